"""The optimizer of a run, its learning rate at each step, and the scale and norm of gradients."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from models import LanguageModel
from trainer.muon import Muon
from trainer.settings import Config


def make_optimizer(config: Config, model: LanguageModel, dtype: torch.dtype) -> Optimizer:
    """AdamW of what trains, or Muon of the blocks' matrices and AdamW of the rest. `dtype` is that
    of the run's matrix products.

    Weights decay in matrices only. The adapters' B, which start at zero, learn LORA_PLUS_RATIO
    times as fast as the rest (LoRA+, Hayou et al. 2024). A group's `lr_ratio` is its learning rate
    over the run's.
    """
    by_muon = matrices_for_muon(config, model)
    groups: dict[tuple[bool, bool, bool], list[nn.Parameter]] = {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            kind = (name.endswith("lora_B"), p.dim() >= 2, id(p) in by_muon)
            groups.setdefault(kind, []).append(p)
    options = [
        {
            "params": group,
            "lr_ratio": config.lora_plus_ratio if is_B else 1.0,
            "weight_decay": config.weight_decay if is_matrix else 0.0,
            "orthogonal": orthogonal,
        }
        for (is_B, is_matrix, orthogonal), group in groups.items()
    ]
    common = {"lr": config.learning_rate, "betas": (config.adam_beta1, config.adam_beta2)}
    if config.optimizer == "muon":
        return Muon(options, **common, dtype=muon_dtype(dtype))
    return torch.optim.AdamW(options, **common, fused=True)


def muon_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of Muon's products in a run of this dtype."""
    return dtype if dtype == torch.bfloat16 else torch.float32


def matrices_for_muon(config: Config, model: LanguageModel) -> set[int]:
    """The ids of the parameters that Muon steps: none where OPTIMIZER is another."""
    if config.optimizer != "muon":
        return set()
    return {id(p) for p in model.blocks.parameters() if p.requires_grad and p.dim() >= 2}


def make_scaler(device: torch.device, dtype: torch.dtype) -> torch.amp.GradScaler:
    """What multiplies the loss in float16, so that small gradients are not rounded to 0, and leaves
    out steps whose gradients are then too large (Micikevicius et al. 2017, arXiv 1710.03740).

    In other dtypes it does nothing.
    """
    return torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)


def learning_rate(config: Config, step: int) -> float:
    """The run's learning rate at a step: a linear warm-up to LEARNING_RATE, and from there as
    SCHEDULE says to MIN_LEARNING_RATE, which the step after the last one would have."""
    warmup = min(config.warmup_steps, config.max_steps // 2)
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    high, low = config.learning_rate, config.min_learning_rate
    if low is None:
        low = high / 10 if config.schedule == "cosine" else 0.0
    progress = min(1.0, (step - warmup) / max(1, config.max_steps - warmup))
    left = {
        "linear": 1 - progress,
        "cosine": 0.5 * (1 + math.cos(math.pi * progress)),
        "constant": 1.0,
    }
    return low + (high - low) * left[config.schedule]


def set_learning_rate(optimizer: Optimizer, rate: float) -> None:
    """Give each group of parameters the run's rate times its `lr_ratio`."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["lr_ratio"]


def clip_gradients(parameters: Sequence[nn.Parameter], largest: float) -> Tensor:
    """Scale the gradients down to the norm `largest`, 0 for no limit.

    Returns the norm that all of them together had, () on their device, without waiting for it. Of
    sharded parameters every process must call it.
    """
    if largest > 0:
        norm = nn.utils.clip_grad_norm_(parameters, largest)
    else:
        norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm
