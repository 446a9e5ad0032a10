"""The optimizer of a run, its learning rate at each step, and the scale and norm of gradients."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from trainer.settings import Config


def make_optimizer(config: Config, model: nn.Module) -> torch.optim.AdamW:
    """Fused AdamW of what trains; weight decay on matrices only.

    The adapters' B, which start at zero, learn LORA_PLUS_RATIO times as fast as the rest (LoRA+,
    Hayou et al. 2024). A group's `lr_ratio` is its learning rate over the run's.
    """
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            groups.setdefault((name.endswith("lora_B"), p.dim() >= 2), []).append(p)
    return torch.optim.AdamW(
        [
            {
                "params": group,
                "lr_ratio": config.lora_plus_ratio if is_B else 1.0,
                "weight_decay": config.weight_decay if is_matrix else 0.0,
            }
            for (is_B, is_matrix), group in groups.items()
        ],
        lr=config.learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        fused=True,
    )


def make_scaler(device: torch.device, dtype: torch.dtype) -> torch.amp.GradScaler:
    """What multiplies the loss in float16, so that small gradients are not rounded to 0, and leaves
    out steps whose gradients are then too large (Micikevicius et al. 2017, arXiv 1710.03740).

    In other dtypes it does nothing.
    """
    return torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)


def learning_rate(config: Config, step: int) -> float:
    """Linear warm-up, then a cosine from LEARNING_RATE to MIN_LEARNING_RATE at the last step."""
    warmup = min(config.warmup_steps, config.max_steps // 2)
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    low = config.min_learning_rate
    if low is None:
        low = config.learning_rate / 10
    progress = (step - warmup) / max(1, config.max_steps - 1 - warmup)
    return low + (config.learning_rate - low) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
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
