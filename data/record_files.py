"""DATA to examples: which files hold records, and which of these train or validate."""

import contextlib
import hashlib
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from data.corpus import DataError, printable
from data.forms import COLUMNS, Example, parse_rows
from data.rows import AS_TEXT, read_rows
from data.text_files import (
    BUILT_IN,
    BUILT_IN_RECORDS,
    ENDINGS,
    files_below,
    is_of_a_run,
    path_of,
)

# What the words in a file's path say that it is for; see `_purpose`.
WORDS = {"train": "train", "training": "train", "test": "test"}
WORDS |= dict.fromkeys(("valid", "validation", "val", "dev", "eval"), "validation")
ABOUT = re.compile("(readme|licen[cs]e|notice|citation)", re.IGNORECASE)  # files about a dataset
EVERY = 10  # every tenth record is for validation, where no file is


@dataclass(frozen=True)
class RecordFiles:
    """The files of DATA.

    Attributes:
        name: DATA.
        train, validation: the files of either split. Where none is for validation, every tenth
            example is.
        left_out: the names of other files, each with the reason.
    """

    name: str
    train: list[Path]
    validation: list[Path]
    left_out: dict[str, str]

    def shown(self, file: Path) -> str:
        """The name of a file as the log has it."""
        folder = Path(path_of(self.name))
        return str(file.relative_to(folder)) if file != folder else file.name

    def checksum(self) -> str:
        """Of the files of either split: "sha256:" and 16 hex digits. Raises DataError."""
        digest = hashlib.sha256()
        for split, paths in (("train", self.train), ("validation", self.validation)):
            for path in paths:
                with _opened(path) as file:
                    content = hashlib.file_digest(file, "sha256").hexdigest()
                digest.update(f"{split} {content}\n".encode())
        return f"sha256:{digest.hexdigest()[:16]}"


@dataclass(frozen=True)
class Splits:
    """The examples of DATA.

    Attributes:
        train, validation: the examples of either split.
        found: for the log, by the file's name: its layout, how many rows, and what was ignored.
    """

    train: list[Example]
    validation: list[Example]
    found: dict[str, str]


def is_records(name: str | None) -> bool:
    """Whether DATA=`name` is records: python-instructions, a dataset file, or a folder of them.

    A dataset file has one of ENDINGS in any spelling, or is compressed and has .gz behind. What it
    holds is not asked, so that a .json file which is no dataset is an error and no surprise.

    A folder is one of records where a dataset file at its top is named as training or validation
    data, as train.jsonl is. It is one too where it holds dataset files and nothing else, in any
    depth, beside a README, a licence and hidden files. Any other folder is text, also with dataset
    files among its own.
    """
    if not name or (name in BUILT_IN and name != BUILT_IN_RECORDS):
        return False
    path = Path(path_of(name))
    return bool(_dataset_files(name, path)) if path.is_dir() else _is_dataset(path)


def find_records(name: str) -> RecordFiles:
    """The files of records that DATA=`name` stands for.

    In a folder, files whose path has the word train are for training, and those with valid,
    validation, val, dev or eval for validation; words stand between any other characters than
    letters. Where none has train, all files without such a word are for training. Others are left
    out.

    Raises DataError for a folder that cannot be read, or has none to train on.
    """
    path = Path(path_of(name))
    if not path.is_dir():
        return RecordFiles(name, [path], [], {})
    files, left_out = _sort(name, path, _dataset_files(name, path))
    reasons = {str(file.relative_to(path)): f"left out, as {why}" for file, why in left_out}
    return RecordFiles(name, files["train"], files["validation"], reasons)


def read_splits(files: RecordFiles, columns: Mapping[str, str]) -> Splits:
    """The examples in the files; `columns` as in `parse_rows`.

    Raises DataError for a file that cannot be read, or has a row that is no example.
    """
    found = dict(files.left_out)
    train: list[Example] = []
    validation: list[Example] = []
    for split, paths in ((train, files.train), (validation, files.validation)):
        for file in paths:
            rows = read_rows(str(file), _read(file), (*COLUMNS, *columns.values()))
            new, line = parse_rows(str(file), rows, columns)
            split += new
            found[files.shown(file)] = line + ("; for validation" if split is validation else "")
    if not files.validation:
        if len(train) < 2:
            raise DataError(
                f"{printable(str(files.train[0]))}: one record is too few, as validation needs "
                "one too"
            )
        validation = train[EVERY - 1 :: EVERY] or train[-1:]
        kept = set(map(id, validation))
        train = [example for example in train if id(example) not in kept]
    return Splits(train, validation, {printable(f): line for f, line in sorted(found.items())})


# ---- the files of a folder


def _dataset_files(name: str, folder: Path) -> list[Path]:
    """The dataset files of a folder of records, in order; none where the folder is text."""
    try:
        names = sorted(os.listdir(folder))
    except OSError as error:
        raise DataError(f"DATA={printable(name)}: cannot be read: {error.strerror}") from error
    top = [folder / n for n in names if not n.startswith(".") and not is_of_a_run(n)]
    top = [path for path in top if not path.is_dir()]
    datasets = [path for path in top if _is_dataset(path)]
    if any(_purpose(path, folder) in ("train", "validation") for path in datasets):
        return datasets
    if not all(map(_may_be_in_a_dataset, top)):
        return []  # without a look at all that lies deeper
    below = [Path(path) for path in files_below(name, str(folder))]
    return list(filter(_is_dataset, below)) if all(map(_may_be_in_a_dataset, below)) else []


def _may_be_in_a_dataset(path: Path) -> bool:
    return _is_dataset(path) or ABOUT.match(path.name) is not None


def _is_dataset(path: Path) -> bool:
    name = path.name.lower()
    return name.endswith((*ENDINGS, ".gz"))


def _purpose(file: Path, folder: Path) -> str | None:
    """What a file is for, by the last word of WORDS in its path below the folder."""
    words = re.split("[^a-z]+", str(file.relative_to(folder)).lower())
    known = [WORDS[word] for word in words if word in WORDS]
    return known[-1] if known else None


def _sort(
    name: str, folder: Path, files: list[Path]
) -> tuple[dict[str, list[Path]], list[tuple[Path, str]]]:
    """A folder's files for training and validation, and those left out with the reason.

    Raises DataError where none is for training, and for the same data twice.
    """
    purposes = {file: _purpose(file, folder) for file in files}
    training = "train" if "train" in purposes.values() else None
    split: dict[str, list[Path]] = {"train": [], "validation": []}
    left_out = []
    for file, purpose in purposes.items():
        if purpose == training:
            split["train"].append(file)
        elif purpose == "validation":
            split["validation"].append(file)
        else:
            why = "test data" if purpose == "test" else "its name says neither train nor valid"
            left_out.append((file, why))
    if not split["train"]:
        names = ", ".join(printable(file.name) for file in files[:4])
        raise DataError(
            f"DATA={printable(name)}: the folder has {names}, and no file to train on; accepted: "
            f"a file such as train.jsonl; {AS_TEXT}"
        )
    _refuse_twins(name, split["train"] + split["validation"])
    return split, left_out


def _refuse_twins(name: str, files: list[Path]) -> None:
    """Raise DataError for two files whose names differ in the ending alone: the same data twice."""
    stems: dict[Path, Path] = {}
    for file in files:
        stem = file.with_name(re.sub(r"\.[a-z]+(\.gz)?$", "", file.name.lower()))
        if other := stems.get(stem):
            raise DataError(
                f"DATA={printable(name)}: {printable(other.name)} and {printable(file.name)} look "
                f"like the same data twice; accepted: one of them, as DATA={printable(str(file))}"
            )
        stems[stem] = file


def _read(path: Path) -> bytes:
    """The content of a file. Raises DataError when it cannot be read."""
    with _opened(path) as file:
        return file.read()


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    """A file to read, whose errors are DataErrors."""
    if path.exists() and not path.is_file():  # opening a pipe would wait for its writer
        raise DataError(f"DATA={printable(str(path))}: not a regular file")
    try:
        with open(path, "rb") as file:
            yield file
    except OSError as error:
        raise DataError(f"DATA={printable(str(path))}: cannot be read: {error.strerror}") from error
