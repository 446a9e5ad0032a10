"""Put LoRA into a model: swap its linears, freeze the rest, count the parameters."""

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from files.tensors import release
from lora.linear import LoRALinear, has_hooks, merging_pays
from ops.products import number_size


def add_lora(
    model: nn.Module,
    rank: int = 8,
    alpha: float = 16.0,
    dropout: float = 0.0,
    targets: Sequence[str] | str | None = None,
) -> list[str]:
    """Freeze `model` and swap its linears for LoRALinears that adopt their parameters, in place.

    `targets` are module names or their last parts (`"query"`, `"blocks.0.attn.query"`), None for
    every linear. Returns the full names of the adapted modules.

    Adapters that the model has already stay and go on training. A linear that the model uses in
    several places gets one adapter, in all of them, under the first of its names. A weight that is
    tied to another module's, such as a head's to the embedding, stays tied: the adapter changes the
    linear alone.

    Raises ValueError, and leaves the model as it was, in these cases:
        - A rank or dropout is out of range.
        - A target matches nothing; the message lists what would match.
        - A module is not a plain nn.Linear. A subclass may have another forward, or one that is
          never called, as in nn.MultiheadAttention. `targets=None` takes subclasses too, so a model
          that has them needs targets.
        - A module has hooks, which the adapted layer would lose.
        - A linear is in an nn.TransformerEncoderLayer, whose fast path in eval reads the weights
          without calling the linear, and so without its adapter.
    """
    if isinstance(model, nn.Linear):
        raise ValueError("the model is itself a linear, in which nothing can be swapped")
    modules = dict(model.named_modules(remove_duplicate=False))
    linears = {name: m for name, m in modules.items() if isinstance(m, nn.Linear)}
    chosen = dict(linears)
    if targets is not None:
        chosen = {}
        for target in [targets] if isinstance(targets, str) else targets:
            matched = {name: m for name, m in modules.items() if _matches(name, target)}
            if not matched:
                known = ", ".join(sorted({name.rpartition(".")[2] for name in linears}))
                raise ValueError(f"target {target!r} matches no linear; these would: {known}")
            chosen |= matched
    for name, module in chosen.items():
        if type(module) is not nn.Linear:
            kind = type(module).__name__
            raise ValueError(f"{name} is of {kind}, not a plain nn.Linear, and cannot be adapted")
        if has_hooks(module):
            raise ValueError(f"{name} has hooks, which its adapted layer would lose")
        if isinstance(modules[name.rpartition(".")[0]], nn.TransformerEncoderLayer):
            raise ValueError(
                f"{name} is in an nn.TransformerEncoderLayer, whose fast path passes adapters by"
            )
    first = {id(m): name for name, m in reversed(linears.items())}  # of a module's names
    firsts = {first[id(m)] for m in chosen.values()}
    names = [name for name in linears if name in firsts]
    adapted = {name: LoRALinear(linears[name], rank, alpha, dropout) for name in names}
    for name, parameter in model.named_parameters():
        if not name.endswith((".lora_A", ".lora_B")):
            parameter.requires_grad_(False)
    swap_modules(model, adapted)
    return names


def swap_modules(model: nn.Module, modules: Mapping[str, nn.Module]) -> None:
    """Put each module in the place that its name says, and wherever else the old one stands."""
    new = {id(model.get_submodule(name)): module for name, module in modules.items()}
    for parent in list(model.modules()):
        for child, module in list(parent._modules.items()):
            if id(module) in new:
                setattr(parent, child, new[id(module)])


def _matches(name: str, target: str) -> bool:
    """Whether a target is a module's name or the last parts of it."""
    return name == target or name.endswith("." + target)


def tied_names(model: nn.Module) -> dict[str, list[str]]:
    """The further names of each trained parameter that stands in several modules."""
    first: dict[int, str] = {}
    tied: dict[str, list[str]] = {}
    for name, p in model.named_parameters(remove_duplicate=False):
        if p.requires_grad and first.setdefault(id(p), name) != name:
            tied.setdefault(first[id(p)], []).append(name)
    return tied


def lora_layers(model: nn.Module) -> dict[str, LoRALinear]:
    """The LoRALinears of `model` by name."""
    return {name: m for name, m in model.named_modules() if isinstance(m, LoRALinear)}


def store_base(model: nn.Module, dtype: torch.dtype, tokens: int) -> None:
    """Keep in `dtype` the frozen weights of linears that steps of `tokens` tokens never merge.

    Under autocast such a weight is cast to `dtype` in every step: this does it once, gives the same
    numbers and takes half the memory. Weights that are merged stay as they are, since the sum with
    the adapter must be rounded only once.
    """
    modules = list(model.modules())
    linears = [m for m in modules if type(m) is nn.Linear or isinstance(m, LoRALinear)]
    others = {id(p) for m in set(modules) - set(linears) for p in m.parameters(recurse=False)}
    for layer in linears:
        if layer.weight.requires_grad or id(layer.weight) in others:
            continue  # trained, or shared with another module, as a tied head's
        if number_size(layer.weight) < dtype.itemsize:
            continue  # in less memory already
        adapted = isinstance(layer, LoRALinear)
        if not adapted or layer.dropout > 0.0 or not merging_pays(tokens, layer, dtype):
            before = layer.weight.data
            layer.weight.data = before.to(dtype)
            if before.dtype != dtype:
                release(before)


def count_parameters(model: nn.Module) -> dict[str, int]:
    """Numbers of parameters: `total`, `trainable`, `frozen`, and `lora` for the adapters alone.

    A tensor that two modules share counts once.
    """
    total = sum(p.numel() for p in model.parameters())
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    lora = sum(m.lora_A.numel() + m.lora_B.numel() for m in lora_layers(model).values())
    return {"total": total, "trainable": trainable, "frozen": total - trainable, "lora": lora}
