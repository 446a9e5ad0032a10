"""The device of a run: which one and why, its dtype, its memory, CUDA graphs and timing."""

import contextlib
import ctypes
import itertools
import math
import os
import sys
import time
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

# Larger blocks of memory are mapped one by one: the largest that glibc accepts. See
# keep_freed_memory.
LARGEST_IN_HEAP = 32 * 2**20


class DeviceError(ValueError):
    """A device that was asked for and is not there."""


def choose_device(
    name: str, number: int = 0, processes: int = 1, in_group: bool = False
) -> tuple[torch.device, str]:
    """The device for DEVICE=`name` (auto, cuda, mps, cpu), and the reason in words.

    Each process has a GPU of its own. A process in a group cannot have mps, which gloo does not
    know.

    Args:
        name: the value of DEVICE.
        number: which of the processes on this machine this is, from 0.
        processes: how many processes this machine has.
        in_group: whether there are other processes, here or on another machine.

    Raises DeviceError for a device that is not there.
    """
    in_group = in_group or processes > 1
    mps = torch.backends.mps.is_available() and not in_group
    available = {"cuda": torch.cuda.is_available(), "mps": mps}
    reason = f"DEVICE={name}"
    if name == "auto":
        found = [kind for kind, is_available in available.items() if is_available]
        if found:
            name, reason = found[0], "the first of cuda, mps and cpu that is there"
        else:
            name, reason = "cpu", "no cuda or mps device found"
    elif not available.get(name, True):
        where = "for several processes" if in_group else "here"
        raise DeviceError(f"DEVICE={name} was asked for, but torch finds no {name} device {where}")
    if name != "cuda":
        return torch.device(name), reason
    if processes > torch.cuda.device_count():
        raise DeviceError(
            f"{processes} processes need a GPU each, but torch finds {torch.cuda.device_count()}; "
            "start fewer, or set DEVICE=cpu"
        )
    if processes == 1:
        return torch.device("cuda"), reason
    torch.cuda.set_device(number)
    return torch.device("cuda", number), reason


def choose_threads(number: int | None, processes: int) -> None:
    """Use `number` CPU threads; None is torch's own choice, which OMP_NUM_THREADS may make.

    torchrun sets OMP_NUM_THREADS=1. Of several `processes` on this machine each then has its share
    of the cores instead.
    """
    if number is None and processes > 1 and os.environ.get("OMP_NUM_THREADS") == "1":
        affinity = getattr(os, "sched_getaffinity", None)  # Linux only
        cores = len(affinity(0)) if affinity is not None else os.cpu_count() or 1
        number = max(1, cores // processes)
    if number is not None:
        torch.set_num_threads(number)


def choose_dtype(name: str, device: torch.device) -> tuple[torch.dtype, str]:
    """The dtype of the arithmetic for DTYPE=`name` (auto, float32, bfloat16, float16), and why.

    Trained weights and the optimizer's state are float32 in any case. Raises DeviceError for
    float16 on MPS, where training in it was never tried.
    """
    if name != "auto":
        found, reason = choose_dtype("auto", device)
        if name == "float16" and device.type == "mps":
            raise DeviceError("DTYPE=float16 is for cuda and cpu; on mps set float32 or bfloat16")
        if name == "bfloat16" and found != torch.bfloat16 and device.type == "cpu":
            return torch.bfloat16, f"DTYPE={name}, though {reason}: far slower than float32"
        return getattr(torch, name), f"DTYPE={name}"
    if device.type == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return torch.bfloat16, "the GPU multiplies it natively"
        if torch.cuda.get_device_capability(device) >= (7, 0):  # Volta, the first with tensor cores
            return torch.float16, "the GPU multiplies it natively, but not bfloat16"
        return torch.float32, "the GPU has no native bfloat16"
    if device.type == "cpu":
        capabilities = cpu_capabilities()
        for flag, instruction_set in (("amx_bf16", "AMX"), ("avx512_bf16", "AVX512-BF16")):
            if capabilities.get(flag, False):
                return torch.bfloat16, f"the CPU multiplies it natively with {instruction_set}"
        return torch.float32, "the CPU has no native bfloat16"
    return torch.float32, "the safe choice on this device"


def cpu_capabilities() -> Mapping[str, object]:
    """What torch knows of the CPU: whether it has an instruction set, by name, and `cpu_name`.

    Versions of torch without get_capabilities know only the sets that multiply bfloat16.
    """
    if hasattr(torch.cpu, "get_capabilities"):
        return torch.cpu.get_capabilities()
    return {
        "amx_bf16": torch.cpu._is_amx_tile_supported(),  # no CPU has the tiles without bfloat16
        "avx512_bf16": torch.cpu._is_avx512_bf16_supported(),
    }


def gpus(device: torch.device) -> list[int]:
    """The number of this process's CUDA device, as torch.random.fork_rng takes it; else nothing."""
    return [torch.cuda.current_device()] if device.type == "cuda" else []


def device_name(device: torch.device) -> str:
    """The device in words, with what a reader needs to compare timings."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "cpu":
        name = cpu_capabilities().get("cpu_name", "CPU")
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
        mallopt(m_mmap_threshold, LARGEST_IN_HEAP)
        mallopt(m_trim_threshold, 2**31 - 1)


def return_freed_memory() -> None:
    """Have the C library give the system what was freed, such as after reading data."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:  # musl has none
        trim(0)


def peak_memory(device: torch.device) -> float:
    """Peak memory in MiB; nan where the system does not tell.

    On CUDA it is what torch reserved, which includes memory that it keeps to use again. On MPS it
    is what the driver has allocated now. Elsewhere it is the process's largest resident set.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device) / 2**20
    if device.type == "mps":
        return torch.mps.driver_allocated_memory() / 2**20
    try:
        import resource
    except ImportError:  # Windows
        return math.nan
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out. Only on CUDA does torch have a type for it."""
    words = ("can't allocate memory", "Storage size calculation overflowed", "out of memory")
    words += ("not enough memory", "array is too big")  # torch's on Windows, numpy's
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or (
        any(text in str(error) for text in words)
    )


def allow_tf32(device: torch.device) -> None:
    """Let a GPU multiply float32 in TF32, whose factors have 10 bits of mantissa and sums 23.

    For training alone: what is written, such as a merged weight, is computed in float32.
    """
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")


class _Loss(nn.Module):
    """A model's loss alone, in `dtype`: a module that torch can put into CUDA graphs."""

    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.model, self.dtype = model, dtype

    def forward(self, *batch: Tensor) -> tuple[Tensor]:
        enabled = self.dtype != torch.float32
        with torch.autocast("cuda", self.dtype, enabled=enabled, cache_enabled=False):
            self.loss = self.model(*batch)[1]
        return (self.loss,)


def in_cuda_graphs(model: nn.Module, batch: tuple[Tensor, ...], dtype: torch.dtype) -> nn.Module:
    """The model in CUDA graphs: a module that takes batches like `batch` and returns (loss,).

    The loss is the second output of `model`, computed in `dtype`. Forward is one graph and backward
    another. A graph starts all its kernels at once. Python starts them one by one, and a GPU waits
    for it where they are small. Each call writes its gradients to the same place, so a step can
    have only one batch. The capture does not change the random numbers of later steps.

    Before the call, no loss of `model` may be left that can still be differentiated.
    """
    graph = torch.autograd.graph
    if hasattr(graph, "set_warn_on_accumulate_grad_stream_mismatch"):  # torch 2.8 does not warn
        graph.set_warn_on_accumulate_grad_stream_mismatch(False)
    module = _Loss(model, dtype)
    with torch.random.fork_rng(gpus(batch[0].device)):
        graphed = torch.cuda.make_graphed_callables(module, batch)
    # Autograd's nodes belong to the stream of the capture, and steps would wait for that stream.
    module.loss.detach_()
    return graphed


# When a part of a step begins or ends: seconds of the clock, or an event in the queue of a GPU.
Mark = float | torch.cuda.Event


class StepTimer:
    """Seconds of each step, appended to `times`, and of each part of a run, added to `parts`.

    On a CPU each step is timed. A GPU works through a queue, and would idle if Python waited for it
    at each step. There, `together` steps are timed as one, and each counts as their mean.

    The parts of a step are timed by marks in CUDA's queue, for which nothing waits. So a part is
    the GPU's time for it, with the time that the GPU waits there for Python. On MPS it is the time
    that Python takes to ask for it.
    """

    def __init__(
        self,
        device: torch.device,
        times: list[float],
        parts: dict[str, float],
        together: int = 10,
    ) -> None:
        self.device, self.times, self.parts = device, times, parts
        self.together = 1 if device.type == "cpu" else together
        self.steps = 0  # since `started`
        self.started = 0.0
        self.marks: list[tuple[str | None, Mark]] = []  # the ends of parts; None begins a step

    def begin(self) -> None:
        """Call before a step."""
        if self.steps == 0:
            self.started = time.perf_counter()
        self.end_part(None)

    def end_part(self, name: str | None) -> None:
        """Call in a step after each of its parts."""
        if self.device.type == "cuda":
            mark = torch.cuda.Event(enable_timing=True)
            mark.record()
        else:
            mark = time.perf_counter()
        self.marks.append((name, mark))

    def end(self) -> None:
        """Call after a step."""
        self.steps += 1
        if self.steps == self.together:
            self.flush()

    def flush(self) -> None:
        """Time the steps since the last time; call before anything that is no step."""
        if self.steps > 0:
            synchronize(self.device)
            self.times += [(time.perf_counter() - self.started) / self.steps] * self.steps
            self.steps = 0
        for (_, start), (name, end) in itertools.pairwise(self.marks):
            if name is not None:
                cuda = isinstance(end, torch.cuda.Event)
                self._add(name, start.elapsed_time(end) / 1000 if cuda else end - start)
        self.marks = []

    @contextlib.contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """A context that is a part of the run and of no step. The device must be idle before it."""
        started = time.perf_counter()
        yield
        synchronize(self.device)
        self._add(name, time.perf_counter() - started)

    def take_parts(self) -> dict[str, float]:
        """The seconds of the parts, which then begin at 0 again."""
        taken = dict(self.parts)
        self.parts.clear()
        return taken

    def _add(self, name: str, seconds: float) -> None:
        self.parts[name] = self.parts.get(name, 0.0) + seconds


def synchronize(device: torch.device) -> None:
    """Wait until the device has done all that was asked of it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
