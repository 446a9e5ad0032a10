"""Leaps: steps whose loss or gradient is far larger than those before, which the log warns of."""

import math
import statistics

import torch
from torch import Tensor

from hardware import processes

LEAP = 10  # times the median of the steps before
STEPS = 50  # of which the median is
FEWEST = 10  # below which there is none


class Watch:
    """Compares numbers of each step with their running median, some steps at a time.

    Reading a number from a GPU waits for it, so `add` only keeps it for the next `leaps`.
    """

    def __init__(self, recent: dict[str, list[float]]) -> None:
        """`recent` has the last values by name; it is kept up to date, for a run that goes on."""
        self.recent = recent
        self.unread: dict[str, list[tuple[int, Tensor]]] = {}

    def add(self, step: int, **values: Tensor) -> None:
        """Take the numbers () of a step, which is counted from 1."""
        for name, value in values.items():
            self.unread.setdefault(name, []).append((step, value))

    def leaps(self) -> list[str]:
        """A line of the log for each leap in the steps since the last call, of several in a row for
        the first one.

        Values are means over the processes. It waits for the device. Every process must call it.
        """
        lines = []
        for name, unread in self.unread.items():
            values = processes.all_reduce_mean(torch.stack([value for _, value in unread]).cpu())
            recent = self.recent.setdefault(name, [])
            for (step, _), value in zip(unread, values.tolist(), strict=True):
                if not math.isfinite(value):
                    continue  # the loop ends the run where the loss is none
                goes_on = is_leap(recent)
                recent.append(value)
                del recent[: -STEPS - 1]
                if is_leap(recent) and not goes_on:
                    words, median = name.replace("_", " "), statistics.median(recent[:-1])
                    lines.append(
                        f"Warning: {words} {value:.4g} in step {step}, more than {LEAP} times "
                        f"{median:.4g}, the median of the {len(recent) - 1} steps before"
                    )
        self.unread = {}
        return lines


def is_leap(values: list[float]) -> bool:
    """Whether the last of the values is far larger than those before, where these are enough."""
    *before, last = values or [math.nan]
    return len(before) >= FEWEST and last > LEAP * statistics.median(before) > 0
