"""Packed records in a tokenizer's tokens, from a file that is made once and then mapped."""

import contextlib
import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data.packing import Blocks
from data.text_files import map_file
from files import FileError
from files.writing import replacing

ARRAYS = ("inputs", "targets", "segments")  # of Blocks; the rest of it are numbers
ALIGNED = 64  # each part of the file begins at a multiple of so many bytes


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
    return packed


def _write(path: Path, packed: Packed) -> None:
    """A line of JSON that says what follows, and the arrays. Raises FileError."""
    header: dict[str, Any] = {"are_texts": packed.are_texts, "found": dict(packed.found)}
    arrays = []
    for split in ("train", "validation"):
        blocks = getattr(packed, split)
        fields = {f.name: getattr(blocks, f.name) for f in dataclasses.fields(blocks)}
        parts = {name: fields.pop(name) for name in ARRAYS}
        fields |= {name: [a.dtype.str, list(a.shape)] for name, a in parts.items()}
        header[split] = fields
        arrays += parts.values()
    with replacing(path) as file:
        for part in (json.dumps(header).encode() + b"\n", *arrays):
            file.write(part)
            file.write(b"\0" * (-file.tell() % ALIGNED))


def _read(path: Path) -> Packed | None:
    """What a file holds; None where it is not there, or not whole."""
    if not path.is_file():
        return None
    with open(path, "rb") as file:
        line = file.readline()
        place = file.tell() + -file.tell() % ALIGNED
        content = map_file(file) if line else np.empty(0, np.uint8)
    try:
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
    except (ValueError, KeyError, TypeError):
        return None
    return packed if place == len(content) else None
