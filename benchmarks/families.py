"""LoRA on the shapes of published models, random weights, beside PEFT on transformers' own models.

    python benchmarks/families.py
    python benchmarks/families.py --models Llama-3.2-1B --batches 1x512 --dtypes bfloat16
    python benchmarks/families.py --device cuda --batches 8x1024 --grad-checkpoint
    python benchmarks/families.py --methods ours-nf4,ours     a base in NF4, over one in bfloat16
    python benchmarks/families.py --methods ours-nf4,peft-nf4     and over PEFT on bitsandbytes'

Writes a model as a Hugging Face folder in bfloat16 and trains adapters of rank 8 on all linears of
its blocks, embeddings and head frozen: with this project as training.py does it, and with PEFT as
its users do: from_pretrained in the dtype of the run, get_peft_model with its defaults, labels
to the model, and autocast where the dtype is bfloat16. A step is forward, loss, backward and fused
AdamW. Both get the same tokens, and both keep freed memory (`hardware.keep_freed_memory`). PEFT's
base in NF4 is what `transformers` loads through bitsandbytes in 4 bits, its scales quantized too.

Each method is a process of its own, and the two take turns, so that ratios pair steps that ran
beside each other. Memory is the peak of the whole process, imports and loading included; on CUDA it
is the most that torch allocated there.
"""

import argparse
import contextlib
import importlib.util
import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import hardware
from benchmarks import results
from benchmarks.measure import at_least_one, device_of, names_of
from lora import store_base
from models.huggingface import read_base
from models.llama import layout, read_config
from trainer.loading import LoraOptions, build_model
from trainer.optimization import make_optimizer
from trainer.settings import Config
from training import LAUNCH_BOUND_OPERATIONS, accumulate

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
    "tiny": {
        "model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "vocab_size": 96,
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-6,
        "max_position_embeddings": 64, "rope_theta": 10000, "tie_word_embeddings": True,
    },
}  # fmt: skip
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
METHODS = ("ours", "peft", "ours-nf4", "peft-nf4")
DTYPES = ("float32", "bfloat16")
TOLERANCES = {"float32": 1e-4, "bfloat16": 0.02}  # of the first losses, which are about ln(vocab)
NF4_TOLERANCE = 0.1  # where a base lies in NF4: bitsandbytes rounds differently on a CPU
RANK, ALPHA, SEED, STD = 8, 16.0, 1337, 0.02
ROWS = 2**11  # of a tensor that are made at a time


@dataclass(frozen=True)
class Setting:
    """What a measurement is of: `batch` sequences of `block` tokens."""

    model: str
    dtype: str
    batch: int
    block: int
    device: str
    grad_checkpoint: bool
    threads: int | None
    clock: str
    steps: int
    methods: tuple[str, str] = METHODS[:2]


# The models


def write_folder(folder: Path, model: str) -> None:
    """A folder of random weights in bfloat16: norms are 1, all else is normal with a deviation of
    STD. It is written in parts, so that no model is ever in memory."""
    config = MODELS[model] | {"hidden_act": "silu", "dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text("{}")  # none is needed
    header, end = {"__metadata__": {"format": "pt"}}, 0
    tensors = layout(read_config(config))
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
                if not stored.name.endswith("norm.weight"):
                    part.normal_(std=STD, generator=generator)
                part.bfloat16().view(torch.int16).numpy().tofile(file)


def our_step(folder: Path, setting: Setting, base_dtype: str) -> Callable[[], float]:
    """A function that takes one step as training.py does and returns the loss."""
    device, dtype = torch.device(setting.device), getattr(torch, setting.dtype)
    base = read_base(folder)
    options = LoraOptions(RANK, ALPHA, 0.0, TARGETS, train_embeddings=False)
    model = build_model(base.family, base.sizes, base, device, 0.0, options, base_dtype)
    model.grad_checkpoint = setting.grad_checkpoint
    tokens = batch_of(setting)
    if dtype != torch.float32:
        store_base(model, dtype, tokens.numel())
    del base
    targets = F.pad(tokens[:, 1:], (0, 1), value=-100)  # as transformers shifts labels
    optimizer = make_optimizer(Config(lora_plus_ratio=1.0), model.train())
    operations = 6 * model.get_parameter_info()["total"] * tokens.numel()
    launch_bound = device.type == "cuda" and operations <= LAUNCH_BOUND_OPERATIONS
    if launch_bound and not setting.grad_checkpoint:
        model = hardware.in_cuda_graphs(model, (tokens, targets), dtype)

    def autocast() -> torch.autocast:
        return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)

    def step() -> float:
        loss = accumulate(model, [(tokens, targets)], [1.0], autocast)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return step


def peft_step(folder: Path, setting: Setting, base_dtype: str) -> Callable[[], float]:
    """The same with PEFT on transformers' model."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    device, dtype = torch.device(setting.device), getattr(torch, setting.dtype)
    options: dict[str, Any] = {"dtype": dtype}
    if base_dtype == "nf4":
        options["device_map"] = setting.device
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
    base = AutoModelForCausalLM.from_pretrained(folder, **options)
    if setting.grad_checkpoint:
        base.gradient_checkpointing_enable({"use_reentrant": False})
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=TARGETS, task_type="CAUSAL_LM")
    model: nn.Module = get_peft_model(base.to(device), config).train()
    tokens = batch_of(setting)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3, fused=True)

    def step() -> float:
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return step


def batch_of(setting: Setting) -> torch.Tensor:
    """The same random tokens in every process: (batch, block)."""
    generator = torch.Generator().manual_seed(SEED)
    shape = setting.batch, setting.block
    tokens = torch.randint(MODELS[setting.model]["vocab_size"], shape, generator=generator)
    return tokens.to(setting.device)


# The measurements


class Worker:
    """A process that trains with one method, and takes steps when it is asked."""

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
    """What the process of a Worker does: answer `loss` with that of a step, `time` with the seconds
    of a step, and `peak` with its memory in MiB."""
    if setting.threads is not None:
        torch.set_num_threads(setting.threads)
    device = torch.device(setting.device)
    hardware.keep_freed_memory()
    hardware.allow_tf32(device)
    method, _, base_dtype = method.partition("-")
    step = {"ours": our_step, "peft": peft_step}[method](folder, setting, base_dtype or "auto")
    clock = time.process_time if setting.clock == "cpu" else time.perf_counter
    for line in sys.stdin:
        if line.strip() == "loss":
            answer = step()
        elif line.strip() == "time":
            started = clock()
            for _ in range(setting.steps):
                step()
            answer = (clock() - started) / setting.steps
        elif device.type == "cuda":
            answer = torch.cuda.max_memory_allocated(device) / 2**20
        else:
            answer = hardware.peak_memory(device)
        print("answer", answer, flush=True)


def measured(folder: Path, setting: Setting, rounds: int) -> dict[str, tuple[list[float], float]]:
    """Of each method the seconds of a step in each round, and the peak in MiB.

    Exits with a message where the first losses differ by more than rounding.
    """
    methods = setting.methods
    workers = {method: Worker(method, folder, setting) for method in methods}
    try:
        losses = {method: worker.ask("loss") for method, worker in workers.items()}
        in_nf4 = any(method.endswith("nf4") for method in methods)
        tolerance = NF4_TOLERANCE if in_nf4 else TOLERANCES[setting.dtype]
        if not abs(losses[methods[0]] - losses[methods[1]]) <= tolerance:
            sys.exit(f"error: the first losses differ by more than {tolerance}: {losses}")
        times: dict[str, list[float]] = {method: [] for method in methods}
        for i in range(rounds):
            for method in methods if i % 2 == 0 else reversed(methods):
                times[method].append(workers[method].ask("time"))
        return {method: (times[method], workers[method].ask("peak")) for method in methods}
    finally:
        for worker in workers.values():
            worker.close()


# The report


def head(first: str, second: str) -> str:
    """The names of the columns, where these two methods are compared."""
    return (
        f"{'batch':7}  {'dtype':8}  {first + ', ms':>22}  {second + ', ms':>22}  ratio  "
        f"{first + ', MiB':>13}  {second + ', MiB':>13}  ratio"
    )


def row(setting: Setting, found: dict[str, tuple[list[float], float]]) -> str:
    """A line of the table: medians with the lowest and highest, and ratios of the first method's
    to the second's."""
    cells = [f"{setting.batch}x{setting.block:<5}", f"{setting.dtype:8}"]
    for times, _ in found.values():
        low, middle, high = (1000 * f(times) for f in (min, statistics.median, max))
        cells.append(f"{f'{middle:.0f} ({low:.0f} to {high:.0f})':>22}")
    (first, first_peak), (second, second_peak) = found.values()
    cells.append(f"{statistics.median(first) / statistics.median(second):5.2f}")
    cells += [f"{first_peak:13.0f}", f"{second_peak:13.0f}", f"{first_peak / second_peak:5.2f}"]
    return "  ".join(cells)


def as_row(setting: Setting, found: dict[str, tuple[list[float], float]]) -> results.Row:
    """What the line of the table says, for the file of results."""
    first, second = setting.methods
    kept = {"model": setting.model, "batch": f"{setting.batch}x{setting.block}"}
    kept |= {"dtype": setting.dtype, "clock": setting.clock, "method": first, "beside": second}
    kept["grad_checkpoint"] = "on" if setting.grad_checkpoint else "off"
    (times, peak), (second_times, second_peak) = found.values()
    kept |= results.ranged("step_ms", [1000 * t for t in times])
    kept |= results.ranged("beside_ms", [1000 * t for t in second_times])
    kept["step_ratio"] = kept["step_ms"] / kept["beside_ms"]
    kept |= {"peak_mib": peak, "beside_mib": second_peak, "peak_ratio": peak / second_peak}
    return kept


def report(args: argparse.Namespace) -> Iterator[str]:
    """The lines of the report, each as soon as it is known; the file of results grows with them."""
    name = hardware.device_name(args.device)
    yield f"{name}, torch {torch.__version__}, rounds {args.rounds} of {args.steps} steps"
    yield f"clock {args.clock}, gradient checkpointing {'on' if args.grad_checkpoint else 'off'}"
    kept: list[results.Row] = []
    for model in args.models:
        with tempfile.TemporaryDirectory() as folder:
            write_folder(Path(folder), model)
            yield f"\n{model}\n{head(*args.methods)}"
            setting = Setting(
                model, "", 0, 0, str(args.device), args.grad_checkpoint, args.threads, args.clock,
                args.steps, tuple(args.methods),
            )  # fmt: skip
            for dtype in args.dtypes:
                for batch, block in args.batches:
                    one = replace(setting, dtype=dtype, batch=batch, block=block)
                    found = measured(Path(folder), one, args.rounds)
                    kept.append(as_row(one, found))
                    results.write("families", kept, args.device, args)
                    yield row(one, found)


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
    real = [name for name in MODELS if name != "tiny"]
    parser.add_argument(
        "--models", type=names_of(list(MODELS)), default=real, metavar="NAMES",
        help=f"some of {', '.join(MODELS)}, separated by commas (default: all but tiny)",
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
        help=f"two of {', '.join(METHODS)}, separated by a comma (default: ours,peft)",
    )  # fmt: skip
    parser.add_argument("--device", type=device_of, default="cpu", help="(default: cpu)")
    parser.add_argument("--grad-checkpoint", action="store_true", help="compute activations twice")
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
    if len(args.methods) != 2:
        parser.error(f"--methods {','.join(args.methods)} is not two methods")
    packages = ["transformers", "peft"]
    packages += ["bitsandbytes"] if "peft-nf4" in args.methods else []
    for package in packages:
        if importlib.util.find_spec(package) is None:
            parser.error(f"the package {package} is missing: pip install -r requirements-dev.txt")
    for model in args.models:
        context = MODELS[model]["max_position_embeddings"]
        for batch, block in args.batches:
            if block > context:
                parser.error(f"--batches {batch}x{block} is more than {model}'s context, {context}")
    if args.threads is not None:
        torch.set_num_threads(args.threads)
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
