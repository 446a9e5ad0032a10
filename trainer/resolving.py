"""What the variables mean for a model: its sizes, which of it trains, rank and learning rate."""

import dataclasses
from typing import Any

from torch import nn

from files.streams import did_you_mean
from lora import sum_scaling
from models import GPT2, Family, LanguageModel
from models.checkpoint import Checkpoint, meta_model
from trainer import recipe
from trainer.loading import AdapterFiles, dtype_below, parts_of
from trainer.settings import Config, ConfigError

# The context of windows on a base, unless BLOCK_SIZE is set: models have up to 131,072, which no
# text of a few pages fills.
LONGEST_DEFAULT_BLOCK = 1024

# Sizes of a model that the environment can set, and that a base has.
SIZES = ("n_embd", "block_size", "n_head", "n_layer")


def choose_sizes(config: Config, base: Checkpoint | None) -> Any:
    """The model's sizes: those of the base, or without a base those of the configuration.

    Raises ConfigError for sizes that do not fit each other, or the base.
    """
    if base is None:
        if config.n_embd % config.n_head != 0:
            raise ConfigError(
                f"N_EMBD={config.n_embd} is not divisible by N_HEAD={config.n_head}; "
                "the heads share the width evenly"
            )
        return GPT2.sizes(vocab_size=256, **{name: getattr(config, name) for name in SIZES})
    for name in SIZES:
        wanted, found = getattr(config, name), getattr(base.sizes, name)
        shorter = name == "block_size" and wanted < found
        if name.upper() in config.explicit and wanted != found and not shorter:
            raise ConfigError(
                f"{name.upper()}={wanted} does not fit the base {base.path}, whose {name} is "
                f"{found}; unset {name.upper()} to take the base's"
            )
    return base.sizes


def is_published(base: Checkpoint | None) -> bool:
    """Whether a base has a tokenizer: then it is a published model, or was trained from one."""
    return base is not None and base.tokenizer is not None


def resolve(
    asked: Config, family: Family, sizes: Any, adapters: AdapterFiles, base: Checkpoint | None
) -> tuple[Config, list[str] | None]:
    """Decide what unset variables mean for this model and these adapters.

    The sizes become the model's, except that `block_size` is the length of windows. On a
    published `base` the head is not adapted, and the embeddings are frozen: those of Llama 3.2 1B
    are 263 million numbers. ADAPTERS decide rank and alpha. Where ADAPTERS are trained further,
    they also decide which linears are adapted, and whether the embeddings train. MERGE takes
    the base in NF4 where they all were trained on it.

    Returns the configuration without unset variables, and the linears to adapt, None for all.

    Raises ConfigError for LORA_TARGETS that the model does not have, and for ADAPTERS that hold
    more than the variables let train.
    """
    has_base, published = base is not None, is_published(base)
    values = {name: getattr(sizes, name) for name in SIZES}
    if "BLOCK_SIZE" in asked.explicit:
        values["block_size"] = asked.block_size
    elif published:
        values["block_size"] = min(sizes.block_size, LONGEST_DEFAULT_BLOCK)
    targets, train_embeddings = None, asked.train_embeddings
    if train_embeddings is None:
        train_embeddings = not published
    if asked.trains and asked.use_lora:
        if asked.lora_targets is not None:
            targets = lora_targets(asked.lora_targets, family.model.linears)
        elif published:
            targets = [name for name in family.model.linears if name != "lm_head"]
        if adapters:
            targets, train_embeddings = parts_to_train(asked, targets, adapters)
    elif adapters:
        targets, train_embeddings = parts_of(adapters)
    if asked.use_lora or adapters:
        values["train_embeddings"] = train_embeddings
        values["lora_targets"] = describe_targets(targets, meta_model(family, sizes))
    else:  # every parameter trains
        values |= {"train_embeddings": True, "lora_targets": asked.lora_targets or "all"}
    if asked.merge and "BASE_DTYPE" not in asked.explicit:
        below = {dtype_below(adapter) for _, adapter, _ in adapters}
        values["base_dtype"] = "nf4" if below == {"nf4"} else "auto"
    if adapters:
        rank = asked.lora_rank if "LORA_RANK" in asked.explicit else None
        rank, alpha = sum_scaling([(adapter, weight) for _, adapter, weight in adapters], rank)
        values |= {"use_lora": True, "lora_rank": rank, "lora_alpha": alpha}
    config = dataclasses.replace(asked, **values)
    if config.learning_rate is None:
        rate = recipe.learning_rate(config, sizes.n_embd, has_base)
        config = dataclasses.replace(config, learning_rate=rate)
    if (config.min_learning_rate or 0.0) > config.learning_rate:
        raise ConfigError(
            f"MIN_LEARNING_RATE={config.min_learning_rate} is above "
            f"LEARNING_RATE={config.learning_rate}"
        )
    return config, targets


def lora_targets(text: str, linears: tuple[str, ...]) -> list[str] | None:
    """The linears that LORA_TARGETS=`text` names, as in `query,value`; None for `all`.

    Raises ConfigError for a name that is not in the model's `linears`.
    """
    if text.strip().lower() == "all":
        return None
    targets = [part.strip() for part in text.split(",")]
    for target in targets:
        if target not in linears:
            raise ConfigError(
                f"LORA_TARGETS={text!r}: {target!r} is no layer of the model"
                f"{did_you_mean(target, linears)}; accepted: all, or some of {','.join(linears)}"
            )
    return list(dict.fromkeys(targets))


def parts_to_train(
    asked: Config, targets: list[str] | None, adapters: AdapterFiles
) -> tuple[list[str] | None, bool]:
    """The linears to adapt and whether the embeddings train, where ADAPTERS are trained further.

    The variables decide, and where they are not set the adapters do. `targets` are the linears of
    LORA_TARGETS, None for all. Raises ConfigError for adapters with more than the variables say.
    """
    layers, hold_embeddings = parts_of(adapters)
    if asked.lora_targets is None:
        targets = layers
    for name in layers if targets is not None else ():
        if name not in targets and name.rpartition(".")[2] not in targets:
            raise ConfigError(
                f"LORA_TARGETS={asked.lora_targets} lacks {name}, which has an adapter in "
                f"ADAPTERS={asked.adapters}"
            )
    if asked.train_embeddings is None:
        return targets, hold_embeddings
    if hold_embeddings and not asked.train_embeddings:
        raise ConfigError(
            f"TRAIN_EMBEDDINGS=False, but ADAPTERS={asked.adapters} hold trained embeddings"
        )
    return targets, asked.train_embeddings


def describe_targets(targets: list[str] | None, model: LanguageModel) -> str:
    """A value of LORA_TARGETS for the linears of `model` that `targets` name; None names all."""
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    adapted = [
        name
        for name in names
        if targets is None or name in targets or name.rpartition(".")[2] in targets
    ]
    kinds = [kind for kind in model.linears if any(name.endswith(kind) for name in adapted)]
    frozen = {name.rpartition(".")[2] for name in names if name not in adapted}
    if frozen & set(kinds):  # as with an adapter of PEFT's that is on some blocks only
        return ",".join(adapted)
    return "all" if len(kinds) == len(model.linears) else ",".join(kinds)
