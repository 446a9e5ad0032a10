"""Interrupted runs: resumed to the bit, killed at any moment, stopped politely, on a full disk."""

import errno
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import (
    ROOT,
    TEXT,
    TINY,
    Started,
    environment_of,
    needs_posix,
    refused,
    start_script,
    succeeded,
)
from test_training import losses

from data import DataError
from files import FileError
from files.tensors import write_file
from files.writing import lock_folder
from trainer.console import TrainingError, exit_code_of
from trainer.resuming import read_training_state, restore_training_state, save_training_state

NO_SCALER = torch.amp.GradScaler("cpu", enabled=False)
BASE = {"MAX_STEPS": "4", "EVAL_INTERVAL": "4"}


@pytest.fixture(scope="module")
def base_folder(tmp_path_factory) -> Path:
    """A folder with a text and a full run of four steps."""
    folder = tmp_path_factory.mktemp("base")
    (folder / "text.txt").write_text(TEXT)
    succeeded(start_script(folder, **TINY | BASE))
    (folder / "out" / "full-resume.pt").unlink()
    return folder


def files_of(folder: Path, mode: str) -> dict[str, dict]:
    """What a run left, but for its times."""
    contents = {}
    for name in (f"{mode}.pt", f"{mode}-best.pt", f"{mode}-resume.pt"):
        content = torch.load(folder / name, weights_only=True)
        for key in ("step_times", "elapsed", "seconds"):
            content.get("progress", {}).pop(key, None)
        content.pop("identity", None)
        contents[name] = content
    return contents


def assert_same(a, b) -> None:
    """Equal to the bit, all the way down."""
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    else:
        assert a == b


def killed_after(seconds: float, folder: Path, **variables: str) -> subprocess.CompletedProcess:
    """A run of training.py that gets SIGKILL after so many seconds, if it has not ended before."""
    process = Started(folder, ["training.py"], variables)
    time.sleep(seconds)
    process.send_signal(signal.SIGKILL)
    return process.wait()


@needs_posix
@pytest.mark.parametrize("mode", ["full", "lora"])
def test_a_run_killed_at_twenty_moments_ends_like_one_that_was_not(base_folder, tmp_path, mode):
    folder = tmp_path / "run"
    shutil.copytree(base_folder, folder)
    variables = TINY | {
        "MAX_STEPS": "30", "EVAL_INTERVAL": "1", "EVAL_BATCHES": "1", "DROPOUT": "0.1",
        "SAMPLE_TOKENS": "0", "BASE_CHECKPOINT": "out/full.pt",
    }  # fmt: skip
    if mode == "lora":
        variables |= {"USE_LORA": "True", "LORA_DROPOUT": "0.1"}
    started = time.monotonic()
    succeeded(start_script(folder, OUT_DIR="whole", **variables))
    duration = time.monotonic() - started

    generator = random.Random(mode)
    kills = 0
    while kills < 10:  # of each mode
        after = generator.uniform(0.1, 0.6) * duration
        process = killed_after(after, folder, OUT_DIR="killed", RESUME="True", **variables)
        if process.returncode == 0:  # it ended before the kill: begin again, with kills to come
            assert_same(files_of(folder / "killed", mode), files_of(folder / "whole", mode))
            shutil.rmtree(folder / "killed")
            continue
        assert process.returncode == -signal.SIGKILL, process.stderr
        kills += 1
    for partial in (folder / "killed").glob("*.partial"):
        os.utime(partial, (0, 0))  # as if it had been left long ago
    succeeded(start_script(folder, OUT_DIR="killed", RESUME="True", **variables))
    assert_same(files_of(folder / "killed", mode), files_of(folder / "whole", mode))
    assert not list((folder / "killed").glob("*.partial"))


@needs_posix
@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_a_signal_is_no_error_of_what_it_interrupts(name):
    """Such as a chat template, whose errors of any kind are the data's."""
    number = getattr(signal, name)

    def work() -> None:
        try:
            os.kill(os.getpid(), number)
        except Exception as error:
            raise DataError("the template refuses it") from error

    assert exit_code_of(work) == 128 + number


@needs_posix
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_polite_stop_finishes_the_step_saves_and_says_how_to_go_on(tmp_path, number):
    (tmp_path / "text.txt").write_text(TEXT)
    variables = TINY | {"MAX_STEPS": "300", "EVAL_INTERVAL": "100", "DROPOUT": "0.1"}
    whole = succeeded(start_script(tmp_path, **variables | {"OUT_DIR": "whole"}))
    process = Started(tmp_path, ["training.py"], variables)
    process.wait_for("step 100 ")
    process.send_signal(number)
    stopped = process.wait()
    error = stopped.stderr
    assert stopped.returncode == 128 + number
    assert "saved in out/full-resume.pt" in error and "RESUME=True" in error
    assert error.count("\n") == 1
    resumed = succeeded(start_script(tmp_path, RESUME="True", **variables))
    assert "Resuming out/full-resume.pt at step " in resumed
    # The training losses between evaluations go on over the interruption too.
    assert losses(stopped.stdout) + losses(resumed) == losses(whole)
    assert_same(files_of(tmp_path / "out", "full"), files_of(tmp_path / "whole", "full"))


@needs_posix
def test_ctrl_c_that_ends_the_reader_of_the_log_too_saves_the_run(tmp_path):
    """As Ctrl-C does in `python training.py | tee log`."""
    (tmp_path / "text.txt").write_text(TEXT)
    variables = TINY | {"MAX_STEPS": "1000000", "EVAL_INTERVAL": "1"}
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "training.py")], cwd=tmp_path, env=environment_of(variables),
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    while "step 2 " not in process.stdout.readline():
        pass
    process.send_signal(signal.SIGSTOP)  # so that the signal is there when the pipe breaks
    process.send_signal(signal.SIGINT)
    process.stdout.close()
    process.send_signal(signal.SIGCONT)
    error = process.stderr.read()
    assert process.wait() == 130 and "saved in out/full-resume.pt" in error, error


@needs_posix
def test_a_run_that_is_stopped_before_its_first_step_is_evaluated_has_a_whole_log(tmp_path):
    (tmp_path / "text.txt").write_text(TEXT)
    variables = TINY | {"MAX_STEPS": "400", "EVAL_INTERVAL": "400"}
    process = Started(tmp_path, ["training.py"], variables)
    process.wait_for("step 0 ")
    process.send_signal(signal.SIGINT)
    assert process.wait().returncode == 130
    succeeded(start_script(tmp_path, RESUME="True", **variables))
    lines = (tmp_path / "out" / "full-metrics.jsonl").read_text().splitlines()
    assert [json.loads(line).get("step") for line in lines] == [None, 0, 400, None]


@needs_posix
def test_a_run_that_is_stopped_before_it_evaluates_leaves_an_earlier_ones_files(tmp_path):
    (tmp_path / "text.txt").write_text(TEXT)
    succeeded(start_script(tmp_path, **TINY))
    before = {path: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    long = TINY | {"MAX_STEPS": "1000000", "EVAL_INTERVAL": "1000000"}
    process = Started(tmp_path, ["training.py"], long)
    process.wait_for("step 0 ")
    process.send_signal(signal.SIGINT)
    stopped = process.wait()
    assert stopped.returncode == 130 and "nothing was saved" in stopped.stderr
    assert {path: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before


def test_a_run_goes_on_from_its_own_start_alone(lora_folder, tmp_path):
    """With other ADAPTERS, or with USE_LORA forgotten, it is refused."""
    folder = tmp_path / "run"
    shutil.copytree(lora_folder, folder)
    run = LORA | {"OUT_DIR": "more", "PATIENCE": "0"}
    succeeded(start_script(folder, **run | {"ADAPTERS": "tuned/lora.pt"}))
    shutil.copy(folder / "tuned" / "lora.pt", folder / "same.pt")
    shutil.copy(folder / "more" / "lora.pt", folder / "other.pt")
    again = run | {"RESUME": "True", "MAX_STEPS": "7"}
    for other in ({"ADAPTERS": "other.pt"}, {"ADAPTERS": "same.pt:0.5"}, {}):
        error = refused(start_script(folder, **again | other))
        assert "more/lora-resume.pt is a run on other ADAPTERS: adapter " in error
    assert "Resuming " in succeeded(start_script(folder, **again | {"ADAPTERS": "same.pt"}))
    error = refused(start_script(folder, **again | {"USE_LORA": "False"}))
    assert "more/lora-resume.pt is, of a run with USE_LORA=True" in error


def test_a_finished_run_can_be_resumed_for_longer(base_folder, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(base_folder, folder)
    variables = TINY | {"OUT_DIR": "tuned", "BASE_CHECKPOINT": "out/full.pt"}
    first = succeeded(start_script(folder, **variables))
    again = succeeded(start_script(folder, RESUME="True", **variables))
    assert losses(again) == [] and "Resuming tuned/full-resume.pt at step 6" in again
    assert "Note: it has done MAX_STEPS; a larger MAX_STEPS goes on\n" in again
    for line in ("Best validation loss", "Final validation loss"):
        assert first[first.index(line) :].split("\n")[0] in again
    longer = succeeded(start_script(folder, RESUME="True", **variables | {"MAX_STEPS": "9"}))
    assert "MAX_STEPS 6 -> 9" in longer
    assert [step for step, *_ in losses(longer)] == ["9"]
    assert (
        "tuned/full-resume.pt are of an earlier run, which RESUME=True would go on with"
        in succeeded(start_script(folder, **variables))
    )


def test_what_may_change_between_two_parts_is_said(lora_folder, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(lora_folder, folder)
    changes = {"LORA_PLUS_RATIO": "1", "WEIGHT_DECAY": "0.1", "MAX_STEPS": "9"}
    log = succeeded(start_script(folder, **LORA | {"RESUME": "True"} | changes))
    for change in ("LORA_PLUS_RATIO 8.0 -> 1.0", "WEIGHT_DECAY 0.0 -> 0.1", "MAX_STEPS 6 -> 9"):
        assert change in log


REFUSED = {
    "another seed": ({"SEED": "2"}, "SEED=1337"),
    "another rank": ({"LORA_RANK": "4"}, "LORA_RANK=8"),
    "other layers": ({"LORA_TARGETS": "query"}, "LORA_TARGETS=all"),
    "embeddings that do not train": ({"TRAIN_EMBEDDINGS": "False"}, "TRAIN_EMBEDDINGS=True"),
    "another alpha": ({"LORA_ALPHA": "4"}, "LORA_ALPHA=16.0"),
    "other data": ({"DATA": "other.txt"}, "other DATA"),
    "another base": ({"BASE_CHECKPOINT": "other/full.pt"}, "another base"),
    "fewer steps": ({"MAX_STEPS": "5"}, "MAX_STEPS=5"),
}


@pytest.fixture(scope="module")
def lora_folder(base_folder, tmp_path_factory) -> Path:
    """The base's folder with a LoRA run in `tuned`, another text and another base."""
    folder = tmp_path_factory.mktemp("lora") / "run"
    shutil.copytree(base_folder, folder)
    (folder / "other.txt").write_text(TEXT.upper())
    succeeded(start_script(folder, **TINY | BASE | {"OUT_DIR": "other", "SEED": "5"}))
    succeeded(start_script(folder, **LORA))
    return folder


LORA = TINY | {"USE_LORA": "True", "OUT_DIR": "tuned", "BASE_CHECKPOINT": "out/full.pt"}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_continued_is_refused(lora_folder, case):
    variables, named = REFUSED[case]
    before = (lora_folder / "tuned" / "lora-resume.pt").read_bytes()
    error = refused(start_script(lora_folder, **LORA | {"RESUME": "True"} | variables))
    assert named in error and "tuned/lora-resume.pt" in error
    assert (lora_folder / "tuned" / "lora-resume.pt").read_bytes() == before


RANDOM = {
    "another seed": ({"SEED": "2"}, "SEED=1337, which cannot be continued with SEED=2"),
    "another width": ({"N_EMBD": "16"}, "N_EMBD=32, which cannot be continued with N_EMBD=16"),
    "more layers, other data": (
        {"N_LAYER": "3", "SEED": "2", "DATA": "other.txt"},
        "SEED=1337 N_LAYER=2, which cannot be continued with SEED=2 N_LAYER=3",
    ),
    "LoRA": ({"USE_LORA": "True", "OUT_DIR": "lora", "N_HEAD": "4"}, "N_HEAD=2, which cannot"),
    "another loss": ({"LOSS_ON_PROMPT": "True"}, "LOSS_ON_PROMPT=False, which cannot"),
    "a base instead": ({"BASE_CHECKPOINT": "other/full.pt"}, "another base"),
}


@pytest.mark.parametrize("case", RANDOM)
def test_a_run_from_random_weights_names_what_differs(lora_folder, tmp_path, case):
    folder = tmp_path / "run"
    shutil.copytree(lora_folder, folder)
    own = TINY | {"OUT_DIR": "random"}
    variables, named = RANDOM[case]
    kept = {n: variables[n] for n in ("USE_LORA", "OUT_DIR") if n in variables}
    succeeded(start_script(folder, **own | kept))
    assert named in refused(start_script(folder, **own | {"RESUME": "True"} | variables))


def test_the_speed_after_a_change_of_the_batch_is_that_of_the_new_steps(lora_folder, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(lora_folder, folder)
    changes = {"RESUME": "True", "BATCH_SIZE": "8", "MAX_STEPS": "8", "EVAL_INTERVAL": "8"}
    log = succeeded(start_script(folder, **LORA | changes))
    (evaluated,) = re.findall(r"tokens/s (\d+)", log)
    assert f"Tokens per second: {evaluated}" in log


@pytest.mark.parametrize(
    "wrong", [{"step": -5}, {"step": "6"}, {"step_times": 1}, {"best_loss": None}, {"more": 1}]
)
def test_a_progress_that_is_none_is_refused(lora_folder, tmp_path, wrong):
    folder = tmp_path / "run"
    shutil.copytree(lora_folder, folder)
    path = folder / "tuned" / "lora-resume.pt"
    content = torch.load(path, weights_only=True)
    write_file(path, content | {"progress": content["progress"] | wrong})
    error = refused(start_script(folder, **LORA | {"RESUME": "True"}))
    assert "lora-resume.pt is damaged: it does not say how far" in error


def test_nothing_to_resume_starts_at_the_beginning(base_folder, tmp_path):
    (tmp_path / "text.txt").write_text(TEXT)
    log = succeeded(start_script(tmp_path, RESUME="True", **TINY))
    assert "Nothing to resume in out: starting from step 0" in log
    assert len(losses(log)) == 3


def test_damaged_states_are_refused(lora_folder, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(lora_folder, folder)
    path = folder / "tuned" / "lora-resume.pt"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    assert "lora-resume.pt" in refused(start_script(folder, **LORA | {"RESUME": "True"}))
    shutil.copy(folder / "tuned" / "lora.pt", path)
    assert "a LoRA adapter, not a training state" in refused(
        start_script(folder, **LORA | {"RESUME": "True"})
    )


def test_the_generator_of_a_gpu_goes_on_too(tmp_path, monkeypatch):
    monkeypatch.setattr(
        "trainer.resuming.generators", lambda model: {"cpu": torch, "mps": torch.mps}
    )
    monkeypatch.setattr(torch.mps, "get_rng_state", lambda: torch.tensor([7], dtype=torch.uint8))
    restored = []
    monkeypatch.setattr(torch.mps, "set_rng_state", restored.append)
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    path = tmp_path / "resume.pt"
    save_training_state(path, model, optimizer, NO_SCALER, {}, {})
    expected = torch.rand(3)
    restore_training_state(path, read_training_state(path), model, optimizer, NO_SCALER)
    assert torch.equal(torch.rand(3), expected) and [t.tolist() for t in restored] == [[7]]


@needs_posix
def test_a_full_disk_leaves_the_last_good_files(base_folder, tmp_path):
    """RLIMIT_FSIZE stands for the disk: the adapter still fits in, the state does not."""
    import resource  # which Windows has not

    folder = tmp_path / "run"
    shutil.copytree(base_folder, folder)
    succeeded(start_script(folder, **LORA | {"OUT_DIR": "whole", "MAX_STEPS": "12"}))
    succeeded(start_script(folder, **LORA))
    good = (folder / "tuned" / "lora-resume.pt").read_bytes()
    variables = LORA | {"MAX_STEPS": "12", "RESUME": "True"}
    limit = (folder / "tuned" / "lora.pt").stat().st_size + 20_000
    process = subprocess.run(
        [sys.executable, str(ROOT / "training.py")],
        cwd=folder,
        env={"PATH": os.environ["PATH"]} | variables,
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )
    assert "tuned/lora-resume.pt cannot be written: " in refused(process)
    assert (folder / "tuned" / "lora-resume.pt").read_bytes() == good
    assert not list((folder / "tuned").glob(".*.partial"))
    succeeded(start_script(folder, **variables))


def test_numbers_that_are_not_finite_replace_no_state(tmp_path):
    """As Ctrl-C would, after they came about and before the run has noticed."""
    path = tmp_path / "full-resume.pt"
    path.write_bytes(b"a good one")
    before = path.read_bytes()
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(2)).sum().backward()
    optimizer.step()
    optimizer.state[model.weight]["exp_avg_sq"].fill_(math.inf)
    for bad in (optimizer.state[model.weight]["exp_avg_sq"], model.weight.data):
        bad.fill_(math.inf)
        with pytest.raises(TrainingError, match=r"full-resume\.pt is as it was"):
            save_training_state(path, model, optimizer, NO_SCALER, {}, {})
        bad.fill_(1.0)
    assert path.read_bytes() == before
    save_training_state(path, model, optimizer, NO_SCALER, {}, {})


@needs_posix
def test_what_others_may_be_writing_is_left_and_a_folder_without_locks_is_refused(
    tmp_path, monkeypatch
):
    young, old = tmp_path / ".merged.pt.a.partial", tmp_path / ".full.pt.b.partial"
    young.touch(), old.touch()
    os.utime(old, (0, 0))
    lock_folder(tmp_path).close()
    assert young.exists() and not old.exists()

    def flock(*_: object) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr("fcntl.flock", flock)
    with pytest.raises(FileError, match="cannot be reserved for this run: Function not impl"):
        lock_folder(tmp_path)
    (tmp_path / ".lock").unlink()
    os.mkfifo(tmp_path / ".lock")
    with pytest.raises(FileError, match=r"\.lock is no regular file; remove it"):
        lock_folder(tmp_path)


@needs_posix
def test_two_runs_in_one_folder_are_refused(tmp_path):
    (tmp_path / "text.txt").write_text(TEXT)
    process = Started(tmp_path, ["training.py"], TINY | {"MAX_STEPS": "1000000"})
    process.wait_for("step 0 ")
    assert "out is in use by another run" in refused(start_script(tmp_path, **TINY))
    succeeded(start_script(tmp_path, **TINY | {"OUT_DIR": "other"}))
    process.send_signal(signal.SIGKILL)
    process.wait()
    succeeded(start_script(tmp_path, **TINY))  # a killed run leaves no lock behind
