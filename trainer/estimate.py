"""The memory that a run needs, known before a weight is read.

What the weights take follows from their shapes. What a step takes beside them is found by a step
with torch's fake tensors, which have shapes and no numbers. The model has two blocks there, since
each further block adds as much as the second one.
"""

import dataclasses
import functools
import json
import math
import os
import weakref
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hardware import LARGEST_IN_HEAP, processes
from lora import LoRALinear, store_base
from models import LanguageModel
from models.checkpoint import Checkpoint, meta_model
from trainer.loading import put_lora
from trainer.muon import working_bytes
from trainer.optimization import matrices_for_muon, muon_dtype
from trainer.settings import Config
from trainer.setup import Plan

NF4_BYTES = 4.127 / 8  # for each number
MIB = 2**20

# What a CPU run takes beside its tensors once it computes: threads and buffers of products, and the
# part of what a block holds in the C library's heap that is lost there, for each block. glibc does
# not give an aligned piece that was freed to the next request of its size, which has to be aligned
# anew, and smaller ones break it up. `python benchmarks/memory.py` sets both.
FIRST_USE = 30 * MIB
LOST_IN_HEAP = 0.385

STEP = ("gradients", "activations", "loss")  # what a step holds


@dataclass(frozen=True)
class Memory:
    """Bytes that a run has to hold at once.

    Attributes:
        base: weights that are frozen.
        trained: weights that train.
        optimizer: its state, and what its step holds beyond what a batch has held.
        gradients, activations, loss: what a step holds at its largest moment; activations with
            their own gradients, and of the loss what it computes with and keeps.
        gaps: beside the tensors, what products need, and the room between tensors; under FSDP the
            weights that are whole while a block computes.
        program: what the process has before.
    """

    base: int
    trained: int
    optimizer: int
    gradients: int
    activations: int
    loss: int
    gaps: int
    program: int

    @property
    def total(self) -> int:
        return sum(dataclasses.astuple(self))


def estimate(plan: Plan) -> Memory:
    """The memory of a run that trains as planned, in this process.

    Under FSDP a GPU has a share of the weights and of what belongs to them. A CPU has all of them
    when the run begins.
    """
    n_blocks = plan.sizes.n_layer
    models = [shaped_model(plan, n) for n in range(1, min(2, n_blocks) + 1)]

    def of_all_blocks(sizes: list[int]) -> int:
        return sizes[-1] + (n_blocks - len(sizes)) * (sizes[-1] - sizes[0])

    trained = of_all_blocks(
        [sum(p.nbytes for p in model.parameters() if p.requires_grad) for model in models]
    )
    base = of_all_blocks([sum(frozen_bytes(model, plan.config).values()) for model in models])
    steps = [held_in_step(plan, model) for model in models]
    parts = [of_all_blocks([held.at_most[part] for held in steps]) for part in STEP]
    lost = round(LOST_IN_HEAP * n_blocks * steps[0].most_in_heap)
    gaps = FIRST_USE + lost if plan.device.type == "cpu" else 0
    optimizer = of_all_blocks([optimizer_bytes(plan.config, model) for model in models])
    by_muon = matrices_for_muon(plan.config, models[0])
    matrices = [p for p in models[0].parameters() if id(p) in by_muon] * n_blocks
    working = working_bytes(matrices, muon_dtype(plan.dtype))
    optimizer += max(0, trained + working - sum(parts))
    gradients, *others = parts
    if plan.config.fsdp and plan.device.type != "cpu":
        # While a block computes, its weights are whole, the next one's and those outside of blocks.
        gaps += sum(p.nbytes for p in models[-1].parameters())
        shares = (base, trained, optimizer, gradients)
        base, trained, optimizer, gradients = (-(-n // processes.world_size()) for n in shares)
    program = max(0, program_bytes(plan.device) - read_bytes(plan.base))
    return Memory(base, trained, optimizer, gradients, *others, gaps, program)


def shaped_model(plan: Plan, n_blocks: int) -> LanguageModel:
    """The plan's model with so many blocks, of fake tensors in the dtypes that they will have.

    A base in NF4 is in bfloat16 here: what a step makes of it is the same.
    """
    sizes = dataclasses.replace(plan.sizes, n_layer=n_blocks)
    model = meta_model(plan.family, sizes, plan.config.dropout or 0.0)
    if plan.lora is not None:
        model.requires_grad_(False)
        targets = plan.lora.targets and [name.rpartition(".")[2] for name in plan.lora.targets]
        put_lora(model, dataclasses.replace(plan.lora, targets=targets))
    model.grad_checkpoint = plan.config.grad_checkpoint
    made: dict[int, nn.Parameter] = {}
    with FakeTensorMode(allow_non_fake_inputs=True):
        for module_name, module in model.named_modules():
            for name, p in module._parameters.items():
                if p is None:
                    continue
                if id(p) not in made:
                    own = "weight" if name.startswith("lora_") else name  # what an adapter is on
                    dtype = frozen_dtype(plan, f"{module_name}.{own}".removeprefix("."))
                    if p.requires_grad:
                        dtype = torch.promote_types(dtype, torch.float32)
                    fake = torch.empty(p.shape, dtype=dtype, device=plan.device)
                    made[id(p)] = nn.Parameter(fake, requires_grad=p.requires_grad)
                module._parameters[name] = made[id(p)]
            for name, b in module._buffers.items():
                if b is not None:
                    fake = torch.empty(b.shape, dtype=b.dtype, device=plan.device)
                    module._buffers[name] = fake
        if plan.dtype != torch.float32:
            store_base(model, plan.dtype, plan.batch_size * plan.config.block_size)
    return model


def frozen_dtype(plan: Plan, name: str) -> torch.dtype:
    """The dtype of a frozen weight: what BASE_DTYPE says, or else what the base has."""
    asked, base = plan.config.base_dtype, plan.base
    if asked == "nf4":
        return torch.bfloat16
    if asked != "auto":
        return getattr(torch, asked)
    if base is None:
        return torch.float32
    if name in base.tensors:
        return base.tensors[name].dtype
    return stated_dtype(base)


def stated_dtype(base: Checkpoint) -> torch.dtype:
    """The dtype that a folder's config.json states; float32 where it states none."""
    try:
        config = json.loads(base.files.get("config.json", b"{}"))
    except ValueError:
        return torch.float32
    stated = config.get("dtype", config.get("torch_dtype"))
    dtype = getattr(torch, stated, None) if isinstance(stated, str) else None
    return dtype if isinstance(dtype, torch.dtype) else torch.float32


def frozen_bytes(model: LanguageModel, config: Config) -> dict[int, int]:
    """The bytes of each frozen parameter, by its id; in NF4 those of linears in the blocks."""
    found = {id(p): p.nbytes for p in model.parameters() if not p.requires_grad}
    if config.base_dtype == "nf4":
        for module in model.blocks.modules():
            if isinstance(module, nn.Linear | LoRALinear) and id(module.weight) in found:
                found[id(module.weight)] = int(NF4_BYTES * module.weight.numel())
    return found


def optimizer_bytes(config: Config, model: LanguageModel) -> int:
    """The bytes of an optimizer's means: two for each number under AdamW, one under Muon."""
    by_muon = matrices_for_muon(config, model)
    trained = [p for p in model.parameters() if p.requires_grad]
    return sum(p.nbytes * (1 if id(p) in by_muon else 2) for p in trained)


def held_in_step(plan: Plan, model: LanguageModel) -> "_Held":
    """What a step of the model holds beside the weights, at the largest moment."""
    shape = (plan.batch_size, plan.config.block_size)
    with next(model.parameters()).fake_mode, _Held() as held:
        model.final_norm.register_forward_hook(lambda *_: held.begin("loss"))
        for p in model.parameters():
            if p.requires_grad:
                p.register_post_accumulate_grad_hook(lambda p: held.move(p.grad, "gradients"))
                if plan.config.grad_accum_steps > 1:  # gradients are there before the batch is
                    p.grad = torch.empty_like(p)
                    held.move(p.grad, "gradients")
        batch = [torch.zeros(shape, dtype=torch.int64, device=plan.device) for _ in range(2)]
        kind, enabled = plan.device.type, plan.dtype != torch.float32
        with torch.autocast(kind, plan.dtype, enabled=enabled):
            loss = model(*batch)[1]
        held.begin("activations")
        loss.backward()
    return held


class _Held(TorchDispatchMode):
    """Counts the bytes of the tensors that operations make, by the part of a step that they are of.

    `at_most` is what each part held when all of them held the most, and `most_in_heap` the most
    that tensors held which the C library takes from its heap.
    """

    def __init__(self) -> None:
        super().__init__()
        self.part = "activations"  # of tensors that are made
        self.now, self.at_most = dict.fromkeys(STEP, 0), dict.fromkeys(STEP, 0)
        self.in_heap = self.most_in_heap = 0
        self.part_of: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()  # of storages

    def begin(self, part: str) -> None:
        """Count what is made from now on for `part`."""
        self.part = part

    def move(self, tensor: Tensor, part: str) -> None:
        """Count a tensor that was made here for `part`."""
        held = self.part_of.get(tensor.untyped_storage())
        if held is not None:
            size = tensor.untyped_storage().nbytes()
            self.now[held[0]] -= size
            self.now[part] += size
            held[0] = part

    def __torch_dispatch__(
        self, function: Any, types: Iterable, arguments: tuple = (), options: dict | None = None
    ) -> Any:
        for tensor in tree_leaves((arguments, options)):
            if isinstance(tensor, Tensor):  # it is there already
                self.part_of.setdefault(tensor.untyped_storage(), None)
        made = function(*arguments, **(options or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor) and tensor.untyped_storage() not in self.part_of:
                self._hold(tensor.untyped_storage())
        return made

    def _hold(self, storage: torch.UntypedStorage) -> None:
        size, held = storage.nbytes(), [self.part]
        self.part_of[storage] = held
        self.now[self.part] += size
        self.in_heap += size if size < LARGEST_IN_HEAP else 0
        weakref.finalize(storage, self._release, size, held)
        if sum(self.now.values()) > sum(self.at_most.values()):
            self.at_most = dict(self.now)
        self.most_in_heap = max(self.most_in_heap, self.in_heap)

    def _release(self, size: int, held: list[str]) -> None:
        self.now[held[0]] -= size
        self.in_heap -= size if size < LARGEST_IN_HEAP else 0


# ---- what there is


@functools.cache
def program_bytes(device: torch.device) -> int:
    """What this process holds when it is first asked, before weights are made: Python, torch and
    the data; 0 where the system does not tell, and on a GPU, whose memory the program does not
    take."""
    if device.type != "cpu":
        return 0
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except (OSError, ValueError, IndexError):
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")


def read_bytes(base: Checkpoint | None) -> int:
    """What a base holds in memory already: one of a file of ours. A folder's is mapped."""
    if base is None or os.path.isdir(base.path):
        return 0
    return sum({t.data_ptr(): t.nbytes for t in base.tensors.values()}.values())


@functools.cache
def free_bytes(device: torch.device) -> float:
    """What a run on `device` can take beside what this process has when it is first asked; infinite
    where the system does not tell.

    On a CPU it is what the system has available, or less where the process is in a group with a
    limit, as in a container.
    """
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = 1024 * next(int(x.split()[1]) for x in lines if x.startswith("MemAvailable"))
    except (OSError, ValueError, StopIteration):
        return math.inf
    group = Path("/sys/fs/cgroup")
    try:
        limit = (group / "memory.max").read_text().strip()
        if limit.isdigit():
            used = int((group / "memory.current").read_text())
            stat = dict(map(str.split, (group / "memory.stat").read_text().splitlines()))
            used -= int(stat["active_file"]) + int(stat["inactive_file"])  # files, which can go
            free = min(free, max(0, int(limit) - used))
    except (OSError, ValueError, KeyError):
        pass
    return free


# ---- what the log says


def memory_lines(plan: Plan) -> list[str]:
    """What a run that trains needs and what is free; where that is too little, what would help."""
    needed, n = estimate(plan), processes.local_world_size()
    # On a CPU all processes take of the same memory, and each has its program already.
    takers = n if plan.device.type == "cpu" else 1
    free = free_bytes(plan.device) + takers * program_bytes(plan.device)
    words = {"trained": "trained weights"}
    listed = ", ".join(
        f"{words.get(part, part)} {size / MIB:,.0f}" for part, size in vars(needed).items()
    )
    each = f" for each of {n} processes" if n > 1 else ""
    available = "" if math.isinf(free) else f"; {free / MIB:,.0f} free"
    lines = [f"Memory: about {needed.total / MIB:,.0f} MiB{each} ({listed}){available}"]
    if plan.config.compile:
        lines.append("Note: COMPILE=True takes more: the compiler itself, and what it makes")
    if takers * needed.total > free:
        lines.append("Note: that does not fit; with other variables it takes about, in MiB:")
        for words, changed in smaller(plan):
            size = estimate(changed).total
            fits = " (fits)" if takers * size <= free else ""
            lines.append(f"   {words}: {size / MIB:,.0f}{fits}")
    return lines


def smaller(plan: Plan) -> list[tuple[str, Plan]]:
    """What would take less memory: variables, and the plan with them; all of them at last."""
    config = plan.config
    changes: list[dict[str, Any]] = []
    if not config.grad_checkpoint:
        changes.append({"grad_checkpoint": True})
    n = processes.world_size()
    if config.batch_size > n:
        parts = config.batch_size // n
        steps = config.grad_accum_steps * parts
        changes.append({"batch_size": config.batch_size // parts, "grad_accum_steps": steps})
    takes_nf4 = plan.base is not None and config.use_lora and not config.fsdp
    if takes_nf4 and config.base_dtype != "nf4":
        changes.append({"base_dtype": "nf4"})
    if config.block_size > 1:
        changes.append({"block_size": config.block_size // 2})
    together = {name: value for change in changes for name, value in change.items()}
    if len(changes) > 1:
        changes.append(together)
    return [
        (
            " ".join(f"{name.upper()}={value}" for name, value in change.items()),
            dataclasses.replace(plan, config=dataclasses.replace(config, **change)),
        )
        for change in changes
    ]
