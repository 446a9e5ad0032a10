"""The script as a user starts it: records, files, determinism, and refusals."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import (
    ON_CPU,
    ROOT,
    TEXT,
    TINY,
    Started,
    needs_dev_full,
    needs_posix,
    refused,
    start_script,
    succeeded,
)

from lora import read_adapter, write_adapter

STEP = re.compile(
    r"step (\d+) \| train loss (\S+) \| val loss (\S+) \+- (\S+) \| lr (\S+) \| "
    r"tokens/s (\d+) \| elapsed (\S+) s"
)
SUMMARY = [
    r"Best validation loss: \d+\.\d{4}",
    r"Final validation loss: \d+\.\d{4}",
    r"Training time: \d+\.\d s",
    r"Median step time: \d+\.\d ms",
    r"Tokens per second: \d+",
    r"Peak memory: \d+ MiB",
]


def losses(log: str) -> list[tuple[str, ...]]:
    """(step, train loss, validation loss, standard error) of each evaluation, as printed."""
    return [match.groups()[:4] for match in STEP.finditer(log)]


def final_loss(log: str) -> float:
    return float(re.search(r"Final validation loss: (\S+)", log).group(1))


def test_a_full_run_leaves_a_record_and_a_checkpoint(training, tmp_path):
    process = training()
    log = succeeded(process)
    assert [int(step) for step, *_ in losses(log)] == [0, 3, 6]
    assert losses(log)[0][1] == "-"  # no step was taken yet
    for pattern in SUMMARY:
        assert len(re.findall(f"^{pattern}$", log, re.MULTILINE)) == 1, pattern
    for part in ("Configuration", "N_EMBD: 32 *", "Device: ", "dtype: ", "checksum: sha256:",
                 "Base: none", "Total parameters: ", "Sample (20 tokens"):  # fmt: skip
        assert part in log
    for name in ("full.pt", "full-best.pt"):
        size = (tmp_path / "out" / name).stat().st_size
        assert f"Wrote out/{name}: {size / 2**20:.2f} MiB" in log
    assert process.stderr == ""  # no terminal, no progress bar
    assert "\r" not in log


def test_lora_fine_tunes_the_last_full_run(training, tmp_path):
    full = succeeded(training(MAX_STEPS="30", EVAL_INTERVAL="30"))
    before = (tmp_path / "out" / "full.pt").read_bytes()
    log = succeeded(training(USE_LORA="True", MAX_STEPS="30", EVAL_INTERVAL="30"))
    assert "Base: out/full.pt" in log and "the same data" in log
    assert "Using LoRA for efficient fine-tuning" in log
    assert "LoRA rank: 8, alpha: 16.0, dropout: 0.0" in log
    # It starts where the full run ended, and goes on from there.
    assert float(losses(log)[0][2]) == pytest.approx(final_loss(full), abs=1e-3)
    assert final_loss(log) < final_loss(full)
    assert (tmp_path / "out" / "full.pt").read_bytes() == before
    adapter = torch.load(tmp_path / "out" / "lora.pt", weights_only=True)
    names = set(adapter["tensors"])
    assert {"lm_head.lora_A", "blocks.1.mlp.fc_out.lora_B"} <= names
    assert {"token_embedding_table.weight", "position_embedding_table.weight"} <= names
    assert len(names) == 2 * (6 * 2 + 1) + 2


def test_lora_statistics_are_those_of_the_shapes(training):
    log = succeeded(training(USE_LORA="True", LORA_RANK="4", MAX_STEPS="1"))
    C, V, T, L, r = 32, 256, 32, 2, 4
    adapters = L * (4 * r * 2 * C + 2 * r * 5 * C) + r * (C + V)
    embeddings = (V + T) * C
    frozen = L * (12 * C * C + 4 * C + 5 * C + 4 * C) + 2 * C + V * C
    total = frozen + adapters + embeddings
    share = 100 * (adapters + embeddings) / total
    for line in (
        f"Total parameters: {total:,}",
        f"Trainable (LoRA): {adapters + embeddings:,}",
        f"Frozen (base): {frozen:,}",
        f"LoRA percentage: {share:.2f}%",
        f"adapters {adapters:,}, embeddings {embeddings:,}",
        f"Training only {share:.2f}% of parameters!",
    ):
        assert line in log
    assert "Note: there is no base in out" in log


def test_layers_and_embeddings_can_be_chosen(training, tmp_path):
    succeeded(training(**ON_CPU))
    chosen = {"USE_LORA": "True", "LORA_TARGETS": "value,query", "TRAIN_EMBEDDINGS": "False"}
    chosen |= ON_CPU  # where sums have one order
    log = succeeded(training(**chosen, OUT_DIR="small", BASE_CHECKPOINT="out/full.pt"))
    adapters = 2 * 2 * 8 * (32 + 32)  # layers, blocks, rank, sides
    for line in (
        "LORA_TARGETS: query,value *",
        "LoRA layers: query,value",
        f"Trainable (LoRA): {adapters:,}",
        f"adapters {adapters:,}, embeddings 0",
    ):
        assert line in log
    adapter = torch.load(tmp_path / "small" / "lora.pt", weights_only=True)
    assert len(adapter["tensors"]) == 2 * 2 * 2
    assert adapter["metadata"]["targets"] == ["query", "value"]

    # Trained further it stays what it is, unless more is asked for; less is refused.
    further = {"USE_LORA": "True", "ADAPTERS": "small/lora.pt", "OUT_DIR": "further"}
    further |= ON_CPU | {"BASE_CHECKPOINT": "out/full.pt"}
    log = succeeded(training(**further))
    assert "LoRA layers: query,value" in log and "embeddings 0" in log
    again = succeeded(training(**further | {"RESUME": "True", "MAX_STEPS": "9"}))
    assert "Resuming further/lora-resume.pt at step 6" in again
    more = succeeded(training(**further, LORA_TARGETS="all", TRAIN_EMBEDDINGS="True"))
    assert "LoRA layers" not in more and f"embeddings {(256 + 32) * 32:,}" in more
    assert losses(more)[0] == losses(log)[0]  # what is new changes nothing yet
    assert "blocks.0.attn.value" in refused(training(**further, LORA_TARGETS="query"))
    assert "have 16; unset it" in refused(training(**further, LORA_ALPHA="64"))
    assert "LORA_RANK=9, but ADAPTERS" in refused(training(**further, LORA_RANK="9"))
    further["ADAPTERS"] = "further/lora.pt"  # has them now
    further["OUT_DIR"] = "last"
    assert "TRAIN_EMBEDDINGS=False" in refused(training(**further, TRAIN_EMBEDDINGS="False"))


def test_two_runs_print_the_same_losses(training):
    first, second = succeeded(training()), succeeded(training(OUT_DIR="other"))
    assert len(losses(first)) == 3 and losses(first) == losses(second)
    assert first[first.index("Sample") :] == second[second.index("Sample") :]
    assert losses(succeeded(training(SEED="2"))) != losses(first)


def test_the_matrices_B_learn_faster_by_the_ratio(training, tmp_path):
    """Adam's first step changes whatever has a gradient by the learning rate."""
    succeeded(training())
    one = {"USE_LORA": "1", "MAX_STEPS": "1", "LEARNING_RATE": "1e-3", "GRAD_CLIP": "0"}
    base = torch.load(tmp_path / "out" / "full.pt", weights_only=True)["tensors"]
    for variables, ratio in (({}, 8), ({"LORA_PLUS_RATIO": "2.5"}, 2.5)):
        succeeded(training(**one, **variables))
        tensors = torch.load(tmp_path / "out" / "lora.pt", weights_only=True)["tensors"]
        B = tensors["blocks.0.mlp.fc_in.lora_B"].abs()
        table = "token_embedding_table.weight"
        embedding = (tensors[table] - base[table]).abs()
        assert B.median().item() == pytest.approx(1e-3 * ratio, rel=0.01)
        assert embedding.max().item() == pytest.approx(1e-3, rel=0.01)


@pytest.mark.parametrize("encoding", [{"PYTHONIOENCODING": "ascii"}, {"LC_ALL": "C"}])
def test_the_record_survives_any_encoding(tmp_path, encoding):
    (tmp_path / "caf\u00e9.txt").write_text("\u00e9\u00e8 \u4f60\u597d\r\n\x07" * 400)
    variables = TINY | {"DATA": "caf\u00e9.txt"} | encoding
    assert "Final validation loss" in succeeded(start_script(tmp_path, **variables))


def test_test_mode_never_touches_a_real_checkpoint(training, tmp_path):
    succeeded(training())
    before = (tmp_path / "out" / "full.pt").read_bytes()
    succeeded(training(TEST_MODE="True", SEED="5"))
    assert (tmp_path / "out" / "full.pt").read_bytes() == before
    assert (tmp_path / "out-test" / "full.pt").exists()


def test_a_full_run_can_start_from_a_checkpoint_but_not_replace_it(training, tmp_path):
    log = succeeded(training())
    base = "out/full.pt"
    again = succeeded(training(BASE_CHECKPOINT=base, OUT_DIR="tuned"))
    assert float(losses(again)[0][2]) == pytest.approx(final_loss(log), abs=1e-3)
    assert "BASE_CHECKPOINT" in refused(training(BASE_CHECKPOINT=base))
    assert "BASE_CHECKPOINT" in refused(training(BASE_CHECKPOINT="./out/../out/full-best.pt"))


def test_the_base_decides_the_shape(training, tmp_path):
    succeeded(training())
    budget = {name: TINY[name] for name in TINY if name not in ("N_EMBD", "N_HEAD", "N_LAYER")}
    del budget["BLOCK_SIZE"]
    log = succeeded(start_script(tmp_path, USE_LORA="1", **budget))
    assert "Frozen (base): 33," in log  # the tiny base's, not the default model's
    error = refused(training(USE_LORA="1", N_LAYER="3"))
    assert "N_LAYER=3" in error and "out/full.pt" in error


def test_the_script_works_from_anywhere_without_arguments(training):
    assert "configuration comes from the environment" in refused(training("--rank=8"))
    help_text = succeeded(training("--help"))
    assert "LORA_RANK" in help_text and "USE_LORA=True python training.py" in help_text


BAD_INPUT = {
    "use_lora": ({"USE_LORA": "Ture"}, "USE_LORA='Ture'"),
    "rank 0": ({"LORA_RANK": "0"}, "LORA_RANK=0"),
    "misspelt": ({"LORA_RNAK": "8"}, "LORA_RANK"),
    "no mps here": ({"DEVICE": "mps"}, "DEVICE=mps"),
    "heads": ({"N_HEAD": "3"}, "N_HEAD=3"),
    "no such data": ({"DATA": "nowhere.txt"}, "nowhere.txt"),
    "empty data": ({"DATA": "empty.txt"}, "empty.txt"),
    "short data": ({"DATA": "short.txt"}, "BLOCK_SIZE=32"),
    "no such base": ({"BASE_CHECKPOINT": "none.pt"}, "none.pt"),
    "base is text": ({"BASE_CHECKPOINT": "text.txt"}, "text.txt"),
    "base is truncated": ({"BASE_CHECKPOINT": "half.pt", "OUT_DIR": "b"}, "half.pt"),
    "base is a pipe": ({"BASE_CHECKPOINT": "pipe.pt", "OUT_DIR": "b"}, "no regular file"),
    "base has a line break": ({"BASE_CHECKPOINT": "a\nb", "OUT_DIR": "b"}, r"a\nb"),
    "adapter of more layers": (
        {
            "ADAPTERS": "deep/lora.pt",
            "USE_LORA": "1",
            "N_LAYER": "2",
            "OUT_DIR": "b",
            "BASE_CHECKPOINT": "out/full.pt",
        },
        "blocks.2.",
    ),
    "adapter of too large a weight": ({"ADAPTERS": "a.pt:1e4", "EVAL_ONLY": "1"}, "at most 1000"),
    "too many sequences": ({"BATCH_SIZE": "1152921504606846976"}, "BATCH_SIZE"),
    "base is a folder": ({"BASE_CHECKPOINT": ".", "OUT_DIR": "b"}, "."),
    "base is an adapter": ({"BASE_CHECKPOINT": "out/lora.pt", "OUT_DIR": "b"}, "a LoRA adapter"),
    "output is a file": ({"OUT_DIR": "text.txt"}, "text.txt"),
    "a folder where a file is written": ({"OUT_DIR": "taken"}, "OUT_DIR: taken/full-best.pt is a"),
    "dropout near 1 is legal, the heads are not": (
        {"DROPOUT": "0.999999", "N_HEAD": "5"},
        "N_HEAD=5",
    ),
    "too large": ({"N_EMBD": "2000000000", "DATA": "text.txt"}, "memory"),
    "loss is not a number": ({"LEARNING_RATE": "1e30", "GRAD_CLIP": "0"}, "LEARNING_RATE"),
}


@pytest.fixture(scope="module")
def trained_folder(tmp_path_factory):
    """A folder with a full run, an adapter, and files that cannot be used."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "text.txt").write_text(TEXT)
    (folder / "empty.txt").write_text("")
    (folder / "short.txt").write_text("short")
    (folder / "taken" / "full-best.pt").mkdir(parents=True)
    succeeded(start_script(folder, **TINY))
    succeeded(start_script(folder, **TINY | {"USE_LORA": "1"}))
    deep = {"USE_LORA": "1", "OUT_DIR": "deep", "N_LAYER": "3"}
    succeeded(start_script(folder, **TINY | deep))
    whole = (folder / "out" / "full.pt").read_bytes()
    (folder / "half.pt").write_bytes(whole[: len(whole) // 2])
    return folder


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_gets_one_clear_line(trained_folder, tmp_path, case):
    if case == "no mps here" and torch.backends.mps.is_available():
        pytest.skip("this machine has mps")
    folder = tmp_path / "copy"
    shutil.copytree(trained_folder, folder)
    variables, named = BAD_INPUT[case]
    if "pipe.pt" in variables.values():
        if not hasattr(os, "mkfifo"):
            pytest.skip("needs named pipes")
        os.mkfifo(folder / "pipe.pt")
    assert named in refused(start_script(folder, **TINY | variables))
    if case == "loss is not a number":  # and the good checkpoint is still there
        good = (trained_folder / "out" / "full.pt").read_bytes()
        assert (folder / "out" / "full.pt").read_bytes() == good


@needs_posix
def test_an_interrupt_ends_in_one_line(tmp_path):
    (tmp_path / "text.txt").write_text(TEXT)
    process = Started(tmp_path, ["training.py"], TINY | {"MAX_STEPS": "1000000"})
    process.wait_for("step 6 ")
    process.send_signal(signal.SIGINT)
    stopped = process.wait()
    assert stopped.returncode == 130
    assert stopped.stderr.startswith("error: interrupted") and stopped.stderr.count("\n") == 1
    torch.load(tmp_path / "out" / "full.pt", weights_only=True)


def test_test_mode_takes_seconds(tmp_path):
    """The default model and corpus from start to saved files, in both modes."""
    for mode in ("False", "True"):
        started = time.monotonic()
        log = succeeded(start_script(tmp_path, TEST_MODE="True", USE_LORA=mode))
        assert time.monotonic() - started < 30  # while other tests run too
        assert "name:     python-code" in log
    assert (tmp_path / "out-test" / "lora.pt").exists()


@needs_dev_full
def test_a_record_that_cannot_be_written_ends_in_one_line(tmp_path):
    (tmp_path / "text.txt").write_text(TEXT)
    environment = {"PATH": os.environ["PATH"]} | TINY
    with open("/dev/full", "w") as full:
        process = subprocess.run(
            [sys.executable, str(ROOT / "training.py")],
            cwd=tmp_path, env=environment, stdout=full, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
    assert process.returncode == 2
    assert process.stderr == "error: stdout: No space left on device\n"


@needs_posix
def test_a_run_needs_no_stderr(tmp_path):
    (tmp_path / "text.txt").write_text(TEXT)
    command = f'exec "{sys.executable}" "{ROOT}/training.py" 2>&-'
    environment = {"PATH": os.environ["PATH"]} | TINY
    process = subprocess.run(
        command, shell=True, cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert "Final validation loss" in succeeded(process)


@needs_posix
def test_a_long_run_says_how_long_it_takes(tmp_path):
    """In a log that is redirected, and so has no progress bar."""
    (tmp_path / "text.txt").write_text(TEXT)
    much = {"MAX_STEPS": "1000000", "EVAL_INTERVAL": "1000000"}
    process = Started(tmp_path, ["training.py"], TINY | much)
    process.wait_for("to MAX_STEPS=1000000, by the steps so far")
    process.send_signal(signal.SIGINT)
    assert re.search(r"^Time: about [\d.]+ (h|min) to MAX_STEPS", process.wait().stdout, re.M)


def test_probable_mistakes_are_pointed_out(training):
    log = succeeded(training(LORA_RANK="4", MAX_STEPS="1"))
    assert "Note: LORA_RANK set without USE_LORA=True" in log
    log = succeeded(training(USE_LORA="1", LORA_RANK="64", MAX_STEPS="1"))
    assert "Note: LORA_RANK=64 is larger than the smaller side" in log
    log = succeeded(training(MAX_STEPS="1"))
    assert "Note: out/lora.pt and out/lora-best.pt are adapters" in log


def test_several_ranks_and_alphas_are_shown_as_ranges(training, tmp_path):
    """As PEFT's rank_pattern and alpha_pattern make them; from a file with a comma in its name."""
    succeeded(training())
    variables = {"LORA_TARGETS": "query,value", "LORA_RANK": "4", "TRAIN_EMBEDDINGS": "0"}
    log = succeeded(training(USE_LORA="1", MAX_STEPS="1", **variables))
    assert "   LoRA rank: 4, alpha: 16.0, dropout: 0.0" in log
    adapter = read_adapter(tmp_path / "out" / "lora.pt")
    for name in adapter.alpha:
        if name.endswith("value"):
            adapter.alpha[name] = 3.0
            adapter.tensors[f"{name}.lora_A"] = adapter.tensors[f"{name}.lora_A"][:2].clone()
            adapter.tensors[f"{name}.lora_B"] = adapter.tensors[f"{name}.lora_B"][:, :2].clone()
    write_adapter(tmp_path / "of,two.pt", adapter)
    log = succeeded(training(EVAL_ONLY="1", ADAPTERS="of,two.pt"))
    assert "   LoRA rank: 2 to 4, alpha: 3.0 to 16.0, dropout: 0.0" in log
    assert "Adapter: of,two.pt, weight 1" in log


@pytest.mark.parametrize("mode", ["False", "True"])
def test_computing_activations_again_changes_no_bit(training, tmp_path, mode):
    variables = {"USE_LORA": mode, "GRAD_ACCUM_STEPS": "2"}
    variables["LORA_DROPOUT" if mode == "True" else "DROPOUT"] = "0.1"
    kept = succeeded(training(**variables))
    again = succeeded(training(**variables, GRAD_CHECKPOINT="True", OUT_DIR="again"))
    assert losses(again) == losses(kept)
    name = "lora.pt" if mode == "True" else "full.pt"
    tensors = [torch.load(tmp_path / out / name)["tensors"] for out in ("again", "out")]
    for key, tensor in tensors[0].items():
        assert torch.equal(tensor, tensors[1][key]), key


def test_a_compiled_model_trains_alike(training, tmp_path):
    if shutil.which("g++") is None:
        pytest.skip("torch.compile needs a C++ compiler")
    variables = {"USE_LORA": "True", "N_LAYER": "1"}  # no dropout, whose masks are others
    variables |= {"DTYPE": "float32"}
    plain = succeeded(training(**variables))
    compiled = succeeded(training(**variables, COMPILE="True"))
    assert re.search(r"^Compile time: \d+\.\d s, before the training time$", compiled, re.MULTILINE)
    for a, b in zip(losses(compiled), losses(plain), strict=True):
        assert float(a[2]) == pytest.approx(float(b[2]), abs=2e-4)
    metrics = (tmp_path / "out" / "lora-metrics.jsonl").read_text().splitlines()
    assert json.loads(metrics[-1])["summary"]["compile_time"] > 0
