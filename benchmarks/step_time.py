"""Step time and memory of LoRA beside full fine-tuning, an embeddings-only floor, and the peers.

    python benchmarks/step_time.py                                    # every size, both dtypes
    python benchmarks/step_time.py --sizes nano,0.8M --dtypes float32
    python benchmarks/step_time.py --methods full,floor,lora --no-memory

Every method trains the project's own BigramLanguageModelLoRA, or at a size llama-* a Llama of
transformers, with the same attention, dropout, optimizer and batch; only the linears differ. Times
are interleaved in one process: each round runs one step of every method, in an order that rotates,
and ratios pair the steps of one round. Memory is the peak of a process of its own. On CUDA float32
is multiplied in TF32, and every method but on a Llama is in CUDA graphs, as training.py does in
small steps. The record goes to stdout, progress to stderr.
"""

import argparse
import gc
import importlib.util
import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import hardware
from benchmarks import results
from benchmarks.measure import (
    add_memory_option,
    at_least_one,
    device_of,
    names_of,
    number_printed_by,
)
from lora import add_lora, store_base
from models.bigram_lm_v2_lora import BigramLanguageModelLoRA


@dataclass(frozen=True)
class Size:
    """A model's shape and the shape of its batch."""

    n_embd: int
    n_head: int
    n_layer: int
    batch: int
    block: int
    llama: bool = False  # transformers' Llama in place of the project's model


SIZES = {
    "nano": Size(n_embd=128, n_head=4, n_layer=4, batch=12, block=64),
    "0.8M": Size(n_embd=128, n_head=4, n_layer=4, batch=32, block=128),
    "3.3M": Size(n_embd=256, n_head=4, n_layer=4, batch=32, block=128),
    "11M": Size(n_embd=384, n_head=6, n_layer=6, batch=16, block=256),
    "25M": Size(n_embd=512, n_head=8, n_layer=8, batch=8, block=256),
    "85M": Size(n_embd=768, n_head=12, n_layer=12, batch=4, block=256),
    "llama-11M": Size(n_embd=384, n_head=6, n_layer=6, batch=16, block=256, llama=True),
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
METHODS = {
    "full": "every parameter trains",
    "floor": "only the embeddings train, no adapter: what nothing can beat at equal arithmetic",
    "lora": "this project's LoRA",
    "peft": "PEFT's LoRA",
    "loralib": "loralib's Linear",
    "autograd": "base(x) + scaling * (x A^T) B^T, left to autograd",
}
PACKAGES = {"peft": "peft", "loralib": "loralib"}  # method -> the package that it needs
HOW_TO_INSTALL = "pip install -r requirements-dev.txt"

VOCAB_SIZE = 256
ALPHA = 16.0
LEARNING_RATE = 3e-4
WARMUP_ROUNDS = 3
MEMORY_STEPS = 4
SEED = 1337


@dataclass(frozen=True)
class Settings:
    """What all measurements of one run share."""

    rank: int
    dropout: float
    lora_dropout: float
    steps: int
    device: torch.device


@dataclass
class Result:
    """The measurements of one method at one size in one dtype."""

    size: str
    dtype: str
    method: str
    trainable: int | None = None  # parameters that train
    step_ms: list[float] = field(default_factory=list)  # one entry per round, warm-up left out
    peak_mib: float | None = None


Results = dict[tuple[str, str, str], Result]  # by (size, dtype, method)


# The methods


class AutogradLoRA(nn.Module):
    """The textbook adapter: base(x) + scaling * (dropout(x) A^T) B^T, left to autograd."""

    def __init__(self, base: nn.Linear, rank: int, alpha: float, dropout: float) -> None:
        super().__init__()
        self.base = base
        self.scaling = alpha / rank
        self.dropout = dropout
        self.lora_A = nn.Parameter(base.weight.new_empty(rank, base.in_features))
        self.lora_B = nn.Parameter(base.weight.new_zeros(base.out_features, rank))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features)."""
        h = F.linear(F.dropout(x, self.dropout, self.training and self.dropout > 0.0), self.lora_A)
        return self.base(x) + self.scaling * F.linear(h, self.lora_B)


def loralib_linear(base: nn.Linear, rank: int, alpha: float, dropout: float) -> nn.Module:
    """loralib's Linear with the parameters of `base`, adopted and not copied."""
    import loralib

    linear = loralib.Linear(
        base.in_features,
        base.out_features,
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        bias=base.bias is not None,
        device=base.weight.device,
    )
    linear.weight, linear.bias = base.weight, base.bias
    return linear


def add_peft_lora(model: nn.Module, rank: int, alpha: float, dropout: float) -> None:
    """Put PEFT's LoRA on every linear of `model`, in place."""
    from peft import LoraConfig, inject_adapter_in_model

    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    config = LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=linears)
    inject_adapter_in_model(config, model)


def replace_linears(model: nn.Module, replacement: Callable[[nn.Linear], nn.Module]) -> None:
    """Swap every nn.Linear of `model` for what `replacement` makes of it, in place."""
    linears = [(name, m) for name, m in model.named_modules() if isinstance(m, nn.Linear)]
    for name, linear in linears:
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, replacement(linear))


class Llama(nn.Module):
    """A small random Llama of transformers, called as the project's model is. It has no dropout."""

    def __init__(self, size: Size, device: torch.device) -> None:
        super().__init__()
        from transformers import LlamaConfig, LlamaForCausalLM

        config = LlamaConfig(
            vocab_size=VOCAB_SIZE,
            hidden_size=size.n_embd,
            intermediate_size=size.n_embd * 8 // 3,  # with three matrices, as many numbers as 4x
            num_hidden_layers=size.n_layer,
            num_attention_heads=size.n_head,
            max_position_embeddings=size.block,
            tie_word_embeddings=False,
        )
        self.llama = LlamaForCausalLM(config).to(device)

    def embedding_tables(self) -> list[nn.Module]:
        return [self.llama.get_input_embeddings()]

    def forward(self, idx: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (B, T, vocab_size) of tokens `idx` (B, T), and the loss of `targets` (B, T)."""
        logits = self.llama(input_ids=idx, use_cache=False).logits
        return logits, F.cross_entropy(logits.float().flatten(0, -2), targets.flatten())


def build_base(size: Size, settings: Settings) -> nn.Module:
    """The model of `size` with random weights, all of which train."""
    if size.llama:
        return Llama(size, settings.device)
    return BigramLanguageModelLoRA(
        vocab_size=VOCAB_SIZE,
        n_embd=size.n_embd,
        block_size=size.block,
        device=settings.device,
        dropout=settings.dropout,
        n_head=size.n_head,
        n_layer=size.n_layer,
    )


def build_model(method: str, size: Size, dtype: torch.dtype, settings: Settings) -> nn.Module:
    """The model of `size` as `method` trains it, with the same base weights for every method.

    `full` and `lora` are the project's models as training.py makes them. In the others frozen
    linears are stored in `dtype`, which changes no result and saves casting them in every step.
    """
    torch.manual_seed(SEED)
    adapter = (settings.rank, ALPHA, settings.lora_dropout)
    model = build_base(size, settings).train()
    if method == "full":
        return model
    model.requires_grad_(False)
    if method == "lora":
        add_lora(model, *adapter)
        if dtype != torch.float32:
            store_base(model, dtype, tokens=size.batch * size.block)  # as training.py does
    elif method == "peft":
        add_peft_lora(model, *adapter)
    elif method == "loralib":
        replace_linears(model, lambda linear: loralib_linear(linear, *adapter))
    elif method == "autograd":
        replace_linears(model, lambda linear: AutogradLoRA(linear, *adapter))
    for table in model.embedding_tables():
        table.requires_grad_(True)
    if method == "lora":
        return model
    for module in model.modules():
        if isinstance(module, nn.Linear) and not module.weight.requires_grad:
            module.weight.data = module.weight.data.to(dtype)
            if module.bias is not None:
                module.bias.data = module.bias.data.to(dtype)
    return model


def training_step(
    model: nn.Module, size: Size, dtype: torch.dtype, device: torch.device
) -> Callable[[], Tensor]:
    """A function that takes one training step on a fixed random batch and returns the loss.

    On CUDA the project's model is in CUDA graphs, as training.py has it for small steps.
    """
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=LEARNING_RATE, fused=True)
    generator = torch.Generator().manual_seed(SEED)
    tokens = torch.randint(VOCAB_SIZE, (size.batch, size.block + 1), generator=generator)
    batch = tokens[:, :-1].to(device), tokens[:, 1:].to(device)  # (batch, block) each
    if device.type == "cuda" and not size.llama:
        model = hardware.in_cuda_graphs(model, batch, dtype)

    def step() -> Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
            loss = model(*batch)[-1]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return step


# The measurements


def measure_times(
    size_name: str, dtype_name: str, methods: Sequence[str], settings: Settings
) -> list[Result]:
    """Time one step of every method in turn, `settings.steps` rounds after the warm-up.

    Raises RuntimeError when the methods turn out not to train the same model.
    """
    size, dtype = SIZES[size_name], DTYPES[dtype_name]
    steps: dict[str, Callable[[], Tensor]] = {}
    found = {}
    for method in methods:
        model = build_model(method, size, dtype, settings)
        steps[method] = training_step(model, size, dtype, settings.device)
        trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
        found[method] = Result(size_name, dtype_name, method, trainable)
    losses = {}
    for i in range(WARMUP_ROUNDS + settings.steps):
        first = i % len(methods)
        for method in [*methods[first:], *methods[:first]]:
            hardware.synchronize(settings.device)
            start = time.perf_counter()
            loss = steps[method]()
            hardware.synchronize(settings.device)
            elapsed = time.perf_counter() - start
            if i >= WARMUP_ROUNDS:
                found[method].step_ms.append(1000.0 * elapsed)
            elif i == 0:
                losses[method] = loss.item()
        if i == 0:
            check_same_model(list(found.values()), losses, settings)
    return list(found.values())


def check_same_model(found: Sequence[Result], losses: dict[str, float], settings: Settings) -> None:
    """Raise RuntimeError unless adapters are of one size and the first losses finite and alike.

    Adapters start at zero, so that without dropout the first loss is the base's, whatever trains.
    """
    adapted = {r.method: r.trainable for r in found if r.method not in ("full", "floor")}
    if len(set(adapted.values())) > 1:
        raise RuntimeError(f"the LoRA methods train different numbers of parameters: {adapted}")
    if not all(math.isfinite(loss) for loss in losses.values()):
        raise RuntimeError(f"a first loss is not finite: {losses}")
    if settings.dropout == 0.0 and max(losses.values()) - min(losses.values()) > 0.01:
        raise RuntimeError(f"the methods start from different losses: {losses}")


def measure_memory(size_name: str, dtype_name: str, method: str, settings: Settings) -> float:
    """Peak MiB of a process of its own that builds the model and takes MEMORY_STEPS steps.

    Exits with the end of that process's stderr when it fails.
    """
    command = [__file__, "--memory-of", size_name, dtype_name, method]
    command += [f"--rank={settings.rank}", f"--device={settings.device}"]
    command += [f"--dropout={settings.dropout}", f"--lora-dropout={settings.lora_dropout}"]
    return number_printed_by(command, f"the memory of {method} at {size_name} in {dtype_name}")


def print_own_memory(size_name: str, dtype_name: str, method: str, settings: Settings) -> None:
    """What the process of `measure_memory` does: take some steps and print its own peak in MiB."""
    size, dtype = SIZES[size_name], DTYPES[dtype_name]
    model = build_model(method, size, dtype, settings)
    step = training_step(model, size, dtype, settings.device)
    for _ in range(MEMORY_STEPS):
        step()
    hardware.synchronize(settings.device)
    print(hardware.peak_memory(settings.device))


def free_memory(device: torch.device) -> None:
    """Free the models of the size before."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


# The report


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """The lower quartile, the median and the upper quartile."""
    low, median, high = np.percentile(values, [25, 50, 75])
    return float(low), float(median), float(high)


def time_ratios(found: Results, result: Result, other: str) -> list[float]:
    """Step time over that of method `other` in the same round; empty where one is missing."""
    reference = found.get((result.size, result.dtype, other))
    if reference is None or not reference.step_ms:
        return []
    return [a / b for a, b in zip(result.step_ms, reference.step_ms, strict=True)]


def memory_ratio(found: Results, result: Result) -> float | None:
    """Peak memory over that of full fine-tuning; None where one is missing."""
    full = found.get((result.size, result.dtype, "full"))
    if full is None or full.peak_mib is None or result.peak_mib is None:
        return None
    return result.peak_mib / full.peak_mib


def rows(found: Results, settings: Settings) -> list[results.Row]:
    """What was measured, a row for each method at each size in each dtype."""
    kept = []
    for result in found.values():
        size = SIZES[result.size]
        row: results.Row = {"size": f"{result.size}, {size.batch}x{size.block}"}
        row |= {"dtype": result.dtype, "method": result.method, "rank": str(settings.rank)}
        row |= {"dropout": f"{settings.dropout:g}", "lora_dropout": f"{settings.lora_dropout:g}"}
        if result.step_ms:
            row |= {"trained": result.trainable, "step_ms": statistics.median(result.step_ms)}
        for other in ("full", "floor"):
            if ratios := time_ratios(found, result, other):
                low, median, high = quartiles(ratios)
                name = f"step_to_{other}"
                row |= {name: median, f"{name}_low": low, f"{name}_high": high}
        if result.peak_mib is not None:
            row |= {"peak_mib": result.peak_mib, "peak_to_full": memory_ratio(found, result)}
        kept.append(row)
    return kept


# The command line


def probability(text: str) -> float:
    """An argparse type: a number in [0, 1)."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0.0 <= number < 1.0:
        raise argparse.ArgumentTypeError(f"{text!a} is not a number in [0, 1)")
    return number


def parse_arguments() -> argparse.Namespace:
    """The checked options; exits with code 2 and a message for a bad one."""
    parser = argparse.ArgumentParser(
        description="Step time and memory of LoRA beside full fine-tuning and the peers."
    )

    for option, accepted in (("--sizes", SIZES), ("--dtypes", DTYPES), ("--methods", METHODS)):
        parser.add_argument(
            option,
            type=names_of(list(accepted)),
            metavar="NAMES",
            help=f"some of {', '.join(accepted)}, separated by commas (default: all)",
        )
    parser.add_argument("--rank", type=at_least_one, default=8, help="(default: 8)")
    parser.add_argument(
        "--dropout", type=probability, default=0.0, help="the model's dropout (default: 0)"
    )
    parser.add_argument(
        "--lora-dropout", type=probability, default=0.0, help="the adapters' (default: 0)"
    )
    parser.add_argument(
        "--steps", type=at_least_one, default=30, help="rounds that are timed (default: 30)"
    )
    parser.add_argument(
        "--device", type=device_of, default="auto", help="auto, cpu, cuda or mps (default: auto)"
    )
    add_memory_option(parser)
    results.add_results_options(parser)
    parser.add_argument(
        "--memory-of", nargs=3, metavar=("SIZE", "DTYPE", "METHOD"), help=argparse.SUPPRESS
    )
    args = parser.parse_args()
    args.dtypes = args.dtypes or list(DTYPES)
    args.notes = []
    llamas = [name for name, size in SIZES.items() if size.llama]
    if importlib.util.find_spec("transformers") is None:
        needs = f"needs the package transformers, which is not installed: {HOW_TO_INSTALL}"
        for name in llamas:
            if name in (args.sizes or []):
                parser.error(f"--sizes {name} {needs}")
            args.notes.append(f"The column `{name}` {needs}.")
        args.sizes = args.sizes or [name for name in SIZES if name not in llamas]
    args.sizes = args.sizes or list(SIZES)
    missing = {m: p for m, p in PACKAGES.items() if importlib.util.find_spec(p) is None}
    if args.methods is None:
        args.methods = [method for method in METHODS if method not in missing]
        args.notes += [
            f"The row `{method}` is left out: the package {package} is not installed "
            f"({HOW_TO_INSTALL})."
            for method, package in missing.items()
        ]
    for method in args.methods:
        if method in missing:
            parser.error(
                f"--methods {method} needs the package {missing[method]}, which is not installed: "
                f"{HOW_TO_INSTALL}"
            )
    if args.memory and args.device.type != "cuda" and sys.platform == "win32":
        args.memory = False
        args.notes.append("Peak memory is left out: Python has no `resource` module on Windows.")
    return args


def progress(text: str) -> None:
    """A line for whoever is waiting."""
    print(text, file=sys.stderr, flush=True)


def main() -> None:
    """Measure, report, write."""
    args = parse_arguments()
    settings = Settings(args.rank, args.dropout, args.lora_dropout, args.steps, args.device)
    hardware.keep_freed_memory()
    hardware.allow_tf32(settings.device)
    if settings.device.index is not None:
        torch.cuda.set_device(settings.device)
    if args.memory_of is not None:
        print_own_memory(*args.memory_of, settings)
        return
    found: Results = {
        (size, dtype, method): Result(size, dtype, method)
        for dtype in args.dtypes
        for size in args.sizes
        for method in args.methods
    }
    # Memory comes first, while this process is small: Linux counts the memory that a process had
    # between fork and exec, which is its parent's, into its peak.
    if args.memory:
        for (size, dtype, method), result in found.items():
            result.peak_mib = measure_memory(size, dtype, method, settings)
            progress(f"memory of {method}, {size}, {dtype}: {result.peak_mib:.0f} MiB")
    for dtype in args.dtypes:
        for size in args.sizes:
            progress(f"times, {size}, {dtype} ...")
            for timed in measure_times(size, dtype, args.methods, settings):
                timed.peak_mib = found[size, dtype, timed.method].peak_mib
                found[size, dtype, timed.method] = timed
            free_memory(settings.device)
            # After every size, so that a long run leaves what it has.
            results.write("step_time", rows(found, settings), settings.device, args)
    print(*args.notes, results.table(rows(found, settings)), sep="\n", flush=True)


if __name__ == "__main__":
    main()
