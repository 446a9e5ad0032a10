"""LoRA on the shapes of published models, random weights, beside PEFT on transformers' own models.

    python benchmarks/families.py
    python benchmarks/families.py --models Llama-3.2-1B --batches 1x512 --dtypes bfloat16
    python benchmarks/families.py --methods ours-nf4,ours     a base in NF4, over one in bfloat16
    python benchmarks/families.py --methods ours-nf4,peft-nf4     and over PEFT on bitsandbytes'
    python benchmarks/families.py --device cuda --models Llama-3.1-8B --batches 1x2048,2x2048
        --methods ours-nf4,ours,peft --grad-checkpoint off,on

Trains adapters of rank 8, or --rank, on all linears of a model's blocks, embeddings and head
frozen: with this project as training.py does it, and with PEFT as its users do: a model of
`transformers` in the dtype of the run, get_peft_model with its defaults, labels to the model, and
autocast where the dtype is bfloat16. A step is forward, loss, backward and fused AdamW. All methods
get the same weights and tokens, and keep freed memory (`hardware.keep_freed_memory`). PEFT's base
in NF4 is bitsandbytes', its scales quantized too. `ours` keeps the base as its file has it, in
bfloat16, and in float32 casts it in every step; `ours-float32` has BASE_DTYPE=float32. Two say what
is possible, with this project's model: `full` trains every weight, in float32; `floor` has no
adapters and trains one norm, the first, so that gradients go through all blocks.

On a CPU each method is a process of its own, which loads the model from a Hugging Face folder in
bfloat16. The methods take turns, so that ratios pair steps that ran beside each other, and memory
is the peak of the whole process, imports and loading included. On CUDA one method comes after the
other in one process, with weights that are drawn on the GPU; memory is the most that torch held
there.

Utilisation is the model's operations over those that a product of two large matrices of the same
dtype reaches here, which is measured first. With N weights in the linears of the blocks and in the
head, a step takes 6 N operations a token where they train and 4 N where they are frozen, plus 6 for
each number of the adapters. Attention adds 6 T for each number of a query, in each block: half the
keys of T tokens, in two products forward and four backward. What is computed again, with gradient
checkpointing, does not count.
"""

import argparse
import contextlib
import gc
import importlib.util
import itertools
import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import hardware
from benchmarks import results
from benchmarks.measure import at_least_one, device_of, names_of
from lora import store_base
from models import GPT2, Family
from models.checkpoint import Checkpoint
from models.huggingface import MODEL_TYPES, read_base
from trainer.loading import LoraOptions, build_model
from trainer.optimization import make_optimizer
from trainer.settings import Config
from training import accumulate, is_launch_bound

# The config.json of each, as far as it decides the arithmetic.
MODELS = {
    "SmolLM2-135M": {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 49152,
        "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
        "num_attention_heads": 9, "num_key_value_heads": 3, "rms_norm_eps": 1e-5,
        "max_position_embeddings": 8192, "rope_theta": 100000, "tie_word_embeddings": True,
    },
    "Qwen2.5-0.5B": {
        "model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "vocab_size": 151936,
        "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24,
        "num_attention_heads": 14, "num_key_value_heads": 2, "rms_norm_eps": 1e-6,
        "max_position_embeddings": 32768, "rope_theta": 1000000, "tie_word_embeddings": True,
    },
    "Llama-3.2-1B": {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 128256,
        "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64, "rms_norm_eps": 1e-5,
        "max_position_embeddings": 131072, "rope_theta": 500000, "tie_word_embeddings": True,
        "rope_scaling": {
            "rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    },
    "Llama-3.1-8B": {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 128256,
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "rms_norm_eps": 1e-5,
        "max_position_embeddings": 131072, "rope_theta": 500000, "tie_word_embeddings": False,
        "rope_scaling": {
            "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    },
    "GPT-2": {
        "model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "vocab_size": 50257,
        "n_embd": 768, "n_positions": 1024, "n_layer": 12, "n_head": 12,
        "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "tie_word_embeddings": True,
    },
    "tiny": {
        "model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "vocab_size": 288,
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-6,
        "max_position_embeddings": 64, "rope_theta": 10000, "tie_word_embeddings": True,
    },
}  # fmt: skip
# What PEFT adapts: the linears of the blocks, by the names of `transformers`.
TARGETS = {
    "gpt2": ["c_attn", "c_proj", "c_fc"],
    "llama": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
}
TARGETS["qwen2"] = TARGETS["llama"]
NORM = re.compile(r"(norm|ln_\w)\.weight$")
METHODS = ("ours", "peft", "ours-nf4", "peft-nf4", "full", "floor", "ours-float32")
PACKAGES = {  # and the methods that need them
    "transformers": ("peft", "peft-nf4"),
    "peft": ("peft", "peft-nf4"),
    "bitsandbytes": ("peft-nf4",),
}
DTYPES = ("float32", "bfloat16")
TOLERANCES = {"float32": 1e-4, "bfloat16": 0.02}  # of the first losses, which are about ln(vocab)
NF4_TOLERANCE = 0.1  # where a base lies in NF4: bitsandbytes rounds differently on a CPU
RANK, SEED, STD = 8, 1337, 0.02
ROWS = 2**11  # of a tensor that are made at a time
SQUARE = {"cpu": 1024, "cuda": 8192}  # the matrices whose product measures what hardware can do
WARMUP = 2  # steps beside the first, where methods take no turns


@dataclass(frozen=True)
class Setting:
    """What a measurement is of: `batch` sequences of `block` tokens."""

    model: str
    dtype: str
    batch: int
    block: int
    device: str
    grad_checkpoint: bool
    compile: bool
    threads: int | None
    clock: str
    steps: int
    methods: tuple[str, ...] = METHODS[:2]
    rank: int = RANK  # alpha is twice as much


# The models


def family_of(model: str) -> tuple[Family, Any]:
    """The family of a published shape, and its sizes."""
    family = MODEL_TYPES[MODELS[model]["model_type"]]
    return family, family.read_config(MODELS[model])


def targets_of(model: str) -> list[str]:
    """The names of the linears that PEFT adapts."""
    return TARGETS[MODELS[model]["model_type"]]


def write_folder(folder: Path, model: str, **changes: object) -> None:
    """A folder of random weights in bfloat16: norms are 1, all else is normal with a deviation of
    STD. It is written in parts, so that no model is ever in memory. `changes` are to its config."""
    config = MODELS[model] | {"hidden_act": "silu", "dtype": "bfloat16"} | changes
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text("{}")  # none is needed
    header, end = {"__metadata__": {"format": "pt"}}, 0
    family, _ = family_of(model)
    tensors = family.layout(family.read_config(config))
    for stored in tensors:
        start, end = end, end + 2 * torch.Size(stored.shape).numel()
        header[stored.name] = {
            "dtype": "BF16", "shape": stored.shape, "data_offsets": [start, end],
        }  # fmt: skip
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of 8 bytes
    generator = torch.Generator().manual_seed(SEED)
    with open(folder / "model.safetensors", "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for stored in tensors:
            rows, *columns = stored.shape
            for start in range(0, rows, ROWS):
                part = torch.ones(min(ROWS, rows - start), *columns)
                if not NORM.search(stored.name):
                    part.normal_(std=STD, generator=generator)
                part.bfloat16().view(torch.int16).numpy().tofile(file)


class Drawn(Mapping[str, Tensor]):
    """The weights of a folder of `write_folder`'s kind, each drawn on a device when it is asked
    for, and again the next time. The model must have the names of its folder."""

    def __init__(self, model: str, device: torch.device) -> None:
        family, sizes = family_of(model)
        self.shapes = {stored.name: stored.shape for stored in family.layout(sizes)}
        self.seeds = {name: SEED + i for i, name in enumerate(self.shapes)}
        self.device = device
        if sizes.tied_head:
            for known in (self.shapes, self.seeds):
                known["lm_head.weight"] = known["model.embed_tokens.weight"]

    def __getitem__(self, name: str) -> Tensor:
        made = torch.ones(self.shapes[name], dtype=torch.bfloat16, device=self.device)
        if not NORM.search(name):
            generator = torch.Generator(self.device).manual_seed(self.seeds[name])
            made.normal_(std=STD, generator=generator)
        return made

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)


Step = Callable[[], Tensor]  # takes one step and returns the loss


def our_step(folder: Path | None, setting: Setting, method: str, base_dtype: str) -> Step:
    """A step as training.py takes it, on the model of a folder or on drawn weights."""
    device, dtype = torch.device(setting.device), getattr(torch, setting.dtype)
    if folder is None:
        base = Checkpoint("drawn", *family_of(setting.model), Drawn(setting.model, device), {})
    else:
        base = read_base(folder)
    rank = setting.rank
    targets = [name for name in base.family.model.linears if name != "lm_head"]
    lora = LoraOptions(rank, 2.0 * rank, 0.0, targets, train_embeddings=False)
    lora = lora if method == "ours" else None
    model = build_model(base.family, base.sizes, base, device, 0.0, lora, base_dtype)
    if method == "floor":
        model.requires_grad_(False)
        named = model.blocks[0].named_parameters()
        first = next(parameter for name, parameter in named if NORM.search(name))
        first.data = first.data.float()
        first.requires_grad_(True)
    model.grad_checkpoint = setting.grad_checkpoint
    tokens = batch_of(setting)
    if dtype != torch.float32 and method != "full":
        store_base(model, dtype, tokens.numel())
    del base
    targets = F.pad(tokens[:, 1:], (0, 1), value=-100)  # as transformers shifts labels
    optimizer = make_optimizer(
        Config(optimizer="adamw", learning_rate=1e-3, lora_plus_ratio=1.0), model.train(), dtype
    )
    in_graphs = is_launch_bound(model, [(tokens, targets)])
    if setting.compile:
        in_graphs = in_graphs and not setting.grad_checkpoint
        model = torch.compile(model, mode="reduce-overhead" if in_graphs else "default")
    elif in_graphs:
        model = hardware.in_cuda_graphs(model, (tokens, targets), dtype)

    def autocast() -> torch.autocast:
        return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)

    def step() -> Tensor:
        loss = accumulate(model, [(tokens, targets)], [1.0], autocast)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss

    return step


def peft_step(folder: Path | None, setting: Setting, method: str, base_dtype: str) -> Step:
    """The same with PEFT on transformers' model."""
    from peft import LoraConfig, get_peft_model

    device, dtype = torch.device(setting.device), getattr(torch, setting.dtype)
    base = peft_base(folder, setting, base_dtype == "nf4")
    if setting.grad_checkpoint:
        base.gradient_checkpointing_enable({"use_reentrant": False})
    sizes = {"r": setting.rank, "lora_alpha": 2 * setting.rank}
    config = LoraConfig(**sizes, target_modules=targets_of(setting.model), task_type="CAUSAL_LM")
    model: nn.Module = get_peft_model(base.to(device), config).train()
    tokens = batch_of(setting)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3, fused=True)
    if setting.compile:
        model = torch.compile(model)

    def step() -> Tensor:
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return step


def peft_base(folder: Path | None, setting: Setting, in_nf4: bool) -> nn.Module:
    """The model of `transformers`, of a folder or on drawn weights."""
    from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig

    device, dtype = torch.device(setting.device), getattr(torch, setting.dtype)
    if folder is not None:
        options: dict[str, Any] = {"dtype": dtype}
        if in_nf4:
            options["device_map"] = setting.device
            options["quantization_config"] = BitsAndBytesConfig(
                load_in_4bit=True,
                bnb_4bit_quant_type="nf4",
                bnb_4bit_use_double_quant=True,
                bnb_4bit_compute_dtype=dtype,
            )
        return AutoModelForCausalLM.from_pretrained(folder, **options)
    with torch.device(device):
        config = AutoConfig.for_model(**MODELS[setting.model])
        base = AutoModelForCausalLM.from_config(config, dtype=dtype)
    weights = base.state_dict()
    for name, tensor in Drawn(setting.model, device).items():
        weights[name].copy_(tensor)
    if in_nf4:  # as from_pretrained has it
        from bitsandbytes.nn import Linear4bit, Params4bit

        base.is_loaded_in_4bit = True
        for name, linear in list(base.named_modules()):
            if name.rpartition(".")[2] not in targets_of(setting.model):
                continue
            options = {"compress_statistics": True, "quant_type": "nf4"}
            bias = linear.bias is not None
            with torch.device("meta"):
                layer = Linear4bit(
                    linear.in_features, linear.out_features, bias, compute_dtype=dtype, **options
                )
            layer.weight = Params4bit(linear.weight.data.cpu(), requires_grad=False, **options)
            layer.bias = linear.bias
            base.set_submodule(name, layer.to(device))
    return base


def batch_of(setting: Setting) -> torch.Tensor:
    """The same random tokens in every process: (batch, block)."""
    generator = torch.Generator().manual_seed(SEED)
    shape = setting.batch, setting.block
    tokens = torch.randint(MODELS[setting.model]["vocab_size"], shape, generator=generator)
    return tokens.to(setting.device)


# The measurements


class Runner:
    """What trains with one method in this process, and takes steps when it is asked."""

    def __init__(self, method: str, folder: Path | None, setting: Setting) -> None:
        self.setting, self.device = setting, torch.device(setting.device)
        self.free()
        kind, _, base_dtype = method.partition("-")
        make = peft_step if kind == "peft" else our_step
        self.step: Step | None = make(folder, setting, kind, base_dtype or "auto")
        self.free()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)

    def ask(self, word: str) -> float:
        """`loss`: that of a step; `time`: the seconds of a step; `peak`: the memory in MiB."""
        if word == "loss":
            return self.step().item()
        if word == "time":
            clock = time.process_time if self.setting.clock == "cpu" else time.perf_counter
            started = clock()
            for _ in range(self.setting.steps):
                self.step()
            hardware.synchronize(self.device)
            return (clock() - started) / self.setting.steps
        return hardware.peak_memory(self.device)

    def close(self) -> None:
        """Free the model, for the next one."""
        self.step = None
        if self.setting.compile:
            torch._dynamo.reset()
        self.free()

    def free(self) -> None:
        """Free what nothing refers to any more."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


class Worker:
    """A Runner in a process of its own."""

    def __init__(self, method: str, folder: Path, setting: Setting) -> None:
        self.what = f"{method}, {setting.model}, {setting.dtype}, {setting.batch}x{setting.block}"
        self.errors = tempfile.TemporaryFile("w+")  # noqa: SIM115  (closed by close)
        command = [sys.executable, __file__, "--worker", method, str(folder)]
        self.process = subprocess.Popen(
            [*command, json.dumps(asdict(setting))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            text=True,
        )

    def ask(self, word: str) -> float:
        """What the process answers. Exits with the end of its stderr when it fails."""
        with contextlib.suppress(BrokenPipeError):  # why it ended stands in its stderr
            print(word, file=self.process.stdin, flush=True)
        line = self.process.stdout.readline()
        if not line.startswith("answer "):
            code = self.process.wait()
            self.errors.seek(0)
            tail = self.errors.read().strip()[-2000:]
            sys.exit(f"error: {self.what} ended with exit code {code}: {tail}")
        return float(line.split()[1])

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()
        self.errors.close()


def work(method: str, folder: Path, setting: Setting) -> None:
    """What the process of a Worker does: answer what it is asked."""
    if setting.threads is not None:
        torch.set_num_threads(setting.threads)
    hardware.keep_freed_memory()
    hardware.allow_tf32(torch.device(setting.device))
    runner = Runner(method, folder, setting)
    for line in sys.stdin:
        print("answer", runner.ask(line.strip()), flush=True)


# Of a method the seconds of a step in each round, and the peak in MiB; no seconds where the memory
# of the device does not suffice.
Found = dict[str, tuple[list[float], float]]


def measured(folder: Path | None, setting: Setting, rounds: int) -> Found:
    """Steps and peaks of each method: in processes that take turns with the model of a folder, or
    without one in this process, one after the other.

    Exits with a message where the first losses differ by more than rounding.
    """
    methods, kind = setting.methods, Runner if folder is None else Worker
    losses: dict[str, float] = {}
    found: Found = {method: ([], float("nan")) for method in methods}
    for together in [methods] if folder is not None else [[method] for method in methods]:
        runners: dict[str, Runner | Worker] = {}
        try:
            for method in together:
                runners[method] = kind(method, folder, setting)
            losses |= {method: runner.ask("loss") for method, runner in runners.items()}
            for _ in range(WARMUP if folder is None else 0):
                runners[together[0]].ask("loss")
            times: dict[str, list[float]] = {method: [] for method in together}
            for i in range(rounds):
                for method in together if i % 2 == 0 else reversed(together):
                    times[method].append(runners[method].ask("time"))
            found |= {method: (times[method], runners[method].ask("peak")) for method in together}
        except torch.OutOfMemoryError:
            pass
        finally:
            for runner in runners.values():
                runner.close()
    in_nf4 = any(method.endswith("nf4") for method in methods)
    tolerance = NF4_TOLERANCE if in_nf4 else TOLERANCES[setting.dtype]
    if losses and not max(losses.values()) - min(losses.values()) <= tolerance:
        sys.exit(f"error: the first losses differ by more than {tolerance}: {losses}")
    return found


def most_operations(device: torch.device, dtype: torch.dtype) -> float:
    """The operations a second that a product of two large matrices reaches."""
    n = SQUARE.get(device.type, SQUARE["cpu"])
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    times = []
    for _ in range(10):
        hardware.synchronize(device)
        started = time.perf_counter()
        for _ in range(3):
            a @ b
        hardware.synchronize(device)
        times.append((time.perf_counter() - started) / 3)
    return 2 * n**3 / min(times)


def step_operations(setting: Setting, method: str) -> float:
    """The operations of the model in a step, as this file's first lines count them."""
    family, s = family_of(setting.model)
    matrices = [
        (len(stored.ours), *(stored.shape if stored.transposed else stored.shape[::-1]))
        for stored in family.layout(s)
        if stored.module.rpartition(".")[2] in targets_of(setting.model) and len(stored.shape) == 2
    ]  # how many linears lie in one, its inputs and its outputs
    n = sum(n_in * n_out for _, n_in, n_out in matrices) + s.vocab_size * s.n_embd
    width = s.n_head * getattr(s, "head_dim", s.n_embd // s.n_head)  # of all queries
    each = (6 if method == "full" else 4) * n + 6 * setting.block * s.n_layer * width
    if method not in ("full", "floor"):
        inputs = (1 if method.startswith("peft") else many for many, _, _ in matrices)
        each += (
            6
            * setting.rank
            * sum(a * n_in + n_out for a, (_, n_in, n_out) in zip(inputs, matrices, strict=True))
        )
    return each * setting.batch * setting.block


# The report

HEAD = (
    f"{'batch':7}  {'dtype':8}  {'checkpoint':10}  {'method':8}  {'ms (lowest to highest)':>22}  "
    f"{'tokens/s':>8}  {'used':>5}  {'MiB':>6}  {'ms ratio':>8}  {'MiB ratio':>9}"
)


def rows(setting: Setting, found: Found, most: float) -> Iterator[tuple[str, results.Row]]:
    """The lines of a table, one a method, each with its row for the file of results. Ratios are to
    the last method."""
    last_times, last_peak = list(found.values())[-1]
    for method, (times, peak) in found.items():
        checkpoint = "on" if setting.grad_checkpoint else "off"
        row = {"model": setting.model, "batch": f"{setting.batch}x{setting.block}"}
        row |= {"dtype": setting.dtype, "clock": setting.clock, "grad_checkpoint": checkpoint}
        row |= {"compile": "on" if setting.compile else "off", "method": method}
        row["beside"] = list(found)[-1]
        if setting.rank != RANK:
            row["rank"] = str(setting.rank)
        cells = [f"{row['batch']:7}", f"{setting.dtype:8}", f"{checkpoint:10}", f"{method:8}"]
        if not times:
            yield "  ".join([*cells, "out of memory"]), row | {"step": "out of memory"}
            continue
        row |= results.ranged("step_ms", [1e3 * t for t in times])
        seconds = row["step_ms"] / 1e3
        row["tokens_per_second"] = setting.batch * setting.block / seconds
        row["used_percent"] = 100 * step_operations(setting, method) / seconds / most
        row["peak_mib"] = peak
        low, middle, high = row["step_ms_low"], row["step_ms"], row["step_ms_high"]
        cells.append(f"{f'{middle:.0f} ({low:.0f} to {high:.0f})':>22}")
        cells.append(f"{row['tokens_per_second']:8.0f}")
        cells.append(f"{row['used_percent']:4.1f}%")
        cells.append(f"{peak:6.0f}")
        if last_times:
            row["step_ratio"] = seconds / statistics.median(last_times)
            row["peak_ratio"] = peak / last_peak
            cells += [f"{row['step_ratio']:8.2f}", f"{row['peak_ratio']:9.2f}"]
        yield "  ".join(cells), row


def report(args: argparse.Namespace) -> Iterator[str]:
    """The lines of the report, each as soon as it is known; the file of results grows with them."""
    name = hardware.device_name(args.device)
    yield f"{name}, torch {torch.__version__}, rounds {args.rounds} of {args.steps} steps"
    yield f"clock {args.clock}, torch.compile {'on' if args.compile else 'off'}"
    yield from args.notes
    most: dict[str, float] = {}
    kept: list[results.Row] = []
    for dtype in args.dtypes:
        most[dtype] = most_operations(args.device, getattr(torch, dtype))
        yield f"A product of large matrices in {dtype}: {most[dtype] / 1e12:.4g}e12 operations/s"
    for model in args.models:
        yield f"\n{model}\n{HEAD}"
        setting = Setting(
            model, "", 0, 0, str(args.device), False, args.compile, args.threads, args.clock,
            args.steps, tuple(args.methods), args.rank,
        )  # fmt: skip
        with contextlib.ExitStack() as stack:
            folder = None
            if args.processes:
                folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
                write_folder(folder, model)
            for dtype, (batch, block), checkpoint in itertools.product(
                args.dtypes, args.batches, args.grad_checkpoint
            ):
                one = replace(
                    setting, dtype=dtype, batch=batch, block=block,
                    grad_checkpoint=checkpoint == "on",
                )  # fmt: skip
                found = measured(folder, one, args.rounds)
                for line, row in rows(one, found, most[dtype]):
                    kept.append(row)
                    yield line
                results.write("families", kept, args.device, args)


# The command line


def batches_of(text: str) -> list[tuple[int, int]]:
    """An argparse type: shapes such as 1x512, separated by commas."""
    shapes = [part.strip() for part in text.split(",")]
    for shape in shapes:
        if not re.fullmatch(r"[1-9]\d{0,6}x[1-9]\d{0,6}", shape):
            raise argparse.ArgumentTypeError(
                f"{shape!a} is not sequences x tokens, both from 1, as in 1x512"
            )
    return [tuple(map(int, shape.split("x"))) for shape in dict.fromkeys(shapes)]


def parse_arguments() -> argparse.Namespace:
    """The checked options; exits with code 2 and a message for a bad one."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        usage=argparse.SUPPRESS,  # so that what is wrong stands alone
    )
    real = ["SmolLM2-135M", "Qwen2.5-0.5B", "Llama-3.2-1B"]
    parser.add_argument(
        "--models", type=names_of(list(MODELS)), default=real, metavar="NAMES",
        help=f"some of {', '.join(MODELS)}, separated by commas (default: {','.join(real)})",
    )  # fmt: skip
    parser.add_argument(
        "--batches", type=batches_of, default=[(1, 512), (4, 256)], metavar="SHAPES",
        help="sequences x tokens, separated by commas (default: 1x512,4x256)",
    )  # fmt: skip
    parser.add_argument(
        "--dtypes", type=names_of(DTYPES), metavar="NAMES",
        help="float32, bfloat16 or both (default: those that the hardware multiplies)",
    )  # fmt: skip
    parser.add_argument(
        "--methods", type=names_of(METHODS), default=METHODS[:2], metavar="NAMES",
        help=f"some of {', '.join(METHODS)}, separated by commas; ratios are to the last (default: "
        "ours,peft)",
    )  # fmt: skip
    parser.add_argument("--rank", type=at_least_one, default=RANK, help="(default: 8)")
    parser.add_argument("--device", type=device_of, default="cpu", help="(default: cpu)")
    parser.add_argument(
        "--grad-checkpoint", type=names_of(["off", "on"]), default=["off"], metavar="WORDS",
        help="off, on, or both: compute activations twice (default: off)",
    )  # fmt: skip
    parser.add_argument("--compile", action="store_true", help="all models through torch.compile")
    parser.add_argument(
        "--processes", action=argparse.BooleanOptionalAction,
        help="each method in a process of its own, all of them in turns (default: on a CPU)",
    )  # fmt: skip
    parser.add_argument("--rounds", type=at_least_one, default=5, help="(default: 5)")
    parser.add_argument(
        "--steps", type=at_least_one, default=1, help="of each method in a round (default: 1)"
    )
    parser.add_argument("--threads", type=at_least_one, help="of each process (default: torch's)")
    parser.add_argument(
        "--clock", choices=("wall", "cpu"), default="wall",
        help="what a step takes: time, or the processor's time, for a busy machine "
        "(default: wall)",
    )  # fmt: skip
    results.add_results_options(parser)
    args = parser.parse_args()
    if args.dtypes is None:
        native = hardware.choose_dtype("auto", args.device)[0] == torch.bfloat16
        args.dtypes = list(DTYPES if native else DTYPES[:1])
    if args.processes is None:
        args.processes = args.device.type == "cpu"
    args.notes = []
    for package, methods in PACKAGES.items():
        missing = importlib.util.find_spec(package) is None
        for method in [method for method in args.methods if missing and method in methods]:
            args.notes.append(f"{method} is left out: {package} is not installed")
            args.methods = [other for other in args.methods if other != method]
    if not args.methods:
        parser.error(f"{args.notes[0]}: pip install -r requirements-dev.txt")
    for model in args.models:
        family, sizes = family_of(model)
        context = sizes.block_size
        if family is GPT2 and not args.processes:
            parser.error("--no-processes draws weights by the folder's names, which GPT-2 has not")
        for batch, block in args.batches:
            if block > context:
                parser.error(f"--batches {batch}x{block} is more than {model}'s context, {context}")
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    hardware.allow_tf32(args.device)
    return args


def main() -> None:
    """Measure and print."""
    if sys.argv[1:2] == ["--worker"]:
        method, folder, setting = sys.argv[2:]
        work(method, Path(folder), Setting(**json.loads(setting)))
        return
    for line in report(parse_arguments()):
        print(line, flush=True)


if __name__ == "__main__":
    main()
