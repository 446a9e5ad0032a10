"""Train a language model on text or chats, or fine-tune a published one, with LoRA or fully.

    python training.py                                  train every weight
    DATA=python-docs USE_LORA=True python training.py   fine-tune that model with LoRA
    RESUME=True python training.py                      go on with an interrupted run
    torchrun --standalone --nproc_per_node=2 training.py   in two processes
    EVAL_ONLY=True python training.py                   the loss of a model on all validation data
    PREVIEW=3 DATA=chats.jsonl python training.py       what the model will learn from
    MERGE=True ADAPTERS=out/lora.pt python training.py  write base and adapter as one checkpoint
    python training.py --help                           every variable

The environment configures everything (trainer/settings.py). The log goes to stdout, and the
progress bar to stderr.
"""

import os
import sys

if __name__ == "__main__":  # before the imports that take seconds
    from trainer.settings import Config
    from trainer.start import start

    start(__doc__, os.environ, Config, "MAX_STEPS=200 python training.py")

import itertools
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import NoReturn

import torch
from torch import Tensor, nn
from tqdm import tqdm

import hardware
from data import Batch, decode, vocabulary_size
from files import FileError
from files.streams import write_out
from hardware import processes
from models import LanguageModel
from models.language_model import mask_is_too_large
from trainer.console import TrainingError, exit_code_of, indent, say
from trainer.description import describe, describe_costs, describe_outcome, describe_plan
from trainer.evaluation import (
    check_finite,
    evaluate_all,
    evaluate_weights,
    evaluation_at,
    evaluation_windows,
    shows_progress,
    summary_of,
    tokens_per_second,
)
from trainer.log import (
    SAMPLE,
    evaluation_line,
    stopped_line,
    summary_lines,
    time_left_lines,
    wrote_line,
)
from trainer.metrics import Metrics
from trainer.optimization import (
    clip_gradients,
    learning_rate,
    make_optimizer,
    make_scaler,
    set_learning_rate,
)
from trainer.progress import Progress
from trainer.resuming import resume, save_training_state
from trainer.saving import save, write_merged
from trainer.settings import Config
from trainer.setup import Run, header, identity, plan_run, preview, set_up
from trainer.stopping import Interrupted, StopSignals
from trainer.watch import Watch

# Steps of up to so many operations are launch-bound: a GPU is done with most kernels before Python
# starts the next. An H200 waits even at 2048 tokens of a base of 8B parameters, which are 2**46.5
# operations, and longest in NF4 and with GRAD_CHECKPOINT (`python benchmarks/families.py --device
# cuda`). Graphs keep their memory between steps.
LAUNCH_BOUND_OPERATIONS = 2**48

LESS_MEMORY = "lower BATCH_SIZE or BLOCK_SIZE; ESTIMATE=True says what a run needs and what helps"


def main() -> int:
    """Run the script; returns its exit code: 0, or 2 for input that cannot be used."""
    return exit_code_of(work, LESS_MEMORY)


def work() -> None:
    """Train, evaluate or merge, as the environment says."""
    config = Config.from_environment(os.environ)
    if not config.compile:
        hardware.postpone_compiler()
    plan = plan_run(config)
    if config.preview:
        colour = sys.stdout is not None and sys.stdout.isatty()
        lines = preview(plan, colour)
        write_out("".join(f"{line}\n" for line in lines if processes.is_main_process()))
        processes.destroy_process_group()
        return
    say(*describe_plan(plan))
    if config.estimate:
        processes.destroy_process_group()
        return
    run = set_up(plan)
    say(*describe(plan, run))
    del plan  # and the base's tensors, of which the model has its own
    if run.old is not None:
        print_weights(run)
    elif run.config.eval_only:
        print_evaluation(run)
    elif run.config.merge:
        write_merged(run)
    else:
        train(run)
        print_sample(run)
    processes.destroy_process_group()


def train(run: Run) -> None:
    """Train: steps, evaluations, files, and the closing summary.

    Raises Interrupted after a signal, TrainingError for a loss that is no number, and FileError for
    a file that cannot be read or written.
    """
    config, n_processes = run.config, processes.world_size()
    hardware.allow_tf32(run.device)
    optimizer = make_optimizer(config, run.model, run.dtype)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    scaler = make_scaler(run.device, run.dtype)
    progress, lines = resume(run, optimizer, scaler) if config.resume else (Progress(), [])
    say(*lines)
    traffic = processes.Traffic()
    model, compile_time = fast_form(run, processes.replicate(run.model, traffic))
    traffic.bytes = 0  # compiling ran a batch that is no part of a step
    timer = hardware.StepTimer(run.device, progress.step_times, progress.seconds)
    watch = Watch(progress.recent)
    windows = evaluation_windows(config, run.corpus)
    earlier_state = not config.resume and run.files.resume.exists()
    earlier_state = processes.all_reduce_max(int(earlier_state)) > 0
    first_step = progress.step
    gradient_norm: Tensor | None = None
    sizes: dict[Path, int] = {}
    metrics = Metrics(run.files.metrics, header(run), progress.evaluated)
    started = time.perf_counter() - progress.elapsed

    def show(*lines: str) -> None:
        try:
            if lines:
                with tqdm.external_write_mode():
                    say(*lines)
        except FileError:  # after Ctrl-C the reader of a pipe has gone, and the run is to be saved
            if not stop.received:
                raise

    def save_results(step: int) -> None:
        sizes[run.files.last] = save(run, run.files.last, step, progress.val_loss)
        progress.since_best += 1
        if progress.val_loss < progress.best_loss:
            progress.best_loss, progress.since_best = progress.val_loss, 0
            sizes[run.files.best] = save(run, run.files.best, step, progress.val_loss)
        save_progress()

    def save_progress() -> None:
        progress.elapsed = time.perf_counter() - started
        sizes[run.files.resume] = save_training_state(
            run.files.resume, run.model, optimizer, scaler, identity(run), progress.plain()
        )

    def interrupt(signal: int) -> NoReturn:
        if earlier_state and run.files.resume not in sizes:
            raise Interrupted(
                f"interrupted after step {progress.step}, and nothing was saved: this run had "
                f"evaluated nothing yet, and {run.files.resume} is of an earlier one",
                signal,
            )
        save_progress()
        metrics.flush()
        raise Interrupted(
            f"interrupted after step {progress.step}, saved in {run.files.resume}; "
            "the same command with RESUME=True goes on from there",
            signal,
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
            due = is_due(step, config)
            signal = processes.all_reduce_max(stop.received)
            if due or signal:
                timer.flush()
                show(*watch.leaps())
            if due and progress.evaluated < step:
                with timer.timed("evaluation"):
                    evaluation = evaluation_at(step, run, windows, progress, gradient_norm)
                evaluation["elapsed"] = time.perf_counter() - started
                evaluation["seconds"] = timer.take_parts()
                progress.val_loss = evaluation["val_loss"]
                if step == 0:
                    progress.start_loss = progress.val_loss
                metrics.write(evaluation)
                check_finite(progress.val_loss, step, run)
                progress.losses, progress.evaluated = [], step
                if step > 0:
                    with timer.timed("saving"):
                        save_results(step)
                show(evaluation_line(evaluation))
            if progress.has_ended(config):
                if step < config.max_steps:
                    show(stopped_line(step, config.patience, progress.best_loss, run.files.best))
                break
            if signal:
                interrupt(signal)

            timer.begin()
            batches = step_batches(run, step)
            parts = run.corpus.loss_parts(batches, n_processes, processes.all_reduce_sum)
            timer.end_part("data")
            loss = accumulate(model, batches, parts, run.autocast, scaler.scale)
            timer.end_part("forward_backward")
            scaler.unscale_(optimizer)
            if config.grad_clip > 0 or scaler.is_enabled() or is_due(step + 1, config):
                gradient_norm = clip_gradients(parameters, config.grad_clip)
            set_learning_rate(optimizer, learning_rate(config, step))
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad(set_to_none=True)
            timer.end_part("optimizer")
            progress.losses.append(loss)
            watch.add(step + 1, training_loss=loss)
            if config.grad_clip > 0:
                watch.add(step + 1, gradient_norm=gradient_norm)
            progress.tokens += config.tokens_per_step
            if scaler.is_enabled():
                progress.skipped = progress.skipped + ~gradient_norm.isfinite()
            if step % 10 == 9:  # seldom: reading the loss waits for a GPU
                check_finite(loss.item(), step, run)
                show(*watch.leaps())
                speed = tokens_per_second(config, progress.step_times[-10:])
                shown = {"loss": f"{loss.item():.3f}", "lr": f"{learning_rate(config, step):.1e}"}
                bar.set_postfix(shown | {"tokens/s": f"{speed:.0f}"}, refresh=False)
            timer.end()
            progress.step = step + 1
            bar.update()
            if progress.step == first_step + 10 and bar.disable:
                show(*time_left_lines(config.max_steps, progress.step, progress.step_times))

    summary = summary_of(run, progress, time.perf_counter() - started)
    if compile_time is not None:
        summary["compile_time"] = compile_time
    if traffic.bytes:
        summary["bytes_exchanged"] = traffic.bytes / (progress.step - first_step)
    metrics.write({"summary": summary | {"files": {str(p): size for p, size in sizes.items()}}})
    say(
        *summary_lines(summary),
        *describe_costs(run, summary),
        *(wrote_line(path, size) for path, size in sizes.items()),
        *describe_outcome(run, progress),
    )


def is_due(step: int, config: Config) -> bool:
    """Whether there is an evaluation after so many steps."""
    return step % config.eval_interval == 0 or step == config.max_steps


def step_batches(run: Run, step: int) -> list[Batch]:
    """This process's share of a step, in GRAD_ACCUM_STEPS batches, each what the model takes.

    A step draws one large batch, of which each batch here is a share. So it sees the same windows
    however many batches and processes they are shared out to.
    """
    config, n = run.config, run.config.grad_accum_steps
    shape = (n * config.batch_size, config.block_size)
    rank, n_processes = processes.rank(), processes.world_size()
    return [
        run.corpus.training_batch(
            *shape, config.seed, step, run.device, share=(i * n_processes + rank, n * n_processes)
        )
        for i in range(n)
    ]


def accumulate(
    model: nn.Module,
    batches: Sequence[Batch],
    parts: Iterable[float | Tensor],
    autocast: Callable[[], AbstractContextManager],
    scale: Callable[[Tensor], Tensor] = lambda loss: loss,
) -> Tensor:
    """Add the gradients of each batch's mean loss times its part to those that the model has.

    `scale` is applied to what is differentiated, and not to the result.
    Gradients are averaged over the processes once, after the last batch. Returns this process's sum
    of the losses times their parts, () float32.
    """
    loss = torch.zeros((), device=batches[0][0].device)
    for i, (batch, part) in enumerate(zip(batches, parts, strict=True)):
        with processes.synchronize_gradients(model, enabled=i == len(batches) - 1):
            with autocast():
                batch_loss = model(*batch)[-1]  # without keeping the logits
            batch_loss = batch_loss * part
            scale(batch_loss).backward()
        loss += batch_loss.detach()
    return loss


def fast_form(run: Run, model: nn.Module) -> tuple[nn.Module, float | None]:
    """The model in the form that trains fastest here, and the seconds that compiling took, if it
    was compiled."""
    if run.config.compile:
        return compiled(run, model, step_batches(run, 0))
    if run.device.type == "cuda" and is_launch_bound(run.model, batches := step_batches(run, 0)):
        return hardware.in_cuda_graphs(model, batches[0], run.dtype), None
    return model, None


def compiled(run: Run, model: nn.Module, batches: Sequence[Batch]) -> tuple[nn.Module, float]:
    """The model through torch.compile, and the seconds that compiling took.

    It is compiled here, by the first of `batches`, which changes neither weights nor random
    numbers. Raises TrainingError where torch cannot compile it.
    """
    started = time.perf_counter()
    in_graphs = is_launch_bound(run.model, batches) and not run.config.grad_checkpoint
    fast = torch.compile(model, mode="reduce-overhead" if in_graphs else "default")
    try:
        for _ in range(2 if in_graphs else 1):  # torch captures CUDA graphs in the second one
            with torch.random.fork_rng(hardware.gpus(run.device)), run.autocast():
                loss = fast(*batches[0])[1]
            loss.backward()
            model.zero_grad(set_to_none=True)
    except torch._dynamo.exc.TorchDynamoException as error:
        reason = str(error).strip().splitlines()[0]
        raise TrainingError(f"COMPILE=True: torch cannot compile the model: {reason}") from error
    hardware.synchronize(run.device)
    return fast, time.perf_counter() - started


def is_launch_bound(model: LanguageModel, batches: Sequence[Batch]) -> bool:
    """Whether a GPU would wait for Python in much of a step, and CUDA graphs can hold that step.

    A graph draws random numbers once for each time that it runs, and not again where a block is
    computed again. In it shapes are fixed, so that long blocks of records would need a mask.
    """
    tokens, _, *segments = batches[0]
    operations = 6 * model.get_parameter_info()["total"] * tokens.numel()
    return (
        tokens.is_cuda
        and operations <= LAUNCH_BOUND_OPERATIONS
        and processes.world_size() == 1
        and len(batches) == 1
        and not (model.grad_checkpoint and model.has_dropout)
        and not (segments and mask_is_too_large(segments[0]))
    )


def print_sample(run: Run) -> None:
    """Print what the model writes after the opening of its corpus: a line break, or a prompt."""
    length = run.config.sample_tokens
    if length == 0:
        return
    torch.manual_seed(run.config.seed)
    start, ends = run.corpus.opening()
    with run.autocast():
        idx = torch.tensor([start], device=run.device)
        known = vocabulary_size(run.tokenizer)
        written = run.model.generate(idx, length, temperature=0.8, top_k=50, n_tokens=known)
        written = written[0].tolist()
    tokens = written[len(start) :]
    if ends:
        tokens = start + list(itertools.takewhile(lambda token: token not in ends, tokens))
    text = decode(tokens, run.tokenizer)
    text = "".join(c if c.isprintable() or c in "\n\t" else "?" for c in text)
    say(f"{SAMPLE}{length} tokens, temperature 0.8, top_k 50):", *indent(text.split("\n")))


def print_weights(run: Run) -> None:
    """Print the losses on DATA and on OLD_DATA at several weights of the adapters."""
    old, _ = run.old
    say(
        f"Validation loss, nats per {unit_of(run)}:",
        f"   weight   {run.corpus.name}   {old.name} (OLD_DATA)",
    )
    for weight, *losses in evaluate_weights(run):
        say(f"   {weight:<6.2f}" + "".join(f"   {loss:.4f} +- {e:.4f}" for loss, e in losses))


def print_evaluation(run: Run) -> None:
    """Print the loss on all of the validation data."""
    found, unit = evaluate_all(run), unit_of(run)
    say(
        f"{unit.capitalize()}s evaluated: {found.n_tokens:,}",
        f"Validation loss: {found.loss:.4f} nats per {unit}",
        f"Perplexity: {found.perplexity:.4f} per {unit}",
        f"Bits per byte: {found.bits_per_byte:.4f}",
    )


def unit_of(run: Run) -> str:
    """What a token of the run is called."""
    return "byte" if run.tokenizer is None else "token"


if __name__ == "__main__":
    sys.exit(main())
