"""Weights and optimizer state that wait in the CPU's memory while they are not used."""

import torch
from torch import nn
from torch.optim import Optimizer


def move_parameters(model: nn.Module, device: torch.device) -> None:
    """Move a (sharded) model's weights."""
    model.to(device)


def move_optimizer(optimizer: Optimizer, device: torch.device) -> None:
    """Move the moments of the parameters; the step counts stay on the CPU, where torch keeps them."""
    for state in optimizer.state.values():
        for name, value in state.items():
            if isinstance(value, torch.Tensor) and value.ndim > 0:
                state[name] = value.to(device)
