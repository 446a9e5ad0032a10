"""Adapters that bring a head or a vocabulary of their own, and the base that they belong on.

PEFT saves a head that was trained whole, and both embeddings where the vocabulary was resized.
"""

import dataclasses

from torch import Tensor

from data import SAYS, DataError, template_in, vocabulary_size
from files import FileError
from files.tensors import fingerprint
from lora import Adapter
from models.checkpoint import Checkpoint
from trainer.loading import AdapterFiles

HEAD = "lm_head.weight"


def fit_base(base: Checkpoint, adapters: AdapterFiles) -> tuple[Checkpoint, AdapterFiles]:
    """The base with the head of an adapter that has its own, and the adapters without that head.

    The base's embedding gets as many rows as that head; the adapter has its weights. A tokenizer
    beside the adapter becomes the base's where the two know different numbers of tokens. The
    adapter's metadata then has `own_head`, and the tokenizer's `files`. A chat template among the
    files beside an adapter becomes its metadata's, unless these say how the model is asked.

    Raises FileError for such an adapter beside others or with a weight, for tokens that no
    tokenizer explains, and where an embedding of another vocabulary is missing.
    """
    fitted: AdapterFiles = []
    for path, adapter, weight in adapters:
        head, tensors = part_head(path, adapter, base)
        beside = checked_files(path, adapter)
        metadata = {name: value for name, value in adapter.metadata.items() if name != "files"}
        template = template_in(
            {name: text.encode("utf-8", "replace") for name, text in beside.items()}
        )
        if template is not None and not SAYS & metadata.keys():
            metadata["chat_template"] = template
        if head is not None:
            if len(adapters) > 1 or weight != 1.0:
                raise FileError(
                    f"{path} has a head of its own, so ADAPTERS takes it alone and without a "
                    "weight; MERGE=True makes a base of it"
                )
            files = own_tokenizer(path, beside, base, rows=len(head))
            base = with_head(base, head)
            metadata |= {"own_head": True}
            if files:
                metadata["files"] = files
                new = {name: text.encode() for name, text in files.items()}
                base = dataclasses.replace(
                    base, tokenizer=files["tokenizer.json"], files={**base.files, **new}
                )
        adapter = dataclasses.replace(adapter, tensors=tensors, metadata=metadata)
        fitted.append((path, adapter, weight))
    return base, fitted


def part_head(
    path: str, adapter: Adapter, base: Checkpoint
) -> tuple[Tensor | None, dict[str, Tensor]]:
    """The head (V, C) that an adapter brings, None where that is the base's; its other tensors.

    PEFT writes the frozen weight of an adapted head, which is the base's unless the vocabulary was
    resized. Where that head is tied, its weight is the embedding too. Raises FileError where the
    vocabulary is another than the base's and an embedding is missing.
    """
    tensors, embedding = dict(adapter.tensors), embedding_name(base)
    head = tensors.pop(HEAD, None)
    frozen = {theirs: ours for ours, theirs in adapter.base_weights.items()}.get(HEAD)
    there = [head, tensors.get(frozen), tensors.get(embedding), tensors.get("lm_head.lora_B")]
    n_tokens, width = base.sizes.vocab_size, base.sizes.n_embd
    rows = next((len(tensor) for tensor in there if tensor is not None), n_tokens)
    resized = rows != n_tokens
    if frozen is not None and (resized or adapter.base is not None):  # ours have it when it is new
        head = tensors.pop(frozen)
        if resized and base.sizes.tied_head:
            tensors.setdefault(embedding, head)
    needed = {HEAD: head, embedding: tensors.get(embedding)} if resized else {}
    for name, tensor in needed.items():
        if tensor is None or tensor.shape != (rows, width):
            raise FileError(
                f"{path} is of a vocabulary of {rows:,} tokens, the base of {n_tokens:,}, and "
                f"lacks {name} of that size: save it again with save_embedding_layers=True"
            )
    if head is None or (not resized and same(head, base.tensors[HEAD])):
        return None, tensors
    if head.shape != (rows, width):
        raise FileError(f"{path}: {HEAD} has shape {tuple(head.shape)}, not {(rows, width)}")
    return head, tensors


def checked_files(path: str, adapter: Adapter) -> dict[str, str]:
    """The text of the tokenizer's files beside an adapter. Raises FileError for no texts."""
    files = adapter.metadata.get("files", {})
    if not all(isinstance(text, str) for text in files.values()):
        raise FileError(f"{path} is damaged: its tokenizer is no table of files")
    return files


def own_tokenizer(path: str, files: dict[str, str], base: Checkpoint, rows: int) -> dict[str, str]:
    """The `files` of an adapter's tokenizer for `rows` tokens; none where the base's is right."""
    files = files if "tokenizer.json" in files else {}
    try:
        known = vocabulary_size(base.tokenizer)
        found = vocabulary_size(files["tokenizer.json"]) if files else known
    except DataError as error:
        raise FileError(f"{path}: {error}") from error
    if found > rows or (not files and rows > base.sizes.vocab_size):
        raise FileError(
            f"{path} is of a vocabulary of {rows:,} tokens, the base of {base.sizes.vocab_size:,}: "
            "put the tokenizer that it was trained with beside it, by tokenizer.save_pretrained"
        )
    return files if found != known else {}


def with_head(base: Checkpoint, head: Tensor) -> Checkpoint:
    """A base with this head, of its own, and as many rows of embeddings; new rows are 0."""
    name, rows = embedding_name(base), len(head)
    embedding = base.tensors[name]
    if len(embedding) != rows:
        old, embedding = embedding, embedding.new_zeros(rows, embedding.shape[1])
        embedding[: len(old)] = old[:rows]
    sizes = dataclasses.replace(base.sizes, vocab_size=rows, tied_head=False)
    return dataclasses.replace(
        base, sizes=sizes, tensors={**base.tensors, HEAD: head, name: embedding}
    )


def embedding_name(base: Checkpoint) -> str:
    """What our model calls the weight of its token embedding."""
    return base.family.layout(base.sizes)[0].ours[0]


def same(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors have the same numbers, be it in different precisions."""
    return fingerprint({"": one}) == fingerprint({"": other})
