"""Adapters: what a LoRA run trained, as named tensors, and what one does with them.

A model holds one adapter at a time; the others are `Adapter`s in memory or files. The bare base is
an adapter too, one that changes nothing: `take_adapter` of a model that has not trained gives it.
"""

import dataclasses
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
from ops.products import base_weight

FORMAT = "LoRA adapter"
VERSION = 2
BASE_LAYER = ".base_layer."  # in PEFT's names of what an adapted layer had before


class BaseMismatch(FileError):
    """An adapter that was trained on another base."""


@dataclass(frozen=True)
class Adapter:
    """The tensors of an adapter by their names in the model, and what they belong to.

    `tensors` has every layer's `lora_A` and `lora_B`, and the embeddings where they were trained;
    `alpha` has a number for each layer; `base` is the `fingerprint` of the model below, None where
    it is unknown, as in PEFT's files. PEFT also writes the base's weight of an adapted head, which
    is in `tensors` as `lm_head.base_layer.weight`.
    """

    base: str | None
    alpha: dict[str, float]
    tensors: dict[str, Tensor]
    metadata: dict[str, Any] = field(default_factory=dict)

    @property
    def ranks(self) -> dict[str, int]:
        """The rank of each layer, by its name."""
        return {name: self.tensors[f"{name}.lora_A"].shape[0] for name in self.alpha}

    @property
    def extras(self) -> list[str]:
        """The names of trained tensors that are no part of a layer's adapter, as embeddings."""
        names = self.tensors.keys() - self.base_weights
        return [n for n in self.tensors if n in names and not n.endswith((".lora_A", ".lora_B"))]

    @property
    def base_weights(self) -> dict[str, str]:
        """The names of the base's weights that PEFT wrote beside the adapter, and what the base
        calls them."""
        parts = {name: name.rpartition(BASE_LAYER) for name in self.tensors}
        return {
            name: f"{x}.{y}" for name, (x, beside, y) in parts.items() if beside and x in self.alpha
        }


def adapter_state(model: nn.Module) -> dict[str, Tensor]:
    """The trained tensors by name: every `lora_A` and `lora_B`, and the embeddings if they train.

    The tensors share memory with the model's parameters.
    """
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


def base_state(model: nn.Module) -> dict[str, Tensor]:
    """The model's state dict without adapters: the tensors of the base's `fingerprint`."""
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
    path: str | os.PathLike,
    model: nn.Module,
    base: str,
    metadata: Mapping[str, Any],
    whole: Mapping[str, Tensor] | None = None,
) -> int:
    """Write the model's adapter and return the file's size in bytes.

    `base` is the `fingerprint` of the model that the adapter was trained on. `metadata` (numbers,
    strings and dicts of these) is stored beside it. `whole` are weights that did not train here and
    are the adapter's own all the same, by name. Raises FileError when it cannot be written.
    """
    adapter = take_adapter(model, base, metadata)
    tensors = {**(whole or {}), **adapter.tensors}
    return write_adapter(path, dataclasses.replace(adapter, tensors=tensors))


def write_adapter(path: str | os.PathLike, adapter: Adapter) -> int:
    """Write an adapter and return the file's size in bytes. Raises FileError when it cannot be
    written."""
    content = {"format": FORMAT, "version": VERSION, "base": adapter.base, "alpha": adapter.alpha}
    tensors = {name: tensor.cpu() for name, tensor in adapter.tensors.items()}
    return write_file(path, content | {"metadata": adapter.metadata, "tensors": tensors})


def read_adapter(path: str | os.PathLike, base: str | None = None) -> Adapter:
    """Read an adapter: a file of ours, or a folder of PEFT's (lora/peft_format.py).

    `base` is the fingerprint of the base that it must belong on; None takes any. An adapter whose
    base is unknown is taken for any base.

    Raises FileError for a file that is damaged or no adapter, and BaseMismatch for another base.
    """
    if os.path.isdir(path):
        from lora.peft_format import read_peft  # here, as lora.peft_format imports this module

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
        or not isinstance(adapter.metadata.get("files", {}), dict)
    ):
        raise FileError(f"{path} is damaged: it holds no complete adapter")
    check_tensors(path, adapter.tensors, adapter.tensors)  # that they are finite numbers
    parts = {f"{name}.{part}" for name in adapter.alpha for part in ("lora_A", "lora_B")}
    matrices = {name for name in adapter.tensors if name.endswith((".lora_A", ".lora_B"))}
    for part in sorted(parts | matrices):
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
    """Raise BaseMismatch where the adapter of file `path` is known to belong on another base.

    `base` is the fingerprint of the base to put it on; None is any base.
    """
    if base is not None and adapter.base not in (None, base):
        below = adapter.metadata.get("base_checkpoint")
        raise BaseMismatch(
            f"{path} was trained on base {adapter.base}{f' ({below})' if below else ''}, "
            f"not on {base}: the weights of the two bases differ"
        )


def check_base_weights(path: str | os.PathLike, adapter: Adapter, model: nn.Module) -> None:
    """Raise BaseMismatch where the model's weights differ from those beside an adapter.

    PEFT writes the base's weight of an adapted head into the adapter's file `path`.
    """
    state = base_state(model) if adapter.base_weights else {}
    for ours, name in adapter.base_weights.items():
        weight = adapter.tensors[ours]
        if name not in state or fingerprint({name: state[name]}) != fingerprint({name: weight}):
            raise BaseMismatch(f"{path} was trained on a base with another {name}")


def complete_adapter(adapter: Adapter, bare: Adapter) -> Adapter:
    """The adapter with every layer and embedding of `bare`, the base's own adapter.

    It changes the base as `adapter` does, exactly. A layer that `adapter` lacks gets a new A and a
    zero B, which change nothing and can train. Their rank and alpha are those of the adapter's
    first layer. An embedding that it lacks is the base's. The tensors are on the device of `bare`,
    without weights of the base that PEFT wrote beside them.
    """
    device = next((tensor.device for tensor in bare.tensors.values()), None)
    alpha = dict(adapter.alpha)
    tensors = {
        name: tensor.to(device=device)
        for name, tensor in adapter.tensors.items()
        if name not in adapter.base_weights
    }
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
    """The further names of trained tensors that several modules share, by their first name."""
    return adapter.metadata.get("tied", {})


def load_adapter(path: str | os.PathLike, model: nn.Module, base: str | None) -> dict[str, Any]:
    """Read an adapter into a model with LoRA on its layers; returns its metadata.

    An adapter of PEFT's may lack layers and embeddings. Those layers then leave the base as it is,
    and the embeddings are the model's. They must still be the base's, which is checked where `base`
    is given.

    Raises FileError, and leaves the model as it was, in these cases: the file is damaged; a tensor
    is unexpected, of another shape or not finite; an embedding is missing and the model's is not
    the base's; the adapter was trained on a base whose fingerprint is not `base` (None takes any).
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
    """Raise FileError unless the adapter fits a model with these layers and trained tensors.

    Its tensors must have the names and shapes of `state`, except for the rank, and be shared by the
    same modules, which `tied` names.
    """
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
    """The weighted sum of adapters from files, given as (path, adapter, weight).

    `combine_adapters` says what the sum is. `bare` is the base's own adapter. It gives the layers
    and embeddings that an adapter lacks, as PEFT's may.

    Raises FileError for an adapter that does not fit `bare`, and BaseMismatch for one that was
    trained on another base, unless `any_base`.
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
    [u s_a B_a, v s_b B_b] and [A_a; A_b]. `bare` is the base's own adapter; its embeddings change
    by the weighted sum of the adapters' changes. A weight may be negative. The sum's base is
    unknown where one adapter's base is unknown. The sum has the metadata in which all agree.

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
    """A set of the one rank that all layers have, empty where their ranks differ."""
    ranks = set(adapter.ranks.values())
    return ranks if len(ranks) == 1 else set()


def _truncate(A: Tensor, B: Tensor, rank: int) -> tuple[Tensor, Tensor, float, float]:
    """The nearest B A of at most `rank`, and the squared norms of what is lost and of the whole.

    It is computed in float64, and on the CPU, since MPS has no float64.
    """
    Q_B, R_B = torch.linalg.qr(B.cpu().double())
    Q_A, R_A = torch.linalg.qr(A.cpu().double().t())
    U, S, Vh = torch.linalg.svd(R_B @ R_A.t())  # B A = Q_B U S Vh Q_A^T
    kept = S[:rank] > 1e-12 * S[0]
    root = S[:rank].sqrt() * kept
    new_A = (root[:, None] * (Vh[:rank] @ Q_A.t())).to(A.dtype)
    if not kept.all():  # where B is zero, A must not be zero, or B could not train
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
    """Put the layers back that `merge_adapter` returned: the model is what it was, to the bit, in
    the mode and on the device that it has now."""
    for name, layer in layers.items():
        merged = model.get_submodule(name)
        layer.to(merged.weight.device).train(merged.training)
    swap_modules(model, layers)


def _merged_linear(layer: LoRALinear) -> nn.Linear:
    linear = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
    merged = base_weight([layer.weight], layer.lora_B.dtype, copy=True).detach()
    # In place, which keeps autocast from adding up in its own dtype.
    merged.addmm_(layer.lora_B.detach(), layer.lora_A.detach(), alpha=layer.scaling)
    linear.weight = nn.Parameter(merged.to(layer.weight.dtype), requires_grad=False)
    linear.bias = layer.bias
    return linear.train(layer.training)
