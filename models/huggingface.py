"""Models in the folders of Hugging Face: published weights as a base, and ours for `transformers`.

A folder has config.json, the weights as model.safetensors or pytorch_model.bin, whole or in shards,
and the tokenizer's files. A family's own file says which tensors its folders hold, under which
names.
"""

import dataclasses
import functools
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from files import FileError
from files.tensors import (
    check_tensors,
    folder_within,
    read_foreign_tensors,
    refuse_pointer,
    safetensors_for,
)
from files.writing import write_folder
from lora import Adapter
from models import FAMILIES, Family
from models.byte_tokenizer import byte_tokenizer, is_of_bytes
from models.checkpoint import Checkpoint, read_checkpoint
from models.language_model import StoredTensor

# Files beside the weights that a checkpoint keeps, for the folder that export.py makes of it.
KEPT = (
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
    "tokenizer.model", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja",
    "vocab.json", "merges.txt",
)  # fmt: skip
GPT2_END = "<|endoftext|>"  # special, though no file of such a tokenizer says so
SHARD_BYTES = 5 * 10**9  # at most, of a file of weights that is written, as in transformers

MODEL_TYPES = {name: family for family in FAMILIES.values() for name in family.model_types}


def read_base(path: str | os.PathLike) -> Checkpoint:
    """Read a checkpoint, or a Hugging Face folder as one. Raises FileError for neither."""
    if os.path.isdir(path):
        return read_model(Path(path))
    folder = Path(path).parent
    if Path(path).suffix != ".pt" and os.path.isfile(path) and (folder / "config.json").exists():
        raise FileError(f"{path} is a file of a Hugging Face folder: name the folder {folder}")
    return read_checkpoint(path)


def read_model(folder: Path) -> Checkpoint:
    """Read a folder as `save_pretrained` writes it, or as models are published.

    Raises FileError for a missing or damaged file, for a model whose family is not supported, and
    for an option that our model does not have.
    """
    family, sizes = _read_config(folder)
    tensors, sizes = _from_folder(folder, _map_weights(folder), family, sizes)
    files = {name: (folder / name).read_bytes() for name in KEPT if (folder / name).is_file()}
    tokenizer: str | None = _read_tokenizer(folder)
    if is_of_bytes(json.loads(tokenizer)):
        tokenizer = None
    return Checkpoint(str(folder), family, sizes, tensors, {}, tokenizer, files)


def read_shape(folder: Path) -> Checkpoint:
    """What config.json says of a folder's model, without its tensors and with an empty tokenizer.

    Raises FileError as `read_model` does for that file.
    """
    family, sizes = _read_config(folder)
    files = {"config.json": (folder / "config.json").read_bytes()}
    return Checkpoint(str(folder), family, sizes, {}, {}, "", files)


def _read_config(folder: Path) -> tuple[Family, Any]:
    """The family and the sizes that a folder's config.json states."""
    if not (folder / "config.json").exists():
        raise FileError(f"{folder} is no Hugging Face folder of a model: {_what_is_there(folder)}")
    config = _read_json(folder / "config.json")
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in MODEL_TYPES:
        known = ", ".join(MODEL_TYPES)
        raise FileError(f"{folder}: model_type {kind!r} is not supported; supported are {known}")
    family = MODEL_TYPES[kind]
    try:
        return family, family.read_config(config)
    except ValueError as error:
        raise FileError(f"{folder}/config.json: {error}") from error


def _what_is_there(folder: Path) -> str:
    """What a folder without config.json has, or may be meant."""
    if (folder / "adapter_config.json").exists():
        return "it holds an adapter of PEFT's, which belongs in ADAPTERS"
    hint = folder_within(folder, "*/config.json", "snapshots/*/config.json")
    return f"config.json cannot be read: No such file or directory{hint}"


def write_model(
    folder: str | os.PathLike,
    checkpoint: Checkpoint,
    ends: Sequence[int] = (),
    others: Mapping[str, bytes] = MappingProxyType({}),
) -> int:
    """Write a checkpoint as a folder that `AutoModelForCausalLM.from_pretrained` reads; returns its
    bytes.

    What the base's own folder had beside its weights is written as it was, with three exceptions.
    config.json states the dtype of the weights, the size of the vocabulary, and whether the head is
    tied. The tokens `ends`, at which a text or a turn ends, are added where `transformers` would
    not stop at all of them. And `others` are further files, by name, such as a chat template. A
    model whose tokens are bytes gets a tokenizer that says so.

    Raises FileError for a checkpoint that lacks a tensor or has numbers that are not finite, for a
    folder that is there already, and when it cannot be written.
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
    stated = family.read_config(config)
    new = (dtype, sizes.tied_head, sizes.vocab_size)
    if new != (config.get(key, "float32"), stated.tied_head, stated.vocab_size):
        config |= {key: dtype, "tie_word_embeddings": sizes.tied_head}
        config["vocab_size"] = sizes.vocab_size
        files["config.json"] = _json_bytes(config)
    files |= _stated_ends(files, ends, checkpoint.tokenizer or files.get("tokenizer.json"))
    return write_folder(folder, files | dict(others) | _weight_files(folder, checkpoint, layout))


def _new_files(checkpoint: Checkpoint) -> dict[str, dict[str, Any]]:
    """The content of new files beside the weights, for a model that did not begin as a folder.

    Raises FileError for a family whose models all begin as folders.
    """
    sizes = checkpoint.sizes
    if checkpoint.family.write_config is None:
        raise FileError(f"{checkpoint.path} lacks config.json of the folder that it began as")
    config = checkpoint.family.write_config(sizes)
    config |= {"dtype": "float32", "bos_token_id": None, "eos_token_id": None}
    files = {"config.json": config}
    tokenizer = None
    if checkpoint.tokenizer is not None:
        tokenizer = json.loads(checkpoint.tokenizer)
    elif sizes.vocab_size == 256:
        tokenizer = byte_tokenizer()
    if tokenizer is not None:
        files["tokenizer.json"] = tokenizer
        files["tokenizer_config.json"] = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": sizes.block_size,
        }
    return files


def _stated_ends(
    files: Mapping[str, Any], ends: Sequence[int], tokenizer: str | bytes | None
) -> dict[str, bytes]:
    """The files of a folder to change so that `transformers` stops at all `ends`.

    The first of the ends becomes the tokenizer's own where that states none.
    """
    if not ends or tokenizer is None:
        return {}
    changed = {}
    # Where generation_config.json is there, it decides.
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
    """The files of weights, in shards where they are large; each is made when it is written."""
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
            check_tensors(checkpoint.path, tensors, tensors)  # that their numbers are finite
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
    """The family of an adapter's model: the one that its metadata names, or else the first with its
    layers, under our names or the folder's.

    Raises FileError where no family has its layers.
    """
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

    It is exact. A folder may have several linears as one matrix, such as GPT-2's query, key and
    value. Their adapters become one: its A is theirs one below the other, its B is block-diagonal,
    and its rank is the sum of theirs. A linear without an adapter counts as one of zeros. An
    adapter that has the folder's names already is returned as it is.

    Raises FileError where such linears are scaled differently, and for an adapter of other layers.
    """
    alpha, tensors = {}, {}
    weights = [stored for stored in _layout_of(adapter, family) if stored.name.endswith(".weight")]
    theirs = {stored.module for stored in weights}
    named = adapter.tensors.keys() - adapter.base_weights
    if {name.rpartition(".")[0] for name in named} <= theirs:
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
    """An adapter of a folder's model, under the names of our model.

    It is exact. Where a folder's matrix is several of our linears, each of them takes its rows of B
    and all of A, or its block where B is block-diagonal. An adapter that has our names already is
    returned as it is.

    Raises FileError for a B whose rows are not equal parts.
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
                if not was_there and any(there):  # the zeros that `adapter_to_folder` put there
                    continue
                alpha[our] = scaled
                tensors |= {f"{our}.lora_A": a.contiguous(), f"{our}.lora_B": b.contiguous()}
    return Adapter(adapter.base, alpha, tensors, adapter.metadata)


def _layout_of(adapter: Adapter, family: Family) -> list[StoredTensor]:
    """The layout of a model with an adapter's layers: its names are right, its shapes are not."""
    numbers = [int(n) for name in adapter.alpha for n in re.findall(r"\.(\d{1,4})\.", name)[:1]]
    sizes = {field.name: 2 for field in dataclasses.fields(family.sizes) if field.type is int}
    return family.layout(family.sizes(**sizes | {"n_layer": max(numbers, default=-1) + 1}))


def _to_folder(tensors: Mapping[str, Tensor], layout: list[StoredTensor]) -> dict[str, Tensor]:
    """Our tensors under the folder's names, joined and transposed as the folder has them."""
    result = {}
    for stored in layout:
        parts = [tensors[name] for name in stored.ours]
        joined = parts[0] if len(parts) == 1 else torch.cat(parts)
        result[stored.name] = (joined.t() if stored.transposed else joined).contiguous()
    return result


def _from_folder(
    folder: Path, found: dict[str, Tensor], family: Family, sizes: Any
) -> tuple[dict[str, Tensor], Any]:
    """A folder's tensors under our names, and its sizes.

    The sizes are those of config.json, except that `tied_head` is False where the folder has a head
    that differs from the embedding. Raises FileError unless the tensors are those of the sizes.
    """
    found = {name: tensor for name, tensor in found.items() if not family.ignored(name)}
    if sizes.n_layer > len(found):  # before a layout of that length is made
        raise FileError(f"{folder}: {len(found)} tensors are too few for {sizes.n_layer} layers")
    layout = family.layout(sizes)
    embedding = layout[0].name
    prefix = embedding.partition(".")[0] + "."  # some files leave it out
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
    check_tensors(folder, found, expected, finite=False)  # loading checks the numbers
    dtypes = {tensor.dtype for tensor in found.values()}
    if torch.float64 in dtypes and len(dtypes) > 1:  # torch multiplies no two of them
        raise FileError(f"{folder} has weights in float64 beside others, accepted are all or none")
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
    """The object in a file of JSON. Raises FileError for a file that has none."""
    try:
        if path.exists() and not path.is_file():  # opening a pipe would wait for ever
            raise FileError(f"{path} cannot be read: it is no regular file")
        refuse_pointer(path)
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise FileError(f"{path} cannot be read: {error.strerror}") from error
    except FileError:  # a ValueError too
        raise
    except (ValueError, RecursionError) as error:
        raise FileError(f"{path} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise FileError(f"{path} holds no JSON object")
    return content


def _map_weights(folder: Path) -> dict[str, Tensor]:
    """The tensors of a folder, mapped from one file of weights or from the shards of its index.

    Raises FileError where a file is missing or damaged.
    """
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (folder / name).exists():
            return read_foreign_tensors(folder / name)[0]
        if (folder / f"{name}.index.json").exists():
            return _map_shards(folder, folder / f"{name}.index.json")
    raise FileError(f"{folder} has neither model.safetensors nor pytorch_model.bin")


def _map_shards(folder: Path, index: Path) -> dict[str, Tensor]:
    """The tensors that an index names, from files in the folder itself.

    Raises FileError for an index that is damaged, or names a file or tensor that is not there.
    """
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
    """The content of tokenizer.json, or one made of vocab.json and merges.txt where it is missing.

    Raises FileError where all of them are missing, damaged, or need a package that is not there.
    """
    path = folder / "tokenizer.json"
    if path.exists():
        return json.dumps(_read_json(path), ensure_ascii=False)
    vocabulary, merges = folder / "vocab.json", folder / "merges.txt"
    if not (vocabulary.exists() and merges.exists()):
        hint = "; transformers makes one of tokenizer.model, by AutoTokenizer and save_pretrained"
        raise FileError(
            f"{folder} has neither tokenizer.json nor vocab.json and merges.txt"
            + (hint if (folder / "tokenizer.model").exists() else "")
        )
    try:
        from tokenizers import ByteLevelBPETokenizer
    except ImportError as error:
        raise FileError(
            f"{folder}: vocab.json needs the package tokenizers: pip install tokenizers"
        ) from error
    try:
        made = ByteLevelBPETokenizer(str(vocabulary), str(merges))
        if made.token_to_id(GPT2_END) is not None:
            made.add_special_tokens([GPT2_END])
        return made.to_str()
    except Exception as error:  # the package has no type of its own for it
        raise FileError(f"{folder}: vocab.json or merges.txt is damaged: {error}") from error
