"""What a run works with: output files, base, adapters, data and model, and the record of them."""

import dataclasses
import os
import sys
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import nn

import device as hardware
import distributed
from checkpoint import SHAPE, VARIANTS, Checkpoint, load_base
from config import LINEARS, Config, ConfigError, adapter_weights, lora_targets, option_fields
from data import (
    Corpus,
    DataError,
    RecordCorpus,
    check_length,
    is_records,
    load_corpus,
    load_records,
    tokenize_corpus,
    vocabulary_size,
)
from huggingface import adapter_from_gpt2, read_base
from lora import (
    BaseMismatch,
    FileError,
    base_state,
    lora_layers,
    read_adapter,
    read_adapters,
    store_base,
    switch_adapter,
    take_adapter,
)
from lora.files import fingerprint, lock_folder, one_line, write_err, write_out
from models.bigram_lm_v2_lora import BigramLanguageModelLoRA

DEFAULT_INPUT = Path(__file__).resolve().parent / "data" / "input.txt"

# What may differ between the processes of a run: where its files are, and how each one computes.
MAY_DIFFER = ("data", "out_dir", "base_checkpoint", "adapters", "num_threads", "progress")


class TrainingError(ValueError):
    """A run that cannot go on, such as one whose loss is no longer a number."""


BAD_INPUT = (
    ConfigError, DataError, FileError, TrainingError, hardware.DeviceError, distributed.GroupError
)  # fmt: skip


class Interrupted(Exception):
    """Ctrl-C or SIGTERM, after the run was saved; holds the message and the signal's number."""


@dataclass(frozen=True)
class OutputFiles:
    """Where a run writes: the weights, or the adapter, of the last and of the best evaluation, what
    is needed to resume, and its metrics; and for MERGE the merged checkpoint."""

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
    corpus: Corpus | RecordCorpus | None  # None for MERGE
    base_path: str | None  # None for random weights
    base_id: str  # fingerprint of the weights that the run starts from
    adapter_facts: dict[str, Any]  # the metadata of ADAPTERS, as far as they agree
    tokenizer: str | None  # the base's own; None where tokens are bytes
    model: BigramLanguageModelLoRA
    files: "OutputFiles"
    lock: BinaryIO | None  # open while the run has the output folder for itself

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)


def set_up(config: Config) -> Run:
    """Choose device and dtype, open the data, build the model on its base, and print it all."""
    hardware.keep_freed_memory()
    torch.manual_seed(config.seed)
    number, processes = distributed.place()
    hardware.choose_threads(config.num_threads, processes)
    in_group = distributed.started_together()
    device, device_reason = hardware.choose_device(config.device, number, processes, in_group)
    check_checkpointing(config, device)
    distributed.join(device)
    check_processes(config)
    dtype, dtype_reason = hardware.choose_dtype(config.dtype, device)
    files = output_files(config)
    base = find_base(config, files)
    lock = None
    if trains(config) and distributed.is_first():
        lock = lock_folder(config.output_folder)
    shape = choose_shape(config, base)
    known = {name: shape[name] for name in SHAPE[1:]}
    if base is not None and "BLOCK_SIZE" in config.explicit:
        known["block_size"] = config.block_size  # of the windows, up to the model's
    config = dataclasses.replace(config, **known)
    tokenizer = None if base is None else base.tokenizer
    corpus = None if config.merge else open_corpus(config, tokenizer)
    model = build_model(config, shape, base, device)
    if trains(config) and config.use_lora:
        train_embeddings = model.token_embedding_table.weight.requires_grad
        parts = {"lora_targets": describe_targets(model), "train_embeddings": train_embeddings}
        config = dataclasses.replace(config, **parts)
    base_id = fingerprint(base_state(model))
    adapters: list[str] = []
    adapter_facts: dict[str, Any] = {}
    if config.adapters is not None:
        rank = config.lora_rank if "LORA_RANK" in config.explicit else None
        adapters, adapter_facts = put_on_adapters(
            model, base_id, config.adapters, rank, config.any_base
        )
        check_scaling(config, model)
        first = next(iter(lora_layers(model).values()))
        changes = {"use_lora": True, "lora_rank": first.rank, "lora_alpha": first.alpha}
        config = dataclasses.replace(config, **changes)
    if dtype != torch.float32 and not config.merge:
        tokens = config.batch_size // distributed.size() * config.block_size
        store_base(model, dtype, tokens)

    base_path = base.path if base is not None else None
    run = Run(
        config, device, dtype, corpus, base_path, base_id, adapter_facts, tokenizer, model, files,
        lock,
    )  # fmt: skip
    describe(run, base, adapters, device_reason, dtype_reason)
    if distributed.size() > 1:
        trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
        distributed.check_agreement(
            {n: v for n, v in identity(run).items() if n not in MAY_DIFFER}
            | {"trained weights": fingerprint(trained)}
        )
        if config.fsdp:
            distributed.shard(model, device)
        torch.manual_seed(config.seed + distributed.rank())  # masks are each process's own
    return run


def build_model(
    config: Config, shape: dict[str, Any], base: Checkpoint | None, device: torch.device
) -> BigramLanguageModelLoRA:
    """The model on its base, if any, with fresh adapters where it trains some or takes ADAPTERS."""
    targets, train_embeddings = parts_to_train(config)
    try:
        model = BigramLanguageModelLoRA(
            **shape,
            device="cpu" if config.fsdp else device,  # whose memory may hold no more than a share
            dropout=config.dropout,
            use_lora=config.use_lora or config.adapters is not None,
            lora_rank=config.lora_rank,
            lora_alpha=config.lora_alpha,
            lora_dropout=config.lora_dropout,
            lora_targets=targets,
            train_embeddings=train_embeddings,
        )
    except ValueError as error:
        if config.adapters is None:
            raise
        raise FileError(f"ADAPTERS={config.adapters} are of another model: {error}") from error
    if base is not None:
        load_base(model, base)
    model.grad_checkpoint = config.grad_checkpoint
    return model


def describe(
    run: Run,
    base: Checkpoint | None,
    adapters: list[str],
    device_reason: str,
    dtype_reason: str,
) -> None:
    """Print what a run works with, before it does."""
    config, device = run.config, run.device
    say("Configuration (* set in the environment):", *indent(config.describe()))
    say(f"Device: {device} ({hardware.device_name(device)}), {device_reason}")
    say(f"dtype: {str(run.dtype).removeprefix('torch.')}, {dtype_reason}")
    if distributed.size() > 1:
        say(f"Processes: {describe_processes(config)}")
    if run.corpus is not None:
        say("Data:", *indent(run.corpus.describe()))
    if trains(config):
        say(f"Passes: {passes(config, run.corpus):.3g} over the training data in MAX_STEPS")
    say(describe_base(base, run.base_id, run.corpus))
    say(*adapters, *describe_parameters(config, run.model))
    for note in notes(config, base, run.model, run.files):
        say(f"Note: {note}")


def facts(run: Run) -> dict[str, Any]:
    """What a program needs to know of a run: the first line of its metrics."""
    config = {f.name: getattr(run.config, f.name) for f in option_fields(Config)}
    return {
        "config": config,
        "run": {
            "device": f"{run.device} ({hardware.device_name(run.device)})",
            "dtype": str(run.dtype).removeprefix("torch."),
            "data": run.corpus.name,
            "checksum": run.corpus.checksum,
            "base": run.base_id,
            "base_checkpoint": run.base_path,
            "parameters": run.model.get_parameter_info(),
            "processes": distributed.size(),
        },
    }


def identity(run: Run) -> dict[str, Any]:
    """What tells one run from another: its settings, its data, its base, and how many train it."""
    described = facts(run)
    return described["config"] | {n: described["run"][n] for n in ("checksum", "base", "processes")}


def trains(config: Config) -> bool:
    return not (config.eval_only or config.merge)


def output_files(config: Config) -> OutputFiles:
    """The files to write, in a folder that can be written if anything is."""
    folder = Path(config.output_folder)
    if not config.eval_only and distributed.is_first():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=folder).close()
        except OSError as error:
            raise ConfigError(f"OUT_DIR: {folder} cannot be written: {error.strerror}") from error
    mode = "lora" if config.use_lora else "full"
    names = ("{}.pt", "{}-best.pt", "{}-resume.pt", "{}-metrics.jsonl", "merged.pt")
    return OutputFiles(*(folder / name.format(mode) for name in names))


def find_base(config: Config, files: OutputFiles) -> Checkpoint | None:
    """The checkpoint to start from: BASE_CHECKPOINT, or the last full run's unless this is one."""
    path = config.base_checkpoint
    default = Path(config.output_folder) / "full.pt"
    if path is None and not trains(config) and not default.exists():
        raise ConfigError(f"there is no {default}: set BASE_CHECKPOINT to the model's checkpoint")
    if path is None and default.exists() and (config.use_lora or not trains(config)):
        path = str(default)
    if path is not None:
        refuse_to_replace("BASE_CHECKPOINT", path, config, files)
    for adapter, _ in adapter_weights(config.adapters) if config.adapters else []:
        refuse_to_replace("ADAPTERS", adapter, config, files)
    return None if path is None else read_base(path)


def refuse_to_replace(name: str, source: str, config: Config, files: OutputFiles) -> None:
    """Raise ConfigError when the run would write the file that it starts from."""
    written: list[Path] = []
    if config.merge:
        written = [files.merged]
    elif trains(config):
        written = [files.last, files.best]
    for output in written:
        if output.exists() and os.path.exists(source) and output.samefile(source):
            raise ConfigError(
                f"{name}={source} is a file that this run would replace; "
                "set OUT_DIR to another folder"
            )


def choose_shape(config: Config, base: Checkpoint | None) -> dict[str, Any]:
    """The model's shape: the base's, or without one the configuration's."""
    if base is None:
        if config.n_embd % config.n_head != 0:
            raise ConfigError(
                f"N_EMBD={config.n_embd} is not divisible by N_HEAD={config.n_head}; "
                "the heads share the width evenly"
            )
        shape = {"vocab_size": vocabulary_size(None)} | VARIANTS
        return shape | {name: getattr(config, name) for name in SHAPE[1:]}
    check_vocabulary(base)
    for name in SHAPE[1:]:
        wanted = getattr(config, name)
        shorter = name == "block_size" and wanted < base.shape[name]
        if name.upper() in config.explicit and wanted != base.shape[name] and not shorter:
            raise ConfigError(
                f"{name.upper()}={wanted} does not fit the base {base.path}, whose {name} is "
                f"{base.shape[name]}; unset {name.upper()} to take the base's"
            )
    return base.shape


def check_vocabulary(base: Checkpoint) -> None:
    """Raise FileError unless the base has an embedding for each token, and no others for bytes."""
    try:
        size, needed = base.shape["vocab_size"], vocabulary_size(base.tokenizer)
    except DataError as error:
        raise FileError(f"{base.path}: {error}") from error
    if size < needed or (base.tokenizer is None and size != needed):
        whose = "bytes are" if base.tokenizer is None else "its tokenizer has"
        raise FileError(f"{base.path} has vocab_size={size}, but {whose} {needed}")


def open_corpus(config: Config, tokenizer: str | None) -> Corpus | RecordCorpus:
    """DATA in the tokens of the base, long enough for BLOCK_SIZE."""
    if is_records(config.data):
        return load_records(config.data, tokenizer, config.block_size, config.loss_on_prompt)
    corpus = load_corpus(config.data, DEFAULT_INPUT)
    if tokenizer is not None:
        with distributed.first_of_machine_first():
            corpus = tokenize_corpus(corpus, tokenizer, Path(config.output_folder))
    check_length(corpus, config.block_size)
    return corpus


def put_on_adapters(
    model: nn.Module, base_id: str, text: str, rank: int | None, any_base: bool
) -> tuple[list[str], dict[str, Any]]:
    """Load ADAPTERS=`text` onto the base that the model holds; returns lines for the record, and
    the adapters' metadata, as far as they agree."""
    weighted = adapter_weights(text)
    try:
        bare = take_adapter(model, base_id)
        adapter = read_adapters(weighted, bare, rank, any_base, adapter_from_gpt2)
    except BaseMismatch as error:
        raise FileError(f"{error}; ANY_BASE=True insists") from error
    switch_adapter(model, adapter)
    lines = [f"Adapter: {path}, weight {weight:g}" for path, weight in weighted]
    if adapter.base is None:
        lines.append(
            "Base of the adapter: not recorded in its file, so not checked; its shapes fit"
        )
    if "truncation_error" in adapter.metadata:
        error = adapter.metadata["truncation_error"]
        lines.append(f"Reduced to rank {max(adapter.ranks.values())}: relative error {error:.2e}")
    return lines, adapter.metadata


def parts_to_train(config: Config) -> tuple[list[str] | None, bool]:
    """The layers to adapt, None for all, and whether the embeddings train: what the variables say,
    or where they say nothing what ADAPTERS have that are trained further.

    Raises ConfigError where ADAPTERS have more than that. A run that trains nothing takes all, and
    what its adapters lack is the base's.
    """
    if not (trains(config) and config.use_lora):
        return None, True
    targets, train_embeddings = lora_targets(config.lora_targets), config.train_embeddings
    if config.adapters is None:
        return targets, train_embeddings
    found = [adapter_from_gpt2(read_adapter(path)) for path, _ in adapter_weights(config.adapters)]
    layers = list(dict.fromkeys(name for adapter in found for name in adapter.alpha))
    if "LORA_TARGETS" not in config.explicit:
        targets = layers
    for name in layers if targets is not None else ():
        if name not in targets and name.rpartition(".")[2] not in targets:
            raise ConfigError(
                f"LORA_TARGETS={config.lora_targets} lacks {name}, of which there is an adapter in "
                f"ADAPTERS={config.adapters}"
            )
    holds_embeddings = any(adapter.extras for adapter in found)
    if "TRAIN_EMBEDDINGS" not in config.explicit:
        train_embeddings = holds_embeddings
    elif holds_embeddings and not train_embeddings:
        raise ConfigError(
            f"TRAIN_EMBEDDINGS=False, but ADAPTERS={config.adapters} hold trained embeddings"
        )
    return targets, train_embeddings


def check_scaling(config: Config, model: nn.Module) -> None:
    """Raise ConfigError for a LORA_ALPHA, or a rank to train, that no adapter in the model has, be
    it one of ADAPTERS or of a layer that they lack."""
    layers = lora_layers(model).values()
    alphas, rank = {layer.alpha for layer in layers}, max(layer.rank for layer in layers)
    if "LORA_ALPHA" in config.explicit and config.lora_alpha not in alphas:
        raise ConfigError(
            f"LORA_ALPHA={config.lora_alpha:g}, but ADAPTERS={config.adapters} have "
            f"{min(alphas):g}; unset it, or give them weights, as in a.pt:0.5"
        )
    if trains(config) and "LORA_RANK" in config.explicit and config.lora_rank > rank:
        raise ConfigError(
            f"LORA_RANK={config.lora_rank}, but ADAPTERS={config.adapters} have {rank}, "
            "which can only be reduced"
        )


def describe_targets(model: nn.Module) -> str:
    """LORA_TARGETS that adapts the layers that are adapted in `model`."""
    layers = lora_layers(model)
    kinds = [kind for kind in LINEARS if any(name.endswith(kind) for name in layers)]
    frozen = {name.rpartition(".")[2] for name, m in model.named_modules() if type(m) is nn.Linear}
    if frozen & set(kinds):  # such as an adapter of PEFT's of some blocks alone
        return ",".join(layers)
    return "all" if len(kinds) == len(LINEARS) else ",".join(kinds)


def check_processes(config: Config) -> None:
    """Raise ConfigError for settings that do not fit the number of processes."""
    n = distributed.size()
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
    """Raise ConfigError for GRAD_CHECKPOINT with dropout on MPS, whose random numbers torch's
    checkpoint does not draw again: the gradients would be those of other masks."""
    dropout = config.dropout or (config.use_lora and config.lora_dropout)
    if device.type == "mps" and config.grad_checkpoint and dropout and trains(config):
        raise ConfigError(
            "GRAD_CHECKPOINT=True is wrong with dropout on mps, as torch draws other masks in "
            "backward there; set DROPOUT=0 and LORA_DROPOUT=0, or DEVICE=cpu"
        )


def describe_processes(config: Config) -> str:
    n, sequences = distributed.size(), config.batch_size
    how = "weights sharded (FSDP2)" if config.fsdp else "weights replicated"
    return f"{n}, each with {sequences // n} of a batch's {sequences} sequences, {how}"


def passes(config: Config, corpus: Corpus | RecordCorpus) -> float:
    """How many times a run trains on as much as its training data are."""
    length = config.block_size if isinstance(corpus, RecordCorpus) else 1  # of what it has
    return config.max_steps * config.tokens_per_step / (len(corpus.train) * length)


def describe_base(
    base: Checkpoint | None, base_id: str, corpus: Corpus | RecordCorpus | None
) -> str:
    if base is None:
        return f"Base: none, random weights (fingerprint {base_id})"
    facts = base.metadata
    if not facts:
        return f"Base: {base.path} (fingerprint {base_id}), weights of GPT-2's kind"
    if "merged" in facts:
        return f"Base: {base.path} (fingerprint {base_id}), merged from {facts['merged']}"
    val_loss = facts.get("val_loss")
    reached = f" to validation loss {val_loss:.4f}" if isinstance(val_loss, float) else ""
    line = f"Base: {base.path} (fingerprint {base_id}), {facts.get('step')} steps on "
    line += f"{facts.get('data')}{reached}"
    if corpus is None:
        return line
    same = "the same data" if facts.get("checksum") == corpus.checksum else "other data"
    return f"{line}; this run is on {same}"


def describe_parameters(config: Config, model: BigramLanguageModelLoRA) -> list[str]:
    info = model.get_parameter_info()
    if not config.use_lora:
        return [
            "Parameter Statistics:",
            f"   Total parameters: {info['total']:,}",
            f"   Trainable (all): {info['trainable']:,}",
        ]
    embeddings = info["trainable"] - info["lora"]
    return [
        "Using LoRA for efficient fine-tuning",
        f"   LoRA rank: {config.lora_rank}, alpha: {config.lora_alpha}, "
        f"dropout: {config.lora_dropout}",
        *([] if (layers := describe_targets(model)) == "all" else [f"   LoRA layers: {layers}"]),
        "Parameter Statistics:",
        f"   Total parameters: {info['total']:,}",
        f"   Trainable (LoRA): {info['trainable']:,}",
        f"   Frozen (base): {info['frozen']:,}",
        f"   LoRA percentage: {info['lora_percentage']:.2f}%",
        f"   Of the trainable: adapters {info['lora']:,}, embeddings {embeddings:,}",
        f"   Cost savings: Training only {info['lora_percentage']:.2f}% of parameters!",
    ]


def notes(
    config: Config, base: Checkpoint | None, model: nn.Module, files: OutputFiles
) -> list[str]:
    """What is legal and probably not what the user meant."""
    found = []
    if trains(config) and not config.resume and files.resume.exists():
        found.append(
            f"{files.resume} is of an earlier run, which RESUME=True would go on with; this run "
            "replaces it at its first evaluation"
        )
    unused = sorted(name for name in config.explicit if name.startswith("LORA_"))
    if unused and not config.use_lora:
        found.append(f"{', '.join(unused)} set without USE_LORA=True: no effect")
    if config.use_lora and base is None:
        test = "TEST_MODE=True " if config.test_mode else ""
        found.append(
            f"there is no base in {config.output_folder}, so the adapters train on random weights, "
            f"which cannot work well; run `{test}python training.py` first or set BASE_CHECKPOINT"
        )
    small = [n for n, m in lora_layers(model).items() if config.lora_rank > min(m.weight.shape)]
    if small:
        found.append(
            f"LORA_RANK={config.lora_rank} is larger than the smaller side of {len(small)} layers, "
            f"among them {small[0]}: such an adapter costs more than the matrix and can do no more"
        )
    return found


def say(*lines: str) -> None:
    """Print facts to the record, whole lines at once; of several processes the first does."""
    for line in lines if distributed.is_first() else ():
        write_out(one_line(line) + "\n")


def indent(lines: Iterable[str]) -> list[str]:
    return [f"   {line}".rstrip() for line in lines]


def format_table(rows: list[tuple[str, str, str]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in (0, 1)]
    return [f"{name:{widths[0]}}  {default:{widths[1]}}  {text}" for name, default, text in rows]


def asks_for_help(arguments: list[str], example: str) -> bool:
    """Whether a script's arguments are --help; raises ConfigError for any others."""
    if arguments and arguments not in (["--help"], ["-h"]):
        raise ConfigError(
            f"{arguments[0]!r} is not understood: configuration comes from the environment, "
            f"as in {example}; --help lists the variables"
        )
    return bool(arguments)


def exit_code_of(work: Callable[[], None]) -> int:
    """Do a script's work; returns 0, or says in one line what failed and returns its exit code."""
    if sys.stdout is not None:  # which it is when the caller closed it
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        work()
    except BAD_INPUT as error:
        return fail(str(error), 2)
    except (MemoryError, RuntimeError) as error:  # torch.OutOfMemoryError is a RuntimeError
        if distributed.is_lost(error):
            return fail("lost another process; RESUME=True goes on from the last evaluation", 1)
        if not hardware.is_out_of_memory(error):
            raise
        variables = "BATCH_SIZE, BLOCK_SIZE, N_EMBD, N_LAYER or LORA_RANK"
        return fail(f"not enough memory; lower {variables}", 2)
    except Interrupted as stop:
        message, number = stop.args
        return fail(message, 128 + number)
    except KeyboardInterrupt:
        return fail("interrupted; the files of the last evaluation are as they were", 130)
    except OSError as error:
        return fail(
            str(error) if error.filename is None else f"{error.filename}: {error.strerror}", 2
        )
    return 0


def fail(message: str, exit_code: int) -> int:
    number = f" (process {distributed.rank()})" if distributed.size() > 1 else ""
    write_err(f"error{number}: {message}")
    return exit_code
