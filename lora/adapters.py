"""Adapters: what a LoRA run trained, as named tensors, and what one does with them.

A model holds one adapter at a time; the others are `Adapter`s in memory or files. The bare base is
an adapter too, one that changes nothing: `take_adapter` of a model that has not trained gives it.
"""

import math
import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from files import FileError
from files.tensors import check_tensors, fingerprint, read_file, write_file
from lora.inject import lora_layers, swap_modules, tied_names
from lora.linear import LoRALinear

FORMAT = "LoRA adapter"
VERSION = 2


class BaseMismatch(FileError):
    """An adapter that was trained on another base."""


@dataclass(frozen=True)
class Adapter:
    """The tensors of an adapter by their names in the model, and what they belong to.

    `tensors` has every layer's `lora_A` and `lora_B`, and the embeddings where they were trained;
    `alpha` has a number for each layer; `base` is the `fingerprint` of the model below, None where
    it is unknown, as in PEFT's files.
    """

    base: str | None
    alpha: dict[str, float]
    tensors: dict[str, Tensor]
    metadata: dict[str, Any] = field(default_factory=dict)

    @property
    def ranks(self) -> dict[str, int]:
        return {name: self.tensors[f"{name}.lora_A"].shape[0] for name in self.alpha}

    @property
    def extras(self) -> list[str]:
        """The names of tensors that are no part of a layer's adapter, such as embeddings."""
        return [name for name in self.tensors if not name.endswith((".lora_A", ".lora_B"))]


def adapter_state(model: nn.Module) -> dict[str, Tensor]:
    """The trained tensors by name: every `lora_A` and `lora_B`, and the embeddings if they train.

    The tensors share memory with the model's parameters.
    """
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


def base_state(model: nn.Module) -> dict[str, Tensor]:
    """The model's state dict without adapters, of which the base's `fingerprint` is made."""
    return {n: t for n, t in model.state_dict().items() if not n.endswith((".lora_A", ".lora_B"))}


def take_adapter(model: nn.Module, base: str, metadata: Mapping[str, Any] | None = None) -> Adapter:
    """A copy of the model's adapter; `base` is the fingerprint of the model below it.

    `metadata["tied"]` has the further names of trained tensors that several modules share, if any.
    """
    alpha = {name: layer.alpha for name, layer in lora_layers(model).items()}
    tensors = {name: t.clone() for name, t in adapter_state(model).items()}
    tied = tied_names(model)
    return Adapter(base, alpha, tensors, dict(metadata or {}) | ({"tied": tied} if tied else {}))


def save_adapter(
    path: str | os.PathLike, model: nn.Module, base: str, metadata: Mapping[str, Any]
) -> int:
    """Write the model's adapter and return the file's size in bytes.

    `base` is the `fingerprint` of the model that the adapter was trained on. `metadata` (numbers,
    strings and dicts of these) is stored beside it.
    """
    return write_adapter(path, take_adapter(model, base, metadata))


def write_adapter(path: str | os.PathLike, adapter: Adapter) -> int:
    """Write an adapter and return the file's size in bytes."""
    content = {"format": FORMAT, "version": VERSION, "base": adapter.base, "alpha": adapter.alpha}
    tensors = {name: tensor.cpu() for name, tensor in adapter.tensors.items()}
    return write_file(path, content | {"metadata": adapter.metadata, "tensors": tensors})


def read_adapter(path: str | os.PathLike, base: str | None = None) -> Adapter:
    """Read an adapter, a file of ours or a folder of PEFT's (lora/peft_format.py), that belongs on
    the base with this fingerprint; None takes any. One whose base is unknown is taken for any.

    Raises FileError for a file that is damaged or no adapter, and BaseMismatch for another base.
    """
    if os.path.isdir(path):
        from lora.peft_format import read_peft  # which imports this module

        adapter = read_peft(path)
    else:
        content = read_file(path, FORMAT, VERSION)
        adapter = Adapter(*(content.get(key) for key in ("base", "alpha", "tensors", "metadata")))
    if (
        not isinstance(adapter.base, str | None)
        or not all(isinstance(p, dict) for p in (adapter.alpha, adapter.tensors, adapter.metadata))
        or not all(isinstance(name, str) for name in (*adapter.alpha, *adapter.tensors))
        or not all(isinstance(alpha, float | int) for alpha in adapter.alpha.values())
        or not all(abs(alpha) < 1e30 for alpha in adapter.alpha.values())
        or not adapter.alpha
        or not isinstance(_tied(adapter), dict)
        or not isinstance(adapter.metadata.get("base_weights", {}), dict)
    ):
        raise FileError(f"{path} is damaged: it holds no complete adapter")
    check_tensors(path, adapter.tensors, adapter.tensors)  # that they are finite numbers
    parts = {f"{name}.{part}" for name in adapter.alpha for part in ("lora_A", "lora_B")}
    for part in sorted(parts | adapter.tensors.keys() - set(adapter.extras)):
        if part not in parts:
            raise FileError(f"{path} lacks the other matrix of {part}")
        if getattr(adapter.tensors.get(part), "ndim", 0) != 2:
            raise FileError(f"{path} lacks the matrix {part}")
    for name, rank in adapter.ranks.items():
        if rank < 1 or adapter.tensors[f"{name}.lora_B"].shape[1] != rank:
            raise FileError(f"{path}: lora_A and lora_B of {name} are of different ranks, or none")
    check_base(path, adapter, base)
    return adapter


def check_base(path: str | os.PathLike, adapter: Adapter, base: str | None) -> None:
    """Raise BaseMismatch where the adapter of file `path` is known to belong on another base than
    that with the fingerprint `base`; None is any."""
    if base is not None and adapter.base not in (None, base):
        below = adapter.metadata.get("base_checkpoint")
        raise BaseMismatch(
            f"{path} was trained on base {adapter.base}{f' ({below})' if below else ''}, "
            f"not on {base}: the weights of the two bases differ"
        )


def check_base_weights(path: str | os.PathLike, adapter: Adapter, model: nn.Module) -> None:
    """Raise BaseMismatch where PEFT wrote a base's weight beside the adapter of file `path`, and
    the model's is another."""
    stated = adapter.metadata.get("base_weights", {})
    state = base_state(model) if stated else {}
    for name, expected in stated.items():
        if name not in state or fingerprint({name: state[name]}) != expected:
            raise BaseMismatch(f"{path} was trained on a base with another {name}")


def complete_adapter(adapter: Adapter, bare: Adapter) -> Adapter:
    """The same adapter with every layer and embedding of `bare`, the base's own adapter.

    Exact: a layer that the adapter lacks gets a new A and a zero B of the adapter's rank and alpha
    (those of its first layer), which change nothing and can train; an embedding is the base's. The
    tensors are on the device of `bare`.
    """
    device = next((tensor.device for tensor in bare.tensors.values()), None)
    alpha = dict(adapter.alpha)
    tensors = {name: tensor.to(device=device) for name, tensor in adapter.tensors.items()}
    first = next(iter(alpha))
    for name in bare.alpha:
        if name not in adapter.alpha:
            A, B = (bare.tensors[f"{name}.{part}"] for part in ("lora_A", "lora_B"))
            rank, alpha[name] = adapter.ranks[first], alpha[first]
            new_A = nn.init.kaiming_uniform_(A.new_empty(rank, A.shape[1]), a=math.sqrt(5))
            tensors[f"{name}.lora_A"], tensors[f"{name}.lora_B"] = new_A, B.new_zeros(len(B), rank)
    tensors |= {name: bare.tensors[name] for name in bare.extras if name not in tensors}
    tied = {n: names for n, names in _tied(bare).items() if n not in adapter.tensors}
    metadata = adapter.metadata | ({"tied": _tied(adapter) | tied} if tied else {})
    return Adapter(adapter.base, alpha, tensors, metadata)


def _tied(adapter: Adapter) -> dict[str, list[str]]:
    return adapter.metadata.get("tied", {})


def load_adapter(path: str | os.PathLike, model: nn.Module, base: str | None) -> dict[str, Any]:
    """Read an adapter into a model with LoRA on its layers; returns its metadata.

    What the adapter lacks, as PEFT's may, is that of the base: layers do not change it, and the
    model must still have the base's embeddings, which is checked where `base` is given.

    Raises FileError, and leaves the model as it was, when the file is damaged, when a tensor is
    unexpected, of another shape or not finite, when an embedding is missing and the model's is not
    the base's, and when the adapter was trained on another base than the one whose fingerprint is
    `base` (None insists).
    """
    adapter = read_adapter(path, base)
    check_base_weights(path, adapter, model)
    bare = take_adapter(model, base or "")
    missing = sorted(set(bare.extras) - set(adapter.extras))
    if missing and base is not None and fingerprint(base_state(model)) != base:
        raise FileError(
            f"{path} lacks tensor {missing[0]}, and the model's is not that of base {base}: "
            "load the base first"
        )
    switch_adapter(model, complete_adapter(adapter, bare), path)
    return adapter.metadata


def switch_adapter(model: nn.Module, adapter: Adapter, name: str | os.PathLike = "adapter") -> None:
    """Make `adapter` the model's, exactly: tensors are copied in place, alpha and rank follow.

    Where the rank differs, the layer gets new parameters, which an optimizer does not know.

    Raises FileError, with `name` in its message, and leaves the model as it was, when the adapter
    does not fit the model.
    """
    layers = lora_layers(model)
    _check_fit(name, adapter, adapter_state(model), layers, tied_names(model))
    with torch.no_grad():
        for layer_name, rank in adapter.ranks.items():
            layers[layer_name].alpha = adapter.alpha[layer_name]
            layers[layer_name].set_rank(rank)
        for tensor_name, tensor in adapter_state(model).items():
            tensor.copy_(adapter.tensors[tensor_name])


def _check_fit(
    name: str | os.PathLike,
    adapter: Adapter,
    state: Mapping[str, Tensor],
    layers: Collection[str],
    tied: Mapping[str, Sequence[str]],
) -> None:
    """Raise FileError unless the adapter is of these layers and its tensors are those of `state`,
    but for the rank, and shared by the same modules."""
    expected = dict(state)
    for layer, rank in adapter.ranks.items():
        A, B = (state.get(f"{layer}.{part}") for part in ("lora_A", "lora_B"))
        if A is not None and B is not None:
            expected[f"{layer}.lora_A"] = A.new_empty(rank, A.shape[1])
            expected[f"{layer}.lora_B"] = B.new_empty(B.shape[0], rank)
    check_tensors(name, adapter.tensors, expected)
    if adapter.alpha.keys() != set(layers):
        raise FileError(f"{name} has adapters of other layers than the model's")
    if _tied(adapter) != tied:
        raise FileError(f"{name} and the model differ in tied tensors, which are {tied or 'none'}")


def sum_adapters(
    files: Sequence[tuple[str, Adapter, float]],
    bare: Adapter,
    rank: int | None = None,
    any_base: bool = False,
) -> Adapter:
    """The weighted sum of adapters that were read from files, as (path, adapter, weight); see
    `combine_adapters`. What one of them lacks, as PEFT's may, is that of `bare`.

    Raises FileError for one that cannot be used with `bare`, the base's own adapter, and
    BaseMismatch for one that was trained on another base, unless `any_base`.
    """
    weighted = []
    for path, adapter, weight in files:
        check_base(path, adapter, None if any_base else bare.base)
        adapter = complete_adapter(adapter, bare)
        _check_fit(path, adapter, bare.tensors, bare.alpha, _tied(bare))
        weighted.append((adapter, weight))
    return combine_adapters(weighted, bare, rank)


def sum_scaling(
    weighted: Sequence[tuple[Adapter, float]], rank: int | None = None
) -> tuple[int, float]:
    """The rank and alpha that `combine_adapters` gives the first layer."""
    first, weight = weighted[0]
    name = next(iter(first.alpha))
    if len(weighted) == 1 and weight == 1.0 and rank in (None, *_ranks(first)):
        return first.ranks[name], first.alpha[name]
    ranks = [
        next(iter(a.ranks.values())) if name not in a.ranks else a.ranks[name] for a, _ in weighted
    ]
    found = min(sum(ranks), rank or sum(ranks))
    return found, float(found)  # a scaling of 1


def combine_adapters(
    weighted: Sequence[tuple[Adapter, float]], bare: Adapter, rank: int | None = None
) -> Adapter:
    """The sum of weighted adapters: its change of the base is the weighted sum of their changes.

    Ranks are concatenated, which is exact: u s_a B_a A_a + v s_b B_b A_b is the product of
    [u s_a B_a, v s_b B_b] and [A_a; A_b]. Embeddings change by the weighted changes of those of
    `bare`, the base's own adapter. A weight may be negative. The sum's base is unknown where that
    of one of them is; its metadata are those in which they agree.

    With `rank`, each layer's change is replaced by the nearest one of at most this rank (Eckart and
    Young 1936; through QR of the factors, in float64), and `metadata["truncation_error"]` is the
    error that this causes: the Frobenius norm of what is lost over that of the whole, all layers
    together.

    Raises ValueError for no adapters, for adapters of different layers, or a rank below 1.
    """
    if not weighted or (rank is not None and rank < 1):
        raise ValueError(f"nothing to combine, or rank={rank} is not at least 1")
    for adapter, _ in weighted:
        if adapter.alpha.keys() != bare.alpha.keys() or set(adapter.extras) != set(bare.extras):
            raise ValueError("the adapters are of different layers")
    if len(weighted) == 1 and weighted[0][1] == 1.0 and rank in (None, *_ranks(weighted[0][0])):
        return weighted[0][0]
    alpha: dict[str, float] = {}
    tensors: dict[str, Tensor] = {}
    lost = total = 0.0
    for name in bare.alpha:
        A = torch.cat([adapter.tensors[f"{name}.lora_A"] for adapter, _ in weighted])
        B = torch.cat(
            [
                adapter.tensors[f"{name}.lora_B"] * (weight * adapter.alpha[name] / r)
                for adapter, weight in weighted
                for r in [adapter.ranks[name]]
            ],
            dim=1,
        )
        if rank is not None:
            A, B, layer_lost, layer_total = _truncate(A, B, rank)
            lost, total = lost + layer_lost, total + layer_total
        tensors[f"{name}.lora_A"], tensors[f"{name}.lora_B"] = A, B
        alpha[name] = float(A.shape[0])  # a scaling of 1, since B holds it
    for name in bare.extras:
        changes = [(a.tensors[name] - bare.tensors[name]) * weight for a, weight in weighted]
        tensors[name] = bare.tensors[name] + torch.stack(changes).sum(0)
    everyone = [adapter.metadata for adapter, _ in weighted]
    metadata = {
        n: v for n, v in everyone[0].items() if all(m.get(n) == v for m in everyone[1:])
    } | ({"tied": _tied(bare)} if _tied(bare) else {})
    if rank is not None:
        metadata["truncation_error"] = (lost / total) ** 0.5 if total > 0 else 0.0
    known = all(adapter.base is not None for adapter, _ in weighted)
    return Adapter(bare.base if known else None, alpha, tensors, metadata)


def _ranks(adapter: Adapter) -> set[int]:
    """The adapter's rank, where all layers have the same."""
    ranks = set(adapter.ranks.values())
    return ranks if len(ranks) == 1 else set()


def _truncate(A: Tensor, B: Tensor, rank: int) -> tuple[Tensor, Tensor, float, float]:
    """The nearest B A of at most `rank`, and the squared norms of what is lost and of the whole.

    In float64 and so on the CPU, for MPS has none.
    """
    Q_B, R_B = torch.linalg.qr(B.cpu().double())
    Q_A, R_A = torch.linalg.qr(A.cpu().double().t())
    U, S, Vh = torch.linalg.svd(R_B @ R_A.t())  # B A = Q_B U S Vh Q_A^T
    kept = S[:rank] > 1e-12 * S[0]
    root = S[:rank].sqrt() * kept
    new_A = (root[:, None] * (Vh[:rank] @ Q_A.t())).to(A.dtype)
    if not kept.all():  # B is zero there; for it to train, A must not be
        new_A[~kept] = nn.init.kaiming_uniform_(torch.empty_like(new_A), a=math.sqrt(5))[~kept]
    new_A = new_A.to(A.device)
    new_B = (Q_B @ U[:, :rank] * root).to(B.dtype).to(B.device)
    squares = S.square()
    return new_A, new_B, squares[rank:].sum().item(), squares.sum().item()


def merge_adapter(model: nn.Module) -> dict[str, LoRALinear]:
    """Replace every LoRALinear by a plain linear that computes the same, in place.

    The weight W + s B A is added up in the adapter's dtype, float32, and rounded once to that of W;
    `model.float()` before keeps all of it. The state dict is then that of a model without LoRA. A
    weight that was tied to another module's is its own afterwards, and the other is as it was.
    Returns the replaced layers, for `unmerge_adapter`.
    """
    layers = lora_layers(model)
    swap_modules(model, {name: _merged_linear(layer) for name, layer in layers.items()})
    return layers


def unmerge_adapter(model: nn.Module, layers: Mapping[str, LoRALinear]) -> None:
    """Put the layers back that `merge_adapter` returned: the model is what it was, to the bit."""
    swap_modules(model, layers)


def _merged_linear(layer: LoRALinear) -> nn.Linear:
    linear = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
    weight = layer.weight.to(layer.lora_B.dtype)
    merged = torch.addmm(weight, layer.lora_B.detach(), layer.lora_A.detach(), alpha=layer.scaling)
    linear.weight = nn.Parameter(merged.to(layer.weight.dtype), requires_grad=False)
    linear.bias = layer.bias
    return linear.train(layer.training)
