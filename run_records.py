"""Read what a run recorded: training.py's redirected output, or metrics.jsonl, as one `Record`.

The output is what `python training.py > output.txt` leaves, in UTF-8 or UTF-16 (PowerShell).
metrics.jsonl has one JSON object in a line. The first describes the run:

    {"config": {"use_lora": false, "max_steps": 1000, ...},       every variable, in lower case
     "run": {"device": "cpu (Intel Xeon, 2 threads)", "dtype": "bfloat16",
             "data": "python-code", "checksum": "sha256:72bf4d52312c98b7",
             "base": "5fbca86079505ce4", "base_checkpoint": null,  a path, null for random weights
             "parameters": {"total": 3323392, "trainable": 3323392}, "processes": 1}}

then come the evaluations, with losses in nats per token and `elapsed` in seconds:

    {"step": 100, "train_loss": 2.77, "val_loss": 2.40, "val_error": 0.017,
     "learning_rate": 0.00298, "tokens_per_second": 23628, "elapsed": 18.9}

and when the run has ended, with seconds, MiB of memory and bytes of files:

    {"summary": {"best_val_loss": 1.46, "final_val_loss": 1.46, "training_time": 178.6,
                 "median_step_time": 0.1696, "tokens_per_second": 24075, "peak_memory": 792,
                 "files": {"out/full.pt": 13316789}}}

Keys that are not named here are ignored, and one that is missing is unknown. null is nan where a
number is due. A run that goes on after an interruption begins with a first line of its own.
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

START = "Configuration (* set in the environment):"
SAMPLE = "Sample ("
NUMBER = r"(nan|inf|\d+(?:\.\d+)?)"
COUNT = r"(\d[\d,]{0,20})"
EVALUATION = re.compile(
    rf"step (\d{{1,18}}) \| train loss \S+ \| val loss {NUMBER} \+- {NUMBER} \| .* \| "
    rf"elapsed {NUMBER} s"
)
VARIABLE = re.compile(r"   ([A-Z][A-Z0-9_]*): (.*?)(?: \*)?")
WRITTEN = re.compile(rf"Wrote (.*): {NUMBER} MiB")


class RecordError(ValueError):
    """A file that records no run: names the file and what is wrong with it."""


@dataclass(frozen=True)
class Evaluation:
    """One evaluation: losses in nats per token, the standard error of val_loss, seconds so far."""

    step: int
    val_loss: float
    val_error: float
    elapsed: float


@dataclass(frozen=True)
class Record:
    """What one run recorded. None and nothing stand for what is unknown or has yet to come."""

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
    best_val_loss: float | None = None  # nats per token; this and all below are of the summary
    final_val_loss: float | None = None
    training_time: float | None = None  # seconds, evaluations included
    step_time: float | None = None  # seconds, the median
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
        """Seconds of training, up to the last evaluation where it has not ended."""
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
        if self.is_finished:
            return f"{steps} steps"
        if not self.evaluations:
            return f"unfinished: no evaluation yet of {steps} steps"
        return f"unfinished: last evaluation at step {self.evaluations[-1].step} of {steps}"

    @property
    def file_size(self) -> float | None:
        """MiB of the checkpoint, or under LoRA of the adapter, of the last evaluation."""
        names = ("full.pt", "lora.pt")
        sizes = (s for path, s in self.files.items() if PureWindowsPath(path).name in names)
        return next(sizes, None)

    def goes_on_with(self, earlier: "Record") -> bool:
        """Whether this is the rest of the run that was interrupted in `earlier`."""
        same = ("checksum", "base", "total", "trainable")
        return (
            self.config.get("RESUME") == "True"
            and not earlier.is_finished
            and not (self.evaluations and self.evaluations[0].step == 0)  # it started afresh
            and all(getattr(self, name) == getattr(earlier, name) for name in same)
            and all(self.config.get(n) == earlier.config.get(n) for n in ("OUT_DIR", "SEED"))
        )


def read_records(path: str | os.PathLike) -> list[Record]:
    """The runs in a file, in their order; of a folder those in all its `*metrics.jsonl`.

    Raises RecordError for a file that cannot be read or records no run.
    """
    path = Path(path)
    try:
        if path.is_dir():
            files = sorted(path.glob("*metrics.jsonl"))
            if not files:
                raise RecordError(f"{path} is a folder without a *metrics.jsonl")
            return [record for file in files for record in read_records(file)]
        text = decode(path.read_bytes())
    except (OSError, ValueError) as error:  # ValueError: a path with a zero byte
        if isinstance(error, RecordError):
            raise
        raise RecordError(f"{path} cannot be read: {_reason(error)}") from error
    if not text.strip():
        raise RecordError(f"{path} is empty")
    if "\0" in text:
        raise RecordError(f"{path} is a binary file, neither an output of training.py nor JSON")
    records = metrics_of(path, text) if text.lstrip().startswith("{") else outputs_of(path, text)
    for record in records:
        if record.config.get("EVAL_ONLY") == "True" or record.config.get("MERGE") == "True":
            raise RecordError(f"{path} is of EVAL_ONLY or MERGE, which train nothing")
    if len(records) == 1:
        return records
    return [dataclasses.replace(record, name=f"{path}[{i}]") for i, record in enumerate(records, 1)]


def decode(content: bytes) -> str:
    """The text of a file: UTF-16 if a byte order mark says so, else UTF-8. Lines end in \\n."""
    is_utf16 = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    text = content.decode("utf-16" if is_utf16 else "utf-8", errors="replace")
    return text.replace("\r", "").replace("\ufeff", "")


def join(records: Iterable[Record]) -> tuple[list[Record], list[str]]:
    """Make one of an interrupted run and its continuation, where both are there.

    Returns the runs and a note for each continuation.
    """
    runs: list[Record] = []
    notes = []
    for record in records:
        before = [i for i, run in enumerate(runs) if record.goes_on_with(run)]
        start = record.evaluations[0].step if record.evaluations else None
        if before:
            run = runs[before[-1]]
            kept = tuple(e for e in run.evaluations if start is None or e.step < start)
            evaluations = kept + record.evaluations
            runs[before[-1]] = dataclasses.replace(record, name=run.name, evaluations=evaluations)
            notes.append(f"{record.name} goes on with {run.name}: shown as one run")
            continue
        if record.config.get("RESUME") == "True" and start != 0:
            notes.append(
                f"{record.name} goes on with an interrupted run, whose record is not given: "
                f"its evaluations begin at {'the end' if start is None else f'step {start}'}"
            )
        runs.append(record)
    return runs, notes


SUMMARY = ("best_val_loss", "final_val_loss", "training_time", "median_step_time",
           "tokens_per_second", "peak_memory")  # fmt: skip


def count(text: str) -> int:
    return int(text.replace(",", ""))


# What an output says in lines of its own: the field, the line, and the value in it.
FACTS = [
    ("device", r"Device: (.*\)), .*", str),
    ("dtype", r"dtype: (\w+), .*", str),
    ("data", r"   name: +(.*)", str),
    ("checksum", r"   checksum: +(.*)", str),
    ("base_path", r"Base: (.*?) \(fingerprint .*", str),
    ("base", r"Base: .*? \(fingerprint (\w+)\).*", str),
    ("processes", rf"Processes: {COUNT}, .*", count),
    ("total", rf"   Total parameters: {COUNT}", count),
    ("trainable", rf"   Trainable \(.*\): {COUNT}", count),
    ("best_val_loss", f"Best validation loss: {NUMBER}", float),
    ("final_val_loss", f"Final validation loss: {NUMBER}", float),
    ("training_time", f"Training time: {NUMBER} s", float),
    ("step_time", f"Median step time: {NUMBER} ms", lambda ms: float(ms) / 1000),
    ("tokens_per_second", f"Tokens per second: {NUMBER}", float),
    ("peak_memory", f"Peak memory: {NUMBER} MiB", float),
]


def outputs_of(path: Path, text: str) -> list[Record]:
    """The runs in an output of training.py, of which an unfinished last line is left out."""
    lines = [printable(line) for line in text.split("\n")[:-1]]
    starts = [i for i, line in enumerate(lines) if line == START]
    if not starts:
        raise RecordError(f"{path} is no output of training.py: it has no line {START!r}")
    ends = [*starts[1:], len(lines)]
    return [output_of(path, lines[a + 1 : b]) for a, b in zip(starts, ends, strict=True)]


def output_of(path: Path, lines: list[str]) -> Record:
    values: dict[str, Any] = {}
    config, files, evaluations = {}, {}, []
    for line in lines:
        if line.startswith(SAMPLE):  # the model's own words follow
            break
        if match := VARIABLE.fullmatch(line):
            config[match[1]] = match[2]
        elif match := EVALUATION.fullmatch(line):
            evaluations.append(Evaluation(int(match[1]), *map(float, match.groups()[1:])))
        elif match := WRITTEN.fullmatch(line):
            files[match[1]] = float(match[2])
        for name, pattern, convert in FACTS:
            if match := re.fullmatch(pattern, line):
                values.setdefault(name, convert(match[1]))
    if values.get("base_path") == "none, random weights":
        values["base_path"] = None
    return Record(str(path), config, evaluations=tuple(evaluations), files=files, **values)


def metrics_of(path: Path, text: str) -> list[Record]:
    """The runs in a metrics.jsonl, of which an unfinished last line is left out."""
    records: list[Record] = []
    lines = text.split("\n")
    for n, line in enumerate(lines, 1):
        try:
            content = json.loads(line) if line.strip() else None
            if content is not None:
                add_metrics(records, str(path), content)
        except RecursionError:
            raise RecordError(f"{path}, line {n} is nested too deeply") from None
        except json.JSONDecodeError as error:
            if n < len(lines):
                raise RecordError(f"{path}, line {n} is not JSON") from error
        except ValueError as error:
            raise RecordError(f"{path}, line {n}: {error}") from error
    if not records:
        raise RecordError(f"{path} has no complete line yet")
    return records


def add_metrics(records: list[Record], name: str, line: Any) -> None:
    """Add what one line says to the last record, or the record that it begins.

    Raises ValueError for a line that is none of metrics.jsonl.
    """
    if isinstance(line, dict) and "config" in line:
        run = part(line, "run")
        parameters = part(run, "parameters")
        config = {k.upper(): "default" if v is None else v for k, v in part(line, "config").items()}
        values = {k: words(run, k) for k in ("device", "dtype", "data", "checksum", "base")}
        values["base_path"] = words(run, "base_checkpoint")
        values |= {k: whole(parameters, k) for k in ("total", "trainable") if k in parameters}
        if "processes" in run:
            values["processes"] = whole(run, "processes")
        config = {k: printable(str(v)) for k, v in config.items()}
        records.append(Record(name, config, **values))
    elif not isinstance(line, dict) or not records:
        raise ValueError('it is no part of a metrics.jsonl, which begins with {"config": ...}')
    elif "step" in line:
        numbers = (number(line, key) for key in ("val_loss", "val_error", "elapsed"))
        new = Evaluation(whole(line, "step"), *numbers)
        before = tuple(e for e in records[-1].evaluations if e.step < new.step)
        records[-1] = dataclasses.replace(records[-1], evaluations=(*before, new))
    elif "summary" in line:
        summary = part(line, "summary")
        names = {"median_step_time": "step_time"}
        values = {names.get(k, k): number(summary, k) for k in SUMMARY if k in summary}
        files = part(summary, "files")
        values["files"] = {printable(path): number(files, path) / 2**20 for path in files}
        records[-1] = dataclasses.replace(records[-1], **values)


def part(values: Mapping[str, Any], key: str) -> dict[str, Any]:
    """values[key], which must be an object; empty where it is missing."""
    found = values.get(key, {})
    if not isinstance(found, dict):
        raise ValueError(f"{key} is {_brief(found)}, not an object")
    return found


def words(values: Mapping[str, Any], key: str) -> str | None:
    found = values.get(key)
    if not isinstance(found, str | None):
        raise ValueError(f"{key} is {_brief(found)}, not a string")
    return found if found is None else printable(found)


def whole(values: Mapping[str, Any], key: str) -> int:
    found = values.get(key)
    if type(found) is not int or not 0 <= found < 2**63:
        raise ValueError(f"{key} is {_brief(found)}, not a whole number from 0")
    return found


def number(values: Mapping[str, Any], key: str) -> float:
    """values[key], nan where it is null or missing."""
    found = values.get(key)
    if found is None:
        return math.nan
    if type(found) not in (int, float) or abs(found) > 1e300:  # an int may be too large for float
        raise ValueError(f"{key} is {_brief(found)}, not a number")
    return float(found)


def printable(text: str) -> str:
    """`text` without what a terminal would obey, or that breaks a line."""
    return "".join(c if c.isprintable() else "?" for c in text)


def _brief(value: Any) -> str:
    return printable(json.dumps(value)[:40])


def _reason(error: BaseException) -> str:
    return getattr(error, "strerror", None) or str(error)
