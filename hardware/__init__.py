"""The machine: devices, dtypes and memory (device.py), several processes (processes.py), and
torch's compiler (compiler.py)."""

from hardware.compiler import postpone_compiler
from hardware.device import (
    LARGEST_IN_HEAP,
    DeviceError,
    StepTimer,
    allow_tf32,
    choose_device,
    choose_dtype,
    choose_threads,
    device_name,
    gpus,
    in_cuda_graphs,
    is_out_of_memory,
    keep_freed_memory,
    peak_memory,
    return_freed_memory,
    synchronize,
)

__all__ = [
    "LARGEST_IN_HEAP",
    "DeviceError",
    "StepTimer",
    "allow_tf32",
    "choose_device",
    "choose_dtype",
    "choose_threads",
    "device_name",
    "gpus",
    "in_cuda_graphs",
    "is_out_of_memory",
    "keep_freed_memory",
    "peak_memory",
    "postpone_compiler",
    "return_freed_memory",
    "synchronize",
]
