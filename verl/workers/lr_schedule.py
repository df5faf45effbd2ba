"""Learning rate over optimizer steps."""

import math

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from verl.trainer.config.schema import OptimConfig


def lr_factor(kind: str, step: int, warmup_steps: int, total_steps: int) -> float:
    """Factor on the peak rate at `step` (from 0): linear warm-up, then constant, or linear or cosine decay to 0."""
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    if kind == "constant":
        return 1.0
    progress = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
    return 1.0 - progress if kind == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))


def lr_schedule(optimizer: Optimizer, optim: OptimConfig, total_steps: int) -> LambdaLR:
    """The schedule of `optim` over `total_steps` optimizer steps."""
    warmup = max(0, optim.lr_warmup_steps)
    return LambdaLR(optimizer, lambda step: lr_factor(optim.lr_scheduler_type, step, warmup, total_steps))
