"""DTYPE=float16: losses are float32's, and the scale of gradients goes on with a resumed run."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from conftest import ON_CPU, TEXT, TINY, refused, start_group, start_script, succeeded
from test_exchange import published
from test_resume import assert_same, files_of
from test_training import losses

from files.tensors import write_file

HALF = TINY | ON_CPU | {"DTYPE": "float16", "LEARNING_RATE": "2e-3", "MIN_LEARNING_RATE": "2e-3"}
MODES = {"full": {}, "lora": {"USE_LORA": "True", "BASE_CHECKPOINT": "base/full.pt"}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a text, and a base that was trained on it."""
    folder = tmp_path_factory.mktemp("float16")
    (folder / "text.txt").write_text(TEXT)
    base = {"OUT_DIR": "base", "OPTIMIZER": "adamw"}
    succeeded(start_script(folder, **TINY | ON_CPU | base))
    return folder


def numbers(log: str) -> list[list[float]]:
    """Step, training and validation loss of the evaluations after a step."""
    return [list(map(float, words[:3])) for words in losses(log)[1:]]


@pytest.mark.parametrize("limit", ["1.0", "0"])
@pytest.mark.parametrize("mode", MODES)
def test_losses_are_those_of_float32(folder, mode, limit):
    """And so is the norm of the gradient, which is not the scaled one."""
    variables = HALF | MODES[mode] | {"DROPOUT": "0", "GRAD_CLIP": limit, "GRAD_ACCUM_STEPS": "2"}
    logs, norms = [], []
    for dtype in ("float32", "float16"):
        logs.append(succeeded(start_script(folder, **variables | {"DTYPE": dtype})))
        lines = (folder / "out" / f"{mode}-metrics.jsonl").read_text().splitlines()
        norms.append([json.loads(line)["gradient_norm"] for line in lines[2:-1]])
    for found, expected in zip(numbers(logs[1]), numbers(logs[0]), strict=True):
        assert found == pytest.approx(expected, abs=5e-3)
    assert norms[1] == pytest.approx(norms[0], rel=0.03)
    assert "dtype: float16, DTYPE=float16" in logs[1]
    assert re.search("^Skipped steps: 0, whose gradients", logs[1], re.MULTILINE)
    assert "Skipped" not in logs[0]


def test_lora_on_a_published_model_follows_float32(tmp_path):
    """Its head is frozen, so that the loss keeps no logits; windows of many tokens, of which each
    is a small part of the mean."""
    published(tmp_path / "base")
    (tmp_path / "text.txt").write_text(TEXT)
    sizes = ("N_EMBD", "N_HEAD", "N_LAYER")
    variables = {name: value for name, value in HALF.items() if name not in sizes}
    variables |= {"BASE_CHECKPOINT": "base", "USE_LORA": "True", "MAX_STEPS": "30"}
    variables |= {"BATCH_SIZE": "32", "EVAL_INTERVAL": "10", "EVAL_BATCHES": "1"}
    expected, found = (
        numbers(succeeded(start_script(tmp_path, **variables | {"DTYPE": dtype})))
        for dtype in ("float32", "float16")
    )
    assert expected[0][2] - expected[-1][2] > 0.1
    for a, b in zip(found, expected, strict=True):
        assert a == pytest.approx(b, abs=0.01)


@pytest.mark.parametrize("mode", MODES)
def test_a_resumed_run_is_the_same_to_the_bit(folder, tmp_path, mode):
    """From a scale that is too large, so that steps are skipped on both sides of the break."""
    variables = HALF | MODES[mode] | {"DROPOUT": "0.1", "EVAL_INTERVAL": "100"}
    variables |= {"MAX_STEPS": "1", "OUT_DIR": f"start-{mode}"}
    succeeded(start_script(folder, **variables))
    path = folder / f"start-{mode}" / f"{mode}-resume.pt"
    content = torch.load(path, weights_only=True)
    assert content["scaler"]["scale"] == 2.0**16 and content["progress"]["skipped"] == 0
    write_file(path, content | {"scaler": content["scaler"] | {"scale": 2.0**40}})
    for name in ("whole", "parts"):
        shutil.copytree(path.parent, folder / f"{name}-{mode}")
    variables |= {"RESUME": "True"}
    logs = [
        succeeded(start_script(folder, **variables | {"OUT_DIR": f"{out}-{mode}", "MAX_STEPS": n}))
        for out, n in (("whole", "40"), ("parts", "6"), ("parts", "40"))
    ]
    states = [files_of(folder / f"{name}-{mode}", mode) for name in ("whole", "parts")]
    for state in states:  # one part evaluated at step 6 too
        del state[f"{mode}-best.pt"]
        for name in ("best_loss", "since_best", "losses"):
            state[f"{mode}-resume.pt"]["progress"].pop(name)
    assert_same(*states)
    state = states[0][f"{mode}-resume.pt"]
    skipped = state["progress"]["skipped"]
    assert 6 < skipped < 39 and state["scaler"]["scale"] == 2.0 ** (40 - skipped)
    assert all(entry == 40 - skipped for name, entry in state["optimizer"].items()
               if name.endswith("step"))  # fmt: skip
    found = [re.search(r"^Skipped steps: (\d+),", log, re.MULTILINE)[1] for log in logs]
    assert found == [str(skipped), "5", str(skipped)]


@pytest.mark.parametrize("scaler", [{}, {"scale": 1.0}, {"scale": "1"}, None, 3])
def test_a_state_without_the_scalers_numbers_is_refused(folder, tmp_path, scaler):
    """But for an empty one, of a run in another dtype, which goes on with the first scale."""
    out = tmp_path / "out"
    variables = HALF | {"OUT_DIR": str(out)}
    succeeded(start_script(folder, **variables | {"DTYPE": "float32"}))
    path = out / "full-resume.pt"
    content = torch.load(path, weights_only=True)
    assert content["scaler"] == {}
    write_file(path, content | {"scaler": scaler})
    process = start_script(folder, **variables | {"RESUME": "True", "MAX_STEPS": "7"})
    if scaler == {}:
        assert "DTYPE float32 -> float16" in succeeded(process)
    else:
        assert "holds no state of the scaler of gradients" in refused(process)


@pytest.mark.parametrize("fsdp", ["False", "True"])
def test_two_processes_train_as_one(folder, fsdp):
    variables = HALF | MODES["lora"] | {"GRAD_ACCUM_STEPS": "2"}
    alone = succeeded(start_script(folder, **variables | {"OUT_DIR": "alone"}))
    first, second = start_group(folder, **variables | {"OUT_DIR": "both", "FSDP": fsdp})
    assert second.returncode == 0, second.stderr
    for found, expected in zip(numbers(succeeded(first)), numbers(alone), strict=True):
        assert found == pytest.approx(expected, abs=5e-3)
