"""Full checkpoints: all weights of a model, its shape, and where they come from."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from lora import base_state
from lora.files import FileError, check_tensors, read_file, write_file
from models.bigram_lm_v2_lora import GELUS

FORMAT = "model checkpoint"
VERSION = 2
SHAPE = ("vocab_size", "n_embd", "block_size", "n_head", "n_layer")
VARIANTS = {"gelu": "exact", "tied_head": False}  # what else tells models apart, and its default


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that was read.

    `shape` has the constructor's arguments named in SHAPE and VARIANTS; `tokenizer` is the content
    of a tokenizer.json, None where tokens are bytes.
    """

    path: str
    shape: dict[str, Any]
    tensors: dict[str, Tensor]
    metadata: dict[str, Any]
    tokenizer: str | None = None


def shape_of(model: nn.Module) -> dict[str, Any]:
    """What a checkpoint of this model has as its `shape`."""
    return {name: getattr(model, name) for name in (*SHAPE, *VARIANTS)}


def save_checkpoint(
    path: str | os.PathLike,
    model: nn.Module,
    metadata: Mapping[str, Any],
    tokenizer: str | None = None,
) -> int:
    """Write all weights of a model without adapters; returns the file's size in bytes."""
    tensors = {name: tensor.cpu() for name, tensor in base_state(model).items()}
    content = {"format": FORMAT, "version": VERSION, "shape": shape_of(model)}
    content |= {"tokenizer": tokenizer, "metadata": dict(metadata), "tensors": tensors}
    return write_file(path, content)


def read_checkpoint(path: str | os.PathLike) -> Checkpoint:
    """Read a checkpoint. Raises FileError when it is missing, damaged or of another kind."""
    content = read_file(path, FORMAT, VERSION)
    shape, tensors, metadata = (content.get(key) for key in ("shape", "tensors", "metadata"))
    tokenizer = content.get("tokenizer")
    if (
        not all(isinstance(part, dict) for part in (shape, tensors, metadata))
        or not set(SHAPE) <= set(shape) <= {*SHAPE, *VARIANTS}
        or not all(isinstance(shape[name], int) and shape[name] > 0 for name in SHAPE)
        or shape.get("gelu", "exact") not in GELUS
        or not isinstance(shape.get("tied_head", False), bool)
        or not isinstance(tokenizer, str | None)
        # The largest sizes come from tensors that exist, before a model of that size is built.
        or getattr(tensors.get("token_embedding_table.weight"), "shape", None)
        != (shape["vocab_size"], shape["n_embd"])
        or getattr(tensors.get("position_embedding_table.weight"), "shape", None)
        != (shape["block_size"], shape["n_embd"])
        or shape["n_layer"] > len(tensors)
        or shape["n_embd"] % shape["n_head"] != 0
    ):
        raise FileError(f"{path} is damaged: its tensors do not fit the shape that it states")
    return Checkpoint(str(path), VARIANTS | shape, tensors, metadata, tokenizer)


def load_base(model: nn.Module, checkpoint: Checkpoint) -> None:
    """Copy a checkpoint into a model of its shape, with or without adapters.

    Raises FileError, and leaves the model as it was, when the tensors are not exactly its own.
    """
    for name in (*SHAPE, "gelu"):  # n_head and gelu show in no tensor
        found, wanted = checkpoint.shape[name], getattr(model, name)
        if found != wanted:
            raise FileError(f"{checkpoint.path} has {name}={found}, the model has {wanted}")
    check_tensors(checkpoint.path, checkpoint.tensors, base_state(model))
    model.load_state_dict(checkpoint.tensors, strict=False)
