"""What the log says of a run before its first step, and of what came of it."""

import dataclasses
from collections.abc import Sequence

import torch

import hardware
from hardware import processes
from lora import lora_layers
from models import LanguageModel
from models.checkpoint import Checkpoint
from trainer.console import indent
from trainer.estimate import memory_lines
from trainer.loading import describe_adapters
from trainer.log import START
from trainer.progress import Progress
from trainer.resolving import is_published
from trainer.settings import Config
from trainer.setup import Plan, Run


def describe_plan(plan: Plan) -> list[str]:
    """The lines of the log that come before a weight is read: configuration, device, memory."""
    config, device = plan.config, plan.device
    lines = [START, *indent(config.describe())]
    lines.append(f"Device: {device} ({hardware.device_name(device)}), {plan.device_reason}")
    lines.append(f"dtype: {str(plan.dtype).removeprefix('torch.')}, {plan.dtype_reason}")
    if processes.world_size() > 1:
        lines.append(f"Processes: {describe_processes(config)}")
    if config.trains and processes.is_main_process():
        lines += memory_lines(plan)
    return lines


def describe(plan: Plan, run: Run) -> list[str]:
    """The lines of the log on what a planned run works with, from its data to notes."""
    config = run.config
    lines = []
    if run.corpus is not None:
        lines += ["Data:", *indent(run.corpus.describe())]
    if config.trains:
        passes = run.corpus.passes(config.max_steps * config.tokens_per_step)
        lines.append(f"Passes: {passes:.3g} over the training data in MAX_STEPS")
        lines += describe_choices(plan, run)
        if config.dropout != (plan.config.dropout or 0.0) and processes.is_main_process():
            lines += memory_lines(dataclasses.replace(plan, config=config))  # of its masks too
    lines.append(describe_base(run))
    if config.base_dtype != "auto":
        lines.append(describe_base_weights(run))
    lines += describe_adapters(
        run.adapters, run.adapter_metadata, config.lora_rank, config.base_dtype
    )
    lines += describe_parameters(config, run.model)
    if config.trains and is_published(run.base):
        lines += describe_defaults(run)
    return lines + [f"Note: {note}" for note in notes(run)]


def describe_choices(plan: Plan, run: Run) -> list[str]:
    """The variables whose values depend on the data."""
    names = ("max_steps", "eval_interval", "patience", "dropout")
    open_ones = [name for name in names if getattr(plan.config, name) is None]
    lines = [f"{name.upper()}: {getattr(run.config, name)}" for name in open_ones]
    return ["Chosen for this data:", *indent(lines)] if lines else []


def describe_processes(config: Config) -> str:
    """How many processes train, and what each of them has of a batch and of the weights."""
    n, sequences = processes.world_size(), config.batch_size
    how = "weights sharded (FSDP2)" if config.fsdp else "weights replicated"
    return f"{n}, each with {sequences // n} of a batch's {sequences} sequences, {how}"


def describe_base(run: Run) -> str:
    """What the run starts from, and how far that was trained."""
    base: Checkpoint | None = run.base
    if base is None:
        return f"Base: none, random weights (fingerprint {run.base_id})"
    metadata = base.metadata
    line = f"Base: {base.path} (fingerprint {run.base_id})"
    if not metadata:
        return f"{line}, weights of the family {base.family.name}"
    if "merged" in metadata:
        return f"{line}, merged from {metadata['merged']}"
    val_loss = metadata.get("val_loss")
    reached = f" to validation loss {val_loss:.4f}" if isinstance(val_loss, float) else ""
    line += f", {metadata.get('step')} steps on {metadata.get('data')}{reached}"
    if run.corpus is None:
        return line
    same = metadata.get("checksum") == run.corpus.checksum
    return f"{line}; this run is on {'the same data' if same else 'other data'}"


def describe_base_weights(run: Run) -> str:
    """In what the frozen weights lie, and how much memory they take."""
    frozen = [p for p in run.model.parameters() if not p.requires_grad]
    size = sum(p.nbytes for p in frozen) / 2**20
    line = f"Base weights: {run.config.base_dtype}, {size:,.1f} MiB"
    if run.config.base_dtype != "nf4":
        return line
    before = sum(p.numel() * p.itemsize for p in frozen) / 2**20
    return f"{line} instead of {before:,.1f}"


def describe_parameters(config: Config, model: LanguageModel) -> list[str]:
    """How many parameters the model has, and which of them train."""
    info = model.get_parameter_info()
    if not config.use_lora:
        return [
            "Parameter Statistics:",
            f"   Total parameters: {info['total']:,}",
            *([f"   Trainable (all): {info['trainable']:,}"] if info["trainable"] else []),
        ]
    embeddings = info["trainable"] - info["lora"]
    savings = f"   Cost savings: Training only {info['lora_percentage']:.2f}% of parameters!"
    layers = [f"   LoRA layers: {config.lora_targets}"] if config.lora_targets != "all" else []
    adapters = lora_layers(model).values()
    return [
        "Using LoRA for efficient fine-tuning",
        f"   LoRA rank: {range_of([layer.rank for layer in adapters])}, "
        f"alpha: {range_of([layer.alpha for layer in adapters])}, "
        f"dropout: {config.lora_dropout}",
        *layers,
        "Parameter Statistics:",
        f"   Total parameters: {info['total']:,}",
        f"   Trainable (LoRA): {info['trainable']:,}",
        f"   Frozen (base): {info['frozen']:,}",
        f"   LoRA percentage: {info['lora_percentage']:.2f}%",
        f"   Of the trainable: adapters {info['lora']:,}, embeddings {embeddings:,}",
        *([savings] if config.trains else []),
    ]


def range_of(values: Sequence[float]) -> str:
    """The least and the greatest of some numbers, as in `4 to 16`, or the one that they are."""
    low, high = min(values), max(values)
    return str(low) if low == high else f"{low} to {high}"


def describe_defaults(run: Run) -> list[str]:
    """Which defaults differ on a published base, and why."""
    config, lines = run.config, []
    if config.use_lora and not run.adapters:
        if "TRAIN_EMBEDDINGS" not in config.explicit:
            tables = run.model.get_parameter_info()["embedding"]
            lines.append(
                f"Embeddings frozen: the default on a published base; they have {tables:,} "
                "parameters (TRAIN_EMBEDDINGS=True trains them)"
            )
        if "LORA_TARGETS" not in config.explicit:
            lines.append(
                "lm_head not adapted: the default on a published base, whose adapters then fit "
                "other programs (LORA_TARGETS=all adapts it)"
            )
    if "BLOCK_SIZE" not in config.explicit and config.block_size < run.model.block_size:
        lines.append(
            f"Windows of {config.block_size} tokens: the default where the base has more, "
            f"here {run.model.block_size} (BLOCK_SIZE)"
        )
    return lines


def notes(run: Run) -> list[str]:
    """What is legal and probably not what the user meant."""
    config, found = run.config, []
    files = run.files
    earlier = [str(p) for p in (files.last, files.best, files.resume) if p.exists()]
    if config.trains and not config.resume and earlier:
        goes_on = ", which RESUME=True would go on with" if files.resume.exists() else ""
        found.append(
            f"{', '.join(earlier)} {'is' if len(earlier) == 1 else 'are'} of an earlier run"
            f"{goes_on}; this run replaces {'it' if len(earlier) == 1 else 'them'} at its first "
            "evaluation, and in another OUT_DIR it would not"
        )
    adapters = [run.files.last.with_name(name) for name in ("lora.pt", "lora-best.pt")]
    adapters = [str(path) for path in adapters if path.exists()]
    if config.trains and not config.use_lora and run.files.last.exists() and adapters:
        found.append(
            f"{' and '.join(adapters)} {'is an adapter' if len(adapters) == 1 else 'are adapters'} "
            f"that may need {run.files.last}, which this run replaces at its first evaluation"
        )
    unused = sorted(name for name in config.explicit if name.startswith("LORA_"))
    if unused and not config.use_lora:
        found.append(f"{', '.join(unused)} set without USE_LORA=True: no effect")
    if config.use_lora and run.base is None:
        test = "TEST_MODE=True " if config.test_mode else ""
        found.append(
            f"there is no base in {config.output_folder}, so the adapters train on random weights, "
            f"which cannot work well; run `{test}python training.py` first or set BASE_CHECKPOINT"
        )
    layers = lora_layers(run.model).items()
    small = [name for name, layer in layers if config.lora_rank > min(layer.weight.shape)]
    if small:
        found.append(
            f"LORA_RANK={config.lora_rank} is larger than the smaller side of {len(small)} layers, "
            f"among them {small[0]}: such an adapter costs more than the matrix and can do no more"
        )
    return found


def describe_costs(run: Run, summary: dict[str, float]) -> list[str]:
    """Lines of the log: what compiling, several processes and float16 cost, where used."""
    lines = []
    if "compile_time" in summary:
        lines.append(f"Compile time: {summary['compile_time']:.1f} s, before the training time")
    if "bytes_exchanged" in summary:
        info = run.model.get_parameter_info()
        full = info["total"] - info["lora"]
        if run.model.copied_head:  # full fine-tuning has one tensor for the head and the embedding
            full -= run.model.lm_head.weight.numel()
        lines.append(
            f"Gradients exchanged: {summary['bytes_exchanged']:,.0f} bytes a step by each process; "
            f"full fine-tuning's would be {4 * full:,}"
        )
    if run.dtype == torch.float16:
        lines.append(
            f"Skipped steps: {summary['skipped_steps']:,}, whose gradients were too large for "
            "float16"
        )
    return lines


def describe_outcome(run: Run, progress: Progress) -> list[str]:
    """A line of the log on which file to use, where that is not the last one."""
    if progress.start_loss <= progress.best_loss:
        return [
            f"Note: training did not beat its start: validation loss {progress.start_loss:.4f} "
            f"before the first step, {progress.best_loss:.4f} at best after it; what the run "
            "started from is better than what it wrote"
        ]
    if progress.best_loss < progress.val_loss:
        return [
            f"Note: use {run.files.best}: its validation loss {progress.best_loss:.4f} is lower "
            f"than {progress.val_loss:.4f}, that of {run.files.last}"
        ]
    return []
