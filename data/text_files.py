"""Text by name or path: finds its files and maps their bytes into memory.

Nothing here reads a text into the process. A single file is memory-mapped. The files of a folder
are joined in an anonymous temporary file, which is memory-mapped in turn.
"""

import codecs
import hashlib
import mmap
import os
import re
import stat
import sysconfig
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from data.corpus import DataError, printable
from files.streams import did_you_mean
from files.writing import LOCK

ENDINGS = (".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".parquet")  # of files of records
BUILT_IN_RECORDS = "python-instructions"  # see record_files.py
BUILT_IN = ("python-code", "python-docs", BUILT_IN_RECORDS)
ACCEPTED_PATH = "DATA=path of a file or of a folder with text files"
ACCEPTED = f"DATA={', DATA='.join(BUILT_IN)}, or {ACCEPTED_PATH}"

# What is left out of the standard library for python-code: tests and tables are not code that
# anyone would want to imitate, and installed packages differ from machine to machine.
NOT_PYTHON_CODE = {"test", "tests", "idle_test", "idlelib", "lib2to3", "encodings", "pydoc_data"}
NOT_PYTHON_CODE |= {"site-packages", "dist-packages", "__pycache__"}

# What runs write beside these, where the output folder is a folder of texts itself.
OF_A_RUN = re.compile(r".*\.pt|(tokens|records)-[0-9a-f]{16}\.bin|(full|lora)-metrics\.jsonl")

MIB = 1024 * 1024
N_SAMPLES = 64  # the checksum of a corpus of more MiB than this reads so many samples of 1 MiB
HEAD_BYTES = 64 * 1024  # how much of a file decides whether it is text


class Text(NamedTuple):
    """A text as it lies on the disk.

    Attributes:
        name: what was asked for: a built-in name, or the path as the user wrote it.
        content: (n_bytes,) uint8, read-only, in mapped memory.
        checksum: "sha256:" and 16 hex digits; ends in " (64 samples)" if not every byte was read.
        n_files: how many texts were joined (for python-docs, its topics).
        n_skipped: how many files of the folder were left out because they are not text. Empty
            and hidden files are not counted.
        n_records: how many of the texts of a folder have the name of a file of records. Those in
            .json are not counted, which programs have among their sources.
    """

    name: str
    content: np.ndarray
    checksum: str
    n_files: int
    n_skipped: int
    n_records: int = 0


def find_text(name: str | None, default_path: Path) -> Text:
    """Find a text and map it into memory.

    Args:
        name: the variable DATA. `python-code` and `python-docs` come with Python itself. Anything
            else is the path of a file, whose every byte counts, or of a folder, whose text files
            count. A file of the same name as a built-in corpus is reached as `./python-code`.
            None stands for `default_path` if that is a file, else for `python-code`.
        default_path: the text of the project, used when it exists and DATA is not set.

    A mapped file must not shrink while the text is in use.

    Raises:
        DataError: nothing there, nothing in it, not readable, or neither a file nor a folder.
    """
    if name is None:
        name = str(default_path) if os.path.isfile(default_path) else "python-code"
    if name == "python-code":
        return _python_code()
    if name == "python-docs":
        return _python_docs()
    if not name:
        raise _data_error(name, "the value is empty")

    path = path_of(name)
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        hint = did_you_mean(name, BUILT_IN)
        raise _data_error(name, _what_failed(error) + hint) from error
    if stat.S_ISDIR(mode):
        return _folder(name, path)
    if stat.S_ISREG(mode):
        return _file(name, path)
    # Opening a pipe would wait for its writer, and a device has no end: neither can be mapped.
    raise _data_error(name, "neither a regular file nor a folder")


def path_of(name: str) -> str:
    """The path that DATA=`name` stands for."""
    if name == BUILT_IN_RECORDS:
        return str(Path(__file__).resolve().parent / name)
    return os.path.expanduser(name)


# ---- the four kinds of text


def _python_code() -> Text:
    """The standard library's sources, about 9 MB with Python 3.11."""
    name = "python-code"
    root = sysconfig.get_path("stdlib")
    files: list[str] = []
    if os.path.isdir(root):
        files = files_below(name, root, lambda folder: folder not in NOT_PYTHON_CODE)
    sources = [path for path in files if path.endswith(".py")]
    if not sources:
        raise _data_error(name, f"this Python has no .py files in {printable(root)}", ACCEPTED_PATH)
    return _join_text_files(name, sources)


def _python_docs() -> Text:
    """The language reference that help() prints, about 465,000 characters of English."""
    name = "python-docs"
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise _data_error(name, "this Python has no pydoc_data.topics", ACCEPTED_PATH) from error
    texts = ([topics[key].encode()] for key in sorted(topics))
    content, checksum = _join(name, texts)
    return Text(name, content, checksum, n_files=len(topics), n_skipped=0)


def _file(name: str, path: str) -> Text:
    """One regular file, every byte of it, whatever it holds."""
    try:
        with open(path, "rb") as file:
            if os.fstat(file.fileno()).st_size == 0:
                raise _data_error(name, "the file is empty")
            content, checksum = map_file(file), _checksum(file)
    except OSError as error:
        raise _data_error(name, _what_failed(error)) from error
    return Text(name, content, checksum, n_files=1, n_skipped=0)


def _folder(name: str, path: str) -> Text:
    """The text files of a folder and of the folders in it, as `files_below` finds them."""
    files = files_below(name, path)
    return _join_text_files(name, files)


# ---- finding files


def files_below(
    name: str, root: str, enter: Callable[[str], bool] = lambda folder: True
) -> list[str]:
    """Paths of the files of DATA=`name` below root, sorted by POSIX path relative to root.

    Hidden files and folders are left out. So is what runs write, so that a second run has the data
    of the first: folders in which a run's lock lies, and files with the names of checkpoints,
    tokens and metrics. `enter` decides about other folders, by their name. Links to folders are
    followed, but no folder is read twice, so that a loop of links ends.

    Raises:
        DataError: a folder cannot be listed. Passing over it would train on another text.
    """

    def fail(error: OSError) -> None:
        found = f"{_what_failed(error)}: {printable(str(error.filename))}"
        raise _data_error(name, found) from error

    files: list[str] = []
    seen: set[tuple[int, int]] = set()
    for folder, subfolders, names in os.walk(root, onerror=fail, followlinks=True):
        status = os.stat(folder)
        if (status.st_dev, status.st_ino) in seen:
            subfolders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        if LOCK in names and folder != root:
            subfolders.clear()
            continue
        # In place, which is how os.walk learns where to go on; sorted, so that of two links to
        # one folder the same one is followed on every machine.
        subfolders[:] = sorted(n for n in subfolders if not n.startswith(".") and enter(n))
        files += [
            os.path.join(folder, n) for n in names if not n.startswith(".") and not is_of_a_run(n)
        ]
    return sorted(files, key=lambda path: Path(path).relative_to(root).as_posix())


def is_of_a_run(name: str) -> bool:
    """Whether a file has a name that runs give to what they write."""
    return OF_A_RUN.fullmatch(name) is not None


def _join_text_files(name: str, paths: Iterable[str]) -> Text:
    """The text files among `paths`, joined.

    Raises:
        DataError: none is text, or one cannot be read. Passing over it would train on another text.
    """
    texts: list[str] = []
    n_skipped = 0
    for path in paths:
        try:
            status = os.stat(path)
            if not stat.S_ISREG(status.st_mode):  # a pipe would block when opened
                n_skipped += 1
            elif status.st_size > 0:
                with open(path, "rb") as file:
                    head = file.read(HEAD_BYTES)
                if _is_text(head):
                    texts.append(path)
                else:
                    n_skipped += 1
        except OSError as error:
            if os.path.islink(path) and not os.path.exists(path):
                n_skipped += 1  # leads nowhere, or in a circle
                continue
            raise _data_error(name, f"{_what_failed(error)}: {printable(path)}") from error
    if not texts:
        others = f" ({n_skipped:,} that are not text)" if n_skipped else ""
        raise _data_error(name, f"the folder has no text files{others}")
    content, checksum = _join(name, (_chunks(name, path) for path in texts))
    n_records = sum(path.lower().endswith(ENDINGS[1:]) for path in texts)
    return Text(name, content, checksum, len(texts), n_skipped, n_records)


def _is_text(head: bytes) -> bool:
    """Whether the first HEAD_BYTES of a file, or all of a shorter one, are UTF-8 without NUL."""
    if b"\0" in head:
        return False
    try:
        # Unless this is the whole file, the last character may be cut in two.
        is_whole = len(head) < HEAD_BYTES
        codecs.getincrementaldecoder("utf-8")().decode(head, final=is_whole)
    except UnicodeDecodeError:
        return False
    return True


# ---- joining and mapping


def _chunks(name: str, path: str) -> Iterator[bytes]:
    """The bytes of a file, 1 MiB at a time."""
    try:
        with open(path, "rb") as file:
            while chunk := file.read(MIB):
                yield chunk
    except OSError as error:
        raise _data_error(name, f"{_what_failed(error)}: {printable(path)}") from error


def _join(name: str, texts: Iterable[Iterable[bytes]]) -> tuple[np.ndarray, str]:
    """Write texts one after another, each on a new line; returns them as `map_file`, and their
    checksum.

    The file has no name: the system removes it when the map goes, also after a crash.
    """
    try:
        with tempfile.TemporaryFile() as joined:
            last = b"\n"
            for chunks in texts:
                if not last.endswith(b"\n"):
                    joined.write(b"\n")
                for chunk in chunks:
                    joined.write(chunk)
                    last = chunk
            joined.flush()
            return map_file(joined), _checksum(joined)
    except OSError as error:  # those of reading a text have become DataErrors in _chunks
        raise DataError(
            f"DATA={printable(name)}: the texts cannot be joined in a temporary file: "
            f"{error.strerror}; accepted: TMPDIR=folder with enough room, or one large file"
        ) from error


def map_file(file: BinaryIO) -> np.ndarray:
    """Map an open file that is not empty: its bytes (n_bytes,) uint8."""
    mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    # np.memmap cannot tell the system that windows are read here and there, and the system would
    # read ahead of each window for nothing. Measured with 20 batches of 32 windows of 128 tokens
    # from a sparse file of 8 GB: 8 s and 45 MiB without the advice, 3 ms and 3 MiB with it.
    if hasattr(mmap, "MADV_RANDOM"):
        mapped.madvise(mmap.MADV_RANDOM)
    return np.frombuffer(mapped, dtype=np.uint8)


def _checksum(file: BinaryIO) -> str:
    """SHA-256 of all bytes up to 64 MiB; above, of the size and 64 evenly spaced samples.

    It reads the file instead of the map, whose pages would count as memory of this process.

    Samples keep a text of any size quick to load. They tell texts apart, and do not prove
    that two are equal, so the string says that they are samples.
    """
    size = os.fstat(file.fileno()).st_size
    digest = hashlib.sha256()
    if size <= N_SAMPLES * MIB:
        starts: Iterable[int] = range(0, size, MIB)
        note = ""
    else:
        digest.update(str(size).encode())
        starts = [i * (size - MIB) // (N_SAMPLES - 1) for i in range(N_SAMPLES)]
        note = f" ({N_SAMPLES} samples)"
    for start in starts:
        file.seek(start)
        digest.update(file.read(MIB))
    return f"sha256:{digest.hexdigest()[:16]}{note}"


# ---- messages


def _data_error(name: str, found: str, accepted: str = ACCEPTED) -> DataError:
    return DataError(f"DATA={printable(name)}: {found}; accepted: {accepted}")


def _what_failed(error: OSError | ValueError) -> str:
    if isinstance(error, (FileNotFoundError, NotADirectoryError)):
        return "no such file or folder"
    if isinstance(error, PermissionError):
        return "permission denied"
    reason = error.strerror if isinstance(error, OSError) else error
    return f"cannot be read ({reason})"
