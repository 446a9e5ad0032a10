"""The loss of a model on validation data: at a step on some windows, or once on all of them."""

import math
import sys
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from hardware import processes
from trainer.console import TrainingError
from trainer.settings import Config
from trainer.setup import Run, trains


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
        return math.exp(self.loss) if self.loss < 700 else math.inf

    @property
    def bits_per_byte(self) -> float:
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
