"""Files of tensors: ours and those of others, read without running code and checked before use."""

import contextlib
import ctypes
import errno
import hashlib
import mmap
import os
import re
import sys
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from files import FileError, OtherKind
from files.writing import replacing

PART = 2**18  # numbers that are checked or hashed at a time
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)  # that weights may have
POINTER = b"version https://git-lfs."  # how a file begins that git has without its content
HUB_NAME = re.compile(r"(?:https://huggingface\.co/)?((?:[\w.-]+/)?([\w-][\w.-]*))/?")


def write_file(path: str | os.PathLike, content: Mapping[str, Any]) -> int:
    """Save `content` (tensors, numbers, strings, dicts and lists of these) and return its bytes.

    The file is written beside `path`, synced to disk and renamed into place, so that a kill or a
    full disk leaves what was there before. Raises FileError when it cannot be written.
    """
    content = dict(content) | {"digest": fingerprint(_tensors_in(content))}
    with replacing(path) as file:
        torch.save(content, file)
        return file.tell()


def read_file(path: str | os.PathLike, kind: str, version: int) -> dict[str, Any]:
    """The content of a file that `write_file` made, with `format` kind and this `version`.

    Nothing but plain data is unpickled. Raises FileError for anything else, and for tensors that
    are not those that were written, or not under their names.
    """
    with _reading(path, OtherKind(f"{path} is not a {kind}, or it is damaged")):
        if zipfile.is_zipfile(path) and os.fspath(path).isprintable():  # mapping takes no others
            # Tensors are only mapped here: another kind of file may be large.
            _check_kind(path, torch.load(path, "cpu", weights_only=True, mmap=True), kind)
        _check_archive(path)
        content = torch.load(path, "cpu", weights_only=True)
        _check_kind(path, content, kind)
        digest = fingerprint(_tensors_in(content))
    if content.get("version") != version:
        raise FileError(f"{path} has format version {content.get('version')}, not {version}")
    if content.get("digest") != digest:
        raise FileError(f"{path} is damaged: its tensors are not those that were saved")
    return content


def read_foreign_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors by name of a file that others wrote, and the text in its header.

    The file is .safetensors or torch's .bin, which has no header. Its tensors are mapped, not read:
    only what is used takes memory, and processes share that memory until one writes to it. The file
    must not shrink meanwhile.

    Raises FileError when it cannot be read or is damaged, or without the package safetensors.
    """
    header: dict[str, str] = {}
    if path.suffix == ".safetensors":
        safetensors = safetensors_for(path)
    with (
        _reading(path, FileError(f"{path} holds no tensors, or it is damaged")),
        warnings.catch_warnings(action="ignore"),  # torch's, of old kinds of tensors
    ):
        refuse_pointer(path)
        os.fspath(path).encode()  # mapping files takes no other names
        if path.suffix == ".safetensors":
            with safetensors.safe_open(path, framework="pt") as file:
                found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                header = file.metadata() or {}
        else:
            is_zip = zipfile.is_zipfile(path)  # files of torch before 1.6 are not
            if is_zip:
                _check_archive(path)
            found = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
        for name, tensor in found.items():
            if not isinstance(tensor, Tensor) or not name.isprintable():
                raise ValueError("no table of tensors by name")
    return found, header


def _check_kind(path: str | os.PathLike, content: Any, kind: str) -> None:
    """Raise OtherKind for a file's content that does not say that it is of this kind."""
    found = content.get("format") if isinstance(content, dict) else None
    if found != kind:
        what = f"a {found}" if isinstance(found, str) else "some other file"
        raise OtherKind(f"{path} is {what}, not a {kind}")


@contextlib.contextmanager
def _reading(path: str | os.PathLike, otherwise: FileError) -> Iterator[None]:
    """A context that raises FileError for a file that cannot be read, else `otherwise` for errors.

    A damaged or foreign file fails in many ways, which all mean the same to the user.
    """
    if os.path.exists(path) and not os.path.isfile(path):  # opening a pipe would wait for ever
        raise FileError(f"{path} cannot be read: it is no regular file")
    try:
        yield
    except OSError as error:
        if error.errno == errno.EINVAL:  # torch looked for a place before the file's beginning
            raise otherwise from error
        hint = how_to_get(path) if error.errno == errno.ENOENT else ""
        raise FileError(f"{path} cannot be read: {error.strerror or error}{hint}") from error
    except (FileError, MemoryError):
        raise
    except UnicodeEncodeError as error:
        raise FileError(f"{path} cannot be read: its name is not UTF-8") from error
    except Exception as error:
        if "not enough memory" in str(error) or "can't allocate memory" in str(error):
            raise  # torch's RuntimeError of a CPU
        raise otherwise from error


def how_to_get(path: str | os.PathLike) -> str:
    """The end of the error for a path where nothing is: how to download it, where it can be the
    name of a model on Hugging Face rather than of a file or folder here."""
    found = HUB_NAME.fullmatch(os.fspath(path))
    parent = os.path.dirname(os.fspath(path).rstrip("/"))
    if not found or os.fspath(path).endswith((".pt", ".bin")) or (parent and os.path.isdir(parent)):
        return ""
    name, folder = found.groups()
    if "/" not in name and not name.startswith("gpt2"):  # which the hub has without one
        name = f"OWNER/{name}"
    return f"; to get it from Hugging Face: hf download {name} --local-dir {folder}"


def folder_within(folder: Path, *patterns: str) -> str:
    """The end of the error for a folder without a file: the first folder that has one, by what
    `patterns` find in it; empty where none has."""
    found = [path.parent for pattern in patterns for path in folder.glob(pattern)]
    return f"; did you mean {min(found)}?" if found else ""


def refuse_pointer(path: Path) -> None:
    """Raise FileError for what `git clone` leaves in the place of a large file without git-lfs."""
    with open(path, "rb") as file:
        if file.read(len(POINTER)) == POINTER:
            raise FileError(
                f"{path} is a pointer of git-lfs, not the file itself, which git lfs pull gets"
            )


def safetensors_for(path: str | os.PathLike) -> Any:
    """The package safetensors, or FileError that says how to get it."""
    try:
        import safetensors.torch
    except ImportError as error:
        raise FileError(f"{path} needs the package safetensors: pip install safetensors") from error
    return safetensors


def check_tensors(
    path: str | os.PathLike, found: Any, expected: Mapping[str, Tensor], finite: bool = True
) -> None:
    """Raise FileError unless `found` has the names and shapes of `expected`, in floating point.

    All numbers must be finite, unless `finite` is False, which reads none of them.
    """
    if not isinstance(found, Mapping) or not all(isinstance(t, Tensor) for t in found.values()):
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
        if tensor.dtype not in FLOATS:
            raise FileError(
                f"{path}: {name} is {tensor.dtype}, not floating-point numbers of 16, 32 or 64 bits"
            )
        if tensor.layout != torch.strided or tensor.is_meta:
            raise FileError(f"{path}: {name} is sparse or has no values, not a plain tensor")
        if finite and not _is_finite(tensor):
            raise FileError(f"{path}: {name} holds numbers that are not finite")


def fingerprint(tensors: Mapping[str, Tensor], released: bool = False) -> str:
    """A hash of names, shapes and values, which tells one base model from another.

    Equal values have the same hash in float32 and in lower precisions, but another in float64. Each
    tensor is `released` after it was read, if so asked.
    """
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(f"{name} {tuple(tensors[name].shape)}\n".encode())
        for part in _in_parts(tensors[name].detach()):
            digest.update(part.cpu().numpy().data)
        if released:
            release(tensors[name])
    return digest.hexdigest()[:16]


def release(tensor: Tensor) -> None:
    """Give the memory of a mapped file's tensor back until it is read again.

    Nobody may have written to the tensor, or it is the file's again. The pages that were read count
    as the process's memory otherwise, as long as it has the file. Only Linux can tell whether
    memory is that of a file, so elsewhere this does nothing.
    """
    plain = type(tensor) is Tensor and tensor.device.type == "cpu" and tensor.is_contiguous()
    if sys.platform != "linux" or not plain:
        return
    page = mmap.PAGESIZE
    start, end = tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes
    first, last = -(-start // page) * page, end // page * page
    if first < last and _is_of_a_file(start, end):
        madvise = ctypes.CDLL(None).madvise
        madvise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), mmap.MADV_DONTNEED)


def _is_of_a_file(start: int, end: int) -> bool:
    """Whether the addresses from `start` to `end` are those of one mapped file."""
    with open("/proc/self/maps", encoding="utf-8", errors="replace") as lines:
        for line in lines:
            addresses, _, _, _, inode, *_ = line.split()
            low, high = (int(address, 16) for address in addresses.split("-"))
            if low <= start < high:
                return end <= high and inode != "0"
    return False


def _is_finite(tensor: Tensor) -> bool:
    """Whether all numbers are finite, which a finite sum says in one pass."""
    return all(
        torch.isfinite(part.sum()) or torch.isfinite(part).all() for part in _in_parts(tensor)
    )


def _in_parts(tensor: Tensor) -> Iterator[Tensor]:
    """The values of a tensor in float32 or above, some rows at a time.

    For all of a large tensor in a lower precision there may be no room.
    """
    dtype = torch.promote_types(tensor.dtype, torch.float32)
    rows = tensor.reshape(1) if tensor.dim() == 0 else tensor
    n = max(1, PART * len(rows) // max(1, rows.numel()))
    for start in range(0, len(rows), n):
        yield rows[start : start + n].to(dtype).contiguous()


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
