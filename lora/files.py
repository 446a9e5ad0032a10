"""Files of tensors: written whole or not at all, read without running code, checked before use."""

import contextlib
import hashlib
import os
import shutil
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

IDLE = 600  # seconds after which a file that is not written to is taken for abandoned


class FileError(ValueError):
    """A file that cannot be read, written or used: names the file and what is wrong with it."""


class OtherKind(FileError):
    """A file that cannot be read as one of the kind that was asked for."""


def write_file(path: str | os.PathLike, content: Mapping[str, Any]) -> int:
    """Save `content` (tensors, numbers, strings, dicts and lists of these) and return its bytes.

    The file is written beside `path`, synced to disk and renamed into place, so that a kill or a
    full disk leaves what was there before. Raises FileError when it cannot be written.
    """
    content = dict(content) | {"digest": fingerprint(_tensors_in(content))}
    with replacing(path) as file:
        torch.save(content, file)
        return file.tell()


def one_line(text: str) -> str:
    """The text with what is no character to print, such as a line break in a name, as an escape."""
    return "".join(c if c.isprintable() or c == "\t" else ascii(c)[1:-1] for c in text)


def write_out(text: str) -> None:
    """Print to stdout at once. Raises FileError when that cannot be written: its disk is full, or
    its reader has gone (`... | head`)."""
    try:
        print(text, end="", flush=True)
    except OSError as error:
        # Python would try again at exit, and complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise FileError(f"stdout: {error.strerror}") from error


def write_err(line: str) -> None:
    """Print a line to stderr, if it is open; for want of it `print` would take stdout."""
    if sys.stderr is not None:
        with contextlib.suppress(OSError):
            print(one_line(line), file=sys.stderr, flush=True)


@contextlib.contextmanager
def replacing(path: str | os.PathLike) -> Iterator[BinaryIO]:
    """A file to write, which takes the place of `path` at the end: it lies beside it until then, is
    synced and renamed, and an error leaves what was there.

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


def write_folder(path: str | os.PathLike, files: Mapping[str, bytes]) -> int:
    """Write a new folder of files and return their bytes.

    The folder is written beside `path`, synced to disk and renamed into place, so that it is never
    there in part. Raises FileError when it cannot be written, or when something is there already.
    """
    path = Path(path)
    partial = None
    try:
        if path.exists() and not (path.is_dir() and not any(path.iterdir())):
            raise FileError(f"{path} exists already; remove it, or name another folder")
        partial = tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.", suffix=".new")
        for name, content in files.items():
            with open(Path(partial) / name, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
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
    return sum(map(len, files.values()))


def read_file(path: str | os.PathLike, kind: str, version: int) -> dict[str, Any]:
    """The content of a file that `write_file` made, with `format` kind and this `version`.

    Nothing but plain data is unpickled. Raises FileError for anything else, and for tensors that
    are not those that were written, or not under their names.
    """
    with _reading(path, OtherKind(f"{path} is not a {kind}, or it is damaged")):
        _check_archive(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
        digest = fingerprint(_tensors_in(content))
    found = content.get("format") if isinstance(content, dict) else None
    if found != kind:
        what = f"a {found}" if isinstance(found, str) else "some other file"
        raise OtherKind(f"{path} is {what}, not a {kind}")
    if content.get("version") != version:
        raise FileError(f"{path} has format version {content.get('version')}, not {version}")
    if content.get("digest") != digest:
        raise FileError(f"{path} is damaged: its tensors are not those that were saved")
    return content


def read_foreign_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors by name of a file that others wrote, .safetensors or torch's .bin, and what text
    the header of the former has.

    Raises FileError when it cannot be read or is damaged, or without the package safetensors.
    """
    header: dict[str, str] = {}
    if path.suffix == ".safetensors":
        safetensors = safetensors_for(path)
    with _reading(path, FileError(f"{path} holds no tensors, or it is damaged")):
        if path.suffix == ".safetensors":
            with safetensors.safe_open(path, framework="pt") as file:
                found = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
                header = file.metadata() or {}
        else:
            if zipfile.is_zipfile(path):  # which files of torch before 1.6 are not
                _check_archive(path)
            found = torch.load(path, map_location="cpu", weights_only=True)
        for name, tensor in found.items():
            if not isinstance(tensor, Tensor) or not name.isprintable():
                raise ValueError("no table of tensors by name")
    return found, header


@contextlib.contextmanager
def _reading(path: str | os.PathLike, otherwise: FileError) -> Iterator[None]:
    """Raise FileError where a file cannot be read, and `otherwise` for whatever else is wrong with
    it: a damaged or foreign file fails in many ways, all of them alike."""
    if os.path.exists(path) and not os.path.isfile(path):  # to open a pipe would wait for ever
        raise FileError(f"{path} cannot be read: it is no regular file")
    try:
        yield
    except OSError as error:
        raise FileError(f"{path} cannot be read: {error.strerror or error}") from error
    except MemoryError:
        raise
    except Exception as error:
        raise otherwise from error


def safetensors_for(path: str | os.PathLike) -> Any:
    """The package safetensors, or FileError that says how to get it."""
    try:
        import safetensors.torch
    except ImportError as error:
        raise FileError(f"{path} needs the package safetensors: pip install safetensors") from error
    return safetensors


def check_tensors(path: str | os.PathLike, found: Any, expected: Mapping[str, Tensor]) -> None:
    """Raise FileError unless `found` has the names, shapes and kind of `expected`, all finite."""
    if not isinstance(found, dict) or not all(isinstance(t, Tensor) for t in found.values()):
        raise FileError(f"{path} holds no table of tensors")
    for what, names in (
        ("lacks", expected.keys() - found.keys()),
        ("has an unexpected", found.keys() - expected.keys()),
    ):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise FileError(f"{path} {what} tensor {min(map(str, names))}{more}")
    for name, tensor in found.items():
        if tensor.shape != expected[name].shape:
            raise FileError(
                f"{path}: {name} has shape {tuple(tensor.shape)}, "
                f"the model's has {tuple(expected[name].shape)}"
            )
        if tensor.layout != torch.strided or not tensor.is_floating_point():
            raise FileError(f"{path}: {name} is {tensor.dtype}, not floating-point numbers")
        if not torch.isfinite(tensor if tensor.itemsize > 1 else tensor.float()).all():
            raise FileError(f"{path}: {name} holds numbers that are not finite")


def fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """A hash of names, shapes and values, which tells one base model from another.

    A value is the same in float32 and below, such as bfloat16, in float64 another.
    """
    digest = hashlib.sha256()
    for name in sorted(tensors):
        dtype = torch.promote_types(tensors[name].dtype, torch.float32)
        tensor = tensors[name].detach().to("cpu", dtype).contiguous()
        digest.update(f"{name} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.numpy().data)
    return digest.hexdigest()[:16]


def lock_folder(folder: str | os.PathLike) -> BinaryIO:
    """Reserve a folder for this process until the returned file is closed or the process ends.

    Also removes what killed processes left unfinished there, which is what nobody has written to
    for IDLE seconds, as not all that is written needs the folder alone. Raises FileError when
    another process has the folder, or when it cannot be reserved.
    """
    lock = open(Path(folder) / ".lock", "ab")  # noqa: SIM115 (closing it releases the lock)
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
    for partial in Path(folder).glob(".*.partial"):
        with contextlib.suppress(FileNotFoundError):
            if time.time() - partial.stat().st_mtime > IDLE:
                partial.unlink()
    return lock


def _check_archive(path: str | os.PathLike) -> None:
    """Raise BadZipFile unless a file of torch's is whole: torch itself checks no checksums."""
    with zipfile.ZipFile(path) as archive:
        if archive.testzip() is not None:
            raise zipfile.BadZipFile


def _tensors_in(content: Any, name: str = "") -> dict[str, Tensor]:
    """All tensors of nested dicts and lists, by the path of keys that leads to them."""
    if isinstance(content, Tensor):
        return {name: content}
    parts: Iterator = iter(())
    if isinstance(content, Mapping):
        parts = iter(content.items())
    elif isinstance(content, list | tuple):
        parts = enumerate(content)
    return {n: t for key, part in parts for n, t in _tensors_in(part, f"{name}/{key}").items()}


def _sync_folder(folder: Path) -> None:
    """Have the renaming itself survive a power cut, where the system can sync a folder."""
    if os.name == "posix":
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
    return (getattr(error, "strerror", None) or str(error) or repr(error)).splitlines()[0]
