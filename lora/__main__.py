"""List adapter files: `python -m lora [file or folder ...]`, by default all below this folder."""

import contextlib
import os
import sys
from pathlib import Path

from lora.adapters import read_adapter
from lora.files import FileError, OtherKind

HEADER = ("file", "rank", "alpha", "trained on", "steps", "val loss", "base", "MiB")


def main(arguments: list[str]) -> int:
    """Print a table with a row for each adapter; returns 2 when a file cannot be read as one."""
    try:
        rows = [row for name in arguments or ["."] for row in rows_of(Path(name))]
    except FileError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    widths = [max(len(row[i]) for row in [HEADER, *rows]) for i in range(len(HEADER))]
    for row in [HEADER, *rows]:
        cells = (f"{cell:{width}}" for cell, width in zip(row, widths, strict=True))
        print("  ".join(cells).rstrip())
    return 0


def rows_of(path: Path) -> list[tuple[str, ...]]:
    """The row of a file, or those of all adapters in a folder and below it."""
    if not path.is_dir():
        return [row_of(path)]
    rows = []
    for file in sorted(path.rglob("*.pt")):
        with contextlib.suppress(OtherKind):  # a checkpoint, or no file of ours
            rows.append(row_of(file))
    return rows


def row_of(path: Path) -> tuple[str, ...]:
    adapter = read_adapter(path)
    facts = adapter.metadata
    loss = facts.get("val_loss")
    return (
        str(path),
        "/".join(map(str, sorted(set(adapter.ranks.values())))),
        "/".join(f"{alpha:g}" for alpha in sorted(set(adapter.alpha.values()))),
        str(facts.get("data", "-")),
        str(facts.get("step", "-")),
        f"{loss:.4f}" if isinstance(loss, float) else "-",
        adapter.base,
        f"{os.path.getsize(path) / 2**20:.2f}",
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
