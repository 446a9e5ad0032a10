"""Several processes compute what one does, exchange only what trains, and end together."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ON_CPU, ROOT, TEXT, TINY, environment_of, start_group, start_script, succeeded
from test_exchange import published
from test_training import losses

from ops.loss import PLAIN_VOCABULARY

# Dropout off: its masks are each process's own.
STEPS = TINY | {"DROPOUT": "0", "GRAD_ACCUM_STEPS": "2", "DTYPE": "float32"} | ON_CPU
MODES = {"full": {}, "lora": {"USE_LORA": "True", "BASE_CHECKPOINT": "base/full.pt"}}
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a text, and a base that was trained on it."""
    (tmp_path / "text.txt").write_text(TEXT)
    succeeded(start_script(tmp_path, **TINY | {"OUT_DIR": "base"}))
    return tmp_path


def record_of_group(folder: Path, **variables: str) -> str:
    """The log of a run in several processes, of which the first alone prints."""
    first, *others = start_group(folder, **variables)
    for process in others:
        # gloo tells there, in torch 2.8, how many others it met.
        printed = re.sub(r"^\[Gloo\] Rank .*\n", "", succeeded(process), flags=re.MULTILINE)
        assert printed == "" == process.stderr
    assert first.stderr == ""
    return succeeded(first)


def assert_same_losses(found: str, expected: str) -> None:
    """Printed losses agree within 2e-4 nats: sums of gradients are rounded in another order."""
    for a, b in zip(losses(found), losses(expected), strict=True):
        assert a[0] == b[0]
        a, b = ([float("nan" if x == "-" else x) for x in words[1:]] for words in (a, b))
        assert a == pytest.approx(b, abs=2e-4, nan_ok=True)


def tensors(path: Path) -> dict[str, torch.Tensor]:
    return torch.load(path, weights_only=True)["tensors"]


def test_a_preview_is_printed_once(folder):
    assert record_of_group(folder, **STEPS | {"PREVIEW": "1"}).count("Example 1: ") == 1


@pytest.mark.parametrize("fsdp", ["False", "True"])
@pytest.mark.parametrize("mode", MODES)
def test_two_processes_train_as_one(folder, mode, fsdp):
    variables = STEPS | MODES[mode] | {"EVAL_BATCHES": "3"}
    alone = succeeded(start_script(folder, **variables | {"OUT_DIR": "alone"}))
    together = record_of_group(folder, **variables | {"OUT_DIR": "together", "FSDP": fsdp})
    assert_same_losses(together, alone)
    assert losses(alone)[-1] != losses(alone)[0]
    ours, theirs = (tensors(folder / out / f"{mode}.pt") for out in ("together", "alone"))
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=2e-4)
    # And a file is a file: one process evaluates what two have written.
    base = variables.get("BASE_CHECKPOINT", "together/full.pt")
    adapters = {"ADAPTERS": "together/lora.pt"} if mode == "lora" else {}
    evaluated = {"EVAL_ONLY": "True", "BASE_CHECKPOINT": base, "DATA": "text.txt"}
    evaluated |= adapters | ON_CPU
    one = succeeded(start_script(folder, **evaluated))
    two = record_of_group(folder, **evaluated, FSDP=fsdp)
    assert re.search("Validation loss: .*", one)[0] == re.search("Validation loss: .*", two)[0]


@pytest.mark.parametrize(
    "mode",
    [
        {"USE_LORA": "True"},
        {"USE_LORA": "True", "LORA_TARGETS": "q_proj,lm_head", "DATA": "say.jsonl"},
        {"USE_LORA": "False", "DATA": "say.jsonl"},
    ],
)
def test_two_processes_fine_tune_a_llama_as_one(tmp_path, mode):
    """A base in bfloat16 with a vocabulary whose logits are never whole, replicated and sharded,
    with its head frozen, adapted and trained, on text and on records."""
    published(tmp_path / "base", dtype=torch.bfloat16, vocab_size=PLAIN_VOCABULARY + 1)
    (tmp_path / "text.txt").write_text(TEXT)
    records = ({"prompt": "say a", "completion": "a" * n} for n in (3, 19, 8, 20, 11, 5) * 12)
    (tmp_path / "say.jsonl").write_text("\n".join(map(json.dumps, records)))
    sizes = ("N_EMBD", "N_HEAD", "N_LAYER")
    variables = {name: value for name, value in STEPS.items() if name not in sizes}
    variables |= {"BASE_CHECKPOINT": "base", "EVAL_BATCHES": "3"} | mode
    alone = succeeded(start_script(tmp_path, **variables, OUT_DIR="alone"))
    assert losses(alone)[-1] != losses(alone)[0]
    for fsdp in ("False", "True"):
        together = record_of_group(tmp_path, **variables, OUT_DIR=fsdp, FSDP=fsdp)
        assert_same_losses(together, alone)


def test_records_weigh_as_much_in_two_processes_as_in_one(tmp_path):
    """Blocks count different numbers of tokens, so a mean of the processes' means is another."""
    lengths = (3, 50, 8, 20, 61, 5, 33, 12)
    lines = [json.dumps({"prompt": "say a", "completion": "a" * n}) for n in lengths * 8]
    (tmp_path / "say.jsonl").write_text("\n".join(lines))
    variables = STEPS | {"DATA": "say.jsonl", "BLOCK_SIZE": "96", "MAX_STEPS": "3"}
    alone = succeeded(start_script(tmp_path, **variables))
    assert_same_losses(record_of_group(tmp_path, OUT_DIR="two", **variables), alone)


def test_only_what_trains_travels(folder):
    for mode, variables in MODES.items():
        log = record_of_group(folder, **STEPS | variables)
        trained = sum(t.numel() for t in tensors(folder / "out" / f"{mode}.pt").values())
        everything = sum(t.numel() for t in tensors(folder / "base" / "full.pt").values())
        bytes_a_step = 4 * trained  # float32, and once for both of the accumulated batches
        assert (
            f"Gradients exchanged: {bytes_a_step:,} bytes a step by each process; "
            f"full fine-tuning's would be {4 * everything:,}"
        ) in log


@pytest.mark.parametrize("fsdp", ["False", "True"])
def test_two_processes_resume_to_the_bit(folder, fsdp):
    """Each process goes on with its own random state: dropout is on."""
    variables = TINY | MODES["lora"] | {"FSDP": fsdp, "LORA_DROPOUT": "0.1"}
    variables |= {"LEARNING_RATE": "0.01", "MIN_LEARNING_RATE": "0.01"}  # at any MAX_STEPS
    record_of_group(folder, **variables | {"OUT_DIR": "whole", "MAX_STEPS": "9"})
    first = record_of_group(folder, **variables)
    state = torch.load(folder / "out" / "lora-resume.pt", weights_only=True)
    assert state["random"].keys() == {"cpu", "cpu.1"}
    assert not torch.equal(state["random"]["cpu"], state["random"]["cpu.1"])  # nor are the masks
    log = record_of_group(folder, **variables | {"MAX_STEPS": "9", "RESUME": "True"})
    assert "Resuming out/lora-resume.pt at step 6" in log
    exchanged = "Gradients exchanged: .*"  # a step, of those that this part of the run took
    assert re.findall(exchanged, log) == re.findall(exchanged, first)
    assert bool(re.findall(exchanged, first)) == (fsdp == "False")
    expected = tensors(folder / "whole" / "lora.pt")
    for name, tensor in tensors(folder / "out" / "lora.pt").items():
        assert torch.equal(tensor, expected[name]), name


def test_processes_go_on_from_one_state(folder):
    """Each finds one in its own OUT_DIR, of as many steps but of another run."""
    for out, rate in (("one", "0.001"), ("two", "0.003")):
        record_of_group(folder, **TINY | {"OUT_DIR": out, "LEARNING_RATE": rate})
    variables = TINY | {"RESUME": "True", "MAX_STEPS": "9", "OUT_DIR": "one"}
    for process in start_group(folder, others={"OUT_DIR": "two"}, **variables):
        assert process.returncode == 2 and process.stderr.count("\n") == 1
        assert "the processes disagree: the state to go on from is " in process.stderr


def test_bad_groups_are_refused(folder):
    for variables, words in (
        ({"BATCH_SIZE": "3"}, "BATCH_SIZE=3 is not divisible by the 2 processes"),
        ({"LORA_RANK": "0"}, "LORA_RANK=0"),
        ({"MERGE": "1", "ADAPTERS": "a.pt", "BASE_CHECKPOINT": "base/full.pt"}, "MERGE is done by"),
        ({"DEVICE": "mps"}, "DEVICE=mps"),
    ):
        for process in start_group(folder, **TINY | variables):
            assert process.returncode == 2 and process.stderr.startswith("error")
            assert words in process.stderr and process.stderr.count("\n") == 1
    (folder / "other.txt").write_text(TEXT + "and then some more")
    alike = {"DROPOUT": "0.1", "LEARNING_RATE": "1e-3"}  # whose defaults depend on the base
    for others, words in (
        ({"SEED": "2"}, "seed is 1337 in the first and 2 in number 1"),
        ({"DATA": "other.txt"}, "checksum is sha256:"),
        ({"BASE_CHECKPOINT": "base/full.pt"}, "base is "),
    ):
        for process in start_group(folder, others=others, **TINY | alike):
            assert process.returncode == 2 and process.stderr.count("\n") == 1
            assert "the processes disagree: " in process.stderr and words in process.stderr
    alone = start_script(folder, **TINY | {"FSDP": "True"})
    assert alone.returncode == 2 and "nproc_per_node=2" in alone.stderr
    partly = start_script(folder, **TINY | {"RANK": "0", "WORLD_SIZE": "2"})
    assert partly.returncode == 2 and "LOCAL_RANK" in partly.stderr
    other = start_script(folder, **TINY | {"FSDP": "True", "COMPILE": "True"})
    assert other.returncode == 2 and "FSDP and COMPILE exclude each other" in other.stderr


def started_by_torchrun(folder: Path, *options: str, **variables: str) -> subprocess.Popen:
    return subprocess.Popen(
        [*TORCHRUN, *options, str(ROOT / "training.py")],
        cwd=folder,
        env=environment_of(ON_CPU | variables),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for(line: str, process: subprocess.Popen) -> None:
    while line not in (found := process.stdout.readline()):
        assert found, process.stderr.read()


def workers_of(process: subprocess.Popen) -> list[int]:
    """The processes that torchrun started, in the order of their ranks."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return sorted(
        map(int, children),
        key=lambda pid: re.search(rb"\0RANK=(\d)", Path(f"/proc/{pid}/environ").read_bytes())[1],
    )


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_worker_that_dies_ends_the_run_which_goes_on_later(folder):
    variables = TINY | {"MAX_STEPS": "1000000"}
    process = started_by_torchrun(folder, **variables)
    wait_for("step 9 ", process)
    os.kill(workers_of(process)[1], signal.SIGKILL)
    started = time.monotonic()
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1 and time.monotonic() - started < 40
    assert "error (process 0): lost another process; RESUME=True goes on" in errors
    saved = torch.load(folder / "out" / "full-resume.pt", weights_only=True)["progress"]["step"]
    assert saved >= 6  # what step 9 leaves may not be written yet
    variables |= {"RESUME": "True", "MAX_STEPS": str(saved + 3)}
    assert f"Resuming out/full-resume.pt at step {saved}" in record_of_group(folder, **variables)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_an_interrupted_group_saves_and_ends(folder):
    process = started_by_torchrun(folder, **TINY | {"MAX_STEPS": "1000000"})
    wait_for("step 3 ", process)
    for pid in [process.pid, *workers_of(process)]:  # as a terminal does
        os.kill(pid, signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    step = re.search(r"interrupted after step (\d+), saved in out/full-resume.pt", errors)[1]
    progress = torch.load(folder / "out" / "full-resume.pt", weights_only=True)["progress"]
    assert progress["step"] == int(step)
