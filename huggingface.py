"""GPT-2 in the folders of Hugging Face: published weights as a base, and ours for `transformers`.

A folder has config.json, the weights as model.safetensors or pytorch_model.bin, and the tokenizer's
files. GPT-2 keeps query, key and value in one matrix, `c_attn`, and all matrices as (in, out).
"""

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from checkpoint import SHAPE, Checkpoint, read_checkpoint
from lora import Adapter
from lora.files import (
    FileError,
    check_tensors,
    read_foreign_tensors,
    safetensors_for,
    write_folder,
)

SIZES = dict(zip(SHAPE, ("vocab_size", "n_embd", "n_positions", "n_head", "n_layer"), strict=True))
GELUS = {"gelu_new": "tanh", "gelu_pytorch_tanh": "tanh", "gelu": "exact"}
# Options that change what the model computes, with GPT-2's defaults, which are all that we have.
FIXED = {
    "layer_norm_epsilon": 1e-5,
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "add_cross_attention": False,
}


def read_base(path: str | os.PathLike) -> Checkpoint:
    """Read a checkpoint, or a folder with GPT-2 weights as one. Raises FileError for neither."""
    return read_gpt2(Path(path)) if os.path.isdir(path) else read_checkpoint(path)


def read_gpt2(folder: Path) -> Checkpoint:
    """Read a folder as `GPT2LMHeadModel.save_pretrained` writes it, or as GPT-2 is published.

    Raises FileError for a missing or damaged file, for another kind of model, and for an option
    that our model does not have.
    """
    config = _read_json(folder / "config.json")
    kind = config.get("model_type")
    if kind != "gpt2":
        raise FileError(f"{folder}: model_type is {kind!r}; only 'gpt2' can be a base")
    sizes = {ours: config.get(theirs) for ours, theirs in SIZES.items()}
    for name, size in sizes.items():
        if type(size) is not int or size < 1:
            raise FileError(f"{folder}/config.json: {SIZES[name]} is {size!r}, not a size")
    gelu = config.get("activation_function", "gelu_new")
    if not isinstance(gelu, str) or gelu not in GELUS:
        raise FileError(
            f"{folder}: activation_function {gelu!r} is not supported, only {', '.join(GELUS)}"
        )
    n_embd = sizes["n_embd"]
    wanted = FIXED | {"n_inner": config.get("n_inner") and 4 * n_embd}
    for name, value in wanted.items():
        if config.get(name, value) != value:
            raise FileError(f"{folder}: {name}={config[name]} is not supported, only {value}")
    if n_embd % sizes["n_head"] != 0:
        raise FileError(f"{folder}/config.json: n_embd is not a multiple of n_head")
    shape = sizes | {"gelu": GELUS[gelu]}
    shape["tied_head"] = config.get("tie_word_embeddings", True) is True
    tensors = _from_gpt2(folder, _read_weights(folder), shape)
    return Checkpoint(str(folder), shape, tensors, {}, _read_tokenizer(folder))


def write_gpt2(folder: str | os.PathLike, checkpoint: Checkpoint) -> int:
    """Write a checkpoint as a folder that `GPT2LMHeadModel.from_pretrained` reads; returns its
    bytes.

    Raises FileError for a checkpoint that lacks a tensor, when something is there already, or when
    it cannot be written.
    """
    shape = checkpoint.shape
    missing = {n for entry in _layout(shape) for n in entry.ours} - checkpoint.tensors.keys()
    if missing:
        raise FileError(f"{checkpoint.path} lacks tensor {min(missing)}")
    config: dict[str, Any] = {theirs: shape[ours] for ours, theirs in SIZES.items()} | FIXED
    config |= {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "dtype": "float32"}
    names = {ours: theirs for theirs, ours in reversed(GELUS.items())}
    config |= {"activation_function": names[shape["gelu"]], "bos_token_id": None}
    config |= {"tie_word_embeddings": shape["tied_head"], "eos_token_id": None}
    files = {"config.json": config}
    if checkpoint.tokenizer is not None:
        files["tokenizer.json"] = json.loads(checkpoint.tokenizer)
        files["tokenizer_config.json"] = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": shape["block_size"],
        }
        for token in files["tokenizer.json"].get("added_tokens", []):
            if token.get("content") == "<|endoftext|>":  # GPT-2's only special token
                files["tokenizer_config.json"]["eos_token"] = token["content"]
                config |= {"bos_token_id": token["id"], "eos_token_id": token["id"]}

    texts = {n: json.dumps(content, indent=2, ensure_ascii=False) for n, content in files.items()}
    content = {name: text.encode() for name, text in texts.items()}
    tensors = _to_gpt2(checkpoint.tensors, shape)
    save = safetensors_for(folder).torch.save
    content["model.safetensors"] = save(tensors, metadata={"format": "pt"})
    return write_folder(folder, content)


def adapter_to_gpt2(adapter: Adapter) -> Adapter:
    """The adapter of a model of ours, for the GPT-2 that `write_gpt2` makes of its base.

    Exact: the adapters of query, key and value, which GPT-2 has as one matrix, become one whose A
    is theirs one below the other and whose B is block-diagonal, of their ranks' sum. Where there
    are not all three, the others' A and B are zero.

    Raises FileError where these three are scaled differently, and for an adapter of other layers.
    """
    alpha, tensors = {}, {}
    entries = [e for e in _layout_of(adapter) if e.name.endswith(".weight")]
    foreign = adapter.alpha.keys() - {our for entry in entries for our in entry.our_modules}
    if foreign:
        raise FileError(f"{min(foreign)} is no layer of GPT-2's: python -m lora export keeps names")
    for entry in entries:
        name, ours = entry.module, entry.our_modules
        if entry.ours[0] in adapter.tensors:
            tensors[entry.name] = adapter.tensors[entry.ours[0]]
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


def adapter_from_gpt2(adapter: Adapter) -> Adapter:
    """The inverse; an adapter of another model is returned as it is.

    Exact for those that were trained on GPT-2's matrix as well, where query, key and value each
    take the whole of A. Raises FileError for a matrix of theirs that is not of three parts.
    """
    if not any(name.startswith("transformer.") for name in adapter.alpha):
        return adapter
    alpha, tensors = dict(adapter.alpha), dict(adapter.tensors)
    for entry in _layout_of(adapter):
        name, ours, n = entry.module, entry.our_modules, len(entry.ours)
        if entry.name in tensors:
            tensors[entry.ours[0]] = tensors.pop(entry.name)
        if entry.name.endswith(".weight") and name in alpha:
            A, B = tensors.pop(f"{name}.lora_A"), tensors.pop(f"{name}.lora_B")
            scaled = alpha.pop(name)
            if len(B) % n:
                raise FileError(f"{name}.lora_B has {len(B)} rows, which are not {n} equal parts")
            parts = [(A, b) for b in B.chunk(n)]
            blocks = [b.chunk(n, dim=1) for b in B.chunk(n)] if len(A) % n == 0 else []
            if blocks and torch.equal(torch.block_diag(*(b[i] for i, b in enumerate(blocks))), B):
                parts = [(a, b[i]) for i, (a, b) in enumerate(zip(A.chunk(n), blocks, strict=True))]
                scaled /= n
            for our, (a, b) in zip(ours, parts, strict=True):
                if not a.any():  # there was none
                    continue
                alpha[our] = scaled
                tensors |= {f"{our}.lora_A": a.contiguous(), f"{our}.lora_B": b.contiguous()}
    return Adapter(adapter.base, alpha, tensors, adapter.metadata)


class Entry(NamedTuple):
    """A tensor of GPT-2 and those of ours that it holds, side by side."""

    name: str
    ours: list[str]
    shape: tuple[int, ...]
    transposed: bool = False

    @property
    def module(self) -> str:
        return self.name.rpartition(".")[0]

    @property
    def our_modules(self) -> list[str]:
        return [name.rpartition(".")[0] for name in self.ours]


def _layout(shape: Mapping[str, Any]) -> list[Entry]:
    """All tensors of a GPT-2 of this shape."""
    C, V, head = shape["n_embd"], shape["vocab_size"], "lm_head.weight"
    entries = [
        Entry("transformer.wte.weight", ["token_embedding_table.weight"], (V, C)),
        Entry(
            "transformer.wpe.weight", ["position_embedding_table.weight"], (shape["block_size"], C)
        ),
        *_pair("transformer.ln_f", ["ln_f"], (C,)),
    ]
    for i in range(shape["n_layer"]):
        h, block = f"transformer.h.{i}", f"blocks.{i}"
        q_k_v = [f"{block}.attn.{name}" for name in ("query", "key", "value")]
        entries += _pair(f"{h}.ln_1", [f"{block}.ln_1"], (C,))
        entries += _pair(f"{h}.attn.c_attn", q_k_v, (C, 3 * C))
        entries += _pair(f"{h}.attn.c_proj", [f"{block}.attn.proj"], (C, C))
        entries += _pair(f"{h}.ln_2", [f"{block}.ln_2"], (C,))
        entries += _pair(f"{h}.mlp.c_fc", [f"{block}.mlp.fc_in"], (C, 4 * C))
        entries += _pair(f"{h}.mlp.c_proj", [f"{block}.mlp.fc_out"], (4 * C, C))
    return entries if shape["tied_head"] else [*entries, Entry(head, [head], (V, C))]


def _layout_of(adapter: Adapter) -> list[Entry]:
    """The layout of an adapter's model, as far as names go."""
    numbers = [int(n) for name in adapter.alpha for n in re.findall(r"\.(\d{1,4})\.", name)[:1]]
    sizes = dict.fromkeys(SHAPE, 0) | {"n_layer": max(numbers, default=-1) + 1}
    return _layout(sizes | {"tied_head": False})


def _pair(name: str, ours: list[str], shape: tuple[int, ...]) -> list[Entry]:
    """Weight and bias of a module."""
    return [
        Entry(f"{name}.weight", [f"{o}.weight" for o in ours], shape, transposed=len(shape) == 2),
        Entry(f"{name}.bias", [f"{o}.bias" for o in ours], shape[-1:]),
    ]


def _to_gpt2(tensors: Mapping[str, Tensor], shape: Mapping[str, Any]) -> dict[str, Tensor]:
    """Our tensors under GPT-2's names and in its layout."""
    result = {}
    for entry in _layout(shape):
        joined = torch.cat([tensors[name] for name in entry.ours])
        result[entry.name] = joined.t().contiguous() if entry.transposed else joined
    return result


def _from_gpt2(
    folder: Path, found: dict[str, Tensor], shape: Mapping[str, Any]
) -> dict[str, Tensor]:
    """The inverse. Raises FileError unless the tensors are those of a GPT-2 of this shape."""
    # As published, names have no prefix, and there are the causal masks of attention.
    found = {
        name if name.startswith(("transformer.", "lm_head.")) else f"transformer.{name}": tensor
        for name, tensor in found.items()
        if not name.endswith((".attn.bias", ".attn.masked_bias"))
    }
    if shape["tied_head"]:
        found.pop("lm_head.weight", None)
    if shape["n_layer"] > len(found):  # before a layout of that length is made
        raise FileError(
            f"{folder}: {len(found)} tensors are too few for n_layer={shape['n_layer']}"
        )
    layout = _layout(shape)
    expected = {entry.name: torch.empty(entry.shape, device="meta") for entry in layout}
    check_tensors(folder, found, expected)
    result = {}
    for entry in layout:
        tensor = found[entry.name].float()
        parts = (tensor.t() if entry.transposed else tensor).chunk(len(entry.ours))
        result |= {name: p.contiguous() for name, p in zip(entry.ours, parts, strict=True)}
    if shape["tied_head"]:
        result["lm_head.weight"] = result["token_embedding_table.weight"]
    return result


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


def _read_weights(folder: Path) -> dict[str, Tensor]:
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (folder / name).exists():
            return read_foreign_tensors(folder / name)[0]
    raise FileError(f"{folder} has neither model.safetensors nor pytorch_model.bin")


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
