"""Batches of windows, gathered from the tokens of a text; only what a batch needs is read.

B is the batch size and T the block size: a window is T tokens and the one that follows them.
"""

import numpy as np
import torch
from numpy.lib.stride_tricks import sliding_window_view
from torch import Tensor

from data.corpus import Batch


def training_batch(
    tokens: np.ndarray,
    batch_size: int,
    block_size: int,
    seed: int,
    number: int,
    device: str | torch.device = "cpu",
    share: tuple[int, int] = (0, 1),
) -> Batch:
    """Draw windows uniformly, with replacement, from anywhere in the text.

    The batch depends on nothing but the arguments: a resumed run draws the same batches without a
    saved state.

    Args:
        tokens: (n,) unsigned integers, the split to draw from.
        seed, number: the run's seed, and which of its batches this is, from 0.
        share: (i, n) for the i-th of n equal parts of the batch; only that part is read.

    Returns:
        x and y, (B / n, T) int64 on `device`; y is x one token later.

    Raises:
        ValueError: tokens has fewer than block_size + 1 tokens, or a number is negative.
    """
    random = np.random.default_rng([seed, number])
    offsets = random.integers(_count_offsets(tokens, block_size), size=batch_size)
    i, n = share
    return windows_batch(tokens, offsets[i::n], block_size, device)


def validation_windows(tokens: np.ndarray, n_windows: int, block_size: int) -> np.ndarray:
    """Offsets of evenly spaced windows that do not overlap, from the first possible to the last.

    They depend on no seed, so that runs that ask for as many can be compared; and as no token is
    in two of them, the standard error of their losses is not understated.

    Args:
        tokens: (n,) unsigned integers, the split to evaluate on.
        n_windows: how many offsets are wanted; a split too short for as many gives all it has.

    Returns:
        (min(n_windows, (n - 1) // block_size),) int64, at least block_size apart.

    Raises:
        ValueError: tokens has fewer than block_size + 1 tokens, or n_windows is below 1.
    """
    n_offsets = _count_offsets(tokens, block_size)
    return even_spread(n_windows, n_offsets, (len(tokens) - 1) // block_size)


def even_spread(n_windows: int, n_places: int, most: int) -> np.ndarray:
    """Places of windows, evenly spaced from the first to the last of `n_places`; at most `most`.

    Returns:
        (min(n_windows, most),) int64.

    Raises:
        ValueError: n_windows is below 1.
    """
    if n_windows < 1:
        raise ValueError(f"n_windows is {n_windows}, but must be at least 1")
    n_windows = min(n_windows, most)
    return np.arange(n_windows, dtype=np.int64) * (n_places - 1) // max(n_windows - 1, 1)


def windows_batch(
    tokens: np.ndarray,
    offsets: np.ndarray,
    block_size: int,
    device: str | torch.device = "cpu",
) -> Batch:
    """Gather the windows that start at the given offsets.

    Args:
        tokens: (n,) unsigned integers.
        offsets: (B,) integers from 0 to n - block_size - 1.

    Returns:
        x and y, (B, T) int64 on `device`, contiguous; y is x one token later.

    Raises:
        IndexError: an offset is too large.
        ValueError: tokens has fewer than block_size + 1 tokens.
    """
    # A view with a row for every offset; the only copy is of the rows that the index picks.
    rows = sliding_window_view(tokens, block_size + 1)  # (n - T, T + 1)
    windows = rows[offsets]  # (B, T + 1)
    if windows.dtype != np.uint8:
        windows = windows.astype(np.int64)  # torch computes with no unsigned integers but bytes
    windows = on_device(device, torch.from_numpy(windows))  # bytes are an eighth of int64
    return windows[:, :-1].long(), windows[:, 1:].long()


def on_device(device: str | torch.device, tensor: Tensor) -> Tensor:
    """The tensor on `device`, copied to a GPU from pinned memory, beside its work."""
    if torch.device(device).type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def _count_offsets(tokens: np.ndarray, block_size: int) -> int:
    """How many windows of block_size + 1 tokens there are, counting every start."""
    n_offsets = len(tokens) - block_size
    if n_offsets < 1:
        raise ValueError(
            f"{len(tokens):,} tokens hold no window: block_size {block_size} needs {block_size + 1}"
        )
    return n_offsets
