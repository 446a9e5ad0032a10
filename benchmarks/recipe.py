"""What the defaults of training are drawn from: many short runs, a table for each question.

    python benchmarks/recipe.py --device cuda             all of it: minutes on a large GPU
    python benchmarks/recipe.py --questions optimizer     days on two cores; a question at a time
    python benchmarks/recipe.py --quick                   the same in small, to see that it works

The questions, of which trainer/recipe.py and trainer/settings.py hold the answers:

    optimizer   Muon or AdamW, at which rate, from random weights, for models of three widths
    muon        its momentum and its iterations, and the schedule
    batch       many small steps or few large ones, at equal tokens
    dropout     how many passes over a small corpus make it pay
    tuning      Muon or AdamW for every weight of a base that either of them trained
    lora        LoRA's rate by width of the model, rank and tokens of a step
    passes      how many passes over a small corpus fine-tuning takes before it learns it by heart

Each run is training.py's own code, with many runs at once, each in a process and with one thread.
Losses are nats per byte on the validation windows of the run; `old_loss` is that on python-code
after fine-tuning on python-docs.
"""

import argparse
import contextlib
import dataclasses
import functools
import io
import json
import multiprocessing
import os
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from unittest import mock

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import trainer.muon
from benchmarks import results
from benchmarks.measure import at_least_one, device_of, names_of
from data import load_corpus
from trainer.evaluation import evaluate_on
from trainer.recipe import learning_rate
from trainer.settings import Config
from trainer.setup import plan_run, set_up
from training import train

ROOT = Path(__file__).resolve().parents[1]
MODELS = {
    "0.8M": {"N_EMBD": 128, "N_HEAD": 4, "N_LAYER": 4},
    "3.3M": {"N_EMBD": 256, "N_HEAD": 4, "N_LAYER": 4},
    "11M": {"N_EMBD": 384, "N_HEAD": 6, "N_LAYER": 6},
}
DEFAULT = "3.3M"
SEEDS = (1337, 1, 2)
SIZES = {"30 KB": 30_000, "100 KB": 100_000, "1 MB": 1_000_000}
CODE, DOCS = "python-code", "python-docs"
BASES = {  # by name: the model and the variables
    **{name: (name, {"MAX_STEPS": 500}) for name in MODELS},
    "adamw": (DEFAULT, {"MAX_STEPS": 1000, "OPTIMIZER": "adamw", "LEARNING_RATE": 2e-3}),
}


@dataclass(frozen=True)
class Task:
    """A run: the words of its row, its variables, what replaces constants of trainer.muon, and the
    base that it starts from, if any."""

    row: results.Row
    variables: dict[str, object]
    constants: dict[str, object] = field(default_factory=dict)
    base: str | None = None


# ---- the questions


def optimizer() -> Iterator[Task]:
    for model in MODELS:
        for rate in (4e-3, 8e-3, 1.2e-2, 2.4e-2):
            yield from_nothing({"optimizer": "muon"}, model, LEARNING_RATE=rate, MAX_STEPS=350)
    for rate in (1e-3, 2e-3, 4e-3):
        adamw = {"OPTIMIZER": "adamw", "LEARNING_RATE": rate}
        yield from_nothing({"optimizer": "adamw"}, MAX_STEPS=350, **adamw)
    for seed in SEEDS:
        old = {"OPTIMIZER": "adamw", "SCHEDULE": "cosine", "DROPOUT": 0.2, "LEARNING_RATE": 3e-3}
        yield from_nothing({"optimizer": "the old recipe"}, SEED=seed, MAX_STEPS=1000, **old)
        for steps in (300, 500):
            yield from_nothing({"optimizer": "the defaults"}, SEED=seed, MAX_STEPS=steps)


def muon() -> Iterator[Task]:
    for momentum in (0.8, 0.9, 0.95):
        for beta1 in (0.8, 0.9):
            for rate in (8e-3, 1.2e-2):
                words = {"momentum": f"{momentum:g}", "beta1": f"{beta1:g}"}
                yield from_nothing(
                    words, constants={"MOMENTUM": momentum},
                    ADAM_BETA1=beta1, LEARNING_RATE=rate, MAX_STEPS=350,
                )  # fmt: skip
    for n in (3, 4, 5, 6):
        yield from_nothing({"iterations": str(n)}, constants={"ITERATIONS": n}, MAX_STEPS=350)
    for schedule in ("linear", "cosine", "constant"):
        yield from_nothing({"schedule": schedule}, SCHEDULE=schedule, MAX_STEPS=350)


def batch() -> Iterator[Task]:
    for size in (8, 16, 32, 64):
        for rate in (5e-3, 1e-2):
            yield from_nothing(
                {"batch": str(size)},
                BATCH_SIZE=size, LEARNING_RATE=rate, MAX_STEPS=350 * 32 // size,
            )  # fmt: skip


def dropout() -> Iterator[Task]:
    for corpus, size in SIZES.items():
        for passes in (4, 8, 16, 32):
            steps = round(0.9 * size / 4096 * passes)
            for rate in (0.0, 0.1, 0.2) if steps < 1800 else ():
                yield from_nothing(
                    {"corpus": corpus, "passes": str(passes), "dropout": f"{rate:g}"},
                    DATA=f"{CODE} {corpus}", DROPOUT=rate, MAX_STEPS=steps,
                )  # fmt: skip


def tuning() -> Iterator[Task]:
    rates = {"adamw": (5e-4, 1e-3), "muon": (1e-3, 2e-3)}
    for base, trained_by in ((DEFAULT, "muon"), ("adamw", "adamw")):
        for name in rates:
            for rate in rates[name]:
                for seed in SEEDS:
                    yield on_docs(
                        {"base_by": trained_by, "optimizer": name}, base,
                        OPTIMIZER=name, LEARNING_RATE=rate, SEED=seed, MAX_STEPS=300,
                    )  # fmt: skip


def lora() -> Iterator[Task]:
    for model in MODELS:
        for factor in (0.5, 1.0, 2.0):
            for rank in (4, 16, 64):
                yield with_lora({}, model, rank, factor, MAX_STEPS=300)
            for size, steps in ((4, 500), (64, 150)):
                variables = {"BATCH_SIZE": size, "MAX_STEPS": steps}
                yield with_lora({"batch": str(size)}, model, 8, factor, **variables)
    for seed in SEEDS:
        yield with_lora({}, DEFAULT, 16, 1.0, MAX_STEPS=300, SEED=seed)


def passes() -> Iterator[Task]:
    for corpus, size in SIZES.items():
        for n in (1, 2, 3, 4, 6):
            steps = round(0.9 * size / 2048 * n)
            common = {"BATCH_SIZE": 16, "MAX_STEPS": steps, "DATA": f"{DOCS} {corpus}"}
            words = {"corpus": corpus, "passes": str(n)}
            if steps < 1400:
                yield with_lora(words, DEFAULT, 16, 1.0, **common)
                yield on_docs(words | {"method": "full"}, DEFAULT, **common)


QUESTIONS = {f.__name__: f for f in (optimizer, muon, tuning, lora, passes, dropout, batch)}


def from_nothing(
    words: results.Row,
    model: str = DEFAULT,
    constants: dict[str, object] | None = None,
    **variables: object,
) -> Task:
    variables = {"DATA": CODE, "DROPOUT": 0, **MODELS[model], **variables}
    return Task({"model": model, **words}, variables, constants or {})


def on_docs(words: results.Row, base: str, **variables: object) -> Task:
    row = {"model": BASES[base][0], **words}
    return Task(row, {"DATA": DOCS, **variables}, base=base)


def with_lora(
    words: results.Row, model: str, rank: int, factor: float, **variables: object
) -> Task:
    """LoRA on a model of this repository, at the default learning rate times `factor`."""
    width, batch = MODELS[model]["N_EMBD"], variables.get("BATCH_SIZE", 32)
    config = Config(use_lora=True, lora_rank=rank, batch_size=batch)
    rate = factor * learning_rate(config, width, has_base=True)
    words = {"method": f"LoRA, rank {rank}", "of_default_rate": f"{factor:g}", **words}
    lora = {"USE_LORA": True, "LORA_RANK": rank, "LORA_ALPHA": 2 * rank, "LEARNING_RATE": rate}
    return on_docs(words, model, **lora, **variables)


# ---- running them


def run_task(task: Task, folder: Path, device: str) -> results.Row:
    """Train as the task says, in this process; its row with what was found."""
    torch.set_num_threads(1)
    variables = {name: str(value) for name, value in task.variables.items()}
    name, _, part = variables["DATA"].partition(" ")
    if part:
        variables["DATA"] = str(folder / f"{name} {part}.txt")
    if task.base is not None:
        variables["BASE_CHECKPOINT"] = str(folder / task.base / "full.pt")
    with contextlib.ExitStack() as stack:
        for constant, value in task.constants.items():
            stack.enter_context(mock.patch.object(trainer.muon, constant, value))
        out = stack.enter_context(tempfile.TemporaryDirectory())
        stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        common = {"DEVICE": device, "NUM_THREADS": "1", "PROGRESS": "False", "OUT_DIR": out}
        common |= {"EVAL_INTERVAL": variables["MAX_STEPS"]}
        run = set_up(plan_run(Config.from_environment(common | variables)))
        train(run)
        last = json.loads(run.files.metrics.read_text().splitlines()[-1])["summary"]
        row = task.row | {"steps": run.config.max_steps, "seed": run.config.seed}
        row |= {"learning_rate": run.config.learning_rate, "loss": last["final_val_loss"]}
        if task.base is not None:
            row["old_loss"], _ = evaluate_on(run, load_corpus(CODE, ROOT / "data"))
    return row


def write_corpora(folder: Path) -> None:
    """Write the small corpora: the first part of the training text of the large ones."""
    for name in (CODE, DOCS):
        text = load_corpus(name, ROOT / "data").train
        for part, size in SIZES.items():
            (folder / f"{name} {part}.txt").write_bytes(bytes(text[:size]))


def base_tasks(tasks: list[Task], folder: Path) -> list[Task]:
    """The runs that train the bases of the tasks."""
    found = []
    for base in sorted({task.base for task in tasks if task.base is not None}):
        model, variables = BASES[base]
        found.append(from_nothing({"base": base}, model, **variables, OUT_DIR=folder / base))
    return found


def quick(tasks: list[Task]) -> list[Task]:
    """One task of each kind of row, in small."""
    return [in_small(task) for task in {tuple(task.row): task for task in tasks}.values()]


def in_small(task: Task) -> Task:
    small = {"MAX_STEPS": 2, "EVAL_BATCHES": 1, "BATCH_SIZE": 2, "BLOCK_SIZE": 16}
    return dataclasses.replace(task, variables=task.variables | small)


def main() -> None:
    """Run the questions, print a table for each, and write what was found."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--questions", type=names_of(list(QUESTIONS)), default=list(QUESTIONS),
        help=f"some of {','.join(QUESTIONS)} (default: all)",
    )  # fmt: skip
    parser.add_argument("--device", type=device_of, default=torch.device("cpu"), help="cpu, cuda")
    parser.add_argument(
        "--processes", type=at_least_one, default=os.cpu_count(), help="runs at once"
    )
    parser.add_argument("--quick", action="store_true", help="a few tiny runs")
    results.add_results_options(parser)
    args = parser.parse_args()
    context, rows = multiprocessing.get_context("spawn"), []
    with (
        tempfile.TemporaryDirectory() as name,
        ProcessPoolExecutor(args.processes, mp_context=context) as pool,
    ):
        folder = Path(name)
        write_corpora(folder)
        asked = {question: list(QUESTIONS[question]()) for question in args.questions}
        bases = base_tasks([task for tasks in asked.values() for task in tasks], folder)
        if args.quick:
            asked = {question: quick(tasks) for question, tasks in asked.items()}
            bases = [in_small(task) for task in bases]
        start = functools.partial(pool.submit, run_task, folder=folder, device=str(args.device))
        for base in [start(task) for task in bases]:
            base.result()
        started = {question: [start(task) for task in tasks] for question, tasks in asked.items()}
        for question, runs in started.items():
            its_rows = [run.result() for run in runs]
            rows += [{"question": question, **row} for row in its_rows]
            print(f"\n{question}\n{results.table(its_rows)}", flush=True)
            results.write("recipe", rows, args.device, args)


if __name__ == "__main__":
    main()
