"""Full checkpoints: all weights of a model, its sizes, and where they come from."""

import dataclasses
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from files import FileError
from files.tensors import check_tensors, read_file, release, write_file
from lora import LoRALinear, base_state
from models import FAMILIES, GPT2, Family, LanguageModel
from ops.nf4 import NF4, dequantize, quantize

FORMAT = "model checkpoint"
VERSION = 2


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that was read: a base.

    `sizes` is an instance of `family.sizes`; `tokenizer` is the content of a tokenizer.json, None
    where tokens are bytes; `files` are those that a Hugging Face folder has beside its weights.
    """

    path: str
    family: Family
    sizes: Any
    tensors: Mapping[str, Tensor]
    metadata: dict[str, Any]
    tokenizer: str | None = None
    files: Mapping[str, bytes] = field(default_factory=dict)


def sizes_of(model: LanguageModel) -> Any:
    """The sizes to write with this model: `tied_head` is False where LoRA parted a tied head."""
    return dataclasses.replace(model.sizes, tied_head=model.tied_head)


def family_of(model: LanguageModel) -> Family:
    """The family whose model class this is."""
    return next(family for family in FAMILIES.values() if isinstance(model, family.model))


def save_checkpoint(
    path: str | os.PathLike,
    model: LanguageModel,
    metadata: Mapping[str, Any],
    base: Checkpoint | None = None,
) -> int:
    """Write all weights of a model without adapters; returns the file's size in bytes.

    Of a weight in NF4 its values are written, in the dtype of the matrix that it was made of. The
    tokenizer and the files beside the weights of its `base` are written too. Raises FileError when
    the file cannot be written.
    """
    tensors = {name: _plain(tensor).cpu() for name, tensor in base_state(model).items()}
    content = {"format": FORMAT, "version": VERSION, "family": family_of(model).name}
    content |= {"shape": dataclasses.asdict(sizes_of(model))}
    content["tokenizer"] = base.tokenizer if base is not None else None
    if base is not None:  # bytes as tensors, which torch reads without running code
        content["files"] = {
            name: torch.frombuffer(bytearray(file), dtype=torch.uint8)
            for name, file in base.files.items()
        }
    return write_file(path, content | {"metadata": dict(metadata), "tensors": tensors})


def _plain(tensor: Tensor) -> Tensor:
    return dequantize(tensor, tensor.dtype) if isinstance(tensor, NF4) else tensor


def read_checkpoint(path: str | os.PathLike) -> Checkpoint:
    """Read a checkpoint. Raises FileError when it is missing, damaged or of another kind."""
    content = read_file(path, FORMAT, VERSION)
    shape, tensors, metadata = (content.get(key) for key in ("shape", "tensors", "metadata"))
    name = content.get("family", GPT2.name)  # earlier versions wrote none
    tokenizer = content.get("tokenizer")
    damaged = FileError(f"{path} is damaged: its tensors do not fit the shape that it states")
    if not all(isinstance(part, dict) for part in (shape, tensors, metadata)):
        raise damaged
    if name not in FAMILIES:
        raise FileError(f"{path} is of family {name!r}; supported are {', '.join(FAMILIES)}")
    if not isinstance(tokenizer, str | None):
        raise damaged
    family = FAMILIES[name]
    try:
        sizes = checked_sizes(family, shape)
        # A damaged file may state so many layers that to build them would take all memory.
        if sizes.n_layer > len(tensors):
            raise damaged
        check_tensors(path, tensors, meta_model(family, sizes).state_dict(), finite=False)
    except (TypeError, ValueError, RuntimeError) as error:
        raise damaged from error
    files = content.get("files", {})
    if not isinstance(files, dict) or not all(
        isinstance(n, str) and n == os.path.basename(n) and isinstance(t, Tensor)
        for n, t in files.items()
    ):
        raise damaged
    files = {name: t.numpy().tobytes() for name, t in files.items()}
    return Checkpoint(str(path), family, sizes, tensors, metadata, tokenizer, files)


def checked_sizes(family: Family, values: Mapping[str, Any]) -> Any:
    """The family's sizes of these values. Raises TypeError or ValueError unless each has its
    field's type, and numbers are positive."""
    sizes = family.sizes(**values)
    for size in dataclasses.fields(sizes):
        value = getattr(sizes, size.name)
        if type(value) is not size.type:
            raise TypeError(f"{size.name} is {value!r}")
        if size.type is int and value < 1:
            raise ValueError(f"{size.name} is {value!r}")
    return sizes


def meta_model(family: Family, sizes: Any, dropout: float = 0.0) -> LanguageModel:
    """A model of these sizes on the meta device: names and shapes of tensors, without numbers."""
    with torch.device("meta"):
        return family.model(**dataclasses.asdict(sizes), device="meta", dropout=dropout)


def load_base(
    model: LanguageModel,
    checkpoint: Checkpoint,
    dtype: str = "auto",
    device: str | torch.device = "cpu",
) -> None:
    """Make a checkpoint's weights those of a model of its sizes, with or without adapters.

    What trains is a copy in float32. What is frozen keeps the checkpoint's dtype and, on a CPU, its
    memory, such as that of a mapped file. With another `dtype` than "auto" frozen linears are
    converted, one by one: with "float32" or "bfloat16" all of them, and what else is in float64 to
    float32; with "nf4" the weights of those in the blocks, on the device where they will be. A
    model on the meta device is on `device` afterwards.

    Raises FileError, and leaves the model as it was, when the tensors are not exactly its own.
    """
    path, found = checkpoint.path, checkpoint.tensors
    if checkpoint.family is not family_of(model):
        raise FileError(f"{path} is of the family {checkpoint.family.name}")
    for size in dataclasses.fields(model.sizes):  # some sizes show in no tensor's shape
        stated, wanted = getattr(checkpoint.sizes, size.name), getattr(model.sizes, size.name)
        if stated != wanted and size.name != "tied_head":
            raise FileError(f"{path} has {size.name}={stated}, the model has {wanted}")
    check_tensors(path, found, base_state(model), finite=False)
    for name, tensor in found.items():
        check_tensors(path, {name: tensor}, {name: tensor})  # that its numbers are finite
        release(tensor)
    linears = [
        module
        for module in (model.blocks if dtype == "nf4" else model).modules()
        if isinstance(module, nn.Linear | LoRALinear) and dtype != "auto"
    ]
    converted = {id(linear.weight) for linear in linears}
    if dtype != "nf4":
        converted |= {id(linear.bias) for linear in linears}
    loaded: dict[int, nn.Parameter] = {}  # by the id of the parameter that it replaces
    for module_name, module in model.named_modules():
        for name, parameter in module._parameters.items():
            full_name = f"{module_name}.{name}".removeprefix(".")
            if full_name not in found or parameter is None:
                continue
            if id(parameter) not in loaded:
                trains = parameter.requires_grad
                form = "auto"
                if id(parameter) in converted:
                    form = dtype
                elif dtype in ("float32", "bfloat16") and found[full_name].dtype == torch.float64:
                    form = "float32"
                place = device if parameter.is_meta else parameter.device
                tensor = _loaded(found[full_name], place, trains, form)
                loaded[id(parameter)] = nn.Parameter(tensor, requires_grad=trains)
            module._parameters[name] = loaded[id(parameter)]
        if isinstance(module, LoRALinear) and module.weight.dtype == torch.float64:
            module.double()  # adapters that were there already: torch multiplies no two dtypes


def _loaded(tensor: Tensor, device: str | torch.device, trains: bool, form: str) -> Tensor:
    """A checkpoint's tensor on a device: in float32 or above where it trains, else in the dtype
    `form`, in NF4, or with "auto" as it is."""
    if trains:
        dtype = torch.promote_types(tensor.dtype, torch.float32)
        return tensor.to(device, dtype, copy=True, memory_format=torch.contiguous_format)
    if form == "auto":
        return tensor.to(device).contiguous()
    if form == "nf4":
        converted = quantize(tensor.to(device))
    else:
        converted = tensor.to(device, getattr(torch, form)).contiguous()
    if converted is not tensor:
        release(tensor)
    return converted
