"""The memory that the log announces: what a step holds, its parts, and the advice."""

import dataclasses
import json
import re
from pathlib import Path

import pytest
import torch
from conftest import ON_CPU, TEXT, TINY, start_script, succeeded
from test_exchange import published
from torch import nn

from models import LanguageModel
from models.bigram_lm_v2_lora import BigramLanguageModelLoRA
from models.checkpoint import save_checkpoint
from trainer import estimate as module
from trainer.estimate import (
    _Held,
    estimate,
    free_bytes,
    held_in_step,
    memory_lines,
    shaped_model,
)
from trainer.settings import Config
from trainer.setup import Plan, plan_run

SIZES = {"N_EMBD": "64", "N_HEAD": "2", "N_LAYER": "3", "BLOCK_SIZE": "64", "BATCH_SIZE": "4"}
CASES = [
    {},
    {"USE_LORA": "True"},
    {"USE_LORA": "True", "DTYPE": "bfloat16"},
    {"USE_LORA": "True", "GRAD_CHECKPOINT": "True"},
    {"GRAD_ACCUM_STEPS": "2", "DROPOUT": "0.1"},
    {"USE_LORA": "True", "BASE_CHECKPOINT": "base", "BLOCK_SIZE": "32"},
    {"USE_LORA": "True", "BASE_CHECKPOINT": "base", "BLOCK_SIZE": "32", "DTYPE": "bfloat16"},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("estimate")
    published(folder / "base", dtype=torch.bfloat16)
    (folder / "text.txt").write_text(TEXT)
    return folder


def plan_of(folder: Path, **variables: str) -> Plan:
    sizes = {} if "BASE_CHECKPOINT" in variables else SIZES
    base = {"BASE_CHECKPOINT": str(folder / "base")} if "BASE_CHECKPOINT" in variables else {}
    asked = sizes | ON_CPU | {"DTYPE": "float32", "BATCH_SIZE": "4"} | variables | base
    return plan_run(Config.from_environment(asked | {"OUT_DIR": str(folder / "none")}))


def with_numbers(model: LanguageModel) -> LanguageModel:
    """The model with tensors that have numbers, in the same dtypes."""
    real: dict[int, nn.Parameter] = {}
    for m in model.modules():
        for name, p in m._parameters.items():
            if p is not None:
                new = torch.rand(p.shape).to(p.dtype)
                m._parameters[name] = real.setdefault(id(p), nn.Parameter(new, p.requires_grad))
        for name, b in m._buffers.items():
            m._buffers[name] = torch.zeros(b.shape, dtype=b.dtype)
    return model


@pytest.mark.parametrize("variables", CASES)
def test_a_step_with_fake_tensors_holds_what_a_real_one_holds(folder, variables):
    """Up to what torch computes in place for real and in a new tensor for fakes."""
    plan = plan_of(folder, **variables)
    model = with_numbers(shaped_model(plan, 2))
    shape = (plan.batch_size, plan.config.block_size)
    with _Held() as held:
        if plan.config.grad_accum_steps > 1:
            for p in model.parameters():
                p.grad = torch.zeros_like(p) if p.requires_grad else None
        batch = [torch.zeros(shape, dtype=torch.int64) for _ in range(2)]
        with torch.autocast("cpu", plan.dtype, enabled=plan.dtype != torch.float32):
            loss = model(*batch)[1]
        loss.backward()
    found = held_in_step(plan, shaped_model(plan, 2)).at_most
    real = sum(held.at_most.values())
    assert sum(found.values()) == pytest.approx(real, rel=0.12)


@pytest.mark.parametrize("variables", CASES[:4])
def test_each_further_block_adds_as_much_as_the_second(folder, variables):
    plan = plan_of(folder, **variables, N_LAYER="5")
    found = estimate(plan)
    held = held_in_step(plan, shaped_model(plan, 5)).at_most
    step = found.gradients + found.activations + found.loss
    assert sum(held.values()) == pytest.approx(step, rel=0.02)
    assert 0 <= found.gradients <= found.trained and found.activations > found.gradients
    model = shaped_model(plan, 5)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    matrices = [p for p in model.blocks.parameters() if p.dim() == 2]
    by_muon = sum(p.numel() for p in matrices) if plan.config.optimizer == "muon" else 0
    assert (found.trained, found.optimizer) == (4 * trained, 8 * trained - 4 * by_muon)
    frozen = sum(p.numel() for p in model.parameters() if not p.requires_grad)
    bytes_each = 4 if variables.get("DTYPE") != "bfloat16" else 2  # linears that are never merged
    assert bytes_each * frozen <= found.base <= 4 * frozen


def test_a_base_in_4_bits_takes_4_127_bits_a_number(folder):
    whole = estimate(plan_of(folder, USE_LORA="True", BASE_CHECKPOINT="base"))
    plan = plan_of(folder, USE_LORA="True", BASE_CHECKPOINT="base", BASE_DTYPE="nf4")
    linears = [m for m in shaped_model(plan, plan.sizes.n_layer).blocks.modules()]
    numbers = sum(m.weight.numel() for m in linears if hasattr(m, "in_features"))
    saved = numbers * (2 - 4.127 / 8)
    assert whole.base - estimate(plan).base == pytest.approx(saved, abs=len(linears))


def test_a_base_that_was_read_is_not_counted_twice(folder):
    sizes = {"vocab_size": 256, "n_embd": 768, "block_size": 8, "n_head": 8, "n_layer": 12}
    model = BigramLanguageModelLoRA(**sizes, device="cpu", dropout=0.0)
    save_checkpoint(folder / "large.pt", model, {})
    del model
    run = {"MAX_STEPS": "1", "EVAL_BATCHES": "1", "BATCH_SIZE": "1", "BLOCK_SIZE": "8"}
    run |= {"DATA": "text.txt", "SAMPLE_TOKENS": "0", "DTYPE": "float32"}
    base = {"BASE_CHECKPOINT": "large.pt", "OUT_DIR": "larger", "USE_LORA": "True"}
    new = {"PYTHONUNBUFFERED": "1"}  # a new process, which shares no memory with the tests'
    log = succeeded(start_script(folder, **base, **run, **new))
    (announced,) = re.findall(r"^Memory: about ([\d,]+) MiB", log, re.M)
    (peak,) = re.findall(r"^Peak memory: ([\d,]+) MiB", log, re.M)
    announced, peak = (float(n.replace(",", "")) for n in (announced, peak))
    assert announced == pytest.approx(peak, rel=0.15)


def test_adapters_bring_their_rank(folder):
    run = {"USE_LORA": "True", "BASE_CHECKPOINT": "base", "MAX_STEPS": "1", "DATA": "text.txt"}
    run |= {"BLOCK_SIZE": "8", "EVAL_BATCHES": "1", "SAMPLE_TOKENS": "0", "LORA_RANK": "32"}
    succeeded(start_script(folder, OUT_DIR="rank", **run))
    plans = [
        plan_of(folder, USE_LORA="True", BASE_CHECKPOINT="base", **asked)
        for asked in ({"ADAPTERS": str(folder / "rank" / "lora.pt")}, {"LORA_RANK": "32"})
    ]
    assert estimate(plans[0]).trained == estimate(plans[1]).trained


def test_each_gpu_has_memory_of_its_own(folder, monkeypatch):
    plan = plan_of(folder, USE_LORA="True", BASE_CHECKPOINT="base")
    gpu = dataclasses.replace(plan, device=torch.device("cuda"))
    monkeypatch.setattr(module, "program_bytes", lambda device: 0)
    needed = estimate(plan)
    monkeypatch.setattr(module.processes, "local_world_size", lambda: 4)
    monkeypatch.setattr(module, "estimate", lambda plan: needed)
    monkeypatch.setattr(module, "free_bytes", lambda device: needed.total + 1)
    assert len(memory_lines(gpu)) == 1
    assert memory_lines(plan)[1].startswith("Note: that does not fit")


def test_under_fsdp_a_gpu_has_a_share(folder, monkeypatch):
    plan = plan_of(folder, N_EMBD="64", N_LAYER="8")
    monkeypatch.setattr(module, "held_in_step", lambda plan, model: one_step)
    one_step = held_in_step(plan, shaped_model(plan, 1))
    sharded = dataclasses.replace(
        plan, config=dataclasses.replace(plan.config, fsdp=True), device=torch.device("meta")
    )
    whole = estimate(dataclasses.replace(sharded, config=plan.config))
    monkeypatch.setattr(module.processes, "world_size", lambda: 4)
    found = estimate(sharded)
    for part in ("trained", "optimizer", "gradients"):
        assert getattr(found, part) == -(-getattr(whole, part) // 4)
    two_blocks = sum(p.nbytes for p in shaped_model(plan, 2).parameters())
    assert found.gaps == two_blocks and found.activations == whole.activations


def test_files_in_memory_are_free_in_a_container(monkeypatch):
    files = {
        "memory.max": "1000000", "memory.current": "900000",
        "memory.stat": "anon 100000\nactive_file 300000\ninactive_file 400000\n",
        "meminfo": "MemAvailable: 5000 kB",
    }  # fmt: skip
    monkeypatch.setattr(Path, "read_text", lambda path, *_: files[path.name])
    free_bytes.cache_clear()
    try:
        assert free_bytes(torch.device("cpu")) == 800_000
    finally:
        free_bytes.cache_clear()


def test_what_would_fit_is_said(folder, monkeypatch):
    plan = plan_of(folder, USE_LORA="True", BASE_CHECKPOINT="base", BATCH_SIZE="64")
    assert len(memory_lines(plan)) == 1
    needed = estimate(plan)
    for free, fits in ((needed.total - needed.program - 1, True), (1000.0, False)):
        monkeypatch.setattr(module, "free_bytes", lambda device, free=free: free)
        first, note, *advice = memory_lines(plan)
        assert re.match(r"Memory: about [\d,]+ MiB \(base .*\); [\d,]+ free$", first)
        assert note.startswith("Note: that does not fit")
        assert [line.split(":")[0].strip() for line in advice[:-1]] == [
            "GRAD_CHECKPOINT=True", "BATCH_SIZE=1 GRAD_ACCUM_STEPS=64", "BASE_DTYPE=nf4",
            "BLOCK_SIZE=32",
        ]  # fmt: skip
        assert advice[-1].count("=") == 5 and advice[-1].endswith(" (fits)") == fits


def test_the_script_announces_it_and_estimate_needs_no_weights(folder):
    log = succeeded(start_script(folder, **TINY))
    assert log.index("\nMemory: about ") < log.index("\nData:")
    assert log.count("\nMemory: about ") == 1
    by_heart = succeeded(start_script(folder, **TINY | {"MAX_STEPS": "14", "BATCH_SIZE": "512"}))
    assert "DROPOUT: 0." in by_heart and by_heart.count("\nMemory: about ") == 2  # then with masks
    again = TINY | {"ESTIMATE": "True", "BASE_CHECKPOINT": "out/full.pt"}  # it replaces nothing
    log = succeeded(start_script(folder, **again, COMPILE="True"))
    assert "\nMemory: about " in log and "\nNote: COMPILE=True takes more: " in log
    (folder / "shape").mkdir()
    config = (folder / "base" / "config.json").read_text()
    (folder / "shape" / "config.json").write_text(config)
    asked = {"USE_LORA": "True", "BLOCK_SIZE": "32", "BATCH_SIZE": "4", "OUT_DIR": "elsewhere"}
    found = [
        succeeded(start_script(folder, ESTIMATE="True", BASE_CHECKPOINT=name, **asked))
        for name in ("shape", "base")
    ]
    parts = r"^Memory: about .* MiB \(base (.*), program"
    lines = [re.search(parts, log, re.M)[1] for log in found]
    assert lines[0] == lines[1] and json.loads(config)["dtype"] == "bfloat16"
    assert "Data:" not in found[0] and not (folder / "elsewhere").exists()
