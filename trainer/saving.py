"""The files of a run's result: its model, or under LoRA its adapter, and what MERGE writes."""

import dataclasses
from pathlib import Path

import torch

from hardware import processes
from lora import lora_layers, merge_adapter, save_adapter
from models.checkpoint import family_of, save_checkpoint, sizes_of
from trainer.console import say
from trainer.loading import dtype_below
from trainer.log import wrote_line
from trainer.own_head import HEAD
from trainer.setup import Run


def save(run: Run, path: Path, step: int, val_loss: float) -> int:
    """Write the checkpoint, or under LoRA the adapter; returns the file's size in bytes.

    Every process must call it; the first writes, and the others return 0. Raises FileError when it
    cannot be written.
    """
    with processes.full_parameters(run.model):
        return write_model(run, path, step, val_loss) if processes.is_main_process() else 0


def write_model(run: Run, path: Path, step: int, val_loss: float) -> int:
    """Write the file that `save` is for, with what generate.py and a later run need to know."""
    metadata = {"step": step, "val_loss": val_loss} | run.corpus.metadata()
    if not run.config.use_lora:
        return save_checkpoint(path, run.model, metadata, run.base)
    metadata |= {"shape": dataclasses.asdict(sizes_of(run.model))}
    metadata |= {"family": family_of(run.model).name, "base_checkpoint": run.base_path}
    metadata["seed"] = run.config.seed
    if run.config.base_dtype != "auto":
        metadata["base_dtype"] = run.config.base_dtype
    metadata |= {name: getattr(run.config, f"lora_{name}") for name in ("rank", "alpha", "dropout")}
    metadata["targets"] = sorted({name.rpartition(".")[2] for name in lora_layers(run.model)})
    whole = {}
    if run.own_head is not None:
        whole = {HEAD: run.own_head}
        if "files" in run.adapter_metadata:
            metadata["files"] = run.adapter_metadata["files"]
    return save_adapter(path, run.model, run.base_id, metadata, whole)


def write_merged(run: Run) -> None:
    """Write base and adapters as one checkpoint, which is a base like any other. Raises FileError
    when it cannot be written."""
    dtypes = {layer.weight.dtype for layer in lora_layers(run.model).values()} - {torch.float32}
    merge_adapter(run.model)
    path = run.files.merged
    metadata = {"merged": f"{run.base_path} with {run.config.adapters}"}
    metadata["base_dtype"] = run.config.base_dtype
    if any("nf4" in (run.config.base_dtype, dtype_below(a)) for _, a, _ in run.adapters):
        say(f"Merged onto the base's weights in BASE_DTYPE={run.config.base_dtype}")
    for name in ("data", "prompt_format", "chat_template"):  # what says how the model is asked
        if name in run.adapter_metadata:
            metadata[name] = run.adapter_metadata[name]
    for dtype in dtypes:
        rounded = str(dtype).removeprefix("torch.")
        say(f"Merged weights are rounded once to the dtype of the base's, {rounded}")
    say(wrote_line(path, save_checkpoint(path, run.model, metadata, run.base)))
