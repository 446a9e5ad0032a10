"""What LoRA learns and forgets beside full fine-tuning: the study behind the defaults.

    python benchmarks/quality.py            under two hours on 2 cores; the same command goes on
    python benchmarks/quality.py --device cuda
    python benchmarks/quality.py --grid     also every rank with every alpha and dropout
    python benchmarks/quality.py --quick    the same in small, to see that it works

A base is trained on python-code and adapted by every method of METHODS, at equal tokens, to
python-docs and to the first 100 KB of it. Each method looks for its own learning rate among RATES,
with the first seed, until the best one lies between two worse ones; the other seeds are run there.
One more method is full fine-tuning in the time that LoRA takes, by fewer steps.

Each run is training.py's own code in a process of its own with one thread, as many runs at once as
there are cores. What they find is added to results.jsonl in the output folder, which a later start
reads; report.md is made of it.
"""

import argparse
import contextlib
import dataclasses
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import hardware
from benchmarks import results
from benchmarks.measure import device_of, other_variables
from data import load_corpus
from trainer.evaluation import evaluate_on
from trainer.settings import Config
from trainer.setup import plan_run, set_up
from training import train

ROOT = Path(__file__).resolve().parents[1]
RATES = (2.5e-4, 5e-4, 1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2, 6.4e-2)
OLD, NEW, SMALL = "python-code", "python-docs", "100 KB of python-docs"
SMALL_BYTES = 100_000


@dataclass(frozen=True)
class Method:
    """A way to fine-tune: its variables, the learning rate where its search begins, whether it is
    tried on the small corpus too, and the part of the change that is kept after training."""

    variables: dict[str, str]
    rate: float
    small: bool = False
    kept: float = 1.0


def lora(
    rank: int, alpha: int, rate: float = 2e-3, small: bool = False, kept: float = 1.0, **more: str
) -> Method:
    sizes = {"USE_LORA": "True", "LORA_RANK": str(rank), "LORA_ALPHA": str(alpha)}
    return Method(sizes | more, rate, small, kept)


BASE, FULL, MAIN = "base", "full", "rank 16"
NF4 = "rank 16, base in NF4"
IN_TIME = "full, in the time of rank 16"
METHODS = {
    FULL: Method({"DROPOUT": "0"}, 1e-3, small=True),
    MAIN: lora(16, 32, small=True),
    "rank 32": lora(32, 64, small=True),
    "rank 8": lora(8, 16),
    "rank 16, at weight 0.7": lora(16, 32, kept=0.7),
    "full, 0.7 of the change": Method({"DROPOUT": "0"}, 2e-3, kept=0.7),
    "rank 16, query and value": lora(16, 32, LORA_TARGETS="query,value"),
    "rank 16, B as fast as A": lora(16, 32, 4e-3, LORA_PLUS_RATIO="1"),
    "rank 16, LORA_DROPOUT=0.1": lora(16, 32, small=True, LORA_DROPOUT="0.1"),
    NF4: lora(16, 32, small=True, BASE_DTYPE="nf4"),
    "full, OPTIMIZER=muon": Method({"DROPOUT": "0", "OPTIMIZER": "muon"}, 1e-3, small=True),
    "rank 16, embeddings frozen": lora(16, 32, TRAIN_EMBEDDINGS="False"),
    "rank 4": lora(4, 8),
    "rank 16, alpha = rank": lora(16, 16),
    "rank 16, alpha = 4 rank": lora(16, 64),
    "rank 16, SCHEDULE=cosine": lora(16, 32, SCHEDULE="cosine"),
    "rank 16, DROPOUT=0.2": lora(16, 32, DROPOUT="0.2"),
    "full, DROPOUT=0.2": Method({"DROPOUT": "0.2"}, 1e-3),
    "rank 16, WEIGHT_DECAY=0.1": lora(16, 32, WEIGHT_DECAY="0.1"),
}
GRID = {
    f"rank {rank}, alpha = {factor} rank, dropout {dropout}": lora(
        rank, factor * rank, small=True, LORA_DROPOUT=str(dropout)
    )
    for rank in (4, 8, 16, 32)
    for factor in (1, 2, 4)
    for dropout in (0.0, 0.1)
}


@dataclass(frozen=True)
class Budget:
    """How much is run: variables of the base's training, variables of the runs on each corpus,
    seeds, and the learning rates to search."""

    base: dict[str, str]
    runs: dict[str, dict[str, str]]
    seeds: tuple[int, ...]
    rates: tuple[float, ...]
    device: str = "cpu"

    @property
    def place(self) -> dict[str, str]:
        """The variables of where and in what every run computes."""
        return {"DEVICE": self.device, "DTYPE": "float32"}


def run_variables(steps: int, batch: int, eval_batches: int, warmup: int) -> dict[str, str]:
    return {
        "MAX_STEPS": str(steps), "EVAL_INTERVAL": str(steps),
        "WARMUP_STEPS": str(warmup), "BATCH_SIZE": str(batch), "EVAL_BATCHES": str(eval_batches),
    }  # fmt: skip


STUDY = Budget(
    {"MAX_STEPS": "500", "EVAL_INTERVAL": "250"},
    {NEW: run_variables(100, 16, 16, 10), SMALL: run_variables(200, 8, 32, 20)},
    (1, 2, 3),
    RATES,
)
QUICK = Budget(
    run_variables(20, 8, 2, 2) | {"N_EMBD": "32", "N_LAYER": "1", "BLOCK_SIZE": "32"},
    {NEW: run_variables(4, 8, 2, 1), SMALL: run_variables(4, 4, 4, 1)},
    (1, 2),
    RATES[2:4],
)
QUICK_METHODS = (FULL, MAIN, NF4, "rank 16, query and value")


@dataclass(frozen=True)
class Task:
    """One run: a method's name, a corpus, a learning rate, a seed, and how many steps."""

    method: str
    corpus: str
    rate: float
    seed: int
    steps: int


@dataclass(frozen=True)
class Study:
    """What is studied, where, and what is known so far."""

    methods: dict[str, Method]
    budget: Budget
    folder: Path
    results: dict[Task, dict[str, float]]

    def methods_on(self, corpus: str) -> dict[str, Method]:
        return {n: m for n, m in self.methods.items() if m.small or corpus != SMALL}

    def base_loss(self, corpus: str) -> dict[str, float] | None:
        return self.results.get(Task(BASE, corpus, 0.0, 0, 0))

    def tasks_by_rate(self, name: str, corpus: str) -> list[Task]:
        """The runs of the first seed."""
        seed, steps = self.budget.seeds[0], int(self.budget.runs[corpus]["MAX_STEPS"])
        return [Task(name, corpus, rate, seed, steps) for rate in self.budget.rates]

    def same_with_all_seeds(self, task: Task) -> list[Task]:
        return [dataclasses.replace(task, seed=seed) for seed in self.budget.seeds]


# What is to be run


def plan(study: Study) -> list[Task]:
    """The runs that are known to be missing; what they find may ask for more."""
    tasks = [Task(BASE, corpus, 0.0, 0, 0) for corpus in study.budget.runs]
    for name in study.methods:
        for corpus in study.budget.runs:
            if name not in study.methods_on(corpus):
                continue
            tasks += search(study, name, corpus)[0]
            for runs in at_best(study, name, corpus).values():
                tasks += runs
    return [task for task in dict.fromkeys(tasks) if task not in study.results]


def search(study: Study, name: str, corpus: str) -> tuple[list[Task], Task | None]:
    """The runs that the search for a learning rate needs next, or the best one when it is found:
    one whose rate lies between two worse ones, or at an end of the rates."""
    tasks = study.tasks_by_rate(name, corpus)
    known = [i for i, task in enumerate(tasks) if task in study.results]
    if not known:
        start = study.budget.rates.index(study.methods[name].rate)
        return tasks[max(0, start - 1) : start + 2], None
    best = min(known, key=lambda i: study.results[tasks[i]]["loss"])
    beside = [i for i in (best - 1, best + 1) if 0 <= i < len(tasks) and i not in known]
    return [tasks[i] for i in beside], None if beside else tasks[best]


def at_best(study: Study, name: str, corpus: str) -> dict[str, list[Task]]:
    """The runs of all seeds at the method's best learning rate, once that is found, by name: for
    full fine-tuning also those in the time of LoRA."""
    _, best = search(study, name, corpus)
    if best is None:
        return {}
    runs = {name: study.same_with_all_seeds(best)}
    return runs | {IN_TIME: in_the_time_of_lora(study, best)} if name == FULL else runs


def in_the_time_of_lora(study: Study, full: Task) -> list[Task]:
    """Runs like `full` of as many steps as it takes in the time that MAIN takes for as many; none
    until it is known how long both take."""
    _, lora = search(study, MAIN, full.corpus)
    if lora is None:
        return []
    timed = [study.same_with_all_seeds(task) for task in (lora, full)]
    if not all(task in study.results for tasks in timed for task in tasks):
        return []
    ours, theirs = (
        statistics.median(study.results[task]["step_time"] for task in tasks) for tasks in timed
    )
    steps = max(1, round(full.steps * ours / theirs))
    return study.same_with_all_seeds(dataclasses.replace(full, method=IN_TIME, steps=steps))


# Running it


def run_task(task: Task, budget: Budget, folder: Path) -> dict[str, float]:
    """Train as `task` says, in this process, and measure what was learned and forgotten."""
    with tempfile.TemporaryDirectory() as out:
        method = (METHODS | GRID).get(task.method, METHODS[FULL])
        variables = budget.place | budget.runs[task.corpus] | method.variables | {
            "OUT_DIR": out, "BASE_CHECKPOINT": str(folder / "base" / "full.pt"),
            "DATA": data_of(task.corpus, folder), "SEED": str(task.seed),
            "NUM_THREADS": "1", "PROGRESS": "False",
        }  # fmt: skip
        if task.method != BASE:
            variables |= {"LEARNING_RATE": str(task.rate), "MAX_STEPS": str(task.steps)}
        with open(folder / "log.txt", "a") as log, contextlib.redirect_stdout(log):
            run = set_up(plan_run(Config.from_environment(variables)))
            torch.set_num_threads(1)
            if task.method != BASE:
                before = {name: p.detach().clone() for name, p in trained_parameters(run.model)}
                train(run)
                keep_part(run.model, before, method.kept)

        old_loss, _ = evaluate_on(run, load_corpus(OLD, ROOT / "data"))
        if task.method == BASE:
            return {"loss": evaluate_on(run, run.corpus)[0], "old_loss": old_loss}
        summary = json.loads(run.files.metrics.read_text().splitlines()[-1])["summary"]
        return {
            "loss": summary["final_val_loss"]
            if method.kept == 1.0
            else evaluate_on(run, run.corpus)[0],
            "old_loss": old_loss,
            "step_time": summary["median_step_time"],
            "time": summary["training_time"],
            "peak": summary["peak_memory"],
            "file": run.files.last.stat().st_size / 2**20,
            "trainable": run.model.get_parameter_info()["trainable"],
        }


@torch.no_grad()
def keep_part(model: nn.Module, before: dict[str, Tensor], kept: float) -> None:
    """Take what was trained back towards `before`, to this part of the change (Wortsman et al.
    2022).

    Of an adapter that is what its weight in ADAPTERS does: it scales B, which began at zero, and
    the change of the embeddings.
    """
    for name, parameter in trained_parameters(model):
        if not name.endswith("lora_A"):
            parameter.lerp_(before[name], 1.0 - kept)


def trained_parameters(model: nn.Module) -> list[tuple[str, Tensor]]:
    return [(name, p) for name, p in model.named_parameters() if p.requires_grad]


def data_of(corpus: str, folder: Path) -> str:
    return corpus if corpus != SMALL else str(folder / "small.txt")


def prepare(budget: Budget, folder: Path) -> None:
    """Make the small corpus and train the base, or go on with it, with all threads."""
    corpus = load_corpus(NEW, ROOT / "data")
    (folder / "small.txt").write_bytes(bytes(corpus.train[:SMALL_BYTES]))
    variables = (
        budget.place
        | budget.base
        | {"DATA": OLD, "OUT_DIR": str(folder / "base"), "RESUME": "True"}
    )
    with open(folder / "base.txt", "a") as log:
        done = subprocess.run(
            [sys.executable, str(ROOT / "training.py")],
            env=other_variables() | variables | {"SAMPLE_TOKENS": "0"},
            stdout=log,
            check=False,
        )
    if done.returncode != 0:
        sys.exit(done.returncode)  # it has said why


def run_missing(study: Study, processes: int) -> None:
    """Run what is missing, and add what is found to the results and to their file."""
    kind = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
    context = multiprocessing.get_context(kind)
    if kind == "forkserver":  # which imports once what every run needs
        context.set_forkserver_preload(["training", "torch._dynamo"])
    running: dict[Future, Task] = {}
    with ProcessPoolExecutor(processes, mp_context=context, max_tasks_per_child=1) as pool:
        while True:
            missing = [t for t in plan(study) if t not in running.values()]
            for task in missing[: processes - len(running)]:
                running[pool.submit(run_task, task, study.budget, study.folder)] = task
            if not running:
                return
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                task = running.pop(future)
                study.results[task] = result = future.result()
                with open(study.folder / "results.jsonl", "a") as file:
                    line = {"task": dataclasses.asdict(task), "result": result}
                    file.write(json.dumps(line) + "\n")
                (study.folder / "report.md").write_text(report(study))
                print(
                    f"{len(study.results)} runs, at least {len(plan(study))} to come: "
                    f"{task.method}, {task.corpus}, rate {task.rate:g}, seed {task.seed}: "
                    f"{result['loss']:.4f}",
                    file=sys.stderr,
                    flush=True,
                )


def read_results(folder: Path, budget: Budget) -> dict[Task, dict[str, float]]:
    """What earlier starts of the same study found. Exits when the folder has another's."""
    path = folder / "results.jsonl"
    head = {"study": json.loads(json.dumps(dataclasses.asdict(budget)))}
    if not path.exists():
        path.write_text(json.dumps(head) + "\n")
    text = path.read_text()
    if not text.endswith("\n"):  # a kill may cut a line
        path.write_text(text + "\n")
    first, *lines = text.splitlines()
    if json.loads(first) != head:
        sys.exit(f"error: {path} has the results of another study; choose another --output")
    found = [json.loads(line) for line in lines if line.endswith("}}")]
    return {Task(**each["task"]): each["result"] for each in found}


# What it found


def report(study: Study) -> str:
    """A table for each corpus, and the losses by learning rate, in Markdown."""
    budget, missing = study.budget, len(plan(study))
    lines = [
        f"# LoRA beside full fine-tuning: base on {OLD}, {budget.base['MAX_STEPS']} steps",
        "",
        f"{len(study.results)} runs, {f'{missing} or more' if missing else 'none'} missing; "
        f"float32, {hardware.device_name(torch.device(budget.device))}, torch {torch.__version__}, "
        f"{os.cpu_count()} runs at once with one thread each. Losses in nats per byte, the mean "
        "over seeds +- their standard deviation; each method at its best learning rate.",
    ]
    for corpus, variables in budget.runs.items():
        lines += [
            "",
            f"## {corpus}: {variables['MAX_STEPS']} steps of {variables['BATCH_SIZE']}",
            "",
        ]
        lines += [results.table(corpus_rows(study, corpus))]
        lines += ["", "Loss of the first seed by learning rate:", ""]
        lines += rates_table(study, corpus)
    return "\n".join(lines) + "\n"


def found_at_best(study: Study, corpus: str) -> dict[str, dict[Task, dict[str, float]]]:
    """By method, the runs at its best learning rate, of those methods whose search has ended."""
    found = {}
    for name in study.methods_on(corpus):
        for row, tasks in at_best(study, name, corpus).items():
            runs = {task: study.results[task] for task in tasks if task in study.results}
            found |= {row: runs} if runs else {}
    return found


def corpus_rows(study: Study, corpus: str) -> list[results.Row]:
    """The base, and each method at its best learning rate: means over the seeds, the losses with
    their standard deviation, and what a run took."""
    base, found = study.base_loss(corpus), found_at_best(study, corpus)
    text = {"corpus": f"{corpus}, {study.budget.runs[corpus]['MAX_STEPS']} steps"}
    rows = [] if base is None else [text | {"method": "base", "loss": base["loss"]}]
    for name, runs in found.items():
        task = next(iter(runs))

        def column(key: str, minus: float = 0.0, runs: dict = runs) -> list[float]:
            return [result[key] - minus for result in runs.values()]

        differences = [
            result["loss"] - full["loss"]
            for task, result in runs.items()
            for other, full in found.get(FULL, {}).items()
            if task.seed == other.seed
        ]
        row = text | {"method": name, "trained": int(column("trainable")[0])}
        row |= {"learning_rate": task.rate, "seeds": len(runs)}
        row |= spread("loss", column("loss")) | spread("loss_above_full", differences)
        row |= spread("loss_forgotten", column("old_loss", base["old_loss"])) if base else {}
        row |= {"steps": task.steps, "step_ms": statistics.median(column("step_time")) * 1000}
        row |= {"time_s": statistics.mean(column("time"))}
        row |= {"peak_mib": statistics.median(column("peak")), "file_mib": column("file")[0]}
        rows.append(row)
    return rows


def spread(name: str, values: list[float]) -> results.Row:
    """The mean of the values, and with several of them their standard deviation."""
    if not values:
        return {}
    deviation = {f"{name}_sd": statistics.stdev(values)} if len(values) > 1 else {}
    return {name: statistics.mean(values)} | deviation


def rates_table(study: Study, corpus: str) -> list[str]:
    rates = study.budget.rates
    rows = [("method", *(f"{rate:g}" for rate in rates)), ("---",) * (len(rates) + 1)]
    for name in study.methods_on(corpus):
        losses = losses_by_rate(study, name, corpus)
        cells = {rate: f"{loss:.4f}" for rate, loss in losses.items()}
        if losses:
            best = min(losses, key=losses.__getitem__)
            cells[best] = f"**{cells[best]}**"
        rows.append((name, *(cells.get(rate, "") for rate in rates)))
    return [f"| {' | '.join(row)} |" for row in rows]


def losses_by_rate(study: Study, name: str, corpus: str) -> dict[float, float]:
    """The first seed's losses by learning rate, in the order of the rates."""
    tasks = study.tasks_by_rate(name, corpus)
    return {t.rate: study.results[t]["loss"] for t in tasks if t in study.results}


def main() -> int:
    """Run what is missing and write the report; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a tiny study, to see that it works")
    parser.add_argument("--grid", action="store_true", help="every rank, alpha and dropout too")
    parser.add_argument(
        "--output", type=Path, default=Path("quality"), help="its folder (default: quality)"
    )
    parser.add_argument("--device", type=device_of, default=torch.device("cpu"), help="cpu, cuda")
    results.add_results_options(parser)
    args = parser.parse_args()
    methods, budget = METHODS | (GRID if args.grid else {}), STUDY
    folder = args.output.absolute()
    if args.quick:
        methods, budget = {name: METHODS[name] for name in QUICK_METHODS}, QUICK
        folder = folder.with_name(folder.name + "-quick")
    budget = dataclasses.replace(budget, device=str(args.device))
    folder.mkdir(parents=True, exist_ok=True)
    os.environ["PYTHONPATH"] = str(ROOT)  # where the runs' processes find training.py
    study = Study(methods, budget, folder, read_results(folder, budget))
    interrupted = False
    try:
        if plan(study):
            prepare(budget, folder)
            run_missing(study, os.cpu_count() or 1)
    except KeyboardInterrupt:
        interrupted = True
    text = report(study)
    (folder / "report.md").write_text(text)
    print(text)
    torch.set_num_threads(1)  # as the runs had it
    rows = [row for corpus in budget.runs for row in corpus_rows(study, corpus)]
    complete = [row for row in rows if row.get("seeds") in (None, len(budget.seeds))]
    if not interrupted or len(complete) > len(budget.runs):
        results.write("quality", complete, args.device, args)
    if interrupted:
        print("interrupted; the same command goes on", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
