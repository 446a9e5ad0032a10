"""Files and folders that are written whole or not at all, and the lock of a folder."""

import contextlib
import glob
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import BinaryIO

from files import FileError

LOCK = ".lock"  # in every folder that a run has had for itself
IDLE = 600  # seconds after which a file that is not written to is taken for abandoned


@contextlib.contextmanager
def replacing(path: str | os.PathLike) -> Iterator[BinaryIO]:
    """A file to write, which takes the place of `path` at the end.

    Until then it lies beside `path`. At the end it is synced and renamed. An error leaves what was
    there.

    Raises FileError when it cannot be written.
    """
    path = Path(path)
    partial = None
    try:
        with tempfile.NamedTemporaryFile(
            dir=path.parent, prefix=f".{path.name}.", suffix=".partial", delete=False
        ) as file:
            partial = file.name
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.chmod(partial, 0o666 & ~_umask())
        os.replace(partial, path)
        _sync_folder(path.parent)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
        raise FileError(f"{path} cannot be written: {_one_line(error)}") from error
    finally:
        if partial is not None:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(partial)


def write_folder(
    path: str | os.PathLike, files: Mapping[str, bytes | Callable[[Path], None]]
) -> int:
    """Write a new folder of files and return their bytes.

    `files` are contents by name. A content may be a function that writes its file at a given path.

    The folder is written beside `path`, synced to disk and renamed into place, so that it is never
    there in part. What a killed process left of it is removed. Raises FileError when it cannot be
    written, or when something is there already.
    """
    path = Path(path)
    partial = None
    try:
        if path.exists() and not (path.is_dir() and not any(path.iterdir())):
            raise FileError(f"{path} exists already; remove it, or name another folder")
        _remove_abandoned(path.parent, f".{glob.escape(path.name)}.*.new")
        partial = tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.", suffix=".new")
        for name, content in files.items():
            if callable(content):
                content(Path(partial) / name)
            with open(Path(partial) / name, "ab") as file:
                file.write(b"" if callable(content) else content)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(Path(partial) / name, 0o666 & ~_umask())
        os.chmod(partial, 0o777 & ~_umask())
        if path.exists():
            path.rmdir()  # an empty folder, which Windows would not replace
        os.replace(partial, path)
        _sync_folder(path.parent)
    except OSError as error:
        raise FileError(f"{path} cannot be written: {_one_line(error)}") from error
    finally:
        if partial is not None:
            shutil.rmtree(partial, ignore_errors=True)
    return sum((path / name).stat().st_size for name in files)


def lock_folder(folder: str | os.PathLike) -> BinaryIO:
    """Reserve a folder for this process until the returned file is closed or the process ends.

    It also removes unfinished files that killed processes left there: those that nobody has written
    to for IDLE seconds, since some files are written without this lock. Raises FileError when
    another process has the folder, or when it cannot be reserved.
    """
    path = Path(folder) / LOCK
    if path.exists() and not path.is_file():  # opening a pipe would wait for its reader
        raise FileError(f"{path} is no regular file; remove it, or set OUT_DIR to another folder")
    lock = open(path, "ab")  # noqa: SIM115 (closing it releases the lock)
    try:
        if sys.platform == "win32":
            import msvcrt

            msvcrt.locking(lock.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        lock.close()
        if isinstance(error, BlockingIOError | PermissionError):
            reason = "is in use by another run"
        else:
            reason = f"cannot be reserved for this run: {error.strerror}"
        raise FileError(f"{folder} {reason}; set OUT_DIR to another one") from error
    _remove_abandoned(folder, ".*.partial")
    return lock


def _remove_abandoned(folder: str | os.PathLike, pattern: str) -> None:
    """Remove unfinished files and folders whose newest file nobody has written to for IDLE s."""
    for partial in Path(folder).glob(pattern):
        with contextlib.suppress(OSError):
            written = max(path.stat().st_mtime for path in [partial, *partial.glob("*")])
            if time.time() - written > IDLE and partial.is_dir():
                shutil.rmtree(partial, ignore_errors=True)
            elif time.time() - written > IDLE:
                partial.unlink()


def _sync_folder(folder: Path) -> None:
    """Have the renaming itself survive a power cut, where the system can sync a folder."""
    if os.name == "posix":
        with contextlib.suppress(OSError):  # some file systems cannot, and the file is there
            handle = os.open(folder, os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _one_line(error: BaseException) -> str:
    if "inline_container" in str(error):  # where torch's writer forgets what the system said
        return "not all of it was taken, as by a full disk"
    return (getattr(error, "strerror", None) or str(error) or repr(error)).splitlines()[0]
