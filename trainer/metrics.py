"""metrics.jsonl: the log of a run for programs, one JSON object a line.

It can be read while it grows. trainer/log.py says what the lines hold.

The file of an earlier run stays until this one has trained and evaluated, as its other files do.
"""

import json
import math
from pathlib import Path
from typing import Any

from files import FileError
from files.writing import replacing
from hardware import processes


class Metrics:
    """Writes the file, from the first evaluation after a step on.

    A line is in the file, whole, when `write` returns. Of several processes the first writes.
    """

    def __init__(self, path: Path, first: dict[str, Any], evaluated: int) -> None:
        """The file begins with the line `first`.

        `evaluated` is the step of a resumed run's last evaluation: the file keeps the evaluations
        up to it that are there already. It is -1 for a new run.
        """
        self.path, self.begun = path, False
        self.lines = [json.dumps(plain(first))]
        if evaluated >= 0 and path.exists():
            self.lines += earlier_evaluations(path, evaluated)

    def write(self, values: dict[str, Any]) -> None:
        """Append a line. Raises FileError when it cannot be written."""
        if not processes.is_main_process():
            return
        self.lines.append(json.dumps(plain(values)))
        if values.get("step") != 0:
            self.flush()

    def flush(self) -> None:
        """Have all lines in the file, as of a run that ends now. Raises FileError as `write`."""
        if not self.lines or not processes.is_main_process():
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
    """The file's lines of evaluations up to the step `evaluated`, without broken lines."""
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
    """The value with None for NaN and infinity, which JSON lacks."""
    if isinstance(value, dict):
        return {str(name): plain(v) for name, v in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
