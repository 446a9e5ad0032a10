"""The scripts in benchmarks/ run, and say what they compare."""

import argparse
import contextlib
import copy
import dataclasses
import functools
import importlib.util
import json
import math
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, TEXT, start_script, succeeded
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.insert(0, str(ROOT / "benchmarks"))

import cpu_operations
import curves
import families
import quality
import recipe
import variables
from bigram import bigram_loss
from emulated_bfloat16 import EmulatedBfloat16
from loop_speed import SIZES, PlainGPT, estimated_loss, train_plain
from step_time import Settings, Size, build_model, training_step
from variables import compared, of_round

from benchmarks import packing, report, results
from data import load_corpus
from lora import combine_adapters, lora_layers, switch_adapter, take_adapter
from models.bigram_lm_v2_lora import BigramLanguageModelLoRA
from trainer.settings import Config

SCRIPTS = sorted(
    path.name
    for path in (ROOT / "benchmarks").glob("*.py")
    if "__main__" in path.read_text(encoding="utf-8")
)


def start_benchmark(
    folder: Path, script: str, *arguments: str, **variables: str
) -> subprocess.CompletedProcess:
    """Run a script of benchmarks/, its file of results in the folder `results`."""
    script, arguments = f"benchmarks/{script}", (*arguments, "--results", "results")
    return start_script(folder, *arguments, script=script, **variables)


def rows_in(folder: Path, name: str) -> list[results.Row]:
    """The rows of the one file of results that a benchmark has left."""
    (found,) = (r for r in results.read(folder / "results") if r["benchmark"] == name)
    assert found["machine"] and found["date"] and found["versions"]["torch"] == torch.__version__
    assert found["command"].startswith("python benchmarks/") and "--results" not in found["command"]
    return found["rows"]


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_is_help_and_what_is_unknown_is_an_error(tmp_path, script):
    start = functools.partial(start_script, tmp_path, script=f"benchmarks/{script}")
    output = succeeded(start("--help"))
    assert "show this help message and exit" in output and not list(tmp_path.iterdir())
    unknown = start("--nonsense=1")
    assert (unknown.returncode, unknown.stdout) == (2, "") and "error: " in unknown.stderr
    assert "Traceback" not in unknown.stderr and "DATA=" not in unknown.stderr


def test_bigram_loss_is_that_of_the_smoothed_counts():
    train = np.frombuffer(b"ababac", dtype=np.uint8)
    validation = np.frombuffer(b"aba", dtype=np.uint8)
    # After a: b twice and c once; after b: a twice. Every pair counts one more.
    expected = -(np.log(3 / (3 + 256)) + np.log(3 / (2 + 256))) / 2
    assert np.isclose(bigram_loss(train, validation), expected, rtol=1e-12)


def test_bigram_names_its_corpus(tmp_path):
    (tmp_path / "text.txt").write_text("a rose is a rose is a rose\n" * 20)
    output = succeeded(start_benchmark(tmp_path, "bigram.py", "text.txt"))
    assert "text.txt" in output and "nats per byte" in output
    (row,) = rows_in(tmp_path, "bigram")
    assert row["data"] == "text.txt" and f"bigram loss: {row['loss']:.4f}" in output
    missing = start_benchmark(tmp_path, "bigram.py", "nowhere")
    assert missing.returncode == 2 and "nowhere" in missing.stderr


def test_cpu_operations_prints_both_forms(tmp_path):
    start = functools.partial(start_benchmark, tmp_path, "cpu_operations.py")
    output = succeeded(start("--repeats", "1", "--sections", "operations"))
    for row in ("GELU, exact", "dropout 0.2, ours", "attention, plain"):
        assert output.count(row) == 2  # float32 and bfloat16
    exact, rounded = map(float, re.findall(r"error of LayerNorm's gradient: (\S+)", output))
    assert exact < 1e-5 < rounded
    assert len(rows_in(tmp_path, "cpu_operations")) == 2 * (9 + 1)
    wrong = start("--sections", "nothing")
    assert wrong.returncode == 2 and "kept weights" in wrong.stderr


def test_cpu_operations_compares_the_constants(monkeypatch, capsys):
    monkeypatch.setattr(cpu_operations, "WARMUP", 0)
    monkeypatch.setattr(cpu_operations, "GROUPS", [(8, (8, 4))])
    monkeypatch.setattr(cpu_operations, "HEADS", [(8, (16, 32))])
    monkeypatch.setattr(cpu_operations, "ATTENTIONS", [(2, 1, True)])
    for section in ("parts", "slices", "groups", "kept weights", "loss", "segments"):
        rows = list(cpu_operations.SECTIONS[section](1))
        assert rows and all(row["section"].startswith(section) for row in rows)
    output, number = capsys.readouterr().out, r"\d+\.\d\d"
    assert len(re.findall(rf"\d tokens +1 {number}, 4 {number}, 8 {number}, 16 ", output)) == 4
    assert len(re.findall(rf"4096 tokens +256 {number}, 512 {number}, 1024 ", output)) == 4
    groups = rf"8 to 8/4, \d+ tokens +one product {number}, one by one {number}$"
    assert len(re.findall(groups, output, re.M)) == 3 * 2 * 5  # layers, dtypes, tokens
    assert len(re.findall(rf"\d tokens +kept {number}, made again {number}$", output, re.M)) == 9
    assert len(re.findall(rf"8 to \d+ +plain {number}, {2**23} {number}, ", output)) == 3 * 2
    assert (
        len(re.findall(rf"segments of \d+ +mask {number}, segments {number}$", output, re.M)) == 30
    )


def test_step_time_compares_methods(tmp_path):
    few = ("--sizes", "nano", "--steps", "1", "--dtypes", "float32", "--no-memory")
    output = succeeded(start_benchmark(tmp_path, "step_time.py", *few))
    rows = {row["method"]: row for row in rows_in(tmp_path, "step_time")}
    assert list(rows) == ["full", "floor", "lora", "peft", "loralib", "autograd"]
    # The adapters of every method are of the same size.
    assert len({rows[m]["trained"] for m in list(rows)[2:]}) == 1
    assert rows["full"]["step_to_full"] == 1 and rows["lora"]["step_to_full"] > 0
    assert "| nano, 12x64 | float32 | lora |" in output
    wrong = start_benchmark(tmp_path, "step_time.py", "--sizes", "huge")
    assert wrong.returncode == 2 and "nano" in wrong.stderr


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_step_time_compares_the_methods_on_a_llama_too(dtype):
    size = Size(n_embd=32, n_head=2, n_layer=1, batch=2, block=8, llama=True)
    settings = Settings(4, 0.0, 0.0, 1, torch.device("cpu"))
    trainable, losses = {}, []
    for method in ("full", "floor", "lora", "peft"):
        model = build_model(method, size, dtype, settings)
        trainable[method] = sum(p.numel() for p in model.parameters() if p.requires_grad)
        losses.append(training_step(model, size, dtype, settings.device)().item())
    assert trainable["floor"] < trainable["lora"] == trainable["peft"] < trainable["full"]
    assert losses == pytest.approx([losses[0]] * 4, abs=1e-3)


def test_families_compares_steps_and_memory_with_pefts(tmp_path):
    start = functools.partial(start_benchmark, tmp_path, "families.py")
    few = ("--models", "tiny", "--rounds", "1", "--threads", "1", "--batches", "2x16")
    row = r"^2x16 +(\w+) +(\w+) +(\S+) +(\d+) \(\d+ to \d+\) +(\d+) +\S+% +(\d+) +(\S+) +(\S+)$"
    rows = re.findall(row, succeeded(start(*few, "--dtypes", "bfloat16")), re.M)
    assert [tuple(cells[:3]) for cells in rows] == [
        ("bfloat16", "off", "ours"), ("bfloat16", "off", "peft"),
    ]  # fmt: skip
    (*_, our_peak, ratio, peak_ratio), (*_, their_peak, one, also_one) = rows
    assert float(ratio) > 0 and (one, also_one) == ("1.00", "1.00")
    assert float(peak_ratio) == pytest.approx(int(our_peak) / int(their_peak), abs=0.01)
    methods = ["ours", "full", "floor", "ours-nf4", "peft-nf4", "peft"]
    kept = rows_in(tmp_path, "families")
    assert [row["method"] for row in kept] == ["ours", "peft"] and kept[0]["batch"] == "2x16"
    assert f"{kept[0]['step_ratio']:.2f}" == ratio and f"{kept[0]['peak_mib']:.0f}" == our_peak
    options = ("--no-processes", "--methods", ",".join(methods), "--grad-checkpoint", "off,on")
    rows = re.findall(row, succeeded(start(*few, *options, "--dtypes", "float32")), re.M)
    if importlib.util.find_spec("bitsandbytes") is None:  # which the script says, and goes on
        methods.remove("peft-nf4")
    assert [(cells[1], cells[2]) for cells in rows] == [
        (word, method) for word in ("off", "on") for method in methods
    ]
    for arguments, words in (
        (("--models", "huge"), "SmolLM2-135M"),
        ((*few, "--methods", "theirs"), "unknown: 'theirs'; accepted: ours, peft"),
        ((*few, "--batches", "1x512"), "more than tiny's context, 64"),
        ((*few, "--batches", "1x0"), "'1x0' is not sequences x tokens"),
    ):
        wrong = start(*arguments)
        assert wrong.returncode == 2 and words in wrong.stderr and wrong.stderr.count("\n") == 1


def test_profile_step_shows_the_operations_of_each_method(tmp_path):
    few = ("--models", "tiny", "--dtypes", "float32", "--steps", "1")
    succeeded(start_benchmark(tmp_path, "profile_step.py", *few))
    rows = rows_in(tmp_path, "profile")
    for method in ("full", "floor", "lora"):
        own = [row for row in rows if row["method"] == method]
        assert any("mm" in row["operation"] for row in own)
        assert 0 < sum(row["share_percent"] for row in own) <= 100
        assert all(row["time_ms"] > 0 and row["calls"] > 0 for row in own)


def test_sft_compares_whole_runs_with_trls(tmp_path):
    pytest.importorskip("trl")
    few = ("--models", "tiny", "--batches", "2x16", "--dtypes", "float32", "--steps", "2")
    succeeded(start_benchmark(tmp_path, "sft.py", *few, "--rounds", "1"))
    ours, trl = rows_in(tmp_path, "sft")
    assert (ours["method"], trl["method"], trl["time_ratio"]) == ("ours", "TRL", 1.0)
    assert ours["loss"] == pytest.approx(trl["loss"], abs=0.2)  # near log(288), of other windows
    assert ours["whole_s"] > ours["time_s"] > 0 and ours["peak_ratio"] < 1


def test_families_counts_the_operations_of_a_model():
    """Of tiny, 2 blocks: q and o, k and v, and three matrices of the MLP in each; and a head."""
    setting = families.Setting("tiny", "float32", 1, 8, "cpu", False, False, None, "wall", 1)
    weights = 2 * (2 * 32 * 32 + 2 * 16 * 32 + 3 * 64 * 32) + 288 * 32
    adapters = 2 * 8 * (2 * (32 + 32) + 2 * (16 + 32) + 3 * (64 + 32))
    attention = 2 * 6 * 8 * 32
    counts = {m: families.step_operations(setting, m) for m in ("full", "floor", "ours")}
    assert counts == {
        "full": 8 * (6 * weights + attention),
        "floor": 8 * (4 * weights + attention),
        "ours": 8 * (4 * weights + 6 * adapters + attention),
    }


def test_families_refuses_models_whose_first_losses_differ(tmp_path, monkeypatch):
    setting = families.Setting("tiny", "float32", 1, 8, "cpu", False, False, None, "wall", 1)
    losses = iter([4.5, 4.6, 1.0, 1.0, 1.0, 1.0])
    monkeypatch.setattr(families.Worker, "__init__", lambda *_: None)
    monkeypatch.setattr(families.Worker, "ask", lambda *_: next(losses))
    monkeypatch.setattr(families.Worker, "close", lambda *_: None)
    with pytest.raises(SystemExit, match="first losses differ"):
        families.measured(tmp_path, setting, 1)


@pytest.mark.parametrize("model", families.MODELS)
def test_families_writes_folders_that_transformers_takes_for_the_model(model):
    """The names and shapes of the tensors, without their numbers."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = families.MODELS[model]
    with torch.device("meta"):
        theirs = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config)).state_dict()
    family, sizes = families.family_of(model)
    shapes = {stored.name: stored.shape for stored in family.layout(sizes)}
    if config["tie_word_embeddings"]:
        theirs.pop("lm_head.weight")
    assert shapes == {name: tuple(tensor.shape) for name, tensor in theirs.items()}


def test_serving_prints_its_ratios(tmp_path):
    output = succeeded(start_benchmark(tmp_path, "serving.py", "--quick"))
    ratio = re.search(r"recompute / cache: (\S+)", output).group(1)
    assert float(ratio) > 1
    for row in ("switch to another adapter", "combine two, reduced to rank 8", "merge and unmerge"):
        assert re.search(rf"{row} +\d+\.\d ms", output)
    assert len(rows_in(tmp_path, "serving")) == 1 + 5


def test_loop_speed_compares_the_loops_and_their_losses(tmp_path):
    # A variable that needs a new process: in the launcher's, the processes that the script starts
    # would return what they found to the launcher's __main__.
    start = functools.partial(start_benchmark, tmp_path, "loop_speed.py", OMP_NUM_THREADS="2")
    few = ("--steps", "2", "--dtypes", "float32", "--rounds", "1", "--no-memory")
    output = succeeded(start("--sizes", "nano", *few))
    number = r"\d+\.\d\d"
    ratios = dict(re.findall(rf"^   (.+), float32 .*?({number}) \({number} to", output, re.M))
    assert list(ratios) == ["plain trainer", "ours, full", "ours, LoRA"]
    assert float(ratios["plain trainer"]) == 1 and float(min(ratios.values())) > 0
    assert "torch" in output and "threads" in output and "batch 12 x 64" in output
    assert [row["method"] for row in rows_in(tmp_path, "loop_speed")] == list(ratios)


@pytest.mark.parametrize(("size", "millions"), [("nano", 0.83), ("3.3M", 3.25), ("11M", 10.82)])
def test_the_plain_trainers_model_is_of_its_size(size, millions):
    model = PlainGPT(Config.from_environment(SIZES[size]))
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.005)


def test_the_plain_trainers_loss_falls(tmp_path):
    (tmp_path / "text.txt").write_text(TEXT)
    corpus = load_corpus(str(tmp_path / "text.txt"), tmp_path)
    config = Config(
        n_embd=32, n_head=2, n_layer=1, block_size=16, batch_size=8, max_steps=40, warmup_steps=2,
        eval_interval=20, eval_batches=2, learning_rate=1e-2, dropout=0.2,
    )  # fmt: skip
    torch.manual_seed(0)
    model = PlainGPT(config)
    before = estimated_loss(model, corpus.validation, config)
    steps, until_evaluated, with_files = train_plain(model, corpus, config, tmp_path / "plain.pt")
    assert before == pytest.approx(np.log(256), abs=0.1)
    assert estimated_loss(model, corpus.validation, config) < before - 1.5
    assert len(steps) == 40 and sum(steps) < until_evaluated < with_files
    assert torch.load(tmp_path / "plain.pt")["step"] in (20, 40)


def test_variables_runs_a_set_as_a_user_does(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text(TEXT)
    sizes = "N_EMBD=16 N_LAYER=1 BATCH_SIZE=2 EVAL_BATCHES=1 BLOCK_SIZE=16 DATA=text.txt DEVICE=cpu"
    found = variables.summary_of("training.py", variables.parse(f"{sizes} PROCESSES=2"), 2)
    assert found["device"].startswith("cpu") and found["dtype"] and found["final_val_loss"] > 0
    # Of the loopback, which other tests use at the same time: any number.
    assert found["sent"] > 0 or not variables.bytes_sent()
    assert list(tmp_path.iterdir()) == [tmp_path / "text.txt"]


def test_variables_compares_sets_of_them(tmp_path, monkeypatch, capsys):
    def summary_of(script: str, own: dict[str, str], steps: int) -> dict[str, float | str]:
        assert own["LORA_RANK"] == "4" and script == "training.py"
        slow = own.get("PROCESSES") == "2"
        facts = {"device": "cpu", "dtype": "float32", "sent": 1e6 * steps * slow}
        loss = 2.0 + 0.25 * slow + 0.5 * (own.get("SEED") == "1338")
        times = {"median_step_time": 0.03 if slow else 0.02, "peak_memory": 100.0}
        return facts | times | {"final_val_loss": loss}

    monkeypatch.setattr(variables, "summary_of", summary_of)
    few = ["--common", "LORA_RANK=4", "--rounds", "2", "--steps", "3", "--results", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["variables.py", *few, "", "PROCESSES=2"])
    variables.main()
    first, second = capsys.readouterr().out.splitlines()[-2:]
    assert first.startswith("(none): step 20.0 ms, 1.00 of the first (1.00 to 1.00), peak 100 MiB")
    assert "validation loss 2.5000, +0.2500 from the first's (+0.2500 to +0.2500)" in second
    assert second.startswith("PROCESSES=2: step 30.0 ms, 1.50") and "1.00 MB sent" in second
    (found,) = results.read(tmp_path)
    assert found["rows"][1] == {
        "runs": "3 steps, LORA_RANK=4", "variables": "PROCESSES=2", "dtype": "float32",
        "step_ms": 30.0, "step_ratio": 1.5, "step_ratio_low": 1.5, "step_ratio_high": 1.5,
        "peak_mib": 100.0, "loss": 2.5, "loss_minus_first": 0.25, "loss_minus_first_low": 0.25,
        "loss_minus_first_high": 0.25, "sent_mb": 1.0,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["DTPE=float32"], "DTPE is no variable; training.py --help lists them"),
        (["MAX_STEPS=3"], "MAX_STEPS is not for a set"),
        (["PROCESSES=x"], "PROCESSES='x' is not an integer of at least 1"),
        (["--rounds", "0", ""], "'0' is not an integer of at least 1"),
    ],
)
def test_variables_refuses_what_it_cannot_use(tmp_path, arguments, words):
    process = start_benchmark(tmp_path, "variables.py", *arguments)
    assert process.returncode == 2
    assert words in process.stderr.splitlines()[-1]


def test_variables_gives_each_round_a_seed_and_compares_losses_within_it():
    assert [of_round({"SEED": "7", "A": "b"}, i)["SEED"] for i in range(3)] == ["7", "8", "9"]
    assert of_round({}, 1) == {"SEED": "1338"} and of_round({"SEED": "x"}, 1) == {"SEED": "x"}
    found = compared([(1.5, 1.25), (1.75, 2.0), (2.0, 1.0)])
    assert found == "1.7500, +0.3333 from the first's (-0.2500 to +1.0000)"


def test_emulated_bfloat16_is_float32_rounded_once():
    torch.manual_seed(0)
    a, b, c = (torch.randn(shape).bfloat16() for shape in ((6, 40), (40, 5), (6, 5)))
    exact = torch.addmm(c.float(), a.float(), b.float(), alpha=0.3).bfloat16()
    with EmulatedBfloat16():
        assert torch.equal(a @ b, (a.float() @ b.float()).bfloat16())
        assert torch.equal(torch.addmm(c, a, b, alpha=0.3), exact)
        batch = a.expand(3, 6, 40) @ b
        assert batch.dtype == torch.bfloat16 and torch.equal(batch[2], a @ b)
        out = torch.empty_like(c)
        assert torch.addmm(c, a, b, alpha=0.3, out=out) is out and torch.equal(out, exact)
        assert torch.equal(c.addmm_(a, b, alpha=0.3), exact) and torch.equal(c, exact)
        assert torch.equal(a.float() @ b.float(), a.float() @ b.float())


def test_emulated_bfloat16_trains_as_torchs_own_does():
    """The gradients agree within bfloat16's rounding, and torch is given products of float32."""
    model = BigramLanguageModelLoRA(256, 32, 16, "cpu", 0.1, 2, 1, use_lora=True)
    for layer in lora_layers(model).values():
        torch.nn.init.normal_(layer.lora_B, std=0.02)
    idx = torch.randint(256, (4, 16))
    found, dtypes = [], []

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if re.fullmatch(r"(add)?mm_?|(badd)?bmm_?", func.overloadpacket.__name__):
                dtypes[-1].add(args[-1].dtype)
            return func(*args, **(kwargs or {}))

    for mode in (contextlib.nullcontext(), EmulatedBfloat16()):
        dtypes.append(set())
        torch.manual_seed(0)
        with Recorder(), mode, torch.autocast("cpu", torch.bfloat16):
            model(idx, idx)[1].backward()
        found.append([p.grad.clone() for p in model.parameters() if p.requires_grad])
        model.zero_grad()
    assert torch.bfloat16 in dtypes[0] and dtypes[1] == {torch.float32}
    for native, emulated in zip(*found, strict=True):
        assert (native - emulated).norm() <= 1e-2 * native.norm()


def known_study(loss: Callable[[str, str, float], float]) -> quality.Study:
    """The study, with everything that it plans already run and its losses given by `loss`."""
    study = quality.Study(quality.METHODS, quality.STUDY, Path(), {})
    while missing := quality.plan(study):
        for task in missing:
            found = loss(task.method, task.corpus, task.rate) if task.rate else 3.0
            time = 0.8 if task.method == quality.MAIN else 1.0
            study.results[task] = {"loss": found, "old_loss": 2.0, "step_time": time}
    return study


def test_the_study_finds_each_methods_best_learning_rate():
    best = dict(
        zip(quality.METHODS, (1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2, 6.4e-2, 2.5e-4), strict=False)
    )
    study = known_study(lambda method, _, rate: abs(math.log(rate / best.get(method, 4e-3))))
    for name in study.methods:
        for corpus in study.budget.runs:
            if name in study.methods_on(corpus):
                missing, found = quality.search(study, name, corpus)
                assert missing == [] and found.rate == best.get(name, 4e-3)
                for seed in study.budget.seeds:
                    assert dataclasses.replace(found, seed=seed) in study.results
    # A start far away walks there, and looks nowhere beyond the worse neighbour.
    assert list(quality.losses_by_rate(study, "rank 8", quality.NEW)) == [
        1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2
    ]  # fmt: skip
    in_time = [task for task in study.results if task.method == quality.IN_TIME]
    assert {(t.corpus, t.steps) for t in in_time} == {(quality.NEW, 80), (quality.SMALL, 160)}
    assert {task.rate for task in in_time} == {1e-3} and len(in_time) == 6


def test_a_part_of_an_adapters_change_is_its_weight_in_adapters():
    torch.manual_seed(0)
    model = BigramLanguageModelLoRA(64, 16, 8, "cpu", 0.0, 2, 1, use_lora=True)
    bare = take_adapter(model, "base")
    before = {name: p.detach().clone() for name, p in quality.trained_parameters(model)}
    for _, p in quality.trained_parameters(model):
        p.data.add_(torch.randn_like(p), alpha=0.1)
    idx = torch.randint(64, (4, 8))
    switched = copy.deepcopy(model)
    switch_adapter(switched, combine_adapters([(take_adapter(model, "base"), 0.7)], bare))
    quality.keep_part(model, before, 0.7)
    for one in (model, switched):
        one.eval()
    with torch.no_grad():
        torch.testing.assert_close(model(idx)[0], switched(idx)[0], rtol=1e-5, atol=1e-5)


def test_the_study_runs_goes_on_and_reports(tmp_path):
    quick = ("--quick", "--output", "study")
    alone = {"OMP_NUM_THREADS": "2"}  # in a process of its own, as above
    output = succeeded(start_benchmark(tmp_path, "quality.py", *quick, **alone))
    rows = rows_in(tmp_path, "quality")
    names = ["base", "full", quality.IN_TIME, "rank 16", quality.NF4, "rank 16, query and value"]
    assert [row["method"] for row in rows] == [*names, *names[:5]]
    assert all(row["loss"] > 0 for row in rows) and "none missing" in output
    folder = tmp_path / "study-quick"
    assert (folder / "report.md").read_text() + "\n" == output

    # Killed while it wrote: what is known stays, and what was lost is to be run again.
    whole = quality.read_results(folder, quality.QUICK)
    lines = (folder / "results.jsonl").read_text().splitlines(keepends=True)
    (folder / "results.jsonl").write_text("".join(lines[:-2]) + lines[-2][:40])
    again = quality.read_results(folder, quality.QUICK)
    methods = {name: quality.METHODS[name] for name in quality.QUICK_METHODS}
    lost = quality.plan(quality.Study(methods, quality.QUICK, folder, again))
    assert lost and again == {task: whole[task] for task in list(whole)[:-2]}
    assert set(lost) <= set(list(whole)[-2:])
    with pytest.raises(SystemExit, match="another study"):
        quality.read_results(folder, quality.STUDY)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("head", "--sizes 576x32000 --kinds adapted --tokens 8 --rounds 1"),
        ("memory", "--models tiny --methods lora --dtypes float32 --batches 1x16"),
        ("start", "--rounds 1 --megabytes 1"),
        ("parameters", ""),
        ("recipe", "--questions passes --quick --processes 1"),
    ],
)
def test_a_small_part_of_each_script_leaves_rows(name, options, tmp_path):
    succeeded(start_benchmark(tmp_path, f"{name}.py", *options.split()))
    rows = rows_in(tmp_path, name)
    assert rows and all(any(type(value) is float for value in row.values()) for row in rows)


@pytest.mark.parametrize("kind", packing.KINDS)
def test_packing_takes_steps_of_each_kind_of_data(kind):
    step = packing.make_step(kind, use_lora=True, dtype=torch.float32, batch_size=2, block_size=128)
    step()
    step()


def test_the_recipes_questions_are_of_variables_and_bases_that_there_are():
    for question in recipe.QUESTIONS.values():
        tasks = list(question())
        assert tasks and len({str(task) for task in tasks}) == len(tasks)
        for task in tasks:
            Config.from_environment({name: str(value) for name, value in task.variables.items()})
            assert task.base is None or task.base in recipe.BASES
            assert all(hasattr(recipe.trainer.muon, name) for name in task.constants)


def test_a_curve_has_the_evaluations_of_its_run(training, tmp_path):
    succeeded(training(DEVICE="cpu"))
    lines = list(
        map(json.loads, (tmp_path / "out" / "full-metrics.jsonl").read_text().splitlines())
    )
    points, outcome = curves.rows_of("base", lines, {"DEVICE": "cpu"})
    assert [(point["run"], point["step"]) for point in points] == [("base", n) for n in (0, 3, 6)]
    assert outcome["loss_before"] == points[0]["loss"] > outcome["final_loss"] == points[-1]["loss"]
    assert outcome["variables"] == "DEVICE=cpu" and outcome["trained"] > 0


def test_of_the_same_rows_the_newest_of_a_machine_count():
    old = {"benchmark": "b", "machine": "m, 2 cores", "threads": 2, "device": "cpu"}
    new = old | {"date": "2026-02-01", "rows": [{"method": "lora", "ms": 3.0}]}
    old |= {"date": "2026-01-01"}
    old["rows"] = [{"method": name, "ms": 1.0} for name in ("full", "lora", "lora")]
    other = old | {"threads": 1, "rows": [{"method": "lora", "ms": 9.0}]}
    one, two = report.newest([old, other, new])
    assert one.rows == [{"method": "full", "ms": 1.0}, {"method": "lora", "ms": 3.0}]
    assert one.files == [old, new] and one.place == "m, 2 cores"
    assert two.rows == other["rows"] and two.place == "m, 2 cores, 1 thread"


def test_tables_have_ranges_units_and_columns_by_a_name():
    rows = [
        {"size": size, "method": method, "kind": "x", "step_ms": ms, "step_ms_low": 1.0,
         "step_ms_high": 300.0, "loss": 1.0, "loss_sd": 0.25}
        for size in ("s", "m") for method, ms in (("full", 2.0), ("lora", 0.005))
    ]  # fmt: skip
    assert results.table(rows[:1]).splitlines() == [
        "| size | method | kind | step, ms | loss |",
        "| --- | --- | --- | --- | --- |",
        "| s | full | x | 2.00 (1.00 to 300) | 1.0000 +- 0.2500 |",
    ]
    words, heading, table = report.tables(report.Section("", "", None, "size", ("step_ms",)), rows)
    assert (words, heading) == ("With kind x:", "Step, ms:")
    assert table.splitlines()[0] == "| method | s | m |" and "| lora | 5.0e-03 (" in table
    losses = report.tables(report.Section("", "", "method", None, ("loss",)), rows)
    assert losses[0] == "With method full, kind x:" and "1.0000 +- 0.2500" in losses[1]


def test_a_file_of_results_is_written_again_by_the_same_run(tmp_path):
    args = argparse.Namespace(results=tmp_path / "r", commit="abc")
    for ms in (1.0, 2.0 / 3):
        path = results.write("b", [{"method": "full", "ms": ms}], torch.device("cpu"), args)
    (found,) = results.read(tmp_path / "r")
    assert found["rows"] == [{"method": "full", "ms": 0.666667}] and found["commit"] == "abc"
    assert path.name.startswith("b_") and found["threads"] == torch.get_num_threads()
    command = ["/x/b.py", "--results", "/y", "A=1 B=2", "--commit=z"]
    assert results.command_line(command) == "python benchmarks/b.py 'A=1 B=2'"


@pytest.mark.parametrize(
    ("script", "arguments", "message"),
    [
        ("parameters.py", ["--results", "text.txt"], "'text.txt' cannot be a folder of results"),
        ("curves.py", ["--common", "NUM_THREADS=x"], "NUM_THREADS='x' is not a whole number"),
        ("curves.py", ["--common", "DEVICE=nope"], "DEVICE='nope' is not one of"),
        ("curves.py", ["--common", "A='1"], "is no set of variables, as in 'A=1 B=2'"),
        ("variables.py", ["=1"], "'=1' is no set of variables, as in 'A=1 B=2'"),
        ("variables.py", ["SEED=1 FOO=1"], "FOO is no variable; training.py --help lists them"),
    ],
)
def test_bad_options_end_before_anything_is_measured(script, arguments, message, tmp_path):
    (tmp_path / "text.txt").write_text("x")
    done = start_script(tmp_path, *arguments, script=f"benchmarks/{script}")
    assert done.returncode == 2 and done.stdout == "" and message in done.stderr
