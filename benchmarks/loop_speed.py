"""Tokens per second of this project's training loop, beside that of a plain trainer, on a CPU.

    python benchmarks/loop_speed.py
    python benchmarks/loop_speed.py --sizes nano,3.3M --rounds 9 --no-memory
    python benchmarks/loop_speed.py --to-the-end nano --steps 500   # loss and seconds of each

The plain trainer, below, is what one would write or use otherwise, of nanoGPT's kind: float32, a
GPT of torch's own modules, its attention, dropout and AdamW as torch chooses them on a CPU. As
nanoGPT does, it evaluates as many batches of the training data as of the validation data. Ours is
`training.train`, set up from environment variables as a user's run is. Both train on python-code,
with the same optimizer and schedule; --to-the-end gives ours the defaults of training.py instead.

Each row has a process of its own, for a run of ours changes how its process allocates memory. They
take turns: a round runs a stretch of steps of every row, in an order that rotates, and ratios pair
the stretches of one round. A stretch evaluates before its first step and after its last; its time
counts as if evaluation, and the files that are written after it, had the share that they have in a
whole run.
"""

import argparse
import collections
import contextlib
import functools
import io
import json
import math
import multiprocessing
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import hardware
from benchmarks import results
from benchmarks.measure import (
    add_memory_option,
    at_least_one,
    interleaved,
    names_of,
    number_printed_by,
)
from benchmarks.step_time import DTYPES
from data import TextCorpus, load_corpus
from trainer.console import say
from trainer.optimization import learning_rate
from trainer.settings import Config
from trainer.setup import plan_run, set_up
from training import train

VOCAB_SIZE = 256
DATA = "python-code"

# The variables that make a size. nano is nanoGPT's setting for a CPU, 3.3M our default model.
SHAPES = {
    "nano": {"N_EMBD": "128", "BLOCK_SIZE": "64", "BATCH_SIZE": "12"},
    "3.3M": {},
    "11M": {
        "N_LAYER": "6", "N_HEAD": "6", "N_EMBD": "384", "BLOCK_SIZE": "256", "BATCH_SIZE": "16"
    },
}  # fmt: skip

# What both trainers do with them, so that they compute the same: AdamW, as nanoGPT has it.
ADAMW = {"OPTIMIZER": "adamw", "SCHEDULE": "cosine"}
DEEP = ADAMW | {"DROPOUT": "0.2", "LEARNING_RATE": "3e-3", "MAX_STEPS": "1000"}
DEEP |= {"EVAL_INTERVAL": "100"}
SETTINGS = {
    "nano": ADAMW | {"DROPOUT": "0", "LEARNING_RATE": "1e-3", "WARMUP_STEPS": "100"}
    | {"MAX_STEPS": "2000", "EVAL_INTERVAL": "250"},
    "3.3M": DEEP,
    "11M": DEEP,
}  # fmt: skip
SIZES = {name: shape | SETTINGS[name] for name, shape in SHAPES.items()}
STRETCH = {"nano": 125, "3.3M": 20, "11M": 10}  # steps

NAMES = {"plain": "plain trainer", "full": "ours, full", "lora": "ours, LoRA"}
Row = tuple[str, str]  # a key of NAMES and one of DTYPES
PLAIN, FULL = ("plain", "float32"), ("full", "float32")

FEW_STEPS = {"MAX_STEPS": "3", "EVAL_INTERVAL": "3", "EVAL_BATCHES": "1"}


# The plain trainer


class PlainAttention(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.n_head = config.n_head
        self.qkv = nn.Linear(config.n_embd, 3 * config.n_embd, bias=False)
        self.proj = nn.Linear(config.n_embd, config.n_embd, bias=False)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        B, T, C = x.shape
        heads = (B, T, self.n_head, C // self.n_head)
        q, k, v = (t.view(heads).transpose(1, 2) for t in self.qkv(x).split(C, dim=2))
        dropout_p = self.dropout.p if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout_p, is_causal=True)
        return self.dropout(self.proj(y.transpose(1, 2).reshape(B, T, C)))


class PlainBlock(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, bias=False)
        self.attention = PlainAttention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd, bias=False)
        self.mlp = nn.Sequential(
            nn.Linear(config.n_embd, 4 * config.n_embd, bias=False),
            nn.GELU(),
            nn.Linear(4 * config.n_embd, config.n_embd, bias=False),
            nn.Dropout(config.dropout),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class PlainGPT(nn.Module):
    """GPT-2 without biases, over bytes."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCAB_SIZE, config.n_embd)
        self.positions = nn.Embedding(config.block_size, config.n_embd)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(PlainBlock(config) for _ in range(config.n_layer))
        self.ln = nn.LayerNorm(config.n_embd, bias=False)
        self.head = nn.Linear(config.n_embd, VOCAB_SIZE, bias=False)
        self.head.weight = self.tokens.weight
        for name, weight in self.named_parameters():
            if weight.dim() == 2:
                residual = name.endswith(("attention.proj.weight", "mlp.2.weight"))
                nn.init.normal_(weight, std=0.02 / math.sqrt(2 * config.n_layer if residual else 1))

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (B, T, vocabulary) of x (B, T), and the mean loss of y (B, T)."""
        positions = torch.arange(x.shape[1], device=x.device)
        h = self.dropout(self.tokens(x) + self.positions(positions))
        for block in self.blocks:
            h = block(h)
        logits = self.head(self.ln(h))
        return logits, F.cross_entropy(logits.view(-1, VOCAB_SIZE), y.view(-1))


def random_batch(tokens: np.ndarray, config: Config) -> tuple[Tensor, Tensor]:
    """x and y (B, T) from anywhere in the text."""
    T = config.block_size
    starts = torch.randint(len(tokens) - T, (config.batch_size,)).tolist()
    x = torch.stack([torch.from_numpy(tokens[i : i + T].astype(np.int64)) for i in starts])
    y = torch.stack([torch.from_numpy(tokens[i + 1 : i + 1 + T].astype(np.int64)) for i in starts])
    return x, y


@torch.no_grad()
def estimated_loss(model: nn.Module, tokens: np.ndarray, config: Config) -> float:
    """The mean loss of EVAL_BATCHES random batches."""
    model.eval()
    losses = [model(*random_batch(tokens, config))[1].item() for _ in range(config.eval_batches)]
    model.train()
    return statistics.mean(losses)


def train_plain(
    model: nn.Module, corpus: TextCorpus, config: Config, path: Path
) -> tuple[list[float], float, float]:
    """Seconds of each step; of the loop until its last evaluation has ended; of all of it, with the
    checkpoint that it then writes."""
    parameters = list(model.parameters())
    matrices = [p for p in parameters if p.dim() >= 2]
    vectors = [p for p in parameters if p.dim() < 2]
    optimizer = torch.optim.AdamW(
        [
            {"params": matrices, "weight_decay": config.weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ],
        lr=config.learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
    )
    step_seconds, best = [], math.inf
    started = time.perf_counter()
    for step in range(config.max_steps + 1):
        if step % config.eval_interval == 0 or step == config.max_steps:
            estimated_loss(model, corpus.train, config)
            val_loss = estimated_loss(model, corpus.validation, config)
            evaluated = time.perf_counter() - started
            if step > 0 and val_loss < best:
                best = val_loss
                state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
                torch.save(state | {"step": step, "val_loss": val_loss}, path)
        if step == config.max_steps:
            break
        step_started = time.perf_counter()
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(config, step)
        _, loss = model(*random_batch(corpus.train, config))
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, config.grad_clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        loss.item()
        step_seconds.append(time.perf_counter() - step_started)
    return step_seconds, evaluated, time.perf_counter() - started


# The measurement


@dataclass(frozen=True)
class Record:
    """What a run of either trainer found; times are in seconds."""

    trained: int  # parameters
    val_loss: float  # after the last step, on the windows that our evaluation takes
    median_step: float
    steps: float  # of all of them
    until_evaluated: float  # of the loop up to the end of its last evaluation
    with_files: float  # and with the files written after that

    def seconds(self, evaluation: float, files: float) -> float:
        """Those of the loop, with these shares of its evaluations and of writing its last files."""
        return (
            self.steps
            + evaluation * (self.until_evaluated - self.steps)
            + files * (self.with_files - self.until_evaluated)
        )


def run_once(row: Row, settings: dict[str, str], scratch: Path) -> Record:
    """Run the trainer of `row` with these variables, its files in `scratch`, its output nowhere."""
    kind, dtype = row
    folder = scratch / f"{kind}-{dtype}"
    variables = settings | {"DATA": DATA, "DEVICE": "cpu", "DTYPE": dtype, "PROGRESS": "False"}
    if kind == "plain":
        return run_plain(Config.from_environment(variables), folder)
    variables["OUT_DIR"] = str(folder)
    if kind == "lora":
        variables |= {
            "USE_LORA": "True",
            "BASE_CHECKPOINT": str(scratch / "full-float32" / "full.pt"),
        }
    with contextlib.redirect_stdout(io.StringIO()):
        run = set_up(plan_run(Config.from_environment(variables)))
        train(run)
    lines = run.files.metrics.read_text(encoding="utf-8").splitlines()
    evaluation, summary = json.loads(lines[-2]), json.loads(lines[-1])["summary"]
    return Record(
        int(run.model.get_parameter_info()["trainable"]),
        summary["final_val_loss"],
        summary["median_step_time"],
        run.config.max_steps * run.config.tokens_per_step / summary["tokens_per_second"],
        evaluation["elapsed"],
        summary["training_time"],
    )


def run_plain(config: Config, folder: Path) -> Record:
    folder.mkdir(exist_ok=True)
    torch.manual_seed(config.seed)
    corpus = load_corpus(config.data, Path())
    model = PlainGPT(config)
    trained = sum(p.numel() for p in model.parameters())
    steps, *loop = train_plain(model, corpus, config, folder / "plain.pt")
    val_loss = windows_loss(model, corpus, config)
    return Record(trained, val_loss, statistics.median(steps), sum(steps), *loop)


@torch.no_grad()
def windows_loss(model: PlainGPT, corpus: TextCorpus, config: Config) -> float:
    """The mean loss of the windows that our evaluation takes."""
    model.eval()
    windows = corpus.validation_windows(config.eval_batches * config.batch_size, config.block_size)
    batches = [
        corpus.validation_batch(offsets, config.block_size)
        for offsets in np.split(windows, config.eval_batches)
    ]
    return statistics.mean(model(*batch)[1].item() for batch in batches)


class Counter(TorchDispatchMode):
    """Counts torch's operations by name: what autograd, modules and optimizers are made of."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: collections.Counter[str] = collections.Counter()

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        self.counts[str(function).split(".")[1]] += 1
        return function(*args, **(kwargs or {}))


def operations_of(row: Row, settings: dict[str, str], scratch: Path) -> collections.Counter[str]:
    """The operations that one step takes, by name: those that a run of 3 has above one of 2."""
    found = []
    for steps in ("2", "3"):
        few = FEW_STEPS | {"MAX_STEPS": steps, "EVAL_INTERVAL": steps}
        with Counter() as counter:
            run_once(row, settings | few, scratch)
        found.append(counter.counts)
    return found[1] - found[0]


def peak_mib(size: str, row: Row, scratch: Path) -> float:
    """The peak MiB of a process of its own that takes three steps."""
    command = [__file__, "--memory-of", size, *row, str(scratch)]
    return number_printed_by(command, f"the memory of {' '.join(row)}")


@contextlib.contextmanager
def processes_of(rows: list[Row]) -> Iterator[dict[Row, ProcessPoolExecutor]]:
    """A process for each row."""
    methods = multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("forkserver" if "forkserver" in methods else "spawn")
    # Optimizers import the second one; forked from one that has them, processes start at once.
    context.set_forkserver_preload(["torch", "torch._dynamo"])
    with contextlib.ExitStack() as stack:
        yield {row: stack.enter_context(ProcessPoolExecutor(1, mp_context=context)) for row in rows}


def measure(size: str, dtypes: list[str], args: argparse.Namespace) -> list[results.Row]:
    """Run the rounds of one size, print its table, and return its rows."""
    config = Config.from_environment(SIZES[size])
    steps = args.steps or STRETCH[size]
    share = steps / config.eval_interval  # of a whole run's evaluations and files
    batches = max(1, round(config.eval_batches * share / 2))
    evaluation = config.eval_batches * share / (2 * batches)
    stretch = {"MAX_STEPS": steps, "EVAL_INTERVAL": steps, "EVAL_BATCHES": batches}
    settings = SIZES[size] | {name: str(value) for name, value in stretch.items()}
    rows = [PLAIN, *((kind, dtype) for dtype in dtypes for kind in ("full", "lora"))]
    records: dict[Row, list[Record]] = {row: [] for row in rows}
    with tempfile.TemporaryDirectory() as folder, processes_of(rows) as processes:
        scratch = Path(folder)
        processes[rows[1]].submit(run_once, FULL, settings | FEW_STEPS, scratch).result()
        memory = {row: peak_mib(size, row, scratch) for row in rows} if args.memory else {}
        operations = {
            row: processes[row].submit(operations_of, row, settings, scratch).result()
            for row in rows
        }

        def take_turn(row: Row) -> None:
            records[row].append(processes[row].submit(run_once, row, settings, scratch).result())

        turns = {row: functools.partial(take_turn, row) for row in rows}
        interleaved(turns, args.rounds, warmup=1)
    say(
        describe(size, config),
        f"   {args.rounds} stretches of {steps} steps, {batches} batches evaluated at both ends, "
        f"whose time counts {evaluation:.2f}",
        f"   {'':22} {'trained':>10} {'tokens/s':>9}  {'plain = 1':19} {'by the steps alone':19} "
        f"{'step, ms':>8}  peak, MiB  operations",
    )
    tokens = steps * config.tokens_per_step
    measured = {row: found[1:] for row, found in records.items()}  # the first is warm-up
    loops = {row: [r.seconds(evaluation, share) for r in found] for row, found in measured.items()}
    steps_alone = {row: [r.median_step for r in found] for row, found in measured.items()}
    kept = []
    for row in rows:
        speed = statistics.median(tokens / seconds for seconds in loops[row])
        peak = f"{memory[row]:.0f}" if row in memory else ""
        say(
            f"   {label(row):22} {measured[row][0].trained:10,} {speed:9.0f}  "
            f"{ratios(loops, row):19} {ratios(steps_alone, row):19} "
            f"{1000 * statistics.median(steps_alone[row]):8.1f}  {peak:>9}  "
            f"{operations[row].total():10}"
        )
        kept.append(
            {"size": describe(size, config), "method": NAMES[row[0]], "dtype": row[1]}
            | {"tokens_per_second": speed}
            | results.ranged("speed_to_plain", speeds(loops, row))
            | results.ranged("steps_alone_to_plain", speeds(steps_alone, row))
            | {"step_ms": 1000 * statistics.median(steps_alone[row]), "peak_mib": memory.get(row)}
            | {"operations": operations[row].total()}
        )
    say("   operations of a step by name:")
    for row in rows:
        most = ", ".join(f"{name} {n}" for name, n in operations[row].most_common(12))
        say(f"   {label(row):22} {most}")
    return kept


def speeds(seconds: dict[Row, list[float]], row: Row) -> list[float]:
    """How many times as fast as the plain trainer `row` was in each round."""
    return [plain / own for plain, own in zip(seconds[PLAIN], seconds[row], strict=True)]


def ratios(seconds: dict[Row, list[float]], row: Row) -> str:
    """The median of the rounds' speeds, and their range."""
    found = speeds(seconds, row)
    return f"{statistics.median(found):.2f} ({min(found):.2f} to {max(found):.2f})"


def compare_to_the_end(size: str, args: argparse.Namespace) -> list[results.Row]:
    """Run the plain trainer over its schedule, and ours with the defaults of training.py in
    `args.steps` steps; print and return their losses and seconds."""
    settings = {PLAIN: SIZES[size]}
    config = Config.from_environment(SIZES[size])
    steps = args.steps or config.max_steps // 4
    settings[FULL] = SHAPES[size] | {"MAX_STEPS": str(steps)}
    with tempfile.TemporaryDirectory() as folder, processes_of(list(settings)) as processes:
        records = {
            row: processes[row].submit(run_once, row, variables, Path(folder)).result()
            for row, variables in settings.items()
        }
    say(
        describe(size, config),
        f"   final loss on the same {config.eval_batches * config.batch_size} windows",
        f"   {'':22} {'steps':>6} {'trained':>10} {'val loss':>9}  seconds  plain = 1",
    )
    kept = []
    for row, record in records.items():
        n = config.max_steps if row == PLAIN else steps
        ratio = record.with_files / records[PLAIN].with_files
        say(
            f"   {label(row):22} {n:6,} {record.trained:10,} {record.val_loss:9.4f}  "
            f"{record.with_files:7.1f}  {ratio:9.2f}"
        )
        kept.append(
            {"size": describe(size, config), "method": NAMES[row[0]], "dtype": row[1]}
            | {"steps": f"{n:,}", "trained": record.trained, "loss": record.val_loss}
            | {"time_s": record.with_files, "time_to_plain": ratio}
        )
    return kept


def label(row: Row) -> str:
    return f"{NAMES[row[0]]}, {row[1]}"


def describe(size: str, config: Config) -> str:
    return (
        f"{size}: {config.n_layer} layers, {config.n_head} heads, width {config.n_embd}, "
        f"batch {config.batch_size} x {config.block_size}, dropout {config.dropout:g}"
    )


def parse_arguments() -> argparse.Namespace:
    """The checked options; exits with code 2 and a message for a bad one."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--sizes",
        type=names_of(list(SIZES)),
        default=list(SIZES),
        metavar="NAMES",
        help=f"some of {', '.join(SIZES)}, separated by commas (default: all)",
    )
    parser.add_argument(
        "--dtypes",
        type=names_of(list(DTYPES)),
        metavar="NAMES",
        help="our rows' (default: float32, and bfloat16 where the CPU multiplies it natively)",
    )
    parser.add_argument(
        "--rounds", type=at_least_one, default=7, help="rounds that are timed (default: 7)"
    )
    parser.add_argument(
        "--steps", type=at_least_one, help="of a stretch, or with --to-the-end of the run"
    )
    add_memory_option(parser)
    parser.add_argument(
        "--to-the-end",
        choices=SIZES,
        help="run the plain trainer's whole schedule once, and ours in a quarter of its steps or "
        "in --steps, in float32",
    )
    parser.add_argument("--memory-of", nargs=4, help=argparse.SUPPRESS)
    results.add_results_options(parser)
    return parser.parse_args()


def main() -> None:
    """Measure and print."""
    args = parse_arguments()
    cpu = torch.device("cpu")
    if args.memory_of is not None:
        size, *row, scratch = args.memory_of
        run_once(tuple(row), SIZES[size] | FEW_STEPS, Path(scratch))
        print(hardware.peak_memory(cpu))
        return
    say(
        "The plain trainer: float32, torch's attention, dropout and AdamW; ours: training.train",
        f"{DATA}, {hardware.device_name(cpu)}, torch {torch.__version__}",
    )
    if args.to_the_end is not None:
        results.write("whole_runs", compare_to_the_end(args.to_the_end, args), cpu, args)
        return
    native, _ = hardware.choose_dtype("auto", cpu)
    dtypes = args.dtypes or [
        name for name, dtype in DTYPES.items() if dtype in (torch.float32, native)
    ]
    found: list[results.Row] = []
    for size in args.sizes:
        found += measure(size, dtypes, args)
        results.write("loop_speed", found, cpu, args)


if __name__ == "__main__":
    main()
