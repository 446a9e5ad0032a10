"""Several processes train one model, each on its share of every batch, by PyTorch's own engine.

    torchrun --standalone --nproc_per_node=2 training.py

torchrun starts the script in every process, and all do the same; only the first prints and writes
files. The model is replicated (DistributedDataParallel), or with FSDP=True its weights are shared
out (fully_shard). A process that was started alone has rank 0 in a world of 1, and the functions
here leave it alone.
"""

import contextlib
import datetime
import os
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

# How long a process waits for another that is alive, such as for the first to write a checkpoint.
# One that dies is noticed at once.
TIMEOUT = datetime.timedelta(minutes=30)


class GroupError(ValueError):
    """Processes that cannot work together."""


def in_group() -> bool:
    """Whether torchrun, or whatever sets its variables, started more processes than this one."""
    return "RANK" in os.environ and os.environ.get("WORLD_SIZE", "1") != "1"


def local_rank() -> int:
    """The number of this process among those of its machine, from 0. Raises GroupError."""
    return _local("LOCAL_RANK", alone=0)


def local_world_size() -> int:
    """How many processes this machine has. Raises GroupError."""
    return _local("LOCAL_WORLD_SIZE", alone=1)


def _local(name: str, alone: int) -> int:
    """A variable of torchrun's. Raises GroupError when only some of its variables are there."""
    if not in_group():
        return alone
    try:
        return int(os.environ[name])
    except (KeyError, ValueError) as error:
        raise GroupError(
            "RANK and WORLD_SIZE are set, but LOCAL_RANK and LOCAL_WORLD_SIZE are not, as torchrun "
            "sets them; unset RANK to train in one process"
        ) from error


def init_process_group(device: torch.device) -> None:
    """Meet the other processes, if there are any. Raises GroupError where they cannot meet."""
    if not in_group():
        return
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    try:
        dist.init_process_group(backend, timeout=TIMEOUT)
        # All wait for each other here. The first process keeps the store by which all find each
        # other. If it stopped on an error before the others have read the store, they would report
        # its loss instead of the reason.
        all_reduce_sum(torch.zeros(1))
    except (RuntimeError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise GroupError(f"the processes cannot meet: {reason}") from error


def destroy_process_group() -> None:
    """Leave the other processes, if there are any."""
    if world_size() > 1:
        dist.destroy_process_group()


def is_connection_lost(error: BaseException) -> bool:
    """Whether an error says that another process has gone; gloo has no type of its own for it."""
    return isinstance(error, dist.DistError) or "gloo" in str(error)


def rank() -> int:
    """The number of this process among all, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """How many processes there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main_process() -> bool:
    """Whether this is the process that prints and writes files."""
    return rank() == 0


# ---- collectives: every process must call them, or all wait


def all_reduce_sum(values: Tensor) -> Tensor:
    """The sum of all processes' tensors of one shape, in place."""
    if world_size() > 1:
        dist.all_reduce(values)
    return values


def all_reduce_mean(values: Tensor) -> Tensor:
    """The mean of all processes' tensors of one shape."""
    return all_reduce_sum(values) / world_size()


def all_reduce_max(number: int) -> int:
    """The largest of all processes' numbers."""
    if world_size() == 1:
        return number
    value = torch.tensor(number)
    dist.all_reduce(value, dist.ReduceOp.MAX)
    return int(value)


def all_gather(value: Any) -> list[Any]:
    """The values of all processes, in the order of their ranks."""
    values = [value] * world_size()
    if world_size() > 1:
        dist.all_gather_object(values, value)
    return values


@contextlib.contextmanager
def local_main_process_first() -> Iterator[None]:
    """A context that the first process of a machine runs first; the others find its files."""
    waits = local_rank() > 0
    if waits:
        dist.barrier()
    yield
    if world_size() > 1 and not waits:
        dist.barrier()


def check_agreement(settings: Mapping[str, Any]) -> None:
    """Raise GroupError in every process unless these settings and data are the same in all."""
    first, *others = all_gather(dict(settings))
    for number, found in enumerate(others, start=1):
        for name in first:
            if found[name] != first[name]:
                raise GroupError(
                    f"the processes disagree: {name} is {first[name]} in the first and "
                    f"{found[name]} in number {number}; all need the same variables and files"
                )


# ---- one model in all of them


class Traffic:
    """Counts the bytes of gradients that this process gave to be averaged."""

    def __init__(self) -> None:
        self.bytes = 0

    def average(self, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        """A hook of DistributedDataParallel: averages some gradients and counts their bytes."""
        self.bytes += bucket.buffer().nbytes
        return allreduce_hook(None, bucket)


def replicate(model: nn.Module, traffic: Traffic) -> nn.Module:
    """The model as it trains: backward averages the gradients over the processes.

    Only gradients of trained parameters travel, under LoRA those of adapters and embeddings.
    Weights do not travel, so the processes must have the same ones.
    """
    if world_size() == 1 or is_sharded(model):
        return model
    replica = DistributedDataParallel(model, init_sync=False, gradient_as_bucket_view=True)
    replica.register_comm_hook(traffic, Traffic.average)
    return replica


def shard(model: nn.Module, device: torch.device) -> None:
    """Keep a share of every weight in each process, in place (FSDP2; Zhao et al. 2023, arXiv
    2304.11277).

    A process has all weights of a block only while the block computes. The processes must have the
    same weights, which may lie on the CPU. `model.blocks` are its blocks.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (world_size(),))
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh, reshard_after_forward=True)
    if device.type == "cpu":  # gloo adds up, in torch 2.8, what it is asked to average
        for module in (*model.blocks, model):
            module.set_force_sum_reduction_for_comms(True)


def is_sharded(model: nn.Module) -> bool:
    """Whether `shard` was called on the model."""
    return hasattr(model, "set_requires_gradient_sync")


@contextlib.contextmanager
def synchronize_gradients(model: nn.Module, enabled: bool) -> Iterator[None]:
    """A context in which backward averages the gradients over the processes only where `enabled`.

    While a step accumulates gradients, averaging once for all its batches is enough.
    """
    if is_sharded(model):
        model.set_requires_gradient_sync(enabled)
    with contextlib.nullcontext() if enabled or not hasattr(model, "no_sync") else model.no_sync():
        yield


@contextlib.contextmanager
def full_parameters(model: nn.Module) -> Iterator[None]:
    """A context in which the main process has all trained weights of a sharded model, on the CPU.

    The model cannot compute within it. Every process must enter it.
    """
    places = [
        (module, name, parameter)
        for module in model.modules()
        for name, parameter in module._parameters.items()
        if parameter is not None and parameter.requires_grad and is_sharded(model)
    ]
    full: dict[int, nn.Parameter] = {}  # by id, so that a tied parameter is there once
    for module, name, parameter in places:
        if id(parameter) not in full:
            full[id(parameter)] = nn.Parameter(full_tensor(parameter.detach()))
        module._parameters[name] = full[id(parameter)]
    try:
        yield
    finally:
        for module, name, parameter in places:
            module._parameters[name] = parameter


def full_tensor(tensor: Tensor) -> Tensor:
    """All of a tensor, on the CPU; of a sharded one in the main process alone.

    The others get an empty tensor. Every process must call it.
    """
    if not hasattr(tensor, "full_tensor"):
        return tensor.cpu()
    full = tensor.full_tensor()
    return full.cpu() if is_main_process() else torch.empty(0)


def local(tensor: Tensor) -> Tensor:
    """This process's shard of a tensor, in the same memory; all of one that is not sharded."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def gathered(shard: Tensor, like: Tensor) -> Tensor:
    """All of a tensor of which each process has its shard, sharded as `like` is, where it lies.

    Every process must call it. The tensor itself where `like` is not sharded.
    """
    if not hasattr(like, "full_tensor"):
        return shard
    from torch.distributed.tensor import DTensor

    options = {"shape": like.shape, "stride": like.stride()}  # as shards may be of unequal sizes
    return DTensor.from_local(shard, like.device_mesh, like.placements, **options).full_tensor()


def shard_like(tensor: Tensor, like: Tensor) -> Tensor:
    """This process's shard of a tensor that every process has, sharded as `like` is.

    All of the tensor where `like` is not sharded.
    """
    if not hasattr(like, "full_tensor"):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    tensor = tensor.to(like.device)
    return distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None)
