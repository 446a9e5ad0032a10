"""LoRA at GPT-2's real size (124M, random weights), beside PEFT on transformers' own GPT-2.

    python benchmarks/gpt2.py
    python benchmarks/gpt2.py --device cuda --dtype bfloat16 --batch 16 --block 1024

Prints step time, peak memory and adapter size of full fine-tuning, of this project's LoRA, both on
its own model, and of PEFT's LoRA on `transformers`' model with the same weights. Adapters have
rank 8 on every linear, the embeddings train, dropout is 0, the optimizer fused AdamW. Steps are
interleaved in one process; each memory is the peak of a process of its own, imports included, or on
CUDA what torch holds there.
"""

import argparse
import json
import multiprocessing
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import hardware
from benchmarks import results
from benchmarks.measure import at_least_one, device_of, interleaved, number_printed_by
from lora import base_state, save_adapter, store_base
from models import GPT2
from models.bigram_lm_v2_lora import BigramLanguageModelLoRA
from models.checkpoint import Checkpoint
from models.huggingface import write_model

SIZES = {
    "vocab_size": 50257, "n_embd": 768, "block_size": 1024, "n_head": 12, "n_layer": 12,
    "gelu": "tanh", "tied_head": True,
}  # fmt: skip
METHODS = ("full", "lora", "peft")
RANK, ALPHA, SEED = 8, 16.0, 1337


def our_model(use_lora: bool, device: str | torch.device = "cpu") -> BigramLanguageModelLoRA:
    torch.manual_seed(SEED)
    return BigramLanguageModelLoRA(
        **SIZES, device=device, dropout=0.0, use_lora=use_lora, lora_rank=RANK, lora_alpha=ALPHA
    )


def write_base(folder: Path) -> None:
    """The weights of `our_model`, for transformers."""
    model = our_model(use_lora=False)
    write_model(folder, Checkpoint("", GPT2, model.sizes, base_state(model), {}))


def peft_model(base: Path) -> nn.Module:
    """transformers' GPT-2 with the same weights and PEFT's LoRA, the embeddings training."""
    from peft import LoraConfig, get_peft_model
    from transformers import GPT2LMHeadModel

    model = GPT2LMHeadModel.from_pretrained(base, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0)
    config = LoraConfig(
        r=RANK,
        lora_alpha=ALPHA,
        target_modules=["c_attn", "c_proj", "c_fc", "lm_head"],
        modules_to_save=["wte", "wpe"],
        fan_in_fan_out=True,
    )
    return get_peft_model(model, config)


def make_step(method: str, base: Path, args: argparse.Namespace) -> tuple[nn.Module, Callable]:
    """A model, and a function that takes one training step and returns the loss."""
    dtype = getattr(torch, args.dtype)
    if method == "peft":
        model = peft_model(base).to(args.device)
    else:
        model = our_model(method == "lora", args.device)
        if method == "lora" and dtype != torch.float32:
            store_base(model, dtype, tokens=args.batch * args.block)  # as training.py does
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)
    generator = torch.Generator().manual_seed(SEED)
    tokens = torch.randint(SIZES["vocab_size"], (args.batch, args.block + 1), generator=generator)
    tokens = tokens.to(args.device)
    idx, targets = tokens[:, :-1], tokens[:, 1:]

    def step() -> float:
        with torch.autocast(args.device.type, dtype, enabled=dtype != torch.float32):
            if method == "peft":
                logits = model(input_ids=idx, use_cache=False).logits
                loss = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())
            else:
                _, loss = model(idx, targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return model, step


def adapter_mib(method: str, model: nn.Module, folder: Path) -> float:
    """The size of the file that holds what LoRA trained."""
    if method == "lora":
        return save_adapter(folder / "lora.pt", model, "", {}) / 2**20
    model.save_pretrained(folder / "peft", save_embedding_layers=False)
    return (folder / "peft" / "adapter_model.safetensors").stat().st_size / 2**20


def peak_mib(method: str, base: Path, args: argparse.Namespace) -> float:
    """Peak MiB of a process of its own that takes three steps."""
    command = [__file__, "--memory-of", method, "--base", str(base)]
    command += [f"--{name}={getattr(args, name)}" for name in ("device", "dtype", "batch", "block")]
    return number_printed_by(command, f"the memory of {method}")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--steps", type=at_least_one, default=8, help="rounds that are timed (default: 8)"
    )
    parser.add_argument("--device", type=device_of, default="cpu", help="(default: cpu)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--batch", type=at_least_one, default=2, help="sequences (default: 2)")
    parser.add_argument(
        "--block", type=at_least_one, default=256, help="tokens in each (default: 256)"
    )
    parser.add_argument("--memory-of", choices=METHODS, help=argparse.SUPPRESS)
    parser.add_argument("--base", type=Path, help=argparse.SUPPRESS)
    results.add_results_options(parser)
    args = parser.parse_args()
    if args.block > SIZES["block_size"]:
        parser.error(f"--block {args.block} is more than GPT-2's context, {GPT2['block_size']}")
    hardware.keep_freed_memory()
    hardware.allow_tf32(args.device)
    if args.memory_of is not None:
        _, step = make_step(args.memory_of, args.base, args)
        for _ in range(3):
            step()
        print(hardware.peak_memory(args.device))
        return
    with tempfile.TemporaryDirectory() as scratch:
        base = Path(scratch) / "gpt2"
        # In a process of its own, so that this one stays small until the memory is measured.
        writer = multiprocessing.get_context("spawn").Process(target=write_base, args=(base,))
        writer.start()
        writer.join()
        memory = {method: peak_mib(method, base, args) for method in METHODS}
        models = {method: make_step(method, base, args) for method in METHODS}
        steps = {method: step for method, (_, step) in models.items()}
        losses = {method: step() for method, step in steps.items()}
        if max(losses.values()) - min(losses.values()) > 0.01:
            sys.exit(f"error: the methods do not start from the same model: {losses}")
        times = interleaved(steps, args.steps, warmup=1)
        sizes = {m: adapter_mib(m, models[m][0], Path(scratch)) for m in ("lora", "peft")}
        trained = {
            method: sum(p.numel() for p in model.parameters() if p.requires_grad)
            for method, (model, _) in models.items()
        }
    name = hardware.device_name(args.device)
    print(f"GPT-2 124M, batch {args.batch} x {args.block}, {args.dtype}, {name}")
    print(f"torch {torch.__version__}, {json.dumps(losses)} first losses")
    found = []
    for method in METHODS:
        ratios = [t / full for t, full in zip(times[method], times["full"], strict=True)]
        row = {"method": method, "batch": f"{args.batch}x{args.block}", "dtype": args.dtype}
        row |= {"trained": trained[method], "step_ms": 1000 * statistics.median(times[method])}
        row |= results.ranged("ratio_to_full", ratios) | {"peak_mib": memory[method]}
        found.append(row | {"adapter_mib": sizes.get(method)})
    print(results.table(found))
    results.write("gpt2", found, args.device, args)


if __name__ == "__main__":
    main()
