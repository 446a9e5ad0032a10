"""What a run trains and validates on: the methods that text and records share.

A layout of data is a child of `Corpus` and a function that reads its files (see opening.py).
Nothing outside data/ needs to know which child it has.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

IGNORED = -100  # the target that torch's cross-entropy does not count

# What a model takes: x and y (B, T) int64, where y is x one token later or IGNORED. Packed records
# add `segments` (B, T) int64: which record of its row a token is of, 0 for padding.
Batch = tuple[Tensor, ...]


class DataError(ValueError):
    """The corpus that DATA names cannot be used; the message is one line for the user."""


class Corpus(ABC):
    """Tokens for training and validation, in windows.

    A window is what a batch has in one row: block_size tokens, each with the token that follows
    it. A corpus numbers the windows of its validation split as it likes.

    Attributes:
        name: what was asked for: a built-in name, or the path as the user wrote it.
        checksum: "sha256:" and 16 hex digits, of all files or of samples of them.
        tokenizer: the content of a tokenizer.json; None where tokens are bytes.
    """

    name: str
    checksum: str
    tokenizer: str | None

    @abstractmethod
    def describe(self) -> list[str]:
        """The data as `key: value` lines for the log, with aligned values, ASCII only."""

    @abstractmethod
    def passes(self, n_tokens: int) -> float:
        """How many times batches of `n_tokens` tokens in all go through the training split."""

    @abstractmethod
    def training_batch(
        self,
        batch_size: int,
        block_size: int,
        seed: int,
        number: int,
        device: str | torch.device = "cpu",
        share: tuple[int, int] = (0, 1),
    ) -> Batch:
        """A batch of windows of the training split.

        The batch depends on nothing but the arguments. So a run that is resumed at a step needs no
        saved state to see the batches that it would have seen.

        Args:
            batch_size: B, windows in the whole batch.
            block_size: T, tokens in a window.
            seed, number: the run's seed, and which of its batches this is, from 0.
            share: (i, n) for the i-th of n equal parts of the batch; only that part is read.

        Returns:
            What a model takes, each (B / n, T) int64 on `device`.

        Raises:
            ValueError: the split has no window of block_size tokens, or a number is negative.
        """

    @abstractmethod
    def validation_windows(self, n_windows: int, block_size: int) -> np.ndarray:
        """Numbers of windows that lie evenly spaced in the validation split and share no token.

        They depend on no seed, so that runs that ask for as many can be compared. The standard
        error of their losses is not understated, because no token is in two of them.

        Returns:
            (n_windows,) int64, or fewer where the split has no more.

        Raises:
            ValueError: the split has no window of block_size tokens, or n_windows is below 1.
        """

    @abstractmethod
    def validation_batch(
        self, windows: np.ndarray, block_size: int, device: str | torch.device = "cpu"
    ) -> Batch:
        """The windows of the validation split that have these numbers.

        Returns:
            What a model takes, each (len(windows), block_size) int64 on `device`.

        Raises:
            IndexError: there is no window of such a number.
        """

    @abstractmethod
    def all_validation_windows(self, block_size: int) -> list[tuple[np.ndarray, int]]:
        """Windows that predict each token of the validation split once.

        Returns:
            Pairs of windows' numbers and their length, both for `validation_batch`.
        """

    @abstractmethod
    def count_predicted(self) -> tuple[int, int]:
        """How many tokens `all_validation_windows` predict, and how many bytes they stand for."""

    @abstractmethod
    def examples(self, n: int, block_size: int) -> list[tuple[list[int], list[bool]]]:
        """Up to `n` examples of the training split: tokens, and whether the loss counts each."""

    @abstractmethod
    def opening(self) -> tuple[list[int], list[int]]:
        """The tokens that a sample begins with, and those that end it, if any does."""

    def counted(self, batch: Batch) -> Tensor:
        """How many tokens of each window the loss counts: (B,) int64."""
        return (batch[1] != IGNORED).sum(1)

    def loss_parts(
        self,
        batches: Sequence[Batch],
        n_processes: int = 1,
        total: Callable[[Tensor], Tensor] = lambda counted: counted,
    ) -> Sequence[float] | Tensor:
        """What to multiply each batch's mean loss by, so that the sum is the loss of one batch of
        that size, averaged over the processes.

        All windows count as many tokens here, so each batch has the same part.

        Args:
            batches: those of one step in this process.
            n_processes: how many processes share the step.
            total: adds up a tensor over the processes, which call it once each, or never.

        Returns:
            As many parts as there are batches.
        """
        return [1 / len(batches)] * len(batches)

    def metadata(self) -> dict[str, str]:
        """What a trained model's file says of the data, by the keys of its metadata."""
        return {"data": self.name, "checksum": self.checksum}


def aligned(rows: Mapping[str, str]) -> list[str]:
    """`key: value` lines whose values stand below each other."""
    width = max(map(len, rows)) + 1
    return [f"{key + ':':<{width}} {value}" for key, value in rows.items()]


def printable(text: str) -> str:
    """The text on one line of ASCII: a path may hold line breaks, or bytes that are no text."""
    return "".join(
        c if " " <= c <= "~" else c.encode("unicode_escape").decode("ascii") for c in text
    )
