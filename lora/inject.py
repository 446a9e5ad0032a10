"""Put LoRA into a model: swap its linears, freeze the rest, count the parameters."""

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from lora.linear import LoRALinear, merging_pays


def add_lora(
    model: nn.Module,
    rank: int = 8,
    alpha: float = 16.0,
    dropout: float = 0.0,
    targets: Sequence[str] | None = None,
) -> list[str]:
    """Freeze `model` and swap its linears for LoRALinears that adopt their parameters, in place.

    `targets` are module names or their last parts (`"query"`, `"blocks.0.attn.query"`), None for
    every linear. Returns the full names of the adapted modules.

    Adapters that the model has already stay and go on training.

    Raises ValueError, and leaves the model as it was, for a rank or dropout out of range, and when
    a target matches no linear: the message lists what would match.
    """
    if isinstance(model, nn.Linear):
        raise ValueError("the model is itself a linear, in which nothing can be swapped")
    linears = {name: m for name, m in model.named_modules() if type(m) is nn.Linear}
    chosen = list(linears)
    if targets is not None:
        for target in targets:
            if not any(_matches(name, target) for name in linears):
                known = ", ".join(sorted({name.rpartition(".")[2] for name in linears}))
                raise ValueError(f"target {target!r} matches no linear; these would: {known}")
        chosen = [name for name in linears if any(_matches(name, t) for t in targets)]
    adapted = {name: LoRALinear(linears[name], rank, alpha, dropout) for name in chosen}
    for name, parameter in model.named_parameters():
        if not name.endswith((".lora_A", ".lora_B")):
            parameter.requires_grad_(False)
    swap_modules(model, adapted)
    return chosen


def swap_modules(model: nn.Module, modules: Mapping[str, nn.Module]) -> None:
    """Put each module in the place that its name says."""
    for name, module in modules.items():
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, module)


def _matches(name: str, target: str) -> bool:
    return name == target or name.endswith("." + target)


def lora_layers(model: nn.Module) -> dict[str, LoRALinear]:
    """The LoRALinears of `model` by name."""
    return {name: m for name, m in model.named_modules() if isinstance(m, LoRALinear)}


def store_base(model: nn.Module, dtype: torch.dtype, tokens: int) -> None:
    """Keep in `dtype` the frozen weights that steps of `tokens` tokens would never merge.

    Under autocast such a weight is cast to `dtype` in every step: this does it once, gives the same
    numbers and takes half the memory. Weights that are merged stay as they are, since the sum with
    the adapter must be rounded only once.
    """
    for layer in lora_layers(model).values():
        if layer.dropout > 0.0 or not merging_pays(tokens, layer, dtype):
            layer.weight.data = layer.weight.data.to(dtype)


def count_parameters(model: nn.Module) -> dict[str, int]:
    """Numbers of parameters: `total`, `trainable`, `frozen`, and `lora` for the adapters alone.

    A tensor that two modules share counts once.
    """
    total = sum(p.numel() for p in model.parameters())
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    lora = sum(m.lora_A.numel() + m.lora_B.numel() for m in lora_layers(model).values())
    return {"total": total, "trainable": trainable, "frozen": total - trainable, "lora": lora}
