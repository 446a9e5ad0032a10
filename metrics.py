"""metrics.jsonl: a run's record for programs, an object a line, which can be read while it grows.

The first line is {"config": ..., "run": ...}; then one for each evaluation; the last, when the run
has ended, {"summary": ...}. The file of an earlier run stays until this one has trained and
evaluated, as do the others of its files.
"""

import json
import math
from pathlib import Path
from typing import Any

import distributed
from lora.files import FileError, replacing


class Metrics:
    """Writes the file, from the first evaluation after a step on; each line is there, whole, when
    `write` returns.

    Of several processes the first does, and the others write nothing.
    """

    def __init__(self, path: Path, first: dict[str, Any], evaluated: int) -> None:
        """The file will begin with the line `first`, and keep what a run that is resumed had
        written of its evaluations, up to step `evaluated`; -1 for a new run.
        """
        self.path, self.begun = path, False
        self.lines = [json.dumps(plain(first))]
        if evaluated >= 0 and path.exists():
            self.lines += earlier_evaluations(path, evaluated)

    def write(self, values: dict[str, Any]) -> None:
        """Append a line. Raises FileError when it cannot be written."""
        if not distributed.is_first():
            return
        self.lines.append(json.dumps(plain(values)))
        if values.get("step") == 0:
            return
        text = "".join(f"{line}\n" for line in self.lines)
        self.lines = []
        if not self.begun:
            self.begun = True
            with replacing(self.path) as file:
                file.write(text.encode())
            return
        try:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(text)
        except OSError as error:
            raise FileError(f"{self.path} cannot be written: {error.strerror}") from error


def earlier_evaluations(path: Path, evaluated: int) -> list[str]:
    """The file's lines of evaluations up to a step; what is no such line is left out."""
    lines = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            step = json.loads(line).get("step")
        except (ValueError, AttributeError):
            continue
        if isinstance(step, int) and step <= evaluated:
            lines.append(line)
    return lines


def plain(value: Any) -> Any:
    """The value as JSON has it: no NaN and no infinity."""
    if isinstance(value, dict):
        return {str(name): plain(v) for name, v in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
