"""Resuming: what an interrupted run needs to go on as if it had not been, in one file."""

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from files import FileError
from files.tensors import check_tensors, read_file, write_file
from hardware import processes
from trainer.console import TrainingError
from trainer.progress import Progress
from trainer.resolving import SIZES
from trainer.setup import Run, identity

FORMAT = "training state"
VERSION = 2

# A resumed run must agree with the interrupted one in these, for its files to fit or to make sense.
FIXED = ("use_lora", "lora_rank", "lora_alpha", "lora_targets", "train_embeddings", "seed")
FIXED += (*SIZES, "columns", "text", "loss_on_prompt")
# Variables that say where and how a run goes on, not what it computes.
FREE = ("resume", "progress", "sample_tokens", "data", "out_dir", "base_checkpoint", "adapters")


@dataclass(frozen=True)
class TrainingState:
    """What a run needs to go on as if it had not been interrupted.

    Attributes:
        identity: which run it is, as plain values.
        progress: how far it is, as plain values.
        tensors: the trained parameters by name.
        optimizer: the optimizer's state by `<parameter>.<name>`.
        random: the states of the random generators by device; those of further processes as in
            `cpu.1`.
        scaler: the state of a GradScaler, empty but in float16.
        optimizer_class: the optimizer's.
        digest: tells the file from others.
    """

    identity: dict[str, Any]
    progress: dict[str, Any]
    tensors: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    random: dict[str, Tensor]
    scaler: dict[str, Any] = field(default_factory=dict)
    optimizer_class: str = "AdamW"
    digest: str = ""


def resume(
    run: Run, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler
) -> tuple[Progress, list[str]]:
    """Restore the interrupted run; returns how far it was, and lines for the log.

    A run that was interrupted before it saved anything starts afresh. Raises FileError, and changes
    nothing, when the saved state is of another run than this.
    """
    path, config = run.files.resume, run.config
    state = read_training_state(path) if path.exists() else None
    processes.check_agreement({"the state to go on from": state and state.digest})
    if state is None:
        refuse_other_mode(run)
        return Progress(), [f"Nothing to resume in {config.output_folder}: starting from step 0"]
    before, now = state.identity, identity(run)
    # A variable that an earlier version did not have has not changed.
    changed = [n for n in now if n in before and before[n] != now[n] and n not in FREE]
    if run.base is None and before.get("base_checkpoint") is None:
        refuse_fixed(path, changed, before, now)  # variables that make other random weights
    # The base before the data, since its tokenizer is part of the data's checksum.
    starts = {"base": "another base", "checksum": "other DATA", "adapter": "other ADAPTERS"}
    for name, words in starts.items():
        if before.get(name, now[name]) != now[name]:  # earlier versions wrote no adapter
            started = before.get("base_checkpoint")
            hint = (
                f"; it began with BASE_CHECKPOINT={started}" if started and name == "base" else ""
            )
            raise FileError(
                f"{path} is a run on {words}: {name} {before.get(name)}, not {now[name]}{hint}"
            )
    refuse_fixed(path, changed, before, now)
    try:
        progress = Progress.from_plain(state.progress)
    except (AttributeError, TypeError, ValueError, KeyError) as error:
        raise FileError(f"{path} is damaged: it does not say how far the run was") from error
    if "tokens" not in state.progress:  # which earlier versions did not count
        progress.tokens = progress.step * config.tokens_per_step
    if config.max_steps < progress.step:
        raise FileError(f"{path} has {progress.step} steps, more than MAX_STEPS={config.max_steps}")
    restore_training_state(path, state, run.model, optimizer, scaler)
    progress.losses = [loss.to(run.device) for loss in progress.losses]
    sizes = {"batch_size", "grad_accum_steps", "block_size"}
    if sizes & set(changed) and not progress.has_ended(config):
        progress.step_times = []  # of steps of other sizes
    lines = [f"Resuming {path} at step {progress.step}"]
    if progress.step == config.max_steps:
        lines.append("Note: it has done MAX_STEPS; a larger MAX_STEPS goes on")
    if changed:
        differences = (f"{n.upper()} {before.get(n)} -> {now[n]}" for n in changed)
        lines.append(f"Note: changed since the interruption: {', '.join(differences)}")
    return progress, lines


def refuse_other_mode(run: Run) -> None:
    """Raise FileError where a full run would begin, but there is a run with LoRA to go on with."""
    other = run.files.resume.with_name("lora-resume.pt")
    if not run.config.use_lora and other.exists():
        raise FileError(
            f"{run.files.resume} is not there, but {other} is, of a run with USE_LORA=True: set "
            "USE_LORA=True to go on with it, or unset RESUME to train every weight"
        )


def refuse_fixed(
    path: Path, changed: Sequence[str], before: Mapping[str, Any], now: Mapping[str, Any]
) -> None:
    """Raise FileError where variables have changed that must not."""
    if wrong := [name for name in changed if name in FIXED]:
        was, is_now = (
            " ".join(f"{n.upper()}={values[n]}" for n in wrong) for values in (before, now)
        )
        raise FileError(f"{path} is a run with {was}, which cannot be continued with {is_now}")


def save_training_state(
    path: str | os.PathLike,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    identity: Mapping[str, Any],
    progress: Mapping[str, Any],
) -> int:
    """Write a TrainingState in one file, so that its parts agree; returns its size in bytes.

    Every process must call it; the first writes, and the others return 0. Raises TrainingError for
    numbers that are not finite, from which nothing can go on, and leaves the file as it was.
    """
    trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    tensors = {name: processes.full_tensor(p.detach()) for name, p in trained}
    states = {name: kind.get_rng_state() for name, kind in generators(model).items()}
    random = {
        _generator(name, rank): state
        for rank, states in enumerate(processes.all_gather(states))
        for name, state in states.items()
    }
    state = {
        f"{i}.{name}": processes.full_tensor(value)
        for i, entry in optimizer.state_dict()["state"].items()
        for name, value in entry.items()
    }
    if not processes.is_main_process():
        return 0
    if not all(torch.isfinite(t).all() for t in [*tensors.values(), *state.values()]):
        raise TrainingError(
            "the weights, or the optimizer's means of their gradients, are no longer finite: lower "
            f"LEARNING_RATE; {path} is as it was"
        )
    content = {"format": FORMAT, "version": VERSION, "identity": dict(identity)}
    content |= {"progress": dict(progress), "tensors": tensors, "random": random}
    content |= {"optimizer": state, "optimizer_class": type(optimizer).__name__}
    content |= {"scaler": scaler.state_dict()}
    return write_file(path, content)


def read_training_state(path: str | os.PathLike) -> TrainingState:
    """Read a TrainingState. Raises FileError when it is missing, damaged or of another kind."""
    content = read_file(path, FORMAT, VERSION)
    names = ("identity", "progress", "tensors", "optimizer", "random")
    parts = {name: content.get(name) for name in names}
    if not all(isinstance(part, dict) for part in parts.values()):
        raise FileError(f"{path} is damaged: it lacks a part of a training state")
    # What earlier versions did not write.
    later = {name: content[name] for name in ("optimizer_class", "scaler") if name in content}
    return TrainingState(**parts, **later, digest=content["digest"])


def restore_training_state(
    path: str | os.PathLike,
    state: TrainingState,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
) -> None:
    """Put a state that was read from `path` into the model, the optimizer, the scaler of gradients
    and the generators.

    Raises FileError, and leaves all of them as they were, when the state is not theirs.
    """
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    check_tensors(path, state.tensors, parameters)
    kind = type(optimizer).__name__
    if state.optimizer_class != kind:
        raise FileError(
            f"{path} is of the optimizer {state.optimizer_class}, not of {kind}; "
            f"set OPTIMIZER={state.optimizer_class.lower()}"
        )
    optimizer_state = _optimizer_state(path, state.optimizer, optimizer)
    _check_scaler_state(path, state.scaler, scaler)
    try:
        for name, kind in generators(model).items():
            saved = _generator(name, processes.rank())
            # It is not there when there were fewer processes, or another device.
            if saved in state.random or saved == "cpu":
                kind.set_rng_state(state.random[saved])
    except (KeyError, TypeError, RuntimeError) as error:
        raise FileError(f"{path} is damaged: it holds no state of the random generator") from error
    if scaler.is_enabled() and state.scaler:
        scaler.load_state_dict(state.scaler)
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(processes.shard_like(state.tensors[name], parameter))
    if optimizer_state:
        # Its settings, such as weight decay, are the present run's.
        groups = optimizer.state_dict()["param_groups"]
        optimizer.load_state_dict({"state": optimizer_state, "param_groups": groups})


def _optimizer_state(
    path: str | os.PathLike, saved: Mapping[str, Tensor], optimizer: torch.optim.Optimizer
) -> dict[int, dict[str, Tensor]]:
    """The saved state of an optimizer, by the number of the parameter, in this process's shards.

    Raises FileError unless all parameters have the state that the optimizer keeps for them: for
    each name a number, or a tensor of the parameter's shape. Before the first step it is empty.
    """
    optimized, expected = [], {}
    for group in optimizer.param_groups:
        kept = state_of_one_step(optimizer, group) if saved else {}
        for parameter in group["params"]:
            for name, value in kept.items():
                expected[f"{len(optimized)}.{name}"] = parameter if value.dim() else value
            optimized.append(parameter)
    check_tensors(path, saved, expected)
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in saved.items():
        i, _, name = key.partition(".")
        if value.dim():
            value = processes.shard_like(value, optimized[int(i)])
        state.setdefault(int(i), {})[name] = value
    return state


def _check_scaler_state(path: str | os.PathLike, saved: Any, scaler: torch.amp.GradScaler) -> None:
    """Raise FileError unless the saved state of a GradScaler is empty or has its numbers."""
    known = scaler.state_dict() or torch.amp.GradScaler("cpu").state_dict()
    if saved == {}:
        return
    if not (
        isinstance(saved, dict)
        and saved.keys() == known.keys()
        and all(isinstance(v, int | float) and 0 <= v < math.inf for v in saved.values())
    ):
        raise FileError(f"{path} is damaged: it holds no state of the scaler of gradients")


def state_of_one_step(
    optimizer: torch.optim.Optimizer, group: Mapping[str, Any]
) -> dict[str, Tensor]:
    """The state that an optimizer like this one keeps for a matrix in a group like this one: for
    each name a number, or a tensor of the matrix's shape."""
    matrix = torch.nn.Parameter(torch.zeros(2, 2))
    matrix.grad = torch.zeros(2, 2)
    trial = type(optimizer)([{**group, "params": [matrix]}])
    trial.step()
    return dict(trial.state[matrix])


def generators(model: nn.Module) -> dict[str, Any]:
    """torch's modules with `get_rng_state`, by the kind of each device that draws random numbers.

    Devices that the run does not use are left out, since asking for a GPU's state takes memory.
    """
    kind = next(model.parameters()).device.type
    return {"cpu": torch} | ({kind: getattr(torch, kind)} if kind in ("cuda", "mps") else {})


def _generator(device: str, rank: int) -> str:
    """What a TrainingState calls the random generator of a process on a device."""
    return f"{device}.{rank}" if rank > 0 else device
