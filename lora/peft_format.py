"""The adapter format of Hugging Face PEFT: a folder of adapter_config.json and a file of tensors.

Checked against PEFT 0.21. Our fingerprint of the base and our metadata travel in the header of
adapter_model.safetensors, which PEFT does not read, so that a round trip loses nothing.
"""

import json
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from files import FileError, OtherKind
from files.tensors import fingerprint, folder_within, read_foreign_tensors, safetensors_for
from files.writing import write_folder
from lora.adapters import BASE_LAYER, Adapter

CONFIG = "adapter_config.json"
SAFETENSORS = "adapter_model.safetensors"
PICKLE = "adapter_model.bin"
PREFIX = "base_model.model."
HEADER = "lora"  # our entry in the header of the safetensors file
# What programs save beside an adapter, which may have new tokens, or chats in another format.
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "chat_template.jinja",
)  # fmt: skip

# Every option of PEFT's LoraConfig is in one of three sets. First those that are honoured here:
SUPPORTED = {
    "peft_type", "r", "lora_alpha", "lora_dropout", "rank_pattern", "alpha_pattern",
    "base_model_name_or_path", "init_lora_weights", "use_rslora",
}  # fmt: skip
# Second those that change nothing that an adapter computes: origin and training. The names of the
# tensors show which modules are adapted or saved whole. Settings of initializations count only
# where init_lora_weights names one. fan_in_fan_out is about the base's matrices, not A and B.
HARMLESS = {
    "task_type", "auto_mapping", "peft_version", "revision", "inference_mode", "runtime_config",
    "target_modules", "exclude_modules", "modules_to_save", "layers_to_transform", "layers_pattern",
    "loftq_config", "eva_config", "corda_config", "lora_ga_config", "qalora_group_size",
    "megatron_core", "fan_in_fan_out",
}  # fmt: skip
# Third those that must have these values, since others compute something else. An option in none
# of the three sets belongs to a newer PEFT, and must be off.
REQUIRED: dict[str, Any] = {
    "bias": "none",
    "use_dora": False,
    "lora_bias": False,
    "ensure_weight_tying": False,
    "trainable_token_indices": None,
    "target_parameters": None,
    "layer_replication": None,
    "megatron_config": None,
    "alora_invocation_tokens": None,
    "use_qalora": False,
    "use_bdlora": None,
    "velora_config": None,
    "kasa_config": None,
    "monteclora_config": None,
    "arrow_config": None,
}
# Initializations that leave the base as it is. The others (pissa, olora, corda, loftq, lora_ga)
# train on a changed base, and their adapters are wrong on the plain one.
INITIALIZATIONS = (True, False, None, "gaussian", "orthogonal", "eva", "mica")
# What an expression of alpha_pattern may consist of, so that matching it ends. It may have up to
# MANY_WAYS repetitions and groups, which can match in several ways.
EXPRESSION = re.compile(r"\^?([\w|-]|\\[.d-]\+?|\.[*+]?|\[[\w-]+\]\+?|\((\?:)?|\)(?![*+?{]))+\$?")
MANY_WAYS = 3
LONGEST = 200  # characters of such an expression, and of a module's name that it is tried on


def is_peft_folder(path: str | os.PathLike) -> bool:
    """Whether a path is a folder with PEFT's adapter_config.json."""
    return (Path(path) / CONFIG).is_file()


def write_peft(
    folder: str | os.PathLike,
    adapter: Adapter,
    task_type: str | None = None,
    base_model: str | None = None,
    others: Mapping[str, bytes] = MappingProxyType({}),
) -> int:
    """Write an adapter as a folder that PEFT reads, and return the bytes of its files.

    `PeftModel.from_pretrained(model, folder)` puts it on a model of the same module names.
    Embeddings and other weights that were trained whole become PEFT's saved modules.

    Args:
        folder: must not exist yet, or be empty.
        adapter: as `take_adapter` or `read_adapter` give it.
        task_type: PEFT's, such as "CAUSAL_LM".
        base_model: name or path of the base, for programs that load it by that.
        others: the content of further files, by name, such as a chat template.

    Raises FileError when it cannot be written, and for what the format cannot hold. That is a
    trained tensor which stands in several modules, since PEFT adapts one of them or trains a copy;
    a parameter without the weight of its module; and a parameter of a module with adapters in it.
    An adapter does not show whether other parameters of a saved module are missing.
    """
    ranks = adapter.ranks
    alphas = {n: int(a) if float(a).is_integer() else a for n, a in adapter.alpha.items()}
    saved = sorted({name.rpartition(".")[0] for name in adapter.extras} - alphas.keys())
    for name in adapter.extras:
        module = name.rpartition(".")[0]
        if name.removesuffix(".weight") in alphas:
            continue  # a head that was replaced before it was adapted
        within = any(f".{module}." in f".{layer}." for layer in alphas)
        if not module or within or f"{module}.weight" not in adapter.tensors:
            raise FileError(f"{folder}: PEFT saves whole modules and cannot hold {name} alone")
    if tied := adapter.metadata.get("tied"):
        name, places = next(iter(tied.items()))
        raise FileError(
            f"{folder}: {name} is also {', '.join(places)}, which PEFT, adapting one place or "
            "training a copy, cannot hold"
        )
    rank, alpha = most_frequent(ranks), most_frequent(alphas)
    config = {  # no more, so that every version of PEFT knows all of it
        "peft_type": "LORA",
        "task_type": task_type,
        "base_model_name_or_path": base_model,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": dropout_of(adapter),
        "rank_pattern": {anchored(n): r for n, r in ranks.items() if r != rank},
        "alpha_pattern": {anchored(n): a for n, a in alphas.items() if a != alpha},
        "target_modules": sorted(alphas),
        "modules_to_save": saved or None,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
    }
    tensors = {PREFIX + name: t.cpu().contiguous().clone() for name, t in adapter.tensors.items()}
    tensors = {
        f"{name}.weight" if name.endswith((".lora_A", ".lora_B")) else name: tensor
        for name, tensor in tensors.items()
    }
    for layer in alphas:
        if f"{PREFIX}{layer}.weight" in tensors:
            base_name = f"{PREFIX}{layer}{BASE_LAYER}weight"
            tensors[base_name] = tensors.pop(f"{PREFIX}{layer}.weight")
    own = {
        "base": adapter.base,
        "digest": fingerprint(tensors),
        "metadata": {n: v for n, v in adapter.metadata.items() if n != "files" and fits_json(v)},
    }
    save = safetensors_for(folder).torch.save
    header = {"format": "pt", HEADER: json.dumps(own)}
    files = {
        SAFETENSORS: save(tensors, metadata=header),
        CONFIG: json.dumps(config, indent=2, sort_keys=True).encode() + b"\n",
    }
    files |= {name: text.encode() for name, text in adapter.metadata.get("files", {}).items()}
    return write_folder(folder, files | dict(others))


def read_peft(folder: str | os.PathLike) -> Adapter:
    """Read a folder that PEFT or `write_peft` wrote; lower precisions become float32, exactly.

    The names of the tensors say which layers are adapted. PEFT's own adapters do not say which
    weights they belong on, so their `base` is None. `metadata["files"]` has the text of those of
    TOKENIZER_FILES that are in the folder, by their names, if there are any.

    Raises OtherKind for a folder without a LoRA adapter, or with an option that is not supported,
    which the message names, and FileError for a damaged folder.
    """
    if not is_peft_folder(folder):
        hint = folder_within(Path(folder), f"*/{CONFIG}") or ", not a LoRA adapter"
        raise OtherKind(f"{folder} is a folder without {CONFIG}{hint}")
    config = read_config(Path(folder) / CONFIG)
    stored, own = read_tensors(Path(folder))
    files = read_tokenizer_files(Path(folder))
    tensors: dict[str, Tensor] = {}
    for key, tensor in stored.items():
        if not key.startswith(PREFIX):
            raise FileError(f"{folder}: {key} does not begin with {PREFIX}")
        name = key.removeprefix(PREFIX)
        if name.endswith((".lora_A.weight", ".lora_B.weight")):
            name = name.removesuffix(".weight")
        elif ".modules_to_save." in name or ".original_module." in name:
            continue  # of a resized vocabulary, beside the same weight under the module's own name
        elif ".lora_" in name:
            raise OtherKind(f"{folder}: {key} is no lora_A or lora_B of a linear")
        tensors[name] = tensor
    layers = sorted(n.removesuffix(".lora_A") for n in tensors if n.endswith(".lora_A"))
    if not layers:
        raise FileError(f"{folder} has no adapter of any layer")
    for name in layers:
        rank = tensors[f"{name}.lora_A"].shape[:1]
        if not config["rank_pattern"] and rank != (config["r"],):
            raise FileError(f"{folder}: {name} has rank {list(rank)}, {CONFIG} has {config['r']}")
    alpha = {}
    for name in layers:
        alpha[name] = alpha_of(name, config)
        if config["use_rslora"]:  # scaled by alpha / sqrt(rank) (Kalajdzievski 2023)
            alpha[name] *= math.sqrt(len(tensors[f"{name}.lora_A"]))
    if own is None:
        metadata = {"dropout": config["lora_dropout"]}
        if config.get("base_model_name_or_path"):
            metadata["base_checkpoint"] = str(config["base_model_name_or_path"])
        return Adapter(None, alpha, tensors, metadata | files)
    if own.get("digest") != fingerprint(stored):
        raise FileError(f"{folder} is damaged: its tensors are not those that were saved")
    metadata = own.get("metadata")
    if isinstance(metadata, dict):
        metadata |= files
    return Adapter(own.get("base"), alpha, tensors, metadata)


def read_config(path: Path) -> dict[str, Any]:
    """The options of an adapter_config.json, each checked, with defaults for those that we use.

    Raises OtherKind for another kind of adapter or an option that is not supported, and FileError
    for a damaged file.
    """
    try:
        config = json.loads(path.read_bytes())
    except OSError as error:
        raise OtherKind(f"{path} cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise FileError(f"{path} is damaged: it is not JSON") from error
    if not isinstance(config, dict) or "peft_type" not in config:
        raise OtherKind(f"{path} is no configuration of PEFT: it has no peft_type")
    if config["peft_type"] != "LORA":
        raise OtherKind(f"{path} has peft_type {shown(config['peft_type'])}, not LORA")
    for name, value in config.items():
        accepted = name in SUPPORTED | HARMLESS or value in (
            REQUIRED.get(name),
            None,
            False,
            [],
            {},
        )
        if not accepted:
            raise OtherKind(
                f"{path} uses {shown(name)[1:-1]}={shown(value)}, which is not supported"
            )
    start = config.get("init_lora_weights", True)
    if (start.lower() if isinstance(start, str) else start) not in INITIALIZATIONS:
        raise OtherKind(
            f"{path} uses init_lora_weights={shown(start)}, which changes the base's weights"
        )
    defaults = {"lora_dropout": 0.0, "rank_pattern": {}, "alpha_pattern": {}, "use_rslora": False}
    config = defaults | {name: value for name, value in config.items() if value is not None}
    for name in ("rank_pattern", "alpha_pattern"):
        if not isinstance(config[name], dict):
            raise FileError(f"{path}: {name} is {shown(config[name])}, not a table")
    if type(config["use_rslora"]) is not bool:
        raise FileError(f"{path}: use_rslora is {shown(config['use_rslora'])}, not true or false")
    for pattern in config["alpha_pattern"]:
        if not is_simple_expression(pattern):
            raise OtherKind(f"{path}: alpha_pattern {shown(pattern)} is no name or simple pattern")
    numbers = {name: config.get(name) for name in ("r", "lora_alpha", "lora_dropout")}
    for name, value in (numbers | config["alpha_pattern"]).items():
        if not is_number(value):
            raise FileError(f"{path}: {name} is {shown(value)}, not a number")
    return config


def read_tensors(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    """The tensors by PEFT's names, and our entry in the header, None where there is none.

    Tensors are in float32, or float64 where the file has that. Raises FileError for a file that is
    missing or damaged.
    """
    path = folder / SAFETENSORS
    if not path.exists() and (folder / PICKLE).exists():
        path = folder / PICKLE
    found, header = read_foreign_tensors(path)
    for name, tensor in found.items():
        if tensor.is_floating_point() and tensor.dtype != torch.float64:
            found[name] = tensor.detach().float()
    try:
        own = json.loads(header[HEADER]) if HEADER in header else None
    except (ValueError, RecursionError) as error:
        raise FileError(f"{path} is damaged: its header is not JSON") from error
    if not isinstance(own, dict | None):
        raise FileError(f"{path} is damaged: the entry {HEADER} of its header is no table")
    return found, own


def read_tokenizer_files(folder: Path) -> dict[str, dict[str, str]]:
    """The metadata `files`: the text of those of TOKENIZER_FILES that a folder has. Raises
    FileError where one cannot be read."""
    files = {}
    for path in (folder / name for name in TOKENIZER_FILES if (folder / name).is_file()):
        try:
            files[path.name] = path.read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or "it is no text in UTF-8"
            raise FileError(f"{path} cannot be read: {reason}") from error
    return {"files": files} if files else {}


def alpha_of(name: str, config: Mapping[str, Any]) -> float:
    """The alpha of a layer, by PEFT's rule: the first pattern that the end of its name matches."""
    for pattern, alpha in config["alpha_pattern"].items():
        if len(name) <= LONGEST and re.match(rf"(.*\.)?({pattern})$", name):
            return float(alpha)
    return float(config["lora_alpha"])


def is_simple_expression(pattern: str) -> bool:
    """Whether a pattern is a regular expression that matches any module's name in a short time."""
    ways = sum(map(pattern.count, "*+("))
    if len(pattern) > LONGEST or ways > MANY_WAYS or not EXPRESSION.fullmatch(pattern):
        return False
    try:
        re.compile(pattern)
    except re.error:
        return False
    return True


def anchored(name: str) -> str:
    """The pattern that matches this module alone; a plain name would match as an ending too."""
    return "^" + re.escape(name)


def most_frequent(values: Mapping[str, float]) -> Any:
    """The value that occurs most often, the first of several."""
    found = list(values.values())
    return max(found, key=found.count)


def dropout_of(adapter: Adapter) -> float:
    """The dropout that an adapter was trained with, as far as its metadata says; else 0."""
    dropout = adapter.metadata.get("dropout")
    return float(dropout) if is_number(dropout) else 0.0


def is_number(value: Any) -> bool:
    """Whether a value is a finite int or float, and no bool."""
    return type(value) in (int, float) and abs(value) < 1e30 and math.isfinite(value)


def fits_json(value: Any) -> bool:
    """Whether a value is the same after a way through JSON."""
    try:
        return json.loads(json.dumps(value)) == value
    except (TypeError, ValueError, RecursionError):
        return False


def shown(value: Any) -> str:
    """A value from a file, for an error's one line."""
    return repr(value)[:60]
