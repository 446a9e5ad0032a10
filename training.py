"""Train a small GPT-style language model on text, or fine-tune it with LoRA.

    python training.py                                  train every weight
    DATA=python-docs USE_LORA=True python training.py   fine-tune that model with LoRA
    python training.py --help                           every variable

The environment configures everything (config.py). Facts go to stdout, the progress bar to stderr.
"""

import dataclasses
import math
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

import device as hardware
from checkpoint import SHAPE, Checkpoint, base_state, load_base, read_checkpoint, save_checkpoint
from config import Config, ConfigError, help_table
from data import (
    Corpus,
    DataError,
    check_length,
    load_corpus,
    training_batch,
    validation_windows,
    windows_batch,
)
from lora import FileError, lora_layers, save_adapter, store_base
from lora.files import fingerprint
from models.bigram_lm_v2_lora import BigramLanguageModelLoRA

DEFAULT_INPUT = Path(__file__).resolve().parent / "data" / "input.txt"
VOCAB_SIZE = 256  # tokens are bytes


class TrainingError(ValueError):
    """A run that cannot go on, such as one whose loss is no longer a number."""


@dataclass(frozen=True)
class Run:
    """What a run works with."""

    config: Config
    device: torch.device
    dtype: torch.dtype
    corpus: Corpus
    base_path: str | None  # None for random weights
    base_id: str  # fingerprint of the weights that the run starts from
    model: BigramLanguageModelLoRA
    last: Path  # where the weights or the adapter of the last evaluation go
    best: Path  # and those of the best evaluation

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)


def main(arguments: list[str]) -> int:
    """Run the script; returns its exit code: 0, or 2 for input that cannot be used."""
    if sys.stdout is not None:  # which it is when the caller closed it
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        if arguments in (["--help"], ["-h"]):
            say(__doc__.strip(), "", *format_table(help_table()))
            return 0
        if arguments:
            raise ConfigError(
                f"{arguments[0]!r} is not understood: configuration comes from the environment, "
                "as in MAX_STEPS=200 python training.py; --help lists the variables"
            )
        run = set_up(Config.from_environment(os.environ))
        train(run)
        print_sample(run)
    except (ConfigError, DataError, FileError, TrainingError, hardware.DeviceError) as error:
        return fail(str(error), 2)
    except (MemoryError, RuntimeError) as error:  # torch.OutOfMemoryError is a RuntimeError
        if not hardware.is_out_of_memory(error):
            raise
        variables = "BATCH_SIZE, BLOCK_SIZE, N_EMBD, N_LAYER or LORA_RANK"
        return fail(f"not enough memory; lower {variables}", 2)
    except KeyboardInterrupt:
        return fail("interrupted; the files of the last evaluation are as they were", 130)
    except OSError as error:
        # The record cannot be written: a full disk, or its reader has gone (`... | head`). Python
        # would try again at exit, and complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return fail(f"stdout: {error.strerror}", 2)
    return 0


def fail(message: str, exit_code: int) -> int:
    print(f"error: {message}", file=sys.stderr)
    return exit_code


def set_up(config: Config) -> Run:
    """Choose device and dtype, open the data, build the model on its base, and print it all."""
    hardware.keep_freed_memory()
    torch.manual_seed(config.seed)
    if config.num_threads is not None:
        torch.set_num_threads(config.num_threads)
    device, device_reason = hardware.choose_device(config.device)
    dtype, dtype_reason = hardware.choose_dtype(config.dtype, device)
    last, best = output_files(config)
    base = find_base(config, last, best)
    shape = choose_shape(config, base)
    config = dataclasses.replace(config, **{name: shape[name] for name in SHAPE[1:]})
    corpus = load_corpus(config.data, DEFAULT_INPUT)
    check_length(corpus, shape["block_size"])
    model = BigramLanguageModelLoRA(
        **shape,
        device=device,
        dropout=config.dropout,
        use_lora=config.use_lora,
        lora_rank=config.lora_rank,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
    )
    if base is not None:
        load_base(model, base)
    base_id = fingerprint(base_state(model))
    if dtype != torch.float32:
        store_base(model, dtype, tokens=config.batch_size * shape["block_size"])

    say("Configuration (* set in the environment):", *indent(config.describe()))
    say(f"Device: {device} ({hardware.device_name(device)}), {device_reason}")
    say(f"dtype: {str(dtype).removeprefix('torch.')}, {dtype_reason}")
    say("Data:", *indent(corpus.describe()))
    say(describe_base(base, base_id, corpus))
    say(*describe_parameters(config, model))
    for note in notes(config, base, model):
        say(f"Note: {note}")
    base_path = base.path if base is not None else None
    return Run(config, device, dtype, corpus, base_path, base_id, model, last, best)


def train(run: Run) -> None:
    """The loop: steps, evaluations, files, and the closing summary."""
    config, model = run.config, run.model
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = make_optimizer(config, parameters)
    tokens_per_step = config.batch_size * config.grad_accum_steps * model.block_size
    windows = validation_windows(
        run.corpus.validation, config.eval_batches * config.batch_size, model.block_size
    )
    losses: list[Tensor] = []  # of the steps since the last evaluation
    step_times: list[float] = []
    best_loss = math.inf
    sizes: dict[Path, int] = {}
    started = time.perf_counter()

    with tqdm(total=config.max_steps, unit="step", disable=not shows_progress(config)) as bar:
        for step in range(config.max_steps + 1):
            if step % config.eval_interval == 0 or step == config.max_steps:
                train_loss = torch.stack(losses).mean().item() if losses else math.nan
                val_loss, val_error = evaluate(run, windows)
                recent = step_times[-len(losses) :] if losses else []
                with tqdm.external_write_mode():
                    say(
                        f"step {step} | train loss {train_loss:.4f} | val loss {val_loss:.4f} "
                        f"+- {val_error:.4f} | lr {learning_rate(config, step):.2e} | tokens/s "
                        f"{rate(tokens_per_step, recent):.0f} | "
                        f"elapsed {time.perf_counter() - started:.1f} s"
                    )
                check_finite(val_loss, step, config)
                losses.clear()
                if step > 0:
                    sizes[run.last] = save(run, run.last, step, val_loss)
                    if val_loss < best_loss:
                        best_loss = val_loss
                        sizes[run.best] = save(run, run.best, step, val_loss)
                if step == config.max_steps:
                    break

            step_started = time.perf_counter()
            loss = torch.zeros((), device=run.device)
            for micro_step in range(config.grad_accum_steps):
                shape = (config.batch_size, model.block_size)
                x, y = training_batch(
                    run.corpus.train, *shape, config.seed, step, micro_step, run.device
                )
                with run.autocast():
                    _, micro_loss = model(x, y)
                micro_loss = micro_loss / config.grad_accum_steps
                micro_loss.backward()
                loss += micro_loss.detach()
            if config.grad_clip > 0:
                nn.utils.clip_grad_norm_(parameters, config.grad_clip)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(config, step)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            losses.append(loss)
            if step % 10 == 0:
                check_finite(loss.item(), step, config)
                bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
            hardware.synchronize(run.device)
            step_times.append(time.perf_counter() - step_started)
            bar.update()

    say(
        f"Best validation loss: {best_loss:.4f}",
        f"Final validation loss: {val_loss:.4f}",
        f"Training time: {time.perf_counter() - started:.1f} s",
        f"Median step time: {statistics.median(step_times) * 1000:.1f} ms",
        f"Tokens per second: {rate(tokens_per_step, step_times):.0f}",
        f"Peak memory: {hardware.peak_memory(run.device):.0f} MiB",
        *(f"Wrote {path}: {size / 2**20:.2f} MiB" for path, size in sizes.items()),
    )


def learning_rate(config: Config, step: int) -> float:
    """Linear warm-up, then a cosine from LEARNING_RATE to MIN_LEARNING_RATE at the last step."""
    warmup = min(config.warmup_steps, config.max_steps // 2)
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    low = config.min_learning_rate
    if low is None:
        low = config.learning_rate / 10
    progress = (step - warmup) / max(1, config.max_steps - 1 - warmup)
    return low + (config.learning_rate - low) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def make_optimizer(config: Config, parameters: list[nn.Parameter]) -> torch.optim.AdamW:
    """Fused AdamW; weight decay on matrices only."""
    matrices = [p for p in parameters if p.dim() >= 2]
    vectors = [p for p in parameters if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": config.weight_decay}]
    if vectors:
        groups.append({"params": vectors, "weight_decay": 0.0})
    betas = (config.adam_beta1, config.adam_beta2)
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=betas, fused=True)


@torch.no_grad()
def evaluate(run: Run, windows: np.ndarray) -> tuple[float, float]:
    """Mean validation loss in nats per byte over the windows, and its standard error."""
    run.model.eval()
    losses = []
    for batch in np.array_split(windows, math.ceil(len(windows) / run.config.batch_size)):
        x, y = windows_batch(run.corpus.validation, batch, run.model.block_size, run.device)
        with run.autocast():
            logits, _ = run.model(x)  # (B, T, vocab_size)
        losses.append(F.cross_entropy(logits.float().mT, y, reduction="none").mean(1))  # (B,)
    run.model.train()
    loss = torch.cat(losses).cpu().double()
    error = loss.std().item() / math.sqrt(len(loss)) if len(loss) > 1 else 0.0
    return loss.mean().item(), error


def check_finite(loss: float, step: int, config: Config) -> None:
    if not math.isfinite(loss):
        raise TrainingError(
            f"the loss became {loss} by step {step}: lower LEARNING_RATE "
            f"({config.learning_rate:g}); files of earlier evaluations are as they were"
        )


def save(run: Run, path: Path, step: int, val_loss: float) -> int:
    """Write the checkpoint, or under LoRA the adapter; returns the file's size in bytes."""
    metadata = {"step": step, "val_loss": val_loss}
    metadata |= {"data": run.corpus.name, "checksum": run.corpus.checksum}
    shape = {name: getattr(run.model, name) for name in SHAPE}
    if not run.config.use_lora:
        return save_checkpoint(path, run.model, shape, metadata)
    metadata |= {"shape": shape, "base_checkpoint": run.base_path, "seed": run.config.seed}
    metadata |= {name: getattr(run.config, f"lora_{name}") for name in ("rank", "alpha", "dropout")}
    return save_adapter(path, run.model, run.base_id, metadata)


def print_sample(run: Run) -> None:
    """Print text that the model writes after a line break."""
    length = run.config.sample_tokens
    if length == 0:
        return
    torch.manual_seed(run.config.seed)
    start = torch.tensor([list(b"\n")], device=run.device)
    with run.autocast():
        tokens = run.model.generate(start, length, temperature=0.8, top_k=50)[0, 1:]
    text = bytes(tokens.tolist()).decode("utf-8", errors="replace")
    text = "".join(c if c.isprintable() or c in "\n\t" else "?" for c in text)
    say(f"Sample ({length} bytes, temperature 0.8, top_k 50):", *indent(text.split("\n")))


def output_files(config: Config) -> tuple[Path, Path]:
    """The files for the last and the best evaluation, in a folder that can be written."""
    folder = Path(config.output_folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise ConfigError(f"OUT_DIR: {folder} cannot be written: {error.strerror}") from error
    mode = "lora" if config.use_lora else "full"
    return folder / f"{mode}.pt", folder / f"{mode}-best.pt"


def find_base(config: Config, last: Path, best: Path) -> Checkpoint | None:
    """The checkpoint to start from: BASE_CHECKPOINT, or for LoRA the last full run's."""
    path = config.base_checkpoint
    if path is None:
        default = Path(config.output_folder) / "full.pt"
        return read_checkpoint(default) if config.use_lora and default.exists() else None
    base = read_checkpoint(path)
    if any(output.exists() and output.samefile(path) for output in (last, best)):
        raise ConfigError(
            f"BASE_CHECKPOINT={path} is a file that this run would replace; "
            "set OUT_DIR to another folder"
        )
    return base


def choose_shape(config: Config, base: Checkpoint | None) -> dict[str, int]:
    """The model's shape: the base's, or without one the configuration's."""
    if base is None:
        if config.n_embd % config.n_head != 0:
            raise ConfigError(
                f"N_EMBD={config.n_embd} is not divisible by N_HEAD={config.n_head}; "
                "the heads share the width evenly"
            )
        return {"vocab_size": VOCAB_SIZE} | {name: getattr(config, name) for name in SHAPE[1:]}
    if base.shape["vocab_size"] != VOCAB_SIZE:
        raise FileError(f"{base.path} has vocab_size={base.shape['vocab_size']}, not {VOCAB_SIZE}")
    for name in SHAPE[1:]:
        wanted = getattr(config, name)
        if name.upper() in config.explicit and wanted != base.shape[name]:
            raise ConfigError(
                f"{name.upper()}={wanted} does not fit the base {base.path}, whose {name} is "
                f"{base.shape[name]}; unset {name.upper()} to take the base's"
            )
    return base.shape


def describe_base(base: Checkpoint | None, base_id: str, corpus: Corpus) -> str:
    if base is None:
        return f"Base: none, random weights (fingerprint {base_id})"
    facts = base.metadata
    val_loss = facts.get("val_loss")
    reached = f" to validation loss {val_loss:.4f}" if isinstance(val_loss, float) else ""
    same = "the same data" if facts.get("checksum") == corpus.checksum else "other data"
    return (
        f"Base: {base.path} (fingerprint {base_id}), {facts.get('step')} steps on "
        f"{facts.get('data')}{reached}; this run trains on {same}"
    )


def describe_parameters(config: Config, model: BigramLanguageModelLoRA) -> list[str]:
    info = model.get_parameter_info()
    if not config.use_lora:
        return [
            "Parameter Statistics:",
            f"   Total parameters: {info['total']:,}",
            f"   Trainable (all): {info['trainable']:,}",
        ]
    return [
        "Using LoRA for efficient fine-tuning",
        f"   LoRA rank: {config.lora_rank}, alpha: {config.lora_alpha}, "
        f"dropout: {config.lora_dropout}",
        "Parameter Statistics:",
        f"   Total parameters: {info['total']:,}",
        f"   Trainable (LoRA): {info['trainable']:,}",
        f"   Frozen (base): {info['frozen']:,}",
        f"   LoRA percentage: {info['lora_percentage']:.2f}%",
        f"   Of the trainable: adapters {info['lora']:,}, embeddings {info['embedding']:,}",
        f"   Cost savings: Training only {info['lora_percentage']:.2f}% of parameters!",
    ]


def notes(config: Config, base: Checkpoint | None, model: nn.Module) -> list[str]:
    """What is legal and probably not what the user meant."""
    found = []
    unused = sorted(name for name in config.explicit if name.startswith("LORA_"))
    if unused and not config.use_lora:
        found.append(f"{', '.join(unused)} set without USE_LORA=True: no effect")
    if config.use_lora and base is None:
        found.append(
            f"there is no base in {config.output_folder}, so the adapters train on random weights, "
            "which cannot work well; run `python training.py` first or set BASE_CHECKPOINT"
        )
    small = [n for n, m in lora_layers(model).items() if config.lora_rank > min(m.weight.shape)]
    if small:
        found.append(
            f"LORA_RANK={config.lora_rank} is larger than the smaller side of {len(small)} layers, "
            f"among them {small[0]}: such an adapter costs more than the matrix and can do no more"
        )
    return found


def rate(tokens_per_step: int, step_times: list[float]) -> float:
    """Tokens per second over steps of these durations in seconds."""
    return tokens_per_step * len(step_times) / sum(step_times) if step_times else 0.0


def shows_progress(config: Config) -> bool:
    return config.progress and sys.stderr.isatty()


def say(*lines: str) -> None:
    """Print facts to the record, whole lines at once."""
    for line in lines:
        print(line, flush=True)


def indent(lines: Iterable[str]) -> list[str]:
    return [f"   {line}".rstrip() for line in lines]


def format_table(rows: list[tuple[str, str, str]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in (0, 1)]
    return [f"{name:{widths[0]}}  {default:{widths[1]}}  {text}" for name, default, text in rows]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
