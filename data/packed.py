"""Packed records in a tokenizer's tokens, from a file that is made once and then mapped."""

import contextlib
import dataclasses
import hashlib
import json
import os
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data.packing import Blocks
from data.text_files import MIB, map_file
from files import FileError
from files.writing import replacing

ARRAYS = ("inputs", "targets", "segments")  # of Blocks; the rest of it are numbers
ALIGNED = 64  # each part of the file begins at a multiple of so many bytes
CHECK = 4  # bytes of the CRC-32
MOST_FILES = 8  # in a folder; the oldest ones are removed


@dataclass(frozen=True)
class Packed:
    """What is made of DATA's records.

    Attributes:
        train, validation: the packed records of either split.
        are_texts: whether all records are texts, and none a chat.
        found: for the log; see `Splits`.
    """

    train: Blocks
    validation: Blocks
    are_texts: bool
    found: Mapping[str, str]


def kept_in(folder: Path, identity: Any, make: Callable[[], Packed]) -> Packed:
    """What `make` returns, from a file in `folder` that is made on first use, and memory-mapped.

    `identity` is plain data that decides what `make` returns, beside the code of this folder. Where
    the file cannot be written, as in a folder for reading alone, nothing is kept.
    """
    digest = hashlib.sha256(json.dumps(identity).encode())
    for source in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(source.read_bytes())
    path = folder / f"records-{digest.hexdigest()[:16]}.bin"
    packed = _read(path)
    if packed is None:
        packed = make()
        with contextlib.suppress(FileError, OSError):
            folder.mkdir(parents=True, exist_ok=True)
            _write(path, packed)
            packed = _read(path) or packed
            others = sorted(folder.glob("records-*.bin"), key=os.path.getmtime)
            for other in others[:-MOST_FILES]:
                other.unlink()
    return packed


def _write(path: Path, packed: Packed) -> None:
    """A line of JSON that says what follows, the arrays, and at last the CRC-32 of all that. Raises
    FileError."""
    header: dict[str, Any] = {"are_texts": packed.are_texts, "found": dict(packed.found)}
    arrays = []
    for split in ("train", "validation"):
        blocks = getattr(packed, split)
        fields = {f.name: getattr(blocks, f.name) for f in dataclasses.fields(blocks)}
        parts = {name: fields.pop(name) for name in ARRAYS}
        fields |= {name: [a.dtype.str, list(a.shape)] for name, a in parts.items()}
        header[split] = fields
        arrays += parts.values()
    check = 0
    with replacing(path) as file:
        for part in (json.dumps(header).encode() + b"\n", *arrays):
            padding = b"\0" * (-(file.tell() + memoryview(part).nbytes) % ALIGNED)
            for piece in (part, padding):
                file.write(piece)
                check = zlib.crc32(piece, check)
        file.write(check.to_bytes(CHECK, "little"))


def _read(path: Path) -> Packed | None:
    """What a file holds; None where it is not there, cannot be read, or is not what was written."""
    try:
        if not path.is_file() or path.stat().st_size <= CHECK:
            return None
        with open(path, "rb") as file:
            check, left = 0, path.stat().st_size - CHECK
            while piece := file.read(min(left, MIB)):
                check, left = zlib.crc32(piece, check), left - len(piece)
            if file.read(CHECK) != check.to_bytes(CHECK, "little"):
                return None
            file.seek(0)
            line = file.readline()
            place = file.tell() + -file.tell() % ALIGNED
            content = map_file(file)[:-CHECK]
        header = json.loads(line)
        splits = {}
        for split in ("train", "validation"):
            fields = dict(header[split])
            for name in ARRAYS:
                dtype, shape = fields[name]
                stop = place + np.dtype(dtype).itemsize * int(np.prod(shape))
                fields[name] = content[place:stop].view(dtype).reshape(shape)
                place = stop + -stop % ALIGNED
            splits[split] = Blocks(**fields)
        packed = Packed(**splits, are_texts=header["are_texts"], found=header["found"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return packed if place == len(content) else None
