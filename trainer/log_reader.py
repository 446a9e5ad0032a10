"""Read the log of a run as a `RunLog`: training.py's redirected output, or its metrics.jsonl.

A redirected output is UTF-8 or UTF-16 (PowerShell). It may hold several runs, and what terminals
and collectors of logs add: colours, the traces of a progress bar, and a prefix of each line, such
as a container's name or a time. trainer/log.py says what the lines hold. Nothing here needs torch.
"""

import codecs
import dataclasses
import json
import math
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PureWindowsPath
from typing import Any

from trainer.log import EVALUATION, SAMPLE, START, SUMMARY, WROTE, fields_of

COUNT = r"(\d[\d,]{0,20})"
VARIABLE = re.compile(r"   ([A-Z][A-Z0-9_]*): (.*?)(?: \*)?")
# What a terminal obeys and does not show: control sequences (colours), titles, other escapes.
ESCAPE = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b\n]*(?:\x07|\x1b\\)|[ -/]*[0-Z\\^-~])")
# The part of a prefix that changes from line to line: a time of day, with or without its date, or
# seconds since 1970.
TIME = (
    r"(?:(?:\d{4}[-/]\d\d[-/]\d\d[T ]|[A-Z][a-z]{2} [ \d]\d )?"
    r"\d{1,2}:\d\d:\d\d(?:[.,]\d+)?(?:Z|[+-]\d\d:?\d\d)?|\d{10}(?:\.\d+)?)"
)


class LogError(ValueError):
    """A file that is no log of a run: names the file and what is wrong with it."""


@dataclass(frozen=True)
class Evaluation:
    """One evaluation: losses in nats per token, the standard error of val_loss, seconds so far."""

    step: int
    val_loss: float
    val_error: float
    elapsed: float


@dataclass(frozen=True)
class RunLog:
    """What the log of one run says. What is unknown, or not yet there, is None or empty."""

    name: str
    config: Mapping[str, str] = field(default_factory=dict)  # MAX_STEPS: "1000", as printed
    device: str | None = None
    dtype: str | None = None
    data: str | None = None
    checksum: str | None = None
    base: str | None = None  # fingerprint of the weights that the run started from
    base_path: str | None = None  # None for random weights
    processes: int = 1
    total: int | None = None  # parameters
    trainable: int | None = None
    evaluations: tuple[Evaluation, ...] = ()
    best_val_loss: float | None = None  # nats per token; from here on, what the summary says
    final_val_loss: float | None = None
    training_time: float | None = None  # seconds, evaluations included
    median_step_time: float | None = None  # seconds
    tokens_per_second: float | None = None
    peak_memory: float | None = None  # MiB
    files: Mapping[str, float] = field(default_factory=dict)  # MiB by path

    @property
    def mode(self) -> str | None:
        """What the run trained, in words."""
        if "USE_LORA" not in self.config:
            return None
        if self.config["USE_LORA"] != "True":
            return "full"
        layers = self.config.get("LORA_TARGETS", "all")
        of = "" if layers == "all" else f" of {layers}"
        frozen = self.config.get("TRAIN_EMBEDDINGS") == "False"
        return f"LoRA rank {self.config.get('LORA_RANK', '?')}{of}" + (
            ", embeddings frozen" if frozen else ""
        )

    @property
    def is_finished(self) -> bool:
        """Whether the log has its summary, which ends it."""
        return self.final_val_loss is not None

    @property
    def last_loss(self) -> float | None:
        """The final validation loss, or that of the last evaluation so far."""
        if self.is_finished or not self.evaluations:
            return self.final_val_loss
        return self.evaluations[-1].val_loss

    @property
    def best_loss(self) -> float | None:
        """The best validation loss (so far) after a step."""
        found = [e.val_loss for e in self.evaluations if e.step > 0 and math.isfinite(e.val_loss)]
        return self.best_val_loss if self.best_val_loss is not None else min(found, default=None)

    @property
    def elapsed(self) -> float | None:
        """Seconds of training, up to the last evaluation where the run has not ended."""
        if self.is_finished or not self.evaluations:
            return self.training_time
        return self.evaluations[-1].elapsed

    @property
    def share(self) -> float | None:
        """Trainable parameters in percent of all."""
        return 100 * self.trainable / self.total if self.total and self.trainable else None

    @property
    def progress(self) -> str:
        """How far the run is, in words."""
        steps = self.config.get("MAX_STEPS", "?")
        last = str(self.evaluations[-1].step) if self.evaluations else steps
        if self.is_finished:
            return f"{steps} steps" if last == steps else f"{last} of {steps} steps (PATIENCE)"
        if not self.evaluations:
            return f"unfinished: no evaluation yet of {steps} steps"
        return f"unfinished: last evaluation at step {last} of {steps}"

    @property
    def file_size(self) -> float | None:
        """MiB of the checkpoint, or under LoRA of the adapter, of the last evaluation."""
        names = ("full.pt", "lora.pt")
        sizes = (s for path, s in self.files.items() if PureWindowsPath(path).name in names)
        return next(sizes, None)

    def goes_on_with(self, earlier: "RunLog") -> bool:
        """Whether this is the rest of the run that was interrupted in `earlier`."""
        same = ("checksum", "base", "total", "trainable")
        return (
            self.config.get("RESUME") == "True"
            and not earlier.is_finished
            and not (self.evaluations and self.evaluations[0].step == 0)  # it started afresh
            and all(getattr(self, name) == getattr(earlier, name) for name in same)
            and all(self.config.get(n) == earlier.config.get(n) for n in ("OUT_DIR", "SEED"))
        )


def read_logs(path: str | os.PathLike) -> list[RunLog]:
    """The logs in a file, in their order; of a folder those in all its `*metrics.jsonl`.

    Raises LogError for a file that cannot be read or is no log of a run that trains.
    """
    path = Path(path)
    try:
        if path.is_dir():
            files = sorted(path.glob("*metrics.jsonl"))
            if not files:
                raise LogError(f"{path} is a folder without a *metrics.jsonl")
            return [log for file in files for log in read_logs(file)]
        text = decode(path.read_bytes())
    except (OSError, ValueError) as error:  # ValueError: a path with a zero byte
        if isinstance(error, LogError):
            raise
        raise LogError(f"{path} cannot be read: {_reason(error)}") from error
    if not text.strip():
        raise LogError(f"{path} is empty")
    if "\0" in text:
        raise LogError(f"{path} is a binary file, neither an output of training.py nor JSON")
    logs = metrics_of(path, text) if text.lstrip().startswith("{") else outputs_of(path, text)
    for log in logs:
        if log.config.get("EVAL_ONLY") == "True" or log.config.get("MERGE") == "True":
            raise LogError(f"{path} is a log of EVAL_ONLY or MERGE, which train nothing")
    if len(logs) == 1:
        return logs
    return [dataclasses.replace(log, name=f"{path}[{i}]") for i, log in enumerate(logs, 1)]


def decode(content: bytes) -> str:
    """The text of a file: UTF-16 if a byte order mark says so, else UTF-8."""
    is_utf16 = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    text = content.decode("utf-16" if is_utf16 else "utf-8", errors="replace")
    return text.replace("\ufeff", "")


def join(logs: Iterable[RunLog]) -> tuple[list[RunLog], list[str]]:
    """Make one log of an interrupted run's and its continuation's, where both are there.

    Returns a log for each run, and a note for each continuation.
    """
    runs: list[RunLog] = []
    notes = []
    for log in logs:
        before = [i for i, run in enumerate(runs) if log.goes_on_with(run)]
        start = log.evaluations[0].step if log.evaluations else None
        if before:
            run = runs[before[-1]]
            kept = tuple(e for e in run.evaluations if start is None or e.step < start)
            evaluations = kept + log.evaluations
            runs[before[-1]] = dataclasses.replace(log, name=run.name, evaluations=evaluations)
            notes.append(f"{log.name} goes on with {run.name}: shown as one run")
            continue
        if log.config.get("RESUME") == "True" and start != 0:
            notes.append(
                f"{log.name} goes on with an interrupted run, whose log is not given: "
                f"its evaluations begin at {'the end' if start is None else f'step {start}'}"
            )
        runs.append(log)
    return runs, notes


def count(text: str) -> int:
    """The number in a text like `3,323,392`."""
    return int(text.replace(",", ""))


# Lines of trainer/description.py: the field of RunLog, the line's pattern, the type of its value.
DESCRIPTION = [
    ("device", r"Device: (.*\)), .*", str),
    ("dtype", r"dtype: (\w+), .*", str),
    ("data", r"   name: +(.*)", str),
    ("checksum", r"   checksum: +(.*)", str),
    ("base_path", r"Base: (.*?) \(fingerprint .*", str),
    ("base", r"Base: .*? \(fingerprint (\w+)\).*", str),
    ("processes", rf"Processes: {COUNT}, .*", count),
    ("total", rf"   Total parameters: {COUNT}", count),
    ("trainable", rf"   Trainable \(.*\): {COUNT}", count),
]


def outputs_of(path: Path, text: str) -> list[RunLog]:
    """The logs in an output of training.py. A last line that is not finished is left out.

    A log ends where another starts with the same prefix, or without one. This tells logs apart that
    a collector interleaved, each with a prefix of its own.
    """
    lines = [as_shown(line) for line in text.split("\n")[:-1]]
    starts = [(i, prefix_of(line)) for i, line in enumerate(lines) if line.endswith(START)]
    if not starts:
        raise LogError(f"{path} is no output of training.py: it has no line {START!r}")
    logs = []
    for i, prefix in starts:
        ends = (j for j, other in starts if j > i and other in (prefix, ""))
        own = lines[i + 1 : next(ends, len(lines))]
        logs.append(output_of(path, [re.sub(f"^{prefix}", "", line) for line in own]))
    return logs


def as_shown(line: str) -> str:
    """What a terminal shows of a line: no escapes, and nothing that a progress bar overwrote."""
    return ESCAPE.sub("", line).rstrip("\r").rpartition("\r")[2]


def prefix_of(line: str) -> str:
    """The pattern of the prefix that a line has before START: the same text, but any time."""
    prefix = line.removesuffix(START)
    return TIME.join(map(re.escape, re.split(TIME, prefix)))


def output_of(path: Path, lines: Iterable[str]) -> RunLog:
    """The log whose lines after START these are."""
    values: dict[str, Any] = {}
    config, files, evaluations = {}, {}, []
    for line in map(printable, lines):
        if line.startswith(SAMPLE):
            break
        if match := VARIABLE.fullmatch(line):
            config[match[1]] = match[2]
        elif found := fields_of(EVALUATION, line):
            numbers = (float(found[name]) for name in ("val_loss", "val_error", "elapsed"))
            evaluations.append(Evaluation(int(found["step"]), *numbers))
        elif found := fields_of(WROTE, line):
            files[found["path"]] = float(found["size"])
        for name, pattern, convert in DESCRIPTION:
            if match := re.fullmatch(pattern, line):
                values.setdefault(name, convert(match[1]))
        for figure in SUMMARY:
            if (value := figure.read(line)) is not None:
                values.setdefault(figure.key, value)
    if values.get("base_path") == "none, random weights":
        values["base_path"] = None
    return RunLog(str(path), config, evaluations=tuple(evaluations), files=files, **values)


def metrics_of(path: Path, text: str) -> list[RunLog]:
    """The logs in a metrics.jsonl. A last line that is not finished is left out.

    Raises LogError for a line that is not JSON, or no part of a metrics.jsonl.
    """
    logs: list[RunLog] = []
    lines = text.split("\n")
    for n, line in enumerate(lines, 1):
        try:
            content = json.loads(line) if line.strip() else None
            if content is not None:
                add_metrics(logs, str(path), content)
        except RecursionError:
            raise LogError(f"{path}, line {n} is nested too deeply") from None
        except json.JSONDecodeError as error:
            if n < len(lines):
                raise LogError(f"{path}, line {n} is not JSON") from error
        except ValueError as error:
            raise LogError(f"{path}, line {n}: {error}") from error
    if not logs:
        raise LogError(f"{path} has no complete line yet")
    return logs


def add_metrics(logs: list[RunLog], name: str, line: Any) -> None:
    """Add what one line says to the last log, or begin another with it.

    Raises ValueError for what is no line of a metrics.jsonl.
    """
    if isinstance(line, dict) and "config" in line:
        run = part(line, "run")
        parameters = part(run, "parameters")
        config = {k.upper(): "default" if v is None else v for k, v in part(line, "config").items()}
        values = {k: words(run, k) for k in ("device", "dtype", "data", "checksum", "base")}
        values["base_path"] = words(run, "base_checkpoint")
        values |= {
            k: whole_number(parameters, k) for k in ("total", "trainable") if k in parameters
        }
        if "processes" in run:
            values["processes"] = whole_number(run, "processes")
        config = {k: printable(str(v)) for k, v in config.items()}
        logs.append(RunLog(name, config, **values))
    elif not isinstance(line, dict) or not logs:
        raise ValueError('it is no part of a metrics.jsonl, which begins with {"config": ...}')
    elif "step" in line:
        numbers = (number(line, key) for key in ("val_loss", "val_error", "elapsed"))
        new = Evaluation(whole_number(line, "step"), *numbers)
        before = tuple(e for e in logs[-1].evaluations if e.step < new.step)
        logs[-1] = dataclasses.replace(logs[-1], evaluations=(*before, new))
    elif "summary" in line:
        summary = part(line, "summary")
        values = {f.key: number(summary, f.key) for f in SUMMARY if f.key in summary}
        files = part(summary, "files")
        values["files"] = {printable(path): number(files, path) / 2**20 for path in files}
        logs[-1] = dataclasses.replace(logs[-1], **values)


def part(values: Mapping[str, Any], key: str) -> dict[str, Any]:
    """The object values[key], empty where it is missing. Raises ValueError for anything else."""
    found = values.get(key, {})
    if not isinstance(found, dict):
        raise ValueError(f"{key} is {_brief(found)}, not an object")
    return found


def words(values: Mapping[str, Any], key: str) -> str | None:
    """The string values[key] on one line, None for null. Raises ValueError for anything else."""
    found = values.get(key)
    if not isinstance(found, str | None):
        raise ValueError(f"{key} is {_brief(found)}, not a string")
    return found if found is None else printable(found)


def whole_number(values: Mapping[str, Any], key: str) -> int:
    """values[key], an int from 0 to 2**63 - 1. Raises ValueError for anything else."""
    found = values.get(key)
    if type(found) is not int or not 0 <= found < 2**63:
        raise ValueError(f"{key} is {_brief(found)}, not a whole number from 0")
    return found


def number(values: Mapping[str, Any], key: str) -> float:
    """values[key], nan where it is null or missing. Raises ValueError for what is no number."""
    found = values.get(key)
    if found is None:
        return math.nan
    if type(found) not in (int, float) or abs(found) > 1e300:  # an int may be too large for float
        raise ValueError(f"{key} is {_brief(found)}, not a number")
    return float(found)


def printable(text: str) -> str:
    """`text` with "?" for each character that a terminal would obey, or that breaks a line."""
    return "".join(c if c.isprintable() else "?" for c in text)


def _brief(value: Any) -> str:
    return printable(json.dumps(value)[:40])


def _reason(error: BaseException) -> str:
    return getattr(error, "strerror", None) or str(error)
