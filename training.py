"""Train a small GPT-style language model on text, or fine-tune it with LoRA.

    python training.py                                  train every weight
    DATA=python-docs USE_LORA=True python training.py   fine-tune that model with LoRA
    RESUME=True python training.py                      go on with an interrupted run
    torchrun --standalone --nproc_per_node=2 training.py   in two processes (distributed.py)
    EVAL_ONLY=True python training.py                   the loss of a model on all validation data
    MERGE=True ADAPTERS=out/lora.pt python training.py  write base and adapter as one checkpoint
    python training.py --help                           every variable

The environment configures everything (config.py). Facts go to stdout, the progress bar to stderr.
"""

import math
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

import device as hardware
import distributed
from checkpoint import save_checkpoint, shape_of
from config import Config, help_table
from data import (
    IGNORED,
    RecordCorpus,
    decode,
    encode,
    end_token,
    training_batch,
    validation_windows,
    windows_batch,
)
from lora import lora_layers, merge_adapter, save_adapter
from metrics import Metrics
from resume import Progress, StopSignals, resume, save_training_state
from run import (
    Interrupted,
    Run,
    TrainingError,
    asks_for_help,
    exit_code_of,
    facts,
    format_table,
    identity,
    indent,
    say,
    set_up,
    trains,
)

# Operations of a step up to which a GPU is done with most kernels before Python starts the next.
SMALL_STEP = 2**42

EVALUATION = (
    "step {step} | train loss {train_loss:.4f} | val loss {val_loss:.4f} +- {val_error:.4f} | "
    "lr {learning_rate:.2e} | tokens/s {tokens_per_second:.0f} | elapsed {elapsed:.1f} s"
)


def main(arguments: list[str]) -> int:
    """Run the script; returns its exit code: 0, or 2 for input that cannot be used."""
    return exit_code_of(lambda: work(arguments))


def work(arguments: list[str]) -> None:
    if asks_for_help(arguments, "MAX_STEPS=200 python training.py"):
        say(*__doc__.strip().split("\n"), "", *format_table(help_table(Config)))
        return
    run = set_up(Config.from_environment(os.environ))
    if run.config.eval_only:
        print_evaluation(run)
    elif run.config.merge:
        write_merged(run)
    else:
        train(run)
        print_sample(run)
    distributed.leave()


def train(run: Run) -> None:
    """The loop: steps, evaluations, files, and the closing summary."""
    config = run.config
    hardware.allow_tf32(run.device)
    optimizer = make_optimizer(config, run.model)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    progress = resume(run, optimizer) if config.resume else Progress()
    traffic = distributed.Traffic()
    model = distributed.replicate(run.model, traffic)
    compile_time = None
    if config.compile:
        model, compile_time = compiled(run, model)
        traffic.bytes = 0  # of the batch that compiling took
    elif waits_for_python(run):
        model = hardware.in_cuda_graphs(model, batches_of(run, 0)[0], run.dtype)
    timer = hardware.StepTimer(run.device, progress.step_times)
    first_step = progress.step
    windows = validation_windows(
        run.corpus.validation, config.eval_batches * config.batch_size, config.block_size
    )
    replaces = not config.resume and run.files.resume.exists()  # the state of an earlier run
    replaces = distributed.largest(int(replaces)) > 0
    sizes: dict[Path, int] = {}
    metrics = Metrics(run.files.metrics, facts(run), progress.evaluated)
    started = time.perf_counter() - progress.elapsed

    def save_progress() -> None:
        progress.elapsed = time.perf_counter() - started
        sizes[run.files.resume] = save_training_state(
            run.files.resume, run.model, optimizer, identity(run), progress.plain()
        )

    with (
        StopSignals() as stop,
        tqdm(
            total=config.max_steps,
            initial=progress.step,
            unit="step",
            disable=not shows_progress(config),
        ) as bar,
    ):
        for step in range(progress.step, config.max_steps + 1):
            due = step % config.eval_interval == 0 or step == config.max_steps
            signal = distributed.largest(stop.received)
            if due or signal:
                timer.flush()
            if due and progress.evaluated < step:
                evaluation = evaluation_at(step, run, windows, progress)
                evaluation["elapsed"] = time.perf_counter() - started
                progress.val_loss = evaluation["val_loss"]
                metrics.write(evaluation)
                with tqdm.external_write_mode():
                    say(EVALUATION.format(**evaluation))
                check_finite(progress.val_loss, step, config)
                progress.losses, progress.evaluated = [], step
                if step > 0:
                    sizes[run.files.last] = save(run, run.files.last, step, progress.val_loss)
                    if progress.val_loss < progress.best_loss:
                        progress.best_loss = progress.val_loss
                        sizes[run.files.best] = save(run, run.files.best, step, progress.val_loss)
                    save_progress()
            if step == config.max_steps:
                break
            if signal and replaces and run.files.resume not in sizes:
                raise Interrupted(
                    f"interrupted after step {step}, and nothing was saved: this run had evaluated "
                    f"nothing yet, and {run.files.resume} is of an earlier one",
                    signal,
                )
            if signal:
                save_progress()
                raise Interrupted(
                    f"interrupted after step {step}, saved in {run.files.resume}; "
                    "the same command with RESUME=True goes on from there",
                    signal,
                )

            timer.begin()
            loss = torch.zeros((), device=run.device)
            batches = batches_of(run, step)
            for i, (batch, part) in enumerate(zip(batches, loss_parts(run, batches), strict=True)):
                with distributed.averaging(model, now=i == len(batches) - 1):
                    with run.autocast():
                        batch_loss = model(*batch)[-1]  # and let go of the logits
                    batch_loss = batch_loss * part
                    batch_loss.backward()
                loss += batch_loss.detach()
            if config.grad_clip > 0:
                nn.utils.clip_grad_norm_(parameters, config.grad_clip)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(config, step) * group["ratio"]
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            progress.losses.append(loss)
            if step % 10 == 9:  # when the timer waits for a GPU anyway
                check_finite(loss.item(), step, config)
                speed = tokens_per_second(config, progress.step_times[-10:])
                shown = {"loss": f"{loss.item():.3f}", "lr": f"{learning_rate(config, step):.1e}"}
                bar.set_postfix(shown | {"tokens/s": f"{speed:.0f}"}, refresh=False)
            timer.end()
            progress.step = step + 1
            bar.update()

    summary = {
        "best_val_loss": progress.best_loss,
        "final_val_loss": progress.val_loss,
        "training_time": time.perf_counter() - started,
        "median_step_time": statistics.median(progress.step_times),
        "tokens_per_second": tokens_per_second(config, progress.step_times),
        "peak_memory": hardware.peak_memory(run.device),
    }
    if compile_time is not None:
        summary["compile_time"] = compile_time
    if traffic.bytes:
        summary["bytes_exchanged"] = traffic.bytes / (config.max_steps - first_step)
    metrics.write({"summary": summary | {"files": {str(p): size for p, size in sizes.items()}}})
    say(
        f"Best validation loss: {summary['best_val_loss']:.4f}",
        f"Final validation loss: {summary['final_val_loss']:.4f}",
        f"Training time: {summary['training_time']:.1f} s",
        f"Median step time: {summary['median_step_time'] * 1000:.1f} ms",
        f"Tokens per second: {summary['tokens_per_second']:.0f}",
        f"Peak memory: {summary['peak_memory']:.0f} MiB",
        *describe_costs(run, summary),
        *(f"Wrote {path}: {size / 2**20:.2f} MiB" for path, size in sizes.items()),
    )


def batches_of(run: Run, step: int) -> list[tuple[Tensor, ...]]:
    """This process's share of the batches of a step, each what the model takes."""
    config, share = run.config, (distributed.rank(), distributed.size())
    shape, n = (config.batch_size, config.block_size), config.grad_accum_steps
    return [
        training_batch(run.corpus.train, *shape, config.seed, number, run.device, share)
        for number in range(step * n, (step + 1) * n)
    ]


def loss_parts(run: Run, batches: list[tuple[Tensor, ...]]) -> Tensor | list[float]:
    """What each batch's loss counts in the mean over the step, and all processes: of text each as
    much, but of records as many tokens as it counts, for a loss is a mean over these."""
    if not isinstance(run.corpus, RecordCorpus):
        return [1 / len(batches)] * len(batches)
    counted = torch.stack([(targets != IGNORED).sum() for _, targets, _ in batches])
    return counted * distributed.size() / distributed.total(counted.sum())


def compiled(run: Run, model: nn.Module) -> tuple[nn.Module, float]:
    """The model through torch.compile, and the seconds that it took to compile, which is done here
    with a first batch that leaves no trace."""
    started = time.perf_counter()
    in_graphs = waits_for_python(run)
    fast = torch.compile(model, mode="reduce-overhead" if in_graphs else "default")
    try:
        for _ in range(2 if in_graphs else 1):  # CUDA graphs are made at the second time
            with torch.random.fork_rng(hardware.gpus(run.device)), run.autocast():
                loss = fast(*batches_of(run, 0)[0])[1]
            loss.backward()
            model.zero_grad(set_to_none=True)
    except torch._dynamo.exc.TorchDynamoException as error:
        reason = str(error).strip().splitlines()[0]
        raise TrainingError(f"COMPILE=True: torch cannot compile the model: {reason}") from error
    hardware.synchronize(run.device)
    return fast, time.perf_counter() - started


def waits_for_python(run: Run) -> bool:
    """Whether a GPU would wait for most kernels of a step, and can have them in CUDA graphs."""
    config = run.config
    operations = 6 * run.model.get_parameter_info()["total"] * config.tokens_per_step
    return (
        run.device.type == "cuda"
        and operations <= SMALL_STEP
        and distributed.size() == 1
        and config.grad_accum_steps == 1
        and not config.grad_checkpoint
    )


def describe_costs(run: Run, summary: dict[str, float]) -> list[str]:
    """What compiling and working in several processes cost, where it was done."""
    lines = []
    if "compile_time" in summary:
        lines.append(f"Compile time: {summary['compile_time']:.1f} s, before the training time")
    if "bytes_exchanged" in summary:
        info = run.model.get_parameter_info()
        full = info["total"] - info["lora"]
        if run.model.copied_head:  # full fine-tuning has it once, as the embedding
            full -= run.model.lm_head.weight.numel()
        lines.append(
            f"Gradients exchanged: {summary['bytes_exchanged']:,.0f} bytes a step by each process; "
            f"full fine-tuning's would be {4 * full:,}"
        )
    return lines


def evaluation_at(step: int, run: Run, windows: np.ndarray, progress: Progress) -> dict[str, float]:
    """What an evaluation after `step` steps finds, by the names that EVALUATION has."""
    losses = progress.losses
    train_loss = distributed.mean(torch.stack(losses).mean().cpu()).item() if losses else math.nan
    val_loss, val_error = evaluate(run, windows)
    return {
        "step": step,
        "train_loss": train_loss,
        "val_loss": val_loss,
        "val_error": val_error,
        "learning_rate": learning_rate(run.config, step),
        "tokens_per_second": tokens_per_second(
            run.config, progress.step_times[-len(losses) :] if losses else []
        ),
    }


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


def make_optimizer(config: Config, model: nn.Module) -> torch.optim.AdamW:
    """Fused AdamW of what trains; weight decay on matrices only.

    The adapters' B, which start at zero, learn LORA_PLUS_RATIO times as fast as the rest (LoRA+,
    Hayou et al. 2024).
    """
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            groups.setdefault((name.endswith("lora_B"), p.dim() >= 2), []).append(p)
    return torch.optim.AdamW(
        [
            {
                "params": group,
                "ratio": config.lora_plus_ratio if is_B else 1.0,
                "weight_decay": config.weight_decay if is_matrix else 0.0,
            }
            for (is_B, is_matrix), group in groups.items()
        ],
        lr=config.learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        fused=True,
    )


def evaluate(run: Run, windows: np.ndarray) -> tuple[float, float]:
    """Mean validation loss in nats per token over the windows, and its standard error (that of a
    ratio of sums, since windows of records differ in how many tokens count)."""
    losses, counts = window_losses(run, windows, run.config.block_size)
    n, loss = len(losses), (losses.sum() / counts.sum()).item()
    spread = (losses - loss * counts).square().sum().sqrt() / counts.sum()
    return loss, spread.item() * math.sqrt(n / (n - 1)) if n > 1 else 0.0


@torch.no_grad()
def window_losses(run: Run, windows: np.ndarray, length: int) -> tuple[Tensor, Tensor]:
    """The sum of the losses in each window of `length` tokens of the validation data, in nats, and
    how many tokens it counts: (n,) float64 each."""
    run.model.eval()
    losses, counts, numbers = [], [], []
    batches = np.array_split(np.arange(len(windows)), -(-len(windows) // run.config.batch_size))
    for batch in tqdm(
        batches, "evaluating", disable=trains(run.config) or not shows_progress(run.config)
    ):
        numbers.append(batch[distributed.rank() :: distributed.size()])
        offsets = windows[numbers[-1]]
        x, y, *segments = windows_batch(run.corpus.validation, offsets, length, run.device)
        with run.autocast():
            logits, _ = run.model(x, None, *segments)  # (B, T, vocab_size)
        loss = F.cross_entropy(logits.float().flatten(0, 1), y.flatten(), reduction="none")
        losses.append(loss.view(y.shape).sum(1))  # (B,), with 0 for what is not counted
        counts.append((y != IGNORED).sum(1))
    run.model.train()
    found = torch.zeros(2, len(windows), dtype=torch.float64)
    mine = torch.stack([torch.cat(losses), torch.cat(counts)])
    found[:, np.concatenate(numbers)] = mine.cpu().double()
    losses, counts = distributed.total(found)  # each window is one process's
    return losses, counts


def check_finite(loss: float, step: int, config: Config) -> None:
    if not math.isfinite(loss):
        raise TrainingError(
            f"the loss became {loss} by step {step}: lower LEARNING_RATE "
            f"({config.learning_rate:g}); files of earlier evaluations are as they were"
        )


def save(run: Run, path: Path, step: int, val_loss: float) -> int:
    """Write the checkpoint, or under LoRA the adapter; returns the file's size in bytes.

    Every process must call it; the first writes, and the others return 0.
    """
    with distributed.whole(run.model):
        return write_model(run, path, step, val_loss) if distributed.is_first() else 0


def write_model(run: Run, path: Path, step: int, val_loss: float) -> int:
    metadata: dict[str, Any] = {"step": step, "val_loss": val_loss}
    metadata |= {"data": run.corpus.name, "checksum": run.corpus.checksum}
    if isinstance(run.corpus, RecordCorpus):
        metadata["prompt_format"] = run.corpus.prompt_format
    if not run.config.use_lora:
        return save_checkpoint(path, run.model, metadata, run.tokenizer)
    metadata |= {"shape": shape_of(run.model), "base_checkpoint": run.base_path}
    metadata["seed"] = run.config.seed
    metadata |= {name: getattr(run.config, f"lora_{name}") for name in ("rank", "alpha", "dropout")}
    metadata["targets"] = sorted({name.rpartition(".")[2] for name in lora_layers(run.model)})
    return save_adapter(path, run.model, run.base_id, metadata)


def print_sample(run: Run) -> None:
    """Print text that the model writes after a line break, or for the first validation record."""
    length = run.config.sample_tokens
    if length == 0:
        return
    torch.manual_seed(run.config.seed)
    start, end = encode("\n", run.tokenizer), None
    if isinstance(run.corpus, RecordCorpus):
        blocks, end = run.corpus.validation, end_token(run.tokenizer)
        start = blocks.inputs[0, : np.argmax(blocks.targets[0] != IGNORED) + 1].tolist()
    elif not start:  # a tokenizer may leave out white space
        start = run.corpus.validation[:1].tolist()
    with run.autocast():
        idx = torch.tensor([start], device=run.device)
        written = run.model.generate(idx, length, temperature=0.8, top_k=50)[0].tolist()
    tokens = written[len(start) :]
    if end is not None:
        tokens = start + tokens[: tokens.index(end) if end in tokens else None]
    text = decode(tokens, run.tokenizer)
    text = "".join(c if c.isprintable() or c in "\n\t" else "?" for c in text)
    say(f"Sample ({length} tokens, temperature 0.8, top_k 50):", *indent(text.split("\n")))


def print_evaluation(run: Run) -> None:
    """The loss on all of the validation data: of text every token but the first, predicted once; of
    records the tokens that count, where the mark of an end is a byte."""
    length, data = run.config.block_size, run.corpus.validation
    if isinstance(run.corpus, RecordCorpus):
        losses, _ = window_losses(run, np.arange(len(data)), length)
        predicted = data.targets[data.targets != IGNORED]
    else:
        predicted = data[1:]
        full = np.arange(0, len(predicted) - length + 1, length)
        losses, _ = window_losses(run, full, length)
        rest = len(predicted) - len(full) * length
        if rest > 0:
            last, _ = window_losses(run, np.array([len(predicted) - rest]), rest)
            losses = torch.cat([losses, last])
    n = n_bytes = len(predicted)
    total = losses.sum().item()
    loss = total / n
    if not math.isfinite(loss):
        raise TrainingError(f"the loss is {loss}: the model computes no numbers")
    unit = "byte" if run.tokenizer is None else "token"
    if run.tokenizer is not None:
        if isinstance(run.corpus, RecordCorpus):
            predicted = predicted[predicted != end_token(run.tokenizer)]
        n_bytes = n - len(predicted)
        chunks = (predicted[i : i + 2**20].tolist() for i in range(0, len(predicted), 2**20))
        n_bytes += sum(len(decode(chunk, run.tokenizer).encode()) for chunk in chunks)
    say(
        f"{unit.capitalize()}s evaluated: {n:,}",
        f"Validation loss: {loss:.4f} nats per {unit}",
        f"Perplexity: {math.exp(loss) if loss < 700 else math.inf:.4f} per {unit}",
        f"Bits per byte: {total / n_bytes / math.log(2):.4f}",
    )


def write_merged(run: Run) -> None:
    """Write base and adapters as one checkpoint, which is a base like any other."""
    merge_adapter(run.model)
    path = run.files.merged
    metadata = {"merged": f"{run.base_path} with {run.config.adapters}"}
    if "prompt_format" in run.adapter_facts:
        metadata["prompt_format"] = run.adapter_facts["prompt_format"]
    size = save_checkpoint(path, run.model, metadata, run.tokenizer)
    say(f"Wrote {path}: {size / 2**20:.2f} MiB")


def tokens_per_second(config: Config, step_times: list[float]) -> float:
    """The rate over steps of these durations in seconds."""
    tokens = config.tokens_per_step * len(step_times)
    return tokens / sum(step_times) if step_times else 0.0


def shows_progress(config: Config) -> bool:
    is_terminal = sys.stderr is not None and sys.stderr.isatty()  # None when it was closed
    return config.progress and is_terminal and distributed.is_first()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
