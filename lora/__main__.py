"""List adapters, and exchange them with Hugging Face PEFT.

python -m lora                            list the adapters in this folder and below it
python -m lora out/lora.pt peft-folder    list these; a folder of PEFT's is an adapter too
python -m lora export out/lora.pt folder  write an adapter as a folder that PEFT reads
python -m lora import folder lora.pt      write a folder of PEFT's as one file
python -m lora --help                     print this
"""

import os
import sys
from pathlib import Path

from files import FileError, OtherKind
from files.streams import exit_on_signals, one_line, run_command, write_out
from lora.adapters import read_adapter, write_adapter
from lora.peft_format import CONFIG, is_peft_folder, write_peft

HEADER = ("file", "rank", "alpha", "trained on", "steps", "val loss", "base", "MiB")


def main(arguments: list[str]) -> int:
    """Do what the arguments say; returns 2 when a file cannot be read, used or written."""
    return run_command(lambda: work(arguments), FileError)


def work(arguments: list[str]) -> None:
    """Do what the arguments say. Raises FileError when a file cannot be read, used or written."""
    if arguments in (["--help"], ["-h"]):
        write_out(f"{__doc__.strip()}\n")
    elif options := [argument for argument in arguments if argument.startswith("-")]:
        raise FileError(f"{options[0]!r} is no option; python -m lora --help shows what is")
    elif arguments[:1] in (["export"], ["import"]):
        exchange(*arguments)
    else:
        unread: list[FileError] = []
        print_table([row for name in arguments or ["."] for row in rows_of(Path(name), unread)])
        if unread:
            more = f" (and {len(unread) - 1} more)" if len(unread) > 1 else ""
            raise FileError(f"{unread[0]}{more}")


def exchange(command: str, *names: str) -> None:
    """Copy an adapter from our format to PEFT's, or the other way round."""
    if len(names) != 2:
        raise FileError(f"{command} takes two names, what to read and what to write")
    source, target = names
    if os.path.isdir(source) != (command == "import"):
        raise FileError(f"{source} is not {'a folder' if command == 'import' else 'a file'}")
    if command == "import" and os.path.exists(target):
        raise FileError(f"{target} exists already; remove it, or name another file")
    size = (write_peft if command == "export" else write_adapter)(target, read_adapter(source))
    write_out(one_line(f"Wrote {target}: {size / 2**20:.2f} MiB") + "\n")


def print_table(rows: list[tuple[str, ...]]) -> None:
    """Print rows under HEADER, each column as wide as its longest cell."""
    widths = [max(len(row[i]) for row in [HEADER, *rows]) for i in range(len(HEADER))]
    for row in [HEADER, *rows]:
        cells = (f"{one_line(cell):{width}}" for cell, width in zip(row, widths, strict=True))
        write_out("  ".join(cells).rstrip() + "\n")


def rows_of(path: Path, unread: list[FileError]) -> list[tuple[str, ...]]:
    """The row of a file or of PEFT's folder, or those of all adapters in a folder and below it.

    The errors of adapters below a folder that cannot be read are added to `unread`.
    """
    if not path.is_dir() or is_peft_folder(path):
        return [row_of(path)]
    rows = []
    folders = (config.parent for config in path.rglob(CONFIG))
    files = (found for found in path.rglob("*.pt") if found.is_file())
    for found in sorted([*files, *folders]):
        try:
            rows.append(row_of(found))
        except OtherKind:  # a checkpoint, or no file of ours
            continue
        except FileError as error:
            unread.append(error)
    return rows


def row_of(path: Path) -> tuple[str, ...]:
    """The cells of one adapter's row, under HEADER. Raises FileError where it cannot be read."""
    adapter = read_adapter(path)
    metadata = adapter.metadata
    loss = metadata.get("val_loss")
    files = path.iterdir() if path.is_dir() else [path]
    return (
        str(path),
        "/".join(map(str, sorted(set(adapter.ranks.values())))),
        "/".join(f"{alpha:g}" for alpha in sorted(set(adapter.alpha.values()))),
        str(metadata.get("data", "-")),
        str(metadata.get("step", "-")),
        f"{loss:.4f}" if isinstance(loss, float) else "-",
        adapter.base or "-",
        f"{sum(map(os.path.getsize, files)) / 2**20:.2f}",
    )


if __name__ == "__main__":
    exit_on_signals()
    sys.exit(main(sys.argv[1:]))
