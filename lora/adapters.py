"""Adapter files: what a LoRA run trained, as named tensors, and what they belong to."""

import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lora.files import FileError, check_tensors, read_file, write_file
from lora.inject import lora_layers

FORMAT = "LoRA adapter"
VERSION = 1


def adapter_state(model: nn.Module) -> dict[str, Tensor]:
    """The trained tensors by name: every `lora_A` and `lora_B`, and the embeddings if they train.

    The tensors share memory with the model's parameters.
    """
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


def save_adapter(
    path: str | os.PathLike, model: nn.Module, base: str, metadata: Mapping[str, Any]
) -> int:
    """Write the model's adapter and return the file's size in bytes.

    `base` is the `fingerprint` of the model that the adapter was trained on. `metadata` (numbers,
    strings and dicts of these) is stored beside it.
    """
    return write_file(
        path,
        {
            "format": FORMAT,
            "version": VERSION,
            "base": base,
            "alpha": {name: layer.alpha for name, layer in lora_layers(model).items()},
            "metadata": dict(metadata),
            "tensors": {name: t.cpu() for name, t in adapter_state(model).items()},
        },
    )


def load_adapter(path: str | os.PathLike, model: nn.Module, base: str) -> dict[str, Any]:
    """Copy an adapter, its alpha included, into a model with adapters of the same shapes.

    Returns the metadata that was saved with it.

    Raises FileError, and leaves the model as it was, when the file is damaged, when a tensor is
    missing, unexpected, of another shape or not finite, and when the adapter was trained on
    another base than the one whose fingerprint is `base`.
    """
    content = read_file(path, FORMAT, VERSION)
    layers = lora_layers(model)
    alpha, metadata = content.get("alpha"), content.get("metadata")
    if (
        not isinstance(metadata, dict)
        or not isinstance(alpha, dict)
        or alpha.keys() != layers.keys()
        or not all(isinstance(value, float | int) for value in alpha.values())
    ):
        raise FileError(f"{path} is damaged, or its adapters are of other layers than the model's")
    if content.get("base") != base:
        raise FileError(f"{path} was trained on base {content.get('base')}, not on {base}")
    state = adapter_state(model)
    check_tensors(path, content.get("tensors"), state)
    with torch.no_grad():
        for name, tensor in content["tensors"].items():
            state[name].copy_(tensor)
    for name, layer in layers.items():
        layer.alpha = alpha[name]
    return metadata
