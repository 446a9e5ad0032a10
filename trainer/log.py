"""The lines of a run's log that programs read, each format once, for its writer and its reader.

training.py prints a log to stdout, which `python training.py > log.txt` keeps. It writes the same
figures in full to metrics.jsonl (trainer/metrics.py). trainer/log_reader.py reads both. Nothing
here needs torch.

metrics.jsonl has one JSON object a line. The first describes the run:

    {"config": {"use_lora": false, "max_steps": 1000, ...},       every variable, in lower case
     "run": {"device": "cpu (Intel Xeon, 2 threads)", "dtype": "bfloat16",
             "data": "python-code", "checksum": "sha256:72bf4d52312c98b7",
             "base": "5fbca86079505ce4", "base_checkpoint": null,  a path, null for random weights
             "parameters": {"total": 3323392, "trainable": 3323392}, "processes": 1}}

Each evaluation is a line, with losses in nats per token and `elapsed` in seconds:

    {"step": 100, "train_loss": 2.77, "val_loss": 2.40, "val_error": 0.017,
     "learning_rate": 0.00298, "tokens_per_second": 23628, "elapsed": 18.9,
     "gradient_norm": 0.81, "tokens": 409600, "peak_memory": 790, "skipped_steps": 0,
     "seconds": {"data": 0.1, "forward_backward": 15.9, "optimizer": 1.1, "evaluation": 0.8,
                 "saving": 0.1}}

`gradient_norm` is that of the last step before it was clipped, and `tokens` those of all batches so
far, with padding. `skipped_steps` are those so far whose gradients were too large for float16.
`seconds` are those of the steps since the evaluation before, of this `evaluation`, and of `saving`
the files of the evaluation before. Earlier versions had none of these five.

The last line is there when the run has ended, with seconds, MiB of memory and bytes of files:

    {"summary": {"best_val_loss": 1.46, "final_val_loss": 1.46, "training_time": 178.6,
                 "median_step_time": 0.1696, "tokens_per_second": 24075, "peak_memory": 792,
                 "skipped_steps": 0, "files": {"out/full.pt": 13316789}}}

With COMPILE it has `compile_time`, of several processes the `bytes_exchanged` by each in a step.
A number that is not finite is null. The reader ignores keys that are not named here, and takes a
missing one for unknown. A run that goes on after an interruption begins with a first line of its
own when its log is appended to the earlier one.
"""

import functools
import re
import statistics
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

START = "Configuration (* set in the environment):"  # the first line of a log
SAMPLE = "Sample ("  # the line that begins so is the last: after it the model itself writes
EVALUATION = (
    "step {step:d} | train loss {train_loss} | val loss {val_loss:.4f} +- {val_error:.4f} | "
    "lr {learning_rate:.2e} | tokens/s {tokens_per_second:.0f} | elapsed {elapsed:.1f} s"
)
STOPPED = (
    "Stopped at step {step}: {patience} evaluations in a row without a better validation loss than "
    "{best_loss:.4f}, of {best} (PATIENCE={patience})"
)
WROTE = "Wrote {path}: {size:.2f} MiB"

NUMBER = r"nan|inf|\d+(?:\.\d+)?(?:e[+-]\d+)?"
WHOLE = r"\d{1,18}"  # as many digits as a step may have


@dataclass(frozen=True)
class Figure:
    """A figure of the summary: its key in metrics.jsonl and its line in the log.

    The log shows the value of metrics.jsonl times `factor`.
    """

    key: str
    line: str
    factor: int = 1

    def written(self, value: float) -> str:
        """The log's line for a value of metrics.jsonl."""
        return self.line.format(value=value * self.factor)

    def read(self, line: str) -> float | None:
        """The value in a line that `written` made, None for any other line."""
        found = fields_of(self.line, line)
        return None if found is None else float(found["value"]) / self.factor


SUMMARY = (
    Figure("best_val_loss", "Best validation loss: {value:.4f}"),
    Figure("final_val_loss", "Final validation loss: {value:.4f}"),
    Figure("training_time", "Training time: {value:.1f} s"),
    Figure("median_step_time", "Median step time: {value:.1f} ms", factor=1000),
    Figure("tokens_per_second", "Tokens per second: {value:.0f}"),
    Figure("peak_memory", "Peak memory: {value:.0f} MiB"),
)


def time_left_lines(max_steps: int, step: int, step_times: Sequence[float]) -> list[str]:
    """A line on how long the steps after `step` take, by the seconds of those so far; none where
    that is less than a minute."""
    minutes = (max_steps - step) * statistics.median(step_times or [0.0]) / 60
    words = f"{minutes:.0f} min" if minutes < 120 else f"{minutes / 60:.1f} h"
    line = f"Time: about {words} to MAX_STEPS={max_steps}, by the steps so far"
    return [line] if minutes > 1 else []


def evaluation_line(evaluation: Mapping[str, Any]) -> str:
    """The log's line of an evaluation, a dict with the keys of metrics.jsonl.

    `train_loss` is None where no step was taken since the evaluation before, and then a dash.
    """
    loss = evaluation["train_loss"]
    train_loss = "-" if loss is None else f"{loss:.4f}"
    return EVALUATION.format(**{**evaluation, "train_loss": train_loss})


def summary_lines(summary: Mapping[str, float]) -> list[str]:
    """The log's lines of the summary, a dict with the keys of metrics.jsonl."""
    return [figure.written(summary[figure.key]) for figure in SUMMARY]


def stopped_line(step: int, patience: int, best_loss: float, best: str | Path) -> str:
    """The log's line where PATIENCE ends a run; `best` is the file of the best loss."""
    return STOPPED.format(step=step, patience=patience, best_loss=best_loss, best=best)


def wrote_line(path: str | Path, size: int) -> str:
    """The log's line of a file that was written, of `size` bytes."""
    return WROTE.format(path=path, size=size / 2**20)


def fields_of(form: str, line: str) -> dict[str, str] | None:
    """The text of each field in a line that `form.format` made, None for any other line."""
    match = _pattern(form).fullmatch(line)
    return None if match is None else match.groupdict()


@functools.cache
def _pattern(form: str) -> re.Pattern[str]:
    """What matches the lines of a format string: its fields are whole numbers (`:d`), other numbers
    (`:.1f`, `:.2e`) or text (nothing)."""
    pattern = ""
    for literal, name, spec, _ in string.Formatter().parse(form):
        pattern += re.escape(literal)
        if name is not None:
            kind = WHOLE if spec == "d" else NUMBER if spec else ".*?"
            pattern += f"(?P<{name}>{kind})"
    return re.compile(pattern)
