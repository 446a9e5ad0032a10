"""The loss of a model on validation data: at a step on some windows, or once on all of them.

An evaluation at a step also gathers what the loop knows by then, for the log and metrics.jsonl.
"""

import dataclasses
import math
import statistics
import sys
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

import hardware
from data import Corpus
from hardware import processes
from lora import combine_adapters, switch_adapter, take_adapter
from trainer.console import TrainingError
from trainer.optimization import learning_rate
from trainer.progress import Progress
from trainer.settings import Config
from trainer.setup import Run

# How much of the adapters' change is taken, which trades what was learned for what was forgotten
# (Wortsman et al. 2022, arXiv 2109.01903).
WEIGHTS = (0.0, 0.25, 0.5, 0.75, 1.0)


@dataclass(frozen=True)
class FullEvaluation:
    """The loss on all of the validation data.

    Text counts every token but the first, once; records count the tokens that training counts.
    `n_tokens` is their number. `n_bytes` is the bytes that they stand for, where the mark that ends
    a record is one byte. `total` is the sum of their losses in nats.
    """

    n_tokens: int
    n_bytes: int
    total: float

    @property
    def loss(self) -> float:
        """Nats per token."""
        return self.total / self.n_tokens

    @property
    def perplexity(self) -> float:
        """exp(loss), inf where a float cannot hold it."""
        return math.exp(self.loss) if self.loss < 700 else math.inf

    @property
    def bits_per_byte(self) -> float:
        """The loss in bits over the bytes of the text, which does not depend on the tokenizer."""
        return self.total / self.n_bytes / math.log(2)


def evaluate(run: Run, windows: np.ndarray) -> tuple[float, float]:
    """Mean validation loss in nats per token over the windows, and its standard error.

    The error is that of a ratio of sums, since windows of records differ in how many tokens count.
    `windows` (n,) are numbers of windows, as `Corpus.validation_windows` gives them. Every process
    must call it.
    """
    losses, counts = window_losses(run, windows, run.config.block_size)
    n, loss = len(losses), (losses.sum() / counts.sum()).item()
    spread = (losses - loss * counts).square().sum().sqrt() / counts.sum()
    return loss, spread.item() * math.sqrt(n / (n - 1)) if n > 1 else 0.0


def evaluate_on(run: Run, corpus: Corpus) -> tuple[float, float]:
    """`evaluate` on the windows of a corpus that an evaluation of the run takes."""
    windows = evaluation_windows(run.config, corpus)
    return evaluate(dataclasses.replace(run, corpus=corpus), windows)


def evaluation_windows(config: Config, corpus: Corpus) -> np.ndarray:
    """The numbers of the windows that every evaluation of a run takes: (n,)."""
    return corpus.validation_windows(config.eval_batches * config.batch_size, config.block_size)


def evaluate_all(run: Run) -> FullEvaluation:
    """The loss on all of the validation data. Raises TrainingError where it is no number."""
    total = 0.0
    for windows, length in run.corpus.all_validation_windows(run.config.block_size):
        losses, _ = window_losses(run, windows, length)
        total += losses.sum().item()
    result = FullEvaluation(*run.corpus.count_predicted(), total)
    if not math.isfinite(result.loss):
        raise TrainingError(f"the loss is {result.loss}: the model computes no numbers")
    return result


def evaluate_weights(run: Run) -> Iterator[tuple[float, tuple[float, float], tuple[float, float]]]:
    """For each of WEIGHTS, by which ADAPTERS are multiplied, the mean loss on the validation
    windows of DATA with its standard error, and that on those of OLD_DATA.

    The model has the adapters at the last of them then.
    """
    old, bare = run.old
    trained = take_adapter(run.model, run.base_id)
    for weight in WEIGHTS:
        switch_adapter(run.model, combine_adapters([(trained, weight)], bare))
        yield weight, evaluate_on(run, run.corpus), evaluate_on(run, old)


@torch.no_grad()
def window_losses(run: Run, windows: np.ndarray, length: int) -> tuple[Tensor, Tensor]:
    """The sum of the losses in each window of `length` tokens of the validation data, in nats, and
    how many tokens it counts: (n,) float64 each."""
    run.model.eval()
    losses, counts, numbers = [], [], []
    batches = np.array_split(np.arange(len(windows)), -(-len(windows) // run.config.batch_size))
    for batch in tqdm(
        batches, "evaluating", disable=run.config.trains or not shows_progress(run.config)
    ):
        numbers.append(batch[processes.rank() :: processes.world_size()])
        x, y, *segments = run.corpus.validation_batch(windows[numbers[-1]], length, run.device)
        with run.autocast():
            _, loss = run.model(x, y, *segments, reduction="none")  # (B, T), 0 if not counted
        losses.append(loss.sum(1))  # (B,)
        counts.append(run.corpus.counted((x, y)))
    run.model.train()
    found = torch.zeros(2, len(windows), dtype=torch.float64)
    mine = torch.stack([torch.cat(losses), torch.cat(counts)])
    found[:, np.concatenate(numbers)] = mine.cpu().double()
    losses, counts = processes.all_reduce_sum(found)  # one process has computed each window
    return losses, counts


def shows_progress(config: Config) -> bool:
    """Whether to show a progress bar: on a terminal, and from the main process alone."""
    is_terminal = sys.stderr is not None and sys.stderr.isatty()  # None: the caller closed it
    return config.progress and is_terminal and processes.is_main_process()


def evaluation_at(
    step: int, run: Run, windows: np.ndarray, progress: Progress, gradient_norm: Tensor | None
) -> dict[str, float | None]:
    """What an evaluation after `step` steps finds, by the keys of metrics.jsonl.

    Losses are in nats per token; `train_loss` is None where no step was taken since the evaluation
    before. `gradient_norm` () is the last step's. Every process must call it.
    """
    losses = progress.losses
    train_loss = None
    if losses:
        train_loss = processes.all_reduce_mean(torch.stack(losses).mean().cpu()).item()
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
        "gradient_norm": None if gradient_norm is None else gradient_norm.item(),
        "tokens": progress.tokens,
        "peak_memory": hardware.peak_memory(run.device),
        "skipped_steps": int(progress.skipped),
    }


def summary_of(run: Run, progress: Progress, seconds: float) -> dict[str, float]:
    """What a run of so many seconds has come to, by the keys of metrics.jsonl."""
    return {
        "best_val_loss": progress.best_loss,
        "final_val_loss": progress.val_loss,
        "training_time": seconds,
        "median_step_time": statistics.median(progress.step_times or [math.nan]),
        "tokens_per_second": tokens_per_second(run.config, progress.step_times),
        "peak_memory": hardware.peak_memory(run.device),
        "skipped_steps": int(progress.skipped),
    }


def check_finite(loss: float, step: int, run: Run) -> None:
    """Raise TrainingError for a loss that is NaN or infinite."""
    if not math.isfinite(loss):
        other = ", or set DTYPE=float32" if run.dtype == torch.float16 else ""
        raise TrainingError(
            f"the loss became {loss} by step {step}: lower LEARNING_RATE "
            f"({run.config.learning_rate:g}){other}; files of earlier evaluations are as they were"
        )


def tokens_per_second(config: Config, step_times: list[float]) -> float:
    """The rate over steps of these durations in seconds; 0 without a step."""
    tokens = config.tokens_per_step * len(step_times)
    return tokens / sum(step_times) if step_times else 0.0
