"""Setting up a run: a plan before a weight is read, then what the run works with."""

import contextlib
import dataclasses
import os
import tempfile
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import nn

import hardware
from data import Corpus, DataError, chat_format, open_corpus, preview_lines
from files.tensors import fingerprint
from files.writing import lock_folder
from hardware import processes
from lora import Adapter, lora_layers, store_base, take_adapter
from models import GPT2, Family, LanguageModel
from models.checkpoint import Checkpoint
from models.huggingface import read_shape
from trainer import recipe
from trainer.loading import (
    AdapterFiles,
    LoraOptions,
    base_fingerprint,
    build_model,
    metadata_of_asking,
    put_on_adapters,
    read_adapters,
    read_checked_base,
)
from trainer.own_head import HEAD, fit_base
from trainer.resolving import choose_sizes, resolve
from trainer.settings import Config, ConfigError, WeightedAdapters, option_fields

DEFAULT_INPUT = Path(__file__).resolve().parent.parent / "data" / "input.txt"

# Settings whose defaults follow from others, from the base and from the data.
FOLLOWING = ("optimizer", "learning_rate", "max_steps", "eval_interval", "patience", "dropout")
FOLLOWING += ("weight_decay",)

# What may differ between the processes of a run: where its files are, and how each one computes.
MAY_DIFFER = ("data", "out_dir", "base_checkpoint", "adapters", "num_threads", "progress")


@dataclass(frozen=True)
class OutputFiles:
    """Where a run writes.

    `last` and `best` have the weights, or under LoRA the adapter, of these evaluations. `resume`
    has the training state, `metrics` the log for programs, `merged` the checkpoint of MERGE.
    """

    last: Path
    best: Path
    resume: Path
    metrics: Path
    merged: Path


@dataclass(frozen=True)
class Run:
    """What a run works with."""

    config: Config
    device: torch.device
    dtype: torch.dtype
    corpus: Corpus | None  # None for MERGE
    base: Checkpoint | None  # without its tensors; None for random weights
    base_id: str  # fingerprint of the weights that the run starts from
    adapters: AdapterFiles
    adapter_metadata: dict[str, Any]  # of ADAPTERS, as far as they agree
    own_head: torch.Tensor | None  # (V, C), of ADAPTERS that have one, which the base has not
    model: LanguageModel
    old: tuple[Corpus, Adapter] | None  # for OLD_DATA: that data, and the base without adapters
    files: OutputFiles
    lock: BinaryIO | None  # open while the run has the output folder for itself

    @property
    def tokenizer(self) -> str | None:
        """The content of the base's tokenizer.json; None where tokens are bytes."""
        return self.base.tokenizer if self.base is not None else None

    @property
    def base_path(self) -> str | None:
        """Where the base is; None for random weights."""
        return self.base.path if self.base is not None else None

    def autocast(self) -> AbstractContextManager:
        """A context in which matrix products are of the run's dtype."""
        if self.dtype == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, self.dtype)


@dataclass(frozen=True)
class Plan:
    """What is known of a run before a weight is read.

    `asked` is what the environment says, `config` what it means for this base and these adapters.
    """

    asked: Config
    config: Config
    device: torch.device
    device_reason: str
    dtype: torch.dtype
    dtype_reason: str
    files: OutputFiles
    base: Checkpoint | None  # None for random weights
    family: Family
    sizes: Any
    adapters: AdapterFiles
    lora: LoraOptions | None  # None where every parameter trains

    @property
    def batch_size(self) -> int:
        """Sequences of a batch in this process."""
        return self.config.batch_size // processes.world_size()


def plan_run(asked: Config) -> Plan:
    """Choose device and dtype, and find out what the variables mean for the base and the adapters.

    `asked` is what the environment says. Raises ConfigError or FileError for input that cannot be
    used or does not fit together. Raises DeviceError for a device that is not there, and GroupError
    for processes that cannot work together.
    """
    hardware.keep_freed_memory()
    if asked.eval_only and asked.use_lora and asked.adapters is None:
        asked = with_own_adapter(asked)
    device, device_reason = join_processes(asked)
    dtype, dtype_reason = hardware.choose_dtype(asked.dtype, device)
    files = output_files(asked)
    base, family, sizes, adapters = start_from(asked, find_base(asked, files))
    if base is None and asked.base_dtype != "auto":
        raise ConfigError(
            f"BASE_DTYPE={asked.base_dtype} needs a base, and there is no {files.last.parent}/"
            "full.pt: set BASE_CHECKPOINT to the model's checkpoint or folder"
        )
    config, targets = resolve(asked, family, sizes, adapters, base)
    lora = None
    if config.use_lora:
        lora = LoraOptions(
            rank=config.lora_rank,
            alpha=config.lora_alpha,
            dropout=config.lora_dropout,
            targets=targets,
            train_embeddings=config.train_embeddings,
        )
    return Plan(
        asked=asked, config=config, device=device, device_reason=device_reason, dtype=dtype,
        dtype_reason=dtype_reason, files=files, base=base, family=family, sizes=sizes,
        adapters=adapters, lora=lora,
    )  # fmt: skip


def set_up(plan: Plan) -> Run:
    """Open the data, and build the model on its base and adapters.

    Raises DataError, FileError or ConfigError for input that cannot be used or does not fit
    together, and GroupError for processes that do not agree.
    """
    asked, config, device, base = plan.asked, plan.config, plan.device, plan.base
    torch.manual_seed(asked.seed)
    lock = None
    if asked.trains and processes.is_main_process():
        lock = lock_folder(asked.output_folder)
    corpus = None if config.merge else open_data(config, base, plan.adapters)
    hardware.return_freed_memory()  # a step would not find room in all of it
    if corpus is not None:
        config = recipe.for_data(config, corpus, base is not None)
        check_checkpointing(config, device)  # with the dropout that this has chosen
    place = "cpu" if config.fsdp else device  # a GPU may have no room for more than a shard
    model = build_model(
        plan.family,
        plan.sizes,
        base,
        place,
        config.dropout or 0.0,
        plan.lora,
        base_dtype=config.base_dtype,
        trains=config.trains,
    )
    model.grad_checkpoint = config.grad_checkpoint
    base_id, metadata, old = base_fingerprint(base, model), {}, None
    own_head = None
    if config.old_data is not None:
        old_config = dataclasses.replace(config, data=config.old_data)
        try:
            old = open_data(old_config, base, plan.adapters), take_adapter(model, base_id)
        except DataError as error:  # which names DATA
            raise ConfigError(f"OLD_DATA: {error}") from error
    if plan.adapters:
        rank = asked.lora_rank if "LORA_RANK" in asked.explicit else None
        metadata = put_on_adapters(model, base_id, plan.adapters, rank, config.any_base)
        check_scaling(asked, model)
        if "own_head" in metadata:
            own_head = base.tensors[HEAD]  # the model may have it rounded, or a part of it
    if plan.dtype != torch.float32 and not config.merge:
        store_base(model, plan.dtype, plan.batch_size * config.block_size)
    base = None if base is None else dataclasses.replace(base, tensors={})
    run = Run(
        config=config, device=device, dtype=plan.dtype, corpus=corpus, base=base, base_id=base_id,
        adapters=plan.adapters, adapter_metadata=metadata, own_head=own_head, model=model, old=old,
        files=plan.files, lock=lock,
    )  # fmt: skip
    if processes.world_size() > 1:
        trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
        processes.check_agreement(
            {n: v for n, v in identity(run).items() if n not in MAY_DIFFER}
            | {"trained weights": fingerprint(trained)}
        )
        if config.fsdp:
            processes.shard(model, device)
        torch.manual_seed(config.seed + processes.rank())  # each process draws masks of its own
    return run


def open_data(config: Config, base: Checkpoint | None, adapters: AdapterFiles) -> Corpus:
    """The corpus of a run, in the tokens of its base; chats in the format that the adapters or the
    base were trained in, or as CHAT_TEMPLATE says."""
    tokenizer, files = (None, {}) if base is None else (base.tokenizer, base.files)
    stated = metadata_of_asking(base, adapters)
    return open_corpus(
        config.data,
        DEFAULT_INPUT,
        tokenizer,
        config.block_size,
        count_prompts=config.loss_on_prompt,
        token_folder=Path(config.output_folder),
        in_turn=processes.local_main_process_first(),
        format=chat_format(tokenizer, files, stated, config.chat_template),
        columns=dict(config.columns.pairs if config.columns is not None else ()),
        text=config.text,
    )


def preview(plan: Plan, colour: bool) -> list[str]:
    """The data's description and PREVIEW examples, without building a model."""
    config = plan.config
    corpus = open_data(config, plan.base, plan.adapters)
    examples = preview_lines(corpus, config.preview, config.block_size, colour)
    return ["Data:", *(f"   {line}" for line in corpus.describe()), "", *examples]


def with_own_adapter(config: Config) -> Config:
    """The settings with the adapter that a run with USE_LORA=True wrote to OUT_DIR as ADAPTERS.
    Raises ConfigError where there is none."""
    path = config.own_adapter
    if not path.exists():
        raise ConfigError(
            f"EVAL_ONLY=True with USE_LORA=True evaluates an adapter, and there is no {path}: set "
            "ADAPTERS, or unset USE_LORA to evaluate the base"
        )
    return dataclasses.replace(config, adapters=WeightedAdapters.parse(str(path)))


def join_processes(config: Config) -> tuple[torch.device, str]:
    """Meet the other processes, if any; returns this one's device and the reason for it."""
    local_rank, local_processes = processes.local_rank(), processes.local_world_size()
    hardware.choose_threads(config.num_threads, local_processes)
    device, reason = hardware.choose_device(
        config.device, local_rank, local_processes, processes.in_group()
    )
    check_checkpointing(config, device)
    processes.init_process_group(device)
    check_processes(config)
    return device, reason


def output_files(config: Config) -> OutputFiles:
    """The files that runs write. Raises ConfigError when it writes and cannot write there."""
    folder = Path(config.output_folder)
    if config.writes and processes.is_main_process():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=folder).close()
        except OSError as error:
            raise ConfigError(f"OUT_DIR: {folder} cannot be written: {error.strerror}") from error
    mode = "lora" if config.use_lora else "full"
    names = ("{}.pt", "{}-best.pt", "{}-resume.pt", "{}-metrics.jsonl", "merged.pt")
    files = [folder / name.format(mode) for name in names]
    written = files[-1:] if config.merge else files[:-1]
    for path in written if config.writes else ():
        if path.is_dir():
            raise ConfigError(f"OUT_DIR: {path} is a folder, where a run writes a file")
    return OutputFiles(*files)


def find_base(config: Config, files: OutputFiles) -> Checkpoint | None:
    """The checkpoint to start from: BASE_CHECKPOINT, or the last full run's unless this is one."""
    path = config.base_checkpoint
    default = Path(config.output_folder) / "full.pt"
    needs_base = config.eval_only or config.merge
    if path is None and needs_base and not default.exists():
        raise ConfigError(f"there is no {default}: set BASE_CHECKPOINT to the model's checkpoint")
    if path is None and default.exists() and (config.use_lora or needs_base):
        path = str(default)
    if path is not None:
        refuse_to_replace("BASE_CHECKPOINT", path, config, files)
    for adapter, _ in config.adapters.parts if config.adapters else ():
        refuse_to_replace("ADAPTERS", adapter, config, files)
    if path is not None and config.estimate and os.path.isdir(path) and config.adapters is None:
        return read_shape(Path(path))  # an adapter may have a head, which is compared with its own
    return None if path is None else read_checked_base(path)


def start_from(
    config: Config, base: Checkpoint | None
) -> tuple[Checkpoint | None, Family, Any, AdapterFiles]:
    """The base that fits ADAPTERS, the model's family and sizes, and ADAPTERS."""
    family = base.family if base is not None else GPT2
    sizes = choose_sizes(config, base)
    adapters = read_adapters(config.adapters, family, sizes)
    if base is not None:
        base, adapters = fit_base(base, adapters)
        sizes = base.sizes
    return base, family, sizes, adapters


def refuse_to_replace(name: str, source: str, config: Config, files: OutputFiles) -> None:
    """Raise ConfigError when the run would write the file that it starts from."""
    written: list[Path] = []
    if config.writes:
        written = [files.merged] if config.merge else [files.last, files.best]
    for output in written:
        if output.exists() and os.path.exists(source) and output.samefile(source):
            raise ConfigError(
                f"{name}={source} is a file that this run would replace; "
                "set OUT_DIR to another folder"
            )


# ---- what does not go together


def check_scaling(asked: Config, model: nn.Module) -> None:
    """Raise ConfigError for a LORA_ALPHA that no layer has, and for a LORA_RANK to train that is
    above the rank of every layer.

    The layers have alpha and rank of ADAPTERS, also where ADAPTERS lack an adapter for them.
    """
    layers = lora_layers(model).values()
    alphas, rank = {layer.alpha for layer in layers}, max(layer.rank for layer in layers)
    if "LORA_ALPHA" in asked.explicit and asked.lora_alpha not in alphas:
        raise ConfigError(
            f"LORA_ALPHA={asked.lora_alpha:g}, but ADAPTERS={asked.adapters} have "
            f"{min(alphas):g}; unset it, or give them weights, as in a.pt:0.5"
        )
    if asked.trains and "LORA_RANK" in asked.explicit and asked.lora_rank > rank:
        raise ConfigError(
            f"LORA_RANK={asked.lora_rank}, but ADAPTERS={asked.adapters} have {rank}, "
            "which can only be reduced"
        )


def check_processes(config: Config) -> None:
    """Raise ConfigError for settings that do not fit the number of processes."""
    n = processes.world_size()
    if config.fsdp and n == 1:
        raise ConfigError(
            "FSDP=True shards over several processes, but there is one; start them with "
            "torchrun --standalone --nproc_per_node=2 training.py"
        )
    if config.merge and n > 1:
        raise ConfigError(f"MERGE is done by one process, not by {n}")
    if config.batch_size % n != 0:
        raise ConfigError(
            f"BATCH_SIZE={config.batch_size} is not divisible by the {n} processes that share it"
        )


def check_checkpointing(config: Config, device: torch.device) -> None:
    """Raise ConfigError for GRAD_CHECKPOINT with dropout on MPS.

    In backward torch's checkpoint cannot draw the random numbers of MPS again, so the gradients
    would be those of other masks.
    """
    dropout = config.dropout or (config.use_lora and config.lora_dropout)
    if device.type == "mps" and config.grad_checkpoint and dropout and config.trains:
        raise ConfigError(
            "GRAD_CHECKPOINT=True is wrong with dropout on mps, as torch draws other masks in "
            "backward there; set DROPOUT=0 and LORA_DROPOUT=0, or DEVICE=cpu"
        )


# ---- what tells a run from others


def header(run: Run) -> dict[str, Any]:
    """What a program needs to know of a run: the first line of its metrics."""
    config = {f.name: getattr(run.config, f.name) for f in option_fields(Config)}
    for name in ("adapters", "columns"):
        config[name] = config[name] and str(config[name])
    return {
        "config": config,
        "run": {
            "device": f"{run.device} ({hardware.device_name(run.device)})",
            "dtype": str(run.dtype).removeprefix("torch."),
            "data": run.corpus.name,
            "checksum": run.corpus.checksum,
            "base": run.base_id,
            "adapter": adapter_id(run.adapters),
            "base_checkpoint": run.base_path,
            "parameters": run.model.get_parameter_info(),
            "processes": processes.world_size(),
        },
    }


def adapter_id(adapters: AdapterFiles) -> str | None:
    """A fingerprint of the adapters that a run starts from and of their weights; None for none."""
    tensors = {
        f"{weight:g} of {i}: {name}": tensor
        for i, (_, adapter, weight) in enumerate(adapters)
        for name, tensor in adapter.tensors.items()
    }
    return fingerprint(tensors) if tensors else None


def identity(run: Run) -> dict[str, Any]:
    """What tells one run from another: its settings, its data, its base, and how many train it.

    Last come settings whose defaults follow from the others, and so differ where those do."""
    found = header(run)
    facts = found["config"] | {
        n: found["run"][n] for n in ("checksum", "base", "adapter", "processes")
    }
    return facts | {name: facts.pop(name) for name in FOLLOWING}
