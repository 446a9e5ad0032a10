"""The hardware of a run: which device, which dtype and why, and its memory."""

import ctypes
import math
import sys

import torch


class DeviceError(ValueError):
    """A device that was asked for and is not there."""


def choose_device(name: str) -> tuple[torch.device, str]:
    """The device for DEVICE=`name` (auto, cuda, mps, cpu), and the reason in words."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if name == "auto":
        for kind, available in there.items():
            if available:
                return torch.device(kind), "the first of cuda, mps and cpu that is there"
        return torch.device("cpu"), "no cuda or mps device found"
    if not there.get(name, True):
        raise DeviceError(f"DEVICE={name} was asked for, but torch finds no {name} device here")
    return torch.device(name), f"DEVICE={name}"


def choose_dtype(name: str, device: torch.device) -> tuple[torch.dtype, str]:
    """The dtype of the arithmetic for DTYPE=`name` (auto, float32, bfloat16), and the reason.

    Trained weights and the optimizer's state are float32 in any case.
    """
    if name != "auto":
        return getattr(torch, name), f"DTYPE={name}"
    if device.type == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return torch.bfloat16, "the GPU multiplies it natively"
        return torch.float32, "the GPU has no native bfloat16"
    if device.type == "cpu":
        capabilities = torch.cpu.get_capabilities()
        for flag, instruction_set in (("amx_bf16", "AMX"), ("avx512_bf16", "AVX512-BF16")):
            if capabilities.get(flag, False):
                return torch.bfloat16, f"the CPU multiplies it natively with {instruction_set}"
        return torch.float32, "the CPU has no native bfloat16"
    return torch.float32, "the safe choice on this device"


def device_name(device: torch.device) -> str:
    """The device in words, with what a reader needs to compare timings."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "cpu":
        name = torch.cpu.get_capabilities().get("cpu_name", "CPU")
        return f"{name}, {torch.get_num_threads()} threads"
    return device.type


def keep_freed_memory() -> None:
    """Have the C library keep freed memory for the next step instead of returning it.

    A step frees its activations and the next one allocates them again. By default glibc gives
    large blocks back to the system, which must then map and clear every page anew.
    """
    if sys.platform != "linux":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:  # musl has none
        m_trim_threshold, m_mmap_threshold = -1, -3
        mallopt(m_mmap_threshold, 32 * 2**20)  # the largest that glibc accepts
        mallopt(m_trim_threshold, 2**31 - 1)


def peak_memory(device: torch.device) -> float:
    """Peak memory in MiB: what torch allocated on CUDA, elsewhere the process's resident set.

    nan where the system does not tell.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    try:
        import resource
    except ImportError:  # Windows
        return math.nan
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out; on a CPU torch has no type of its own for it."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or (
        "can't allocate memory" in str(error) or "Storage size calculation overflowed" in str(error)
    )


def synchronize(device: torch.device) -> None:
    """Wait until the device has done all that was asked of it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
