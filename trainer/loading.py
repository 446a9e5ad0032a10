"""Base and adapters on it, as training and generating load them."""

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from data import SAYS, DataError, vocabulary_size
from files import FileError
from files.tensors import fingerprint
from lora import (
    Adapter,
    BaseMismatch,
    base_state,
    check_base_weights,
    read_adapter,
    sum_adapters,
    switch_adapter,
    take_adapter,
)
from models import Family, LanguageModel
from models.checkpoint import Checkpoint, load_base, meta_model
from models.huggingface import adapter_from_folder, read_base
from trainer.settings import WeightedAdapters

AdapterFiles = list[tuple[str, Adapter, float]]  # path, adapter, weight in the sum


@dataclass(frozen=True)
class LoraOptions:
    """What `LanguageModel.adapt` takes. `targets` are names of linears, None for all."""

    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    targets: list[str] | None = None
    train_embeddings: bool = True


def read_checked_base(path: str) -> Checkpoint:
    """The base at a path: a checkpoint, or a folder of Hugging Face's.

    Raises FileError where it cannot be read, and where its tokenizer has tokens without an
    embedding. A base of bytes must have a vocabulary of exactly 256.
    """
    base = read_base(path)
    try:
        size, needed = base.sizes.vocab_size, vocabulary_size(base.tokenizer)
    except DataError as error:
        raise FileError(f"{base.path}: {error}") from error
    if size < needed or (base.tokenizer is None and size != needed):
        whose = "bytes are" if base.tokenizer is None else "its tokenizer has"
        raise FileError(f"{base.path} has vocab_size={size}, but {whose} {needed}")
    return base


def read_adapters(weighted: WeightedAdapters | None, family: Family, sizes: Any) -> AdapterFiles:
    """The files that ADAPTERS names, each under the names of our model.

    Raises FileError for one that cannot be read, that adapts a layer which a model of these sizes
    does not have, or that has whole weights other than the embeddings' and the head's.
    """
    if weighted is None:
        return []
    modules = dict(meta_model(family, sizes).named_modules())
    whole = {f"{n}.weight" for n, m in modules.items() if isinstance(m, nn.Embedding)}
    whole.add("lm_head.weight")
    whole |= {stored.name for stored in family.layout(sizes) if whole & set(stored.ours)}
    adapters = []
    for path, weight in weighted.parts:
        found = read_adapter(path)
        adapter = adapter_from_folder(found, family)
        for name in adapter.alpha:
            if not isinstance(modules.get(name), nn.Linear):
                base = adapter.metadata.get("base_checkpoint")
                trained_on = f"; it was trained on BASE_CHECKPOINT={base}" if base else ""
                raise FileError(
                    f"ADAPTERS={weighted} is of another model: {path} has an adapter of {name}"
                    f"{trained_on}"
                )
        for name in found.extras:
            if name not in whole:
                raise FileError(
                    f"ADAPTERS={weighted}: {path} has modules_to_save {name.rpartition('.')[0]}, "
                    "which is not supported, only embeddings and lm_head are"
                )
        adapters.append((path, adapter, weight))
    return adapters


def build_model(
    family: Family,
    sizes: Any,
    base: Checkpoint | None,
    device: str | torch.device,
    dropout: float = 0.0,
    lora: LoraOptions | None = None,
    base_dtype: str = "auto",
    trains: bool = True,
) -> LanguageModel:
    """A model on its base, or of random weights, with fresh adapters where `lora` is given.

    What is frozen lies in `base_dtype`, one of those of `load_base`. Without `lora` all weights
    train, but none where nothing `trains`.

    Raises FileError when the base's tensors are not the model's, and ValueError for a target that
    is no linear of it.
    """
    if base is None:
        model = family.model(**dataclasses.asdict(sizes), device="cpu", dropout=dropout)
    else:
        model = meta_model(family, sizes, dropout)
        model.requires_grad_(lora is None and trains)
        load_base(model, base, base_dtype, device)
    if lora is not None:
        put_lora(model, lora)
    return model.to(device)


def put_lora(model: LanguageModel, lora: LoraOptions) -> None:
    """Put fresh adapters on a model; a tied head gets weights of its own where embeddings train."""
    if model.tied_head and lora.train_embeddings:
        model.tie_head(copied=True)
    model.adapt(*dataclasses.astuple(lora))


def parts_of(adapters: AdapterFiles) -> tuple[list[str], bool]:
    """The linears that any of the adapters is on, and whether one holds trained embeddings."""
    layers = list(dict.fromkeys(name for _, adapter, _ in adapters for name in adapter.alpha))
    return layers, any(adapter.extras for _, adapter, _ in adapters)


def put_on_adapters(
    model: LanguageModel, base_id: str, files: AdapterFiles, rank: int | None, any_base: bool
) -> dict[str, Any]:
    """Make the weighted sum of adapters, reduced to `rank` if given, the adapter of a model on its
    base; returns the metadata in which the adapters agree.

    `base_id` is the fingerprint of the base. Raises FileError for adapters that do not fit the
    model, and, unless `any_base`, for those that were trained on another base.
    """
    try:
        for path, adapter, _ in [] if any_base else files:
            check_base_weights(path, adapter, model)
        adapter = sum_adapters(files, take_adapter(model, base_id), rank, any_base)
    except BaseMismatch as error:
        raise FileError(f"{error}; ANY_BASE=True insists") from error
    switch_adapter(model, adapter)
    return adapter.metadata


def base_fingerprint(base: Checkpoint | None, model: nn.Module) -> str:
    """The fingerprint of the weights below the adapters: those of the base's file, whatever dtype
    the model has them in, or without a base the model's random ones."""
    if base is not None:
        return fingerprint(base.tensors, released=True)
    return fingerprint(base_state(model))


def metadata_of_asking(base: Checkpoint | None, adapters: AdapterFiles) -> dict[str, Any]:
    """The metadata that say how the model is asked: those of the first of ADAPTERS, or else of the
    base, with a word on it."""
    every = [adapter.metadata for _, adapter, _ in adapters]
    every += [base.metadata] if base is not None else []
    return next((metadata for metadata in every if SAYS & metadata.keys()), {})


def dtype_below(adapter: Adapter) -> str:
    """The BASE_DTYPE on which an adapter was trained, as far as its file says."""
    found = adapter.metadata.get("base_dtype")
    return found if isinstance(found, str) else "auto"


def describe_adapters(
    files: AdapterFiles, metadata: dict[str, Any], rank: int, base_dtype: str
) -> list[str]:
    """What the log says of ADAPTERS on a base in `base_dtype`; `metadata` and `rank` are those of
    their sum."""
    lines = [f"Adapter: {path}, weight {weight:g}" for path, _, weight in files]
    if "own_head" in metadata:
        lines.append("Head: the adapter's own, whole and frozen")
    if "files" in metadata:
        n_tokens = vocabulary_size(metadata["files"]["tokenizer.json"])
        lines.append(f"Tokenizer: the adapter's own, of {n_tokens:,} tokens")
    formats = [
        (metadata.get("chat_template"), metadata.get("prompt_format"))
        for metadata in (adapter.metadata for _, adapter, _ in files)
        if SAYS & metadata.keys()
    ]
    if len(set(formats)) > 1:
        lines.append(
            "Note: ADAPTERS were trained in different formats; without CHAT_TEMPLATE, "
            "that of the first counts"
        )
    if any(adapter.base is None for _, adapter, _ in files):
        lines.append(
            "Base of the adapter: not recorded in its file, so not checked; its shapes fit"
        )
    for path, adapter, _ in files:
        trained = dtype_below(adapter)
        if adapter.base is not None and trained != base_dtype and "nf4" in (trained, base_dtype):
            lines.append(
                f"Note: {path} was trained with BASE_DTYPE={trained}, "
                f"and this base is of BASE_DTYPE={base_dtype}"
            )
    if "truncation_error" in metadata:
        error = metadata["truncation_error"]
        lines.append(f"Reduced to rank {rank}: relative error {error:.2e}")
    return lines
