"""Ulysses sequence parallelism (arXiv 2309.14509): the workers of a group share one packed row.

Each worker holds a slice of the row's tokens. Attention needs whole sequences: before it every worker gives away its
tokens of all heads but its own, and gets all tokens of its own heads; after it the exchange is undone.

Gradients: a worker's backward pass covers its own slice of the loss (`sum_over_group` passes gradients through
unsummed), so the sum over ALL workers is the gradient. FSDP2 averages over all of them: the loss is scaled by the
number of workers, whatever the group's size. All workers of a group compute the same rows: `gather_rows`.
"""

import math
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from transformers import PretrainedConfig

from verl.protocol import DataProto
from verl.workers.packing import Packing

KEY = "actor_rollout_ref.actor.ulysses_sequence_parallel_size"


def check_size(config: PretrainedConfig, size: int, workers: int) -> None:
    """ValueError unless groups of `size` can share the model's attention heads and divide the workers. `config`: the
    model's."""
    heads = config.get_text_config().num_attention_heads
    if size < 1 or heads % size or workers % size:
        sizes = ", ".join(str(n) for n in range(1, workers + 1) if heads % n == 0 and workers % n == 0)
        raise ValueError(
            f"{KEY}={size} must divide the model's {heads} attention heads and the {workers} training workers: use one "
            f"of {sizes}"
        )


def make_group(size: int) -> dist.ProcessGroup | None:
    """The group of `size` neighbouring ranks that this worker belongs to; None for groups of one. Collective."""
    if size == 1:
        return None
    groups = [dist.new_group(range(first, first + size)) for first in range(0, dist.get_world_size(), size)]
    return groups[dist.get_rank() // size]


def gather_rows(data: DataProto, group: dist.ProcessGroup | None) -> tuple[DataProto, np.ndarray]:
    """The rows of all workers of the group, in the order of their ranks, and which of them are this worker's.

    So each row is sent to one worker and its results come from one, with sequence parallelism and without. Collective.
    """
    if group is None:
        return data, np.arange(len(data))
    parts: list[Any] = [None] * group.size()
    dist.all_gather_object(parts, data, group=group)
    first = sum(len(part) for part in parts[: group.rank()])
    own = np.arange(first, first + len(data))
    # A worker without rows cannot know the trailing shapes, so it has no say.
    return DataProto.concat([part for part in parts if len(part)] or parts[:1]), own


class Ulysses:
    """A packing (see `packing.Packing`) of which this worker holds N / s tokens; `whole` computes all N."""

    def __init__(self, whole: Packing, group: dist.ProcessGroup) -> None:
        self.whole = whole
        self.group = group

    def attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float | None, window: int | None
    ) -> torch.Tensor:
        """query (N / s, heads, D), key and value (N / s, KV heads, D) of this worker's tokens; see `Packing`."""
        size, kv_heads = self.group.size(), key.shape[1]
        # Every worker needs the KV heads that its query heads use: repeated until they divide.
        copies = math.lcm(kv_heads, size) // kv_heads
        key, value = key.repeat_interleave(copies, 1), value.repeat_interleave(copies, 1)
        shares = [tensor.unflatten(1, (size, -1)) for tensor in (query, key, value)]
        heads = [share.shape[2] for share in shares]
        everything = torch.cat(shares, dim=2).transpose(0, 1)  # (s, N / s, heads of a worker, D): by receiver
        query, key, value = _Exchange.apply(everything, self.group).flatten(0, 1).split(heads, dim=1)
        output = self.whole.attend(query, key, value, scale, window)  # (N, heads / s, D)
        output = _Exchange.apply(output.unflatten(0, (size, -1)), self.group)  # (s, N / s, heads / s, D): by sender
        return output.transpose(0, 1).flatten(1, 2)


def sum_over_group(values: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """The elementwise sum over the group; each worker's gradient is that of its own summand."""
    return _SumOverGroup.apply(values, group)


class _Exchange(torch.autograd.Function):
    """(s, ...): part i goes to worker i of the group, and the part that worker i sent comes back in its place. The
    exchange is its own transpose."""

    @staticmethod
    def forward(ctx: Any, parts: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        ctx.group = group
        received = torch.empty(parts.shape, dtype=parts.dtype, device=parts.device)
        dist.all_to_all_single(received, parts.contiguous(), group=group)
        return received

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        return _Exchange.apply(grads[0], ctx.group), None


class _SumOverGroup(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        total = values.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grads[0], None
