"""How far a run is, beside its tensors."""

import math
from dataclasses import dataclass, field
from typing import Any, Self

import torch
from torch import Tensor

from hardware import processes
from trainer.settings import Config


@dataclass
class Progress:
    """How far a run is, beside its tensors: what a resumed run needs to know."""

    step: int = 0  # steps taken
    evaluated: int = -1  # the step of the last evaluation
    start_loss: float = math.nan  # validation loss before the first step
    val_loss: float = math.nan  # of the last evaluation
    best_loss: float = math.inf  # of evaluations after a step
    since_best: int = 0  # evaluations since that one, each without a better loss
    losses: list[Tensor] = field(default_factory=list)  # of the steps since that evaluation
    step_times: list[float] = field(default_factory=list)  # seconds, of all steps
    elapsed: float = 0.0  # seconds of the runs before this one
    seconds: dict[str, float] = field(default_factory=dict)  # of each part since that evaluation
    tokens: int = 0  # of all batches so far
    skipped: int | Tensor = 0  # steps that the scaler of gradients left out
    recent: dict[str, list[float]] = field(default_factory=dict)  # of the last steps, for Watch

    def has_ended(self, config: Config) -> bool:
        """Whether no step is left: MAX_STEPS are taken, or PATIENCE has ended the run."""
        out_of_patience = config.patience > 0 and self.since_best >= config.patience
        return self.step >= config.max_steps or out_of_patience

    def plain(self) -> dict[str, Any]:
        """Progress as numbers and lists of numbers, with losses that are means over the processes.

        Every process must call it.
        """
        return vars(self) | {
            "losses": processes.all_reduce_mean(torch.tensor(self.losses)).tolist(),
            "skipped": int(self.skipped),
        }

    @classmethod
    def from_plain(cls, values: dict[str, Any]) -> Self:
        """The Progress with this `plain`.

        Raises AttributeError, KeyError, TypeError or ValueError for other values.
        """
        lists = {name: [float(v) for v in values[name]] for name in ("losses", "step_times")}
        progress = cls(**values | lists | {"losses": [torch.tensor(v) for v in lists["losses"]]})
        progress.recent = {str(n): [float(v) for v in v] for n, v in progress.recent.items()}
        progress.seconds = {str(name): float(s) for name, s in progress.seconds.items()}
        numbers = (progress.start_loss, progress.val_loss, progress.elapsed)
        counts = (progress.step, progress.evaluated + 1, progress.since_best)
        counts += (progress.tokens, progress.skipped)
        if not all(isinstance(n, int) and n >= 0 for n in counts):
            raise ValueError
        if not all(isinstance(n, float) for n in (*numbers, progress.best_loss)):
            raise TypeError
        return progress
