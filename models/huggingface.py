"""Models in the folders of Hugging Face: published weights as a base, and ours for `transformers`.

A folder has config.json, the weights as model.safetensors or pytorch_model.bin, whole or in shards,
and the tokenizer's files. What a family's folder holds, and under which names, stands in the
family's own file.
"""

import dataclasses
import functools
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from files import FileError
from files.tensors import check_tensors, read_foreign_tensors, safetensors_for
from files.writing import write_folder
from lora import Adapter
from models import FAMILIES, Family
from models.checkpoint import Checkpoint, read_checkpoint
from models.language_model import StoredTensor

# Files beside the weights that a checkpoint keeps, for the folder that export.py makes of it.
KEPT = (
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
    "tokenizer.model", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja",
    "vocab.json", "merges.txt",
)  # fmt: skip
SHARD_BYTES = 5 * 10**9  # of the files of weights that are written, as transformers has it

MODEL_TYPES = {name: family for family in FAMILIES.values() for name in family.model_types}


def read_base(path: str | os.PathLike) -> Checkpoint:
    """Read a checkpoint, or a Hugging Face folder as one. Raises FileError for neither."""
    return read_model(Path(path)) if os.path.isdir(path) else read_checkpoint(path)


def read_model(folder: Path) -> Checkpoint:
    """Read a folder as `save_pretrained` writes it, or as models are published.

    Raises FileError for a missing or damaged file, for a model of no family of ours, and for an
    option that our model does not have.
    """
    config = _read_json(folder / "config.json")
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in MODEL_TYPES:
        known = ", ".join(MODEL_TYPES)
        raise FileError(f"{folder}: model_type {kind!r} is not supported; supported are {known}")
    family = MODEL_TYPES[kind]
    try:
        sizes = family.read_config(config)
    except ValueError as error:
        raise FileError(f"{folder}/config.json: {error}") from error
    tensors, sizes = _from_folder(folder, _map_weights(folder), family, sizes)
    files = {name: (folder / name).read_bytes() for name in KEPT if (folder / name).is_file()}
    tokenizer = _read_tokenizer(folder)
    return Checkpoint(str(folder), family, sizes, tensors, {}, tokenizer, files)


def write_model(folder: str | os.PathLike, checkpoint: Checkpoint, ends: Sequence[int] = ()) -> int:
    """Write a checkpoint as a folder that `AutoModelForCausalLM.from_pretrained` reads; returns its
    bytes.

    What the base's own folder had beside its weights is written as it was, with two exceptions:
    config.json states the dtype of the weights and whether the head is tied, and the tokens `ends`,
    at which a text ends, are stated where `transformers` would not stop at all of them.

    Raises FileError for a checkpoint that lacks a tensor, when something is there already, or when
    it cannot be written.
    """
    family, sizes = checkpoint.family, checkpoint.sizes
    layout = family.layout(sizes)
    missing = {name for stored in layout for name in stored.ours} - checkpoint.tensors.keys()
    if missing:
        raise FileError(f"{checkpoint.path} lacks tensor {min(missing)}")
    files: dict[str, bytes | Callable[[Path], None]] = dict(checkpoint.files)
    if not checkpoint.files:
        files |= {n: _json_bytes(content) for n, content in _new_files(checkpoint).items()}
    dtypes = {checkpoint.tensors[name].dtype for stored in layout for name in stored.ours}
    dtype = str(functools.reduce(torch.promote_types, dtypes)).removeprefix("torch.")
    config = json.loads(files["config.json"])
    key = "dtype" if "dtype" in config else "torch_dtype"
    tied = family.read_config(config).tied_head
    if config.get(key, "float32") != dtype or tied != sizes.tied_head:
        config |= {key: dtype, "tie_word_embeddings": sizes.tied_head}
        files["config.json"] = _json_bytes(config)
    files |= _stated_ends(files, ends, checkpoint.tokenizer)
    return write_folder(folder, files | _weight_files(folder, checkpoint, layout))


def _new_files(checkpoint: Checkpoint) -> dict[str, dict[str, Any]]:
    """The files beside the weights of a model that began as no folder."""
    sizes = checkpoint.sizes
    if checkpoint.family.write_config is None:
        raise FileError(f"{checkpoint.path} lacks config.json of the folder that it began as")
    config = checkpoint.family.write_config(sizes)
    config |= {"dtype": "float32", "bos_token_id": None, "eos_token_id": None}
    files = {"config.json": config}
    if checkpoint.tokenizer is not None:
        files["tokenizer.json"] = json.loads(checkpoint.tokenizer)
        files["tokenizer_config.json"] = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": sizes.block_size,
        }
    return files


def _stated_ends(
    files: Mapping[str, Any], ends: Sequence[int], tokenizer: str | None
) -> dict[str, bytes]:
    """Those files of a folder that have to be changed for `transformers` to stop at all `ends`, the
    first of which is the tokenizer's."""
    if not ends or tokenizer is None:
        return {}
    changed = {}
    # The one that decides, where it is there, is that of generation.
    name = "generation_config.json" if "generation_config.json" in files else "config.json"
    config = json.loads(files[name])
    stated = config.get("eos_token_id")
    if not set(ends) <= set(stated if isinstance(stated, list) else [stated]):
        config["eos_token_id"] = ends[0] if len(ends) == 1 else list(ends)
        changed[name] = _json_bytes(config)
    options = json.loads(files.get("tokenizer_config.json", b"{}"))
    added = {t["id"]: t["content"] for t in json.loads(tokenizer).get("added_tokens", [])}
    if options.get("eos_token") is None and ends[0] in added:
        changed["tokenizer_config.json"] = _json_bytes(options | {"eos_token": added[ends[0]]})
    return changed


def _json_bytes(content: dict[str, Any]) -> bytes:
    return json.dumps(content, indent=2, ensure_ascii=False).encode() + b"\n"


def _weight_files(
    folder: str | os.PathLike, checkpoint: Checkpoint, layout: list[StoredTensor]
) -> dict[str, bytes | Callable[[Path], None]]:
    """The files of weights, in shards where they are large, each made when it is written."""
    safetensors = safetensors_for(folder)
    shards: list[list[StoredTensor]] = [[]]
    size = total = 0
    for stored in layout:
        n_bytes = sum(checkpoint.tensors[name].nbytes for name in stored.ours)
        if shards[-1] and size + n_bytes > SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append(stored)
        size, total = size + n_bytes, total + n_bytes

    def writer(shard: list[StoredTensor]) -> Callable[[Path], None]:
        def write(path: Path) -> None:
            tensors = _to_folder(checkpoint.tensors, shard)
            try:
                safetensors.torch.save_file(tensors, path, metadata={"format": "pt"})
            except safetensors.SafetensorError as error:  # such as for a full disk
                raise FileError(f"{folder} cannot be written: {error}") from error

        return write

    if len(shards) == 1:
        return {"model.safetensors": writer(shards[0])}
    n = len(shards)
    names = [f"model-{i:05}-of-{n:05}.safetensors" for i in range(1, n + 1)]
    weight_map = {
        stored.name: name for name, shard in zip(names, shards, strict=True) for stored in shard
    }
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    files = {name: writer(shard) for name, shard in zip(names, shards, strict=True)}
    return files | {"model.safetensors.index.json": _json_bytes(index)}


def family_of_adapter(adapter: Adapter) -> Family:
    """The family of an adapter's model: what its metadata says, else the first that has its layers,
    under our names or the folder's. Raises FileError for none."""
    name = adapter.metadata.get("family")
    if isinstance(name, str) and name in FAMILIES:
        return FAMILIES[name]
    for family in FAMILIES.values():
        modules = {
            module
            for stored in _layout_of(adapter, family)
            for module in (stored.module, *stored.our_modules)
        }
        if adapter.alpha.keys() <= modules:
            return family
    raise FileError(
        f"{min(adapter.alpha)} is no layer of {' or '.join(FAMILIES)}: "
        "python -m lora export keeps names"
    )


def adapter_to_folder(adapter: Adapter, family: Family) -> Adapter:
    """The adapter of a model of ours, for the model that `write_model` makes of its base.

    Exact: the adapters of linears that the folder has as one matrix, such as GPT-2's query, key and
    value, become one whose A is theirs one below the other and whose B is block-diagonal, of their
    ranks' sum. Those that lack one have zeros there. One with the folder's names is as it was.

    Raises FileError where such linears are scaled differently, and for an adapter of other layers.
    """
    alpha, tensors = {}, {}
    weights = [stored for stored in _layout_of(adapter, family) if stored.name.endswith(".weight")]
    theirs = {stored.module for stored in weights}
    if {name.rpartition(".")[0] for name in adapter.tensors} <= theirs:
        return adapter
    foreign = adapter.alpha.keys() - {our for stored in weights for our in stored.our_modules}
    if foreign:
        raise FileError(
            f"{min(foreign)} is no layer of {family.name}'s: python -m lora export keeps names"
        )
    for stored in weights:
        name, ours = stored.module, stored.our_modules
        if stored.ours[0] in adapter.tensors:
            tensors[stored.name] = adapter.tensors[stored.ours[0]]
        there = [our for our in ours if our in adapter.alpha]
        if there:
            A, B = (
                [
                    adapter.tensors.get(
                        f"{our}.lora_{x}", torch.zeros_like(adapter.tensors[f"{there[0]}.lora_{x}"])
                    )
                    for our in ours
                ]
                for x in "AB"
            )
            if len({adapter.alpha[our] / adapter.ranks[our] for our in there}) > 1:
                raise FileError(f"{', '.join(ours)} are scaled differently, {name} in one way")
            alpha[name] = sum(adapter.alpha.get(our, adapter.alpha[there[0]]) for our in ours)
            tensors |= {f"{name}.lora_A": torch.cat(A), f"{name}.lora_B": torch.block_diag(*B)}
    return Adapter(adapter.base, alpha, tensors, adapter.metadata)


def adapter_from_folder(adapter: Adapter, family: Family) -> Adapter:
    """An adapter of a folder's model, for our model of it; one with our names is as it was.

    Exact for those that were trained on a folder's matrix which is several of our linears as well:
    each of these takes the whole of A. Raises FileError for a matrix that cannot be so parted.
    """
    layout = _layout_of(adapter, family)
    if not adapter.alpha.keys() & {stored.module for stored in layout}:
        return adapter
    alpha, tensors = dict(adapter.alpha), dict(adapter.tensors)
    for stored in layout:
        name, ours, n = stored.module, stored.our_modules, len(stored.ours)
        if stored.name in tensors:
            tensors[stored.ours[0]] = tensors.pop(stored.name)
        if stored.name.endswith(".weight") and name in alpha:
            A, B = tensors.pop(f"{name}.lora_A"), tensors.pop(f"{name}.lora_B")
            scaled = alpha.pop(name)
            if len(B) % n:
                raise FileError(f"{name}.lora_B has {len(B)} rows, which are not {n} equal parts")
            parts = [(A, b) for b in B.chunk(n)]
            blocks = [b.chunk(n, dim=1) for b in B.chunk(n)] if len(A) % n == 0 else []
            if blocks and torch.equal(torch.block_diag(*(b[i] for i, b in enumerate(blocks))), B):
                parts = [(a, b[i]) for i, (a, b) in enumerate(zip(A.chunk(n), blocks, strict=True))]
                scaled /= n
            there = [a.any().item() or b.any().item() for a, b in parts]
            for our, (a, b), was_there in zip(ours, parts, there, strict=True):
                if not was_there and any(there):  # as `adapter_to_folder` fills the place of one
                    continue
                alpha[our] = scaled
                tensors |= {f"{our}.lora_A": a.contiguous(), f"{our}.lora_B": b.contiguous()}
    return Adapter(adapter.base, alpha, tensors, adapter.metadata)


def _layout_of(adapter: Adapter, family: Family) -> list[StoredTensor]:
    """The layout of an adapter's model, as far as names go."""
    numbers = [int(n) for name in adapter.alpha for n in re.findall(r"\.(\d{1,4})\.", name)[:1]]
    sizes = {field.name: 2 for field in dataclasses.fields(family.sizes) if field.type is int}
    return family.layout(family.sizes(**sizes | {"n_layer": max(numbers, default=-1) + 1}))


def _to_folder(tensors: Mapping[str, Tensor], layout: list[StoredTensor]) -> dict[str, Tensor]:
    """Our tensors under the folder's names and as it has them."""
    result = {}
    for stored in layout:
        parts = [tensors[name] for name in stored.ours]
        joined = parts[0] if len(parts) == 1 else torch.cat(parts)
        result[stored.name] = (joined.t() if stored.transposed else joined).contiguous()
    return result


def _from_folder(
    folder: Path, found: dict[str, Tensor], family: Family, sizes: Any
) -> tuple[dict[str, Tensor], Any]:
    """A folder's tensors under our names, and its sizes: where the head is there beside the
    embedding and other than it, they are not tied, whatever config.json says.

    Raises FileError unless they are the tensors of these sizes.
    """
    found = {name: tensor for name, tensor in found.items() if not family.ignored(name)}
    if sizes.n_layer > len(found):  # before a layout of that length is made
        raise FileError(f"{folder}: {len(found)} tensors are too few for {sizes.n_layer} layers")
    layout = family.layout(sizes)
    embedding = layout[0].name
    prefix = embedding.partition(".")[0] + "."  # which some files leave out
    known = {stored.name for stored in layout}
    for name in known - found.keys():
        if (bare := name.removeprefix(prefix)) in found:
            found[name] = found.pop(bare)
    if sizes.tied_head and "lm_head.weight" in found:
        if embedding in found and _are_equal(found["lm_head.weight"], found[embedding]):
            del found["lm_head.weight"]
        else:
            sizes = dataclasses.replace(sizes, tied_head=False)
            layout = family.layout(sizes)
    expected = {stored.name: torch.empty(stored.shape, device="meta") for stored in layout}
    check_tensors(folder, found, expected, finite=False)  # which loading checks, one by one
    result = {}
    for stored in layout:
        tensor = found[stored.name]
        parts = (tensor.t() if stored.transposed else tensor).chunk(len(stored.ours))
        result |= dict(zip(stored.ours, parts, strict=True))
    if sizes.tied_head:
        result["lm_head.weight"] = result[layout[0].ours[0]]
    return result, sizes


def _are_equal(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors have the same shape, dtype and values."""
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise FileError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise FileError(f"{path} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise FileError(f"{path} holds no JSON object")
    return content


def _map_weights(folder: Path) -> dict[str, Tensor]:
    """The tensors of a folder, mapped; of one with shards those that its index names."""
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (folder / name).exists():
            return read_foreign_tensors(folder / name)[0]
        if (folder / f"{name}.index.json").exists():
            return _map_shards(folder, folder / f"{name}.index.json")
    raise FileError(f"{folder} has neither model.safetensors nor pytorch_model.bin")


def _map_shards(folder: Path, index: Path) -> dict[str, Tensor]:
    """The tensors that an index says are in files of the folder, and in no other place."""
    weight_map = _read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(f, str) for f in weight_map.values()):
        raise FileError(f"{index} has no weight_map from tensors to files")
    tensors = {}
    for name in sorted(set(weight_map.values())):
        if name != os.path.basename(name) or not name.endswith((".safetensors", ".bin")):
            raise FileError(f"{index} names {name!r}, which is no file of weights in the folder")
        if not (folder / name).is_file():
            raise FileError(f"{index} names {name!r}, which is not in the folder")
        for tensor_name, tensor in read_foreign_tensors(folder / name)[0].items():
            if weight_map.get(tensor_name) == name:
                tensors[tensor_name] = tensor
    missing = weight_map.keys() - tensors.keys()
    if missing:
        raise FileError(f"{index} names {min(missing)!r}, which its file lacks")
    return tensors


def _read_tokenizer(folder: Path) -> str:
    """The content of tokenizer.json, which is made of vocab.json and merges.txt where those are all
    that there is."""
    path = folder / "tokenizer.json"
    if path.exists():
        return json.dumps(_read_json(path), ensure_ascii=False)
    vocabulary, merges = folder / "vocab.json", folder / "merges.txt"
    if not (vocabulary.exists() and merges.exists()):
        raise FileError(f"{folder} has neither tokenizer.json nor vocab.json and merges.txt")
    try:
        from tokenizers import ByteLevelBPETokenizer
    except ImportError as error:
        raise FileError(
            f"{folder}: vocab.json needs the package tokenizers: pip install tokenizers"
        ) from error
    try:
        return ByteLevelBPETokenizer(str(vocabulary), str(merges)).to_str()
    except Exception as error:  # the package has no type of its own for it
        raise FileError(f"{folder}: vocab.json or merges.txt is damaged: {error}") from error
