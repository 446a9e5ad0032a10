"""Time the operations for which this project takes another form than torch's first choice.

    python benchmarks/cpu_operations.py
    python benchmarks/cpu_operations.py --sections groups,parts

All figures are milliseconds, forward and backward, medians of 30. The sections are:

    operations     GELU, dropout, LayerNorm and causal attention at the default model's shapes
                   (batch 32, 128 tokens, width 256, 4 heads). And the error of the gradient of
                   LayerNorm's weight, which is float32 in either dtype, as under autocast.
    parts          LoRALinear by the number of parts of a product: PARTS, ENOUGH_TOKENS
    slices         LoRALinear with dropout by the tokens of a slice: SLICE
    groups         layers on one input, as one product and one by one: FEW_TOKENS, WIDE_GROUP,
                   OUTPUTS_PER_TOKEN, PLAIN_GROUP
    kept weights   LoRALinear with its merged weight kept for backward, and made again:
                   SMALL_WEIGHT, SMALL_BATCH
    loss           a head and its loss, as logits and then their loss, and in chunks by the logits
                   of one: PLAIN_VOCABULARY, LOGITS
    segments       attention in packed blocks of 2048 tokens in all, with a mask and by segments:
                   MASK_MAX_CONTEXT
    muon           a step of Muon for the blocks of the project's own models, in float32 (and with
                   the iteration on the matrices themselves, WIDE) and bfloat16, and torch's

The names in capitals are constants of lora/linear.py, ops/loss.py, ops/attention.py and
trainer/muon.py, which the sections set.
"""

import argparse
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import hardware
import trainer.muon
from benchmarks import results
from benchmarks.measure import at_least_one, interleaved, names_of
from lora import LoRALinear, grouped_linear
from lora import linear as lora_linear
from lora.linear import factors_of
from models.language_model import segments_lengths, segments_mask
from ops import loss as ops_loss
from ops.attention import causal_attention, plain_attention
from ops.dropout import dropout
from trainer.muon import Muon

WARMUP = 3

# The input and the outputs of queries, keys and values, and of gate and up: of a small GPT and of
# GPT-2, and as in SmolLM2-135M, Qwen2.5-0.5B and Llama-3.2-1B.
GROUPS = [
    (256, (256, 256, 256)),
    (768, (768, 768, 768)),
    (576, (576, 192, 192)),
    (896, (896, 128, 128)),
    (2048, (2048, 512, 512)),
    (576, (1536, 1536)),
]

# The width and the vocabularies of heads: of small models, and of published ones.
HEADS = [(256, (256, 1024, 4096, 8192, 16384)), (576, (4096, 8192, 16384, 32000))]

# Heads of queries and of keys in attention, and whether its weights are computed again in backward.
ATTENTIONS = [(4, 4, False), (9, 3, True)]


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def milliseconds(function: Callable[[], object], repeats: int) -> float:
    times = []
    for i in range(WARMUP + repeats):
        started = time.perf_counter()
        function()
        if i >= WARMUP:
            times.append(time.perf_counter() - started)
    return statistics.median(times) * 1000


def fused_attention(qkv: Tensor, p: float) -> Tensor:
    """torch's, on qkv (B, T, 3, H, D): (B, T, H * D)."""
    q, k, v = (t.transpose(1, 2) for t in qkv.unbind(2))
    y = F.scaled_dot_product_attention(q, k, v, dropout_p=p, is_causal=True)
    return y.transpose(1, 2).flatten(2)


def with_backward(function: Callable[..., Tensor], *inputs: Tensor):
    """A call that runs `function` on the inputs, forward and backward."""
    leaves = [t.clone().requires_grad_() for t in inputs]
    gradient = torch.ones_like(function(*leaves))
    return lambda: torch.autograd.grad(function(*leaves), leaves, gradient)


def norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.layer_norm(x, bias.shape, weight, bias)


def error_of_norm(dtype: torch.dtype) -> float:
    """The relative error of the gradient of LayerNorm's weight, for random inputs of `dtype`."""
    torch.manual_seed(0)
    x, gradient = torch.randn(2, 4096, 256).to(dtype)

    def found(as_dtype: torch.dtype, weights: torch.dtype) -> Tensor:
        weight = torch.ones(256, dtype=weights, requires_grad=True)
        y = norm(x.to(as_dtype), weight, torch.zeros(256, dtype=weights))
        return torch.autograd.grad(y, weight, gradient.to(as_dtype))[0].double()

    exact = found(torch.float64, torch.float64)
    return ((found(dtype, torch.float32) - exact).norm() / exact.norm()).item()


def operations(repeats: int) -> Iterator[results.Row]:
    for dtype in (torch.float32, torch.bfloat16):
        hidden = torch.randn(32, 128, 1024, dtype=dtype)
        residual = torch.randn(32, 128, 256, dtype=dtype)
        qkv = torch.randn(32, 128, 3, 4, 64, dtype=dtype)
        rows = {
            "GELU, tanh approximation": with_backward(
                lambda x: F.gelu(x, approximate="tanh"), hidden
            ),
            "GELU, exact": with_backward(F.gelu, hidden),
            "dropout 0.2, torch's": with_backward(lambda x: F.dropout(x, 0.2), residual),
            "dropout 0.2, ours": with_backward(lambda x: dropout(x, 0.2, True), residual),
            "LayerNorm": with_backward(norm, residual, torch.ones(256), torch.zeros(256)),
            "attention, torch's": with_backward(lambda t: fused_attention(t, 0.0), qkv),
            "attention, plain": with_backward(lambda t: plain_attention(*t.unbind(2), 0.0), qkv),
            "attention with dropout 0.2, torch's": with_backward(
                lambda t: fused_attention(t, 0.2), qkv
            ),
            "attention with dropout 0.2, plain and ours": with_backward(
                lambda t: plain_attention(*t.unbind(2), 0.2), qkv
            ),
        }
        print(f"{short(dtype)}, forward and backward, ms:")
        for name, function in rows.items():
            taken = milliseconds(function, repeats)
            print(f"   {name:44} {taken:7.2f}")
            yield {"section": "operations", "case": name, "form": short(dtype), "time_ms": taken}
        error = error_of_norm(dtype)
        print(f"   error of LayerNorm's gradient: {error:.1e}")
        yield {"section": "operations", "case": "LayerNorm", "form": short(dtype), "error": error}


def compare(
    section: str, case: str, forms: Mapping[str, Callable[[], object]], repeats: int
) -> list[results.Row]:
    """Print a line with the time of each form, measured in turn, and return a row for each."""
    times = interleaved(forms, repeats, WARMUP)
    medians = {form: statistics.median(t) * 1000 for form, t in times.items()}
    print(f"   {case:44} {', '.join(f'{form} {ms:.2f}' for form, ms in medians.items())}")
    row = {"section": section, "case": case}
    return [row | {"form": form, "time_ms": ms} for form, ms in medians.items()]


def adapters(n_in: int, widths: Sequence[int], dtype: torch.dtype, p: float) -> list[LoRALinear]:
    """LoRALinears of these widths on one input, their bases in `dtype`, adapters' dropout `p`."""
    layers = [LoRALinear(nn.Linear(n_in, n_out, dtype=dtype), dropout=p) for n_out in widths]
    for layer in layers:
        nn.init.normal_(layer.lora_B, std=0.02)
    return layers


def layer_step(
    x: Tensor, layers: Sequence[nn.Module], forward: Callable[..., Sequence[Tensor]], **constants
) -> Callable[[], object]:
    """A call that runs `forward(x, layers)` and its backward with these constants of linear.py."""
    x = x.clone().requires_grad_()
    trained = [p for layer in layers for p in layer.parameters() if p.requires_grad]

    def step() -> None:
        with patch.multiple(lora_linear, **constants):
            outputs = forward(x, layers)
            torch.autograd.grad(outputs, [x, *trained], [torch.ones_like(y) for y in outputs])

    return step


def one_by_one(x: Tensor, layers: Sequence[nn.Module]) -> list[Tensor]:
    return [layer(x) for layer in layers]


def parts(repeats: int) -> Iterator[results.Row]:
    print(section := "parts, float32, 256 to 256")
    layers = adapters(256, [256], torch.float32, 0.0)
    for tokens in (256, 512, 1024, 4096):
        x = torch.randn(tokens, 256)
        forms = {
            str(n): layer_step(x, layers, one_by_one, PARTS=n, ENOUGH_TOKENS=0 if n > 1 else 2**62)
            for n in (1, 4, 8, 16)
        }
        yield from compare(section, f"{tokens} tokens", forms, repeats)


def slices(repeats: int) -> Iterator[results.Row]:
    print(section := "slices, dropout 0.1")
    for dtype in (torch.float32, torch.bfloat16):
        for width in (256, 1024):
            layers = adapters(width, [width], dtype, 0.1)
            x = torch.randn(4096, width, dtype=dtype)
            forms = {
                str(n): layer_step(x, layers, one_by_one, SLICE=n) for n in (256, 512, 1024, 4096)
            }
            case = f"{width} to {width}, {short(dtype)}, 4096 tokens"
            yield from compare(section, case, forms, repeats)


def groups(repeats: int) -> Iterator[results.Row]:
    always = {"FEW_TOKENS": 0, "WIDE_GROUP": 2**62, "OUTPUTS_PER_TOKEN": 2**62}
    always["PLAIN_GROUP"] = 2**62
    for kind in ("LoRA", "plain, frozen", "plain, trained"):
        for dtype in (torch.float32, torch.bfloat16):
            print(section := f"groups, {kind}, {short(dtype)}")
            for n_in, widths in GROUPS:
                layers = adapters(n_in, widths, dtype, 0.0)
                if kind != "LoRA":
                    trained = kind == "plain, trained"
                    layers = [nn.Linear(n_in, n_out, False, dtype=dtype) for n_out in widths]
                    for layer in layers:
                        layer.requires_grad_(trained)
                for tokens in (8, 16, 128, 512, 1024):
                    x = torch.randn(tokens, n_in, dtype=dtype)
                    forms = {
                        "one product": layer_step(x, layers, grouped_linear, **always),
                        "one by one": layer_step(x, layers, one_by_one, **always),
                    }
                    case = f"{n_in} to {'/'.join(map(str, widths))}, {tokens} tokens"
                    yield from compare(section, case, forms, repeats)


def kept_weights(repeats: int) -> Iterator[results.Row]:
    print(section := "kept weights, float32, merged")
    with patch.object(lora_linear, "merging_pays", lambda *_: True):
        for width in (128, 256, 512):
            layers = adapters(width, [width], torch.float32, 0.0)
            for tokens in (256, 1024, 4096):
                x = torch.randn(tokens, width)
                forms = {
                    "kept": layer_step(
                        x, layers, one_by_one, SMALL_WEIGHT=2**62, SMALL_BATCH=2**62
                    ),
                    "made again": layer_step(x, layers, one_by_one, SMALL_WEIGHT=0),
                }
                case = f"{width} to {width}, {tokens} tokens"
                yield from compare(section, case, forms, repeats)


def loss(repeats: int) -> Iterator[results.Row]:
    for kind in ("frozen", "trained", "adapted"):
        print(section := f"loss, float32, 1024 tokens, {kind} head")
        for width, vocabularies in HEADS:
            for vocabulary in vocabularies:
                head: nn.Module = nn.Linear(width, vocabulary, bias=False)
                head.requires_grad_(kind == "trained")
                if kind == "adapted":
                    head = LoRALinear(head)
                    nn.init.normal_(head.lora_B, std=0.02)
                forms = {"plain": loss_step(head, 1024, plain_loss)}
                for n in (2**23, 2**24, 2**25):
                    forms[f"{n}"] = loss_step(head, 1024, chunked_loss, LOGITS=n)
                yield from compare(section, f"{width} to {vocabulary}", forms, repeats)


def plain_loss(x: Tensor, targets: Tensor, head: nn.Module) -> Tensor:
    """The mean cross-entropy of all logits of x (tokens, width)."""
    return F.cross_entropy(head(x).float(), targets)


def chunked_loss(x: Tensor, targets: Tensor, head: nn.Module) -> Tensor:
    """The same, in chunks of tokens."""
    return ops_loss.linear_cross_entropy(x, targets, *factors_of(head))


def loss_step(
    head: nn.Module, tokens: int, form: Callable[..., Tensor], LOGITS: int = 0
) -> Callable[[], object]:
    """A call that runs `form` and its backward for random inputs, with this constant of loss.py."""
    x = torch.randn(tokens, head.in_features, requires_grad=True)
    targets = torch.randint(head.out_features, (tokens,))
    trained = [x, *(p for p in head.parameters() if p.requires_grad)]

    def step() -> None:
        with patch.object(ops_loss, "LOGITS", LOGITS):
            torch.autograd.grad(form(x, targets, head), trained)

    return step


def segments(repeats: int) -> Iterator[results.Row]:
    for H, K, saves_memory in ATTENTIONS:
        for p in (0.0, 0.2):
            words = f"segments, float32, {H} heads of queries and {K} of keys, dropout {p}"
            print(section := words)
            for T in (128, 256, 512, 1024, 2048):
                for length in sorted({min(T, n) for n in (32, 96, 384)}):
                    in_row = torch.arange(T) // length
                    rows = in_row.expand(2048 // T, T)
                    q, k, v = (torch.randn(*rows.shape, heads, 64) for heads in (H, K, K))
                    forms = {
                        name: with_backward(
                            lambda q, k, v, p=p, mask=mask, saves=saves_memory: causal_attention(
                                q, k, v, p, True, mask, saves_memory=saves
                            ),
                            q, k, v,
                        )
                        for name, mask in (
                            ("mask", segments_mask(rows, torch.float32)),
                            ("segments", segments_lengths(rows)),
                        )
                    }  # fmt: skip
                    case = f"{T} tokens, segments of {length}"
                    yield from compare(section, case, forms, repeats)


def muon(repeats: int) -> Iterator[results.Row]:
    print(section := "muon")
    for width, blocks in ((128, 4), (256, 4), (384, 6)):
        shapes = [(width, width)] * 4 + [(4 * width, width), (width, 4 * width)]
        matrices = [nn.Parameter(torch.randn(shape)) for shape in shapes * blocks]
        for p in matrices:
            p.grad = torch.randn_like(p)
        groups = [{"params": matrices, "orthogonal": True}]

        def narrow(step: Callable[[], object]) -> Callable[[], object]:
            def run() -> None:
                with patch.object(trainer.muon, "WIDE", math.inf):
                    step()

            return run

        forms = {
            "float32": Muon(groups).step,
            "float32, on the matrices": narrow(Muon(groups).step),
            "bfloat16": Muon(groups, dtype=torch.bfloat16).step,
        }
        if hasattr(torch.optim, "Muon"):
            forms["torch's"] = torch.optim.Muon(matrices, adjust_lr_fn="match_rms_adamw").step
        yield from compare(section, f"{blocks} blocks of width {width}", forms, repeats)


SECTIONS = {
    "operations": operations,
    "parts": parts,
    "slices": slices,
    "groups": groups,
    "kept weights": kept_weights,
    "loss": loss,
    "segments": segments,
    "muon": muon,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--repeats", type=at_least_one, default=30, help="calls that are timed (default 30)"
    )
    parser.add_argument(
        "--sections",
        type=names_of(list(SECTIONS)),
        default=list(SECTIONS),
        help=f"of {', '.join(SECTIONS)} (default: all)",
    )
    results.add_results_options(parser)
    args = parser.parse_args()
    hardware.keep_freed_memory()
    print(f"device: {hardware.device_name(torch.device('cpu'))}, torch {torch.__version__}")
    found: list[results.Row] = []
    for name in args.sections:
        found += SECTIONS[name](args.repeats)
    results.write("cpu_operations", found, torch.device("cpu"), args)


if __name__ == "__main__":
    main()
