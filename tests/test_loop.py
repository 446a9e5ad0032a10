"""The loop of training.py against a plain one, and its files and figures against what they mean."""

import itertools
import json
import math
import statistics
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ON_CPU, TEXT, TINY, start_script, succeeded
from torch import Tensor

from data import decode
from data.batches import training_batch, validation_windows, windows_batch
from models.bigram_lm_v2_lora import BigramLanguageModelLoRA
from models.checkpoint import load_base, read_checkpoint, save_checkpoint
from trainer.console import indent
from trainer.log import SAMPLE
from trainer.log_reader import read_logs
from trainer.resuming import read_training_state

SEED, STEPS, BATCH_SIZE, BLOCK_SIZE, ACCUMULATED = 3, 7, 4, 32, 2
RATE, LOWEST, WARMUP, DECAY, CLIP, BETAS = 2e-2, 1e-3, 2, 0.5, 0.2, (0.8, 0.9)
EVALUATED = [0, 2, 4, 6, 7]
VARIABLES = TINY | ON_CPU | {
    "SEED": "3", "MAX_STEPS": "7", "GRAD_ACCUM_STEPS": "2", "DTYPE": "float32", "DROPOUT": "0",
    "LEARNING_RATE": "2e-2", "MIN_LEARNING_RATE": "1e-3", "WEIGHT_DECAY": "0.5",
    "SCHEDULE": "cosine", "GRAD_CLIP": "0.2", "ADAM_BETA1": "0.8", "ADAM_BETA2": "0.9",
    "EVAL_INTERVAL": "2", "BASE_CHECKPOINT": "start.pt",
}  # fmt: skip


def a_model() -> BigramLanguageModelLoRA:
    torch.manual_seed(0)
    return BigramLanguageModelLoRA(256, 32, BLOCK_SIZE, "cpu", 0.0, n_head=2, n_layer=2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on a text that ends in other letters, so that validation gets worse and worse."""
    folder = tmp_path_factory.mktemp("loop")
    (folder / "text.txt").write_text(TEXT[: len(TEXT) * 9 // 10] + TEXT[-len(TEXT) // 10 :].upper())
    save_checkpoint(folder / "start.pt", a_model(), {})
    log = succeeded(start_script(folder, **VARIABLES))
    (folder / "log.txt").write_text(log)
    return folder


def metrics(folder: Path) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The evaluations and the summary."""
    lines = (folder / "out" / "full-metrics.jsonl").read_text().splitlines()
    _, *evaluations, last = map(json.loads, lines)
    return evaluations, last["summary"]


def rate_at(step: int) -> float:
    if step < WARMUP:
        return RATE * (step + 1) / WARMUP
    share = (step - WARMUP) / (STEPS - WARMUP)
    return LOWEST + (RATE - LOWEST) * (1 + math.cos(math.pi * share)) / 2


def plain_loop(text: bytes) -> tuple[dict[str, Tensor], dict[int, tuple[float, ...]]]:
    """The weights after the steps, and at each evaluation the training loss since the one before,
    the validation loss and its standard error, and the norm of the last step's gradient."""
    tokens = torch.tensor(list(text)).numpy()
    split = len(tokens) * 9 // 10
    model = a_model()
    decayed = [p for p in model.parameters() if p.dim() == 2]
    rest = [p for p in model.parameters() if p.dim() == 1]
    groups = [{"params": decayed, "weight_decay": DECAY}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=BETAS)
    offsets = validation_windows(tokens[split:], 2 * BATCH_SIZE, BLOCK_SIZE)
    windows = windows_batch(tokens[split:], offsets, BLOCK_SIZE)
    found, train_losses, norm = {}, [], math.nan
    for step in range(STEPS + 1):
        if step in EVALUATED:
            with torch.no_grad():
                each = [model(x[None], y[None])[1].item() for x, y in zip(*windows, strict=True)]
            train_loss = statistics.mean(train_losses) if train_losses else math.nan
            error = statistics.stdev(each) / math.sqrt(len(each))
            found[step] = (train_loss, statistics.mean(each), error, norm)
            train_losses = []
        if step == STEPS:
            return dict(model.named_parameters()), found
        for group in optimizer.param_groups:
            group["lr"] = rate_at(step)
        optimizer.zero_grad()
        size = ACCUMULATED * BATCH_SIZE  # a step's batches are one, in parts
        loss = model(*training_batch(tokens[:split], size, BLOCK_SIZE, SEED, step))[1]
        loss.backward()
        train_losses.append(loss.item())
        norm = math.sqrt(sum(p.grad.square().sum().item() for p in model.parameters()))
        assert norm > CLIP  # so that the limit is at work
        for p in model.parameters():
            p.grad *= CLIP / norm
        optimizer.step()
    raise AssertionError


def test_the_loop_computes_what_a_plain_one_does(folder):
    weights, expected = plain_loop((folder / "text.txt").read_bytes())
    evaluations, _ = metrics(folder)
    assert [e["step"] for e in evaluations] == EVALUATED == list(expected)
    for e in evaluations:
        train_loss, val_loss, val_error, norm = expected[e["step"]]
        if e["step"] > 0:
            assert e["train_loss"] == pytest.approx(train_loss, abs=1e-4)
            assert e["gradient_norm"] == pytest.approx(norm, rel=1e-3)
        assert e["val_loss"] == pytest.approx(val_loss, abs=1e-4)
        assert e["val_error"] == pytest.approx(val_error, rel=1e-3)
        assert e["learning_rate"] == pytest.approx(rate_at(e["step"]))
    written = read_checkpoint(folder / "out" / "full.pt").tensors
    assert written.keys() == weights.keys()
    for name, tensor in written.items():
        torch.testing.assert_close(tensor, weights[name].detach(), rtol=0, atol=1e-4)


def test_the_best_file_is_of_the_least_validation_loss(folder):
    evaluations, summary = metrics(folder)
    after_steps = evaluations[1:]
    best = min(after_steps, key=lambda e: e["val_loss"])
    assert best["step"] == 2  # not the last, which full.pt is of
    for name, e in (("full-best.pt", best), ("full.pt", after_steps[-1])):
        metadata = read_checkpoint(folder / "out" / name).metadata
        assert (metadata["step"], metadata["val_loss"]) == (e["step"], e["val_loss"])
    assert summary["best_val_loss"] == best["val_loss"]
    assert summary["final_val_loss"] == after_steps[-1]["val_loss"]


def test_times_are_those_of_the_steps(folder):
    """Of an evaluation those since the one before, of the summary those of all."""
    progress = read_training_state(folder / "out" / "full-resume.pt").progress
    times, tokens = progress["step_times"], ACCUMULATED * BATCH_SIZE * BLOCK_SIZE
    assert len(times) == STEPS == progress["step"]
    evaluations, summary = metrics(folder)
    assert summary["median_step_time"] == statistics.median(times)
    assert summary["tokens_per_second"] == pytest.approx(tokens * STEPS / sum(times))
    for before, e in itertools.pairwise(evaluations):
        since = times[before["step"] : e["step"]]
        assert e["tokens_per_second"] == pytest.approx(tokens * len(since) / sum(since))
    assert summary["training_time"] >= progress["elapsed"] >= sum(times)


def test_the_parts_of_the_time_are_those_since_the_evaluation_before(folder):
    times = read_training_state(folder / "out" / "full-resume.pt").progress["step_times"]
    first, *evaluations = metrics(folder)[0]
    assert first["seconds"].keys() == {"evaluation"} and first["gradient_norm"] is None
    saved, found = False, []
    for before, e in itertools.pairwise([first, *evaluations]):
        parts = dict(e["seconds"])
        assert parts.pop("evaluation") > 0 and ("saving" in parts) == saved
        assert parts.pop("saving", 1.0) > 0
        assert parts.keys() == {"data", "forward_backward", "optimizer"}
        of_steps = sum(times[before["step"] : e["step"]])
        assert 0 < sum(parts.values()) < of_steps
        saved = True
        found.append(parts)
    # On a busy machine a part may take any time, but seldom the shortest of its times.
    shortest = {name: min(parts[name] for parts in found) for name in found[0]}
    assert max(shortest, key=shortest.__getitem__) == "forward_backward"
    assert sum(sum(parts.values()) for parts in found) > 0.5 * sum(times)


def test_an_evaluation_counts_tokens_and_memory(folder):
    for e in metrics(folder)[0]:
        assert e["tokens"] == e["step"] * ACCUMULATED * BATCH_SIZE * BLOCK_SIZE
        assert 50 < e["peak_memory"] < 50_000  # MiB, of a process with torch


def test_without_a_limit_the_norm_is_computed_where_it_is_shown(folder):
    variables = VARIABLES | {"MAX_STEPS": "2", "EVAL_INTERVAL": "1"}
    found = []
    for limit in ("1e9", "0"):
        succeeded(start_script(folder, **variables | {"GRAD_CLIP": limit, "OUT_DIR": limit}))
        lines = (folder / limit / "full-metrics.jsonl").read_text().splitlines()
        found.append([json.loads(line)["gradient_norm"] for line in lines[2:4]])
    assert found[0] == found[1] and None not in found[0]


def test_what_a_run_had_seen_is_known_when_it_goes_on(folder):
    variables = VARIABLES | {"OUT_DIR": "longer", "MAX_STEPS": "3"}
    succeeded(start_script(folder, **variables))
    variables |= {"RESUME": "True", "MAX_STEPS": "4", "BATCH_SIZE": "2", "EVAL_BATCHES": "4"}
    succeeded(start_script(folder, **variables))
    last = (folder / "longer" / "full-metrics.jsonl").read_text().splitlines()[-2]
    tokens = ACCUMULATED * BLOCK_SIZE * (3 * BATCH_SIZE + 2)
    assert json.loads(last)["tokens"] == tokens
    (log,) = read_logs(folder / "longer" / "full-metrics.jsonl")
    assert [e.step for e in log.evaluations] == [0, 2, 3, 4]


def test_the_sample_is_the_models_and_comes_again(folder):
    """With SEED, temperature 0.8 and top_k 50, as its line says; and the time adds up."""
    checkpoint = read_checkpoint(folder / "out" / "full.pt")
    model = a_model()
    load_base(model, checkpoint)
    torch.manual_seed(SEED)
    written = model.generate(torch.tensor([[10]]), 20, temperature=0.8, top_k=50)[0, 1:]
    text = "".join(
        c if c.isprintable() or c in "\n\t" else "?" for c in decode(written.tolist(), None)
    )
    expected = "\n".join(indent(text.split("\n"))) + "\n"
    log = (folder / "log.txt").read_text()
    assert log[log.index(SAMPLE) :].partition("\n")[2] == expected

    elapsed = read_training_state(folder / "out" / "full-resume.pt").progress["elapsed"]
    again = succeeded(start_script(folder, **VARIABLES | {"RESUME": "True"}))
    assert again[again.index(SAMPLE) :] == log[log.index(SAMPLE) :]
    assert metrics(folder)[1]["training_time"] > elapsed
