"""How a model is divided among the workers by FSDP2."""

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from verl.utils.device import compute_dtype

KEY = "actor_rollout_ref.actor.fsdp_config.fsdp_size"


def make_mesh(device: torch.device, fsdp_size: int) -> DeviceMesh:
    """All workers in one dimension, or (hybrid sharding) groups of `fsdp_size` that each hold the whole model: weights
    are gathered within a group, gradients are summed over groups too. -1: one group."""
    workers = dist.get_world_size()
    if fsdp_size in (-1, workers):
        return init_device_mesh(device.type, (workers,), mesh_dim_names=("shard",))
    if fsdp_size < 1 or workers % fsdp_size:
        sizes = ", ".join(str(n) for n in range(1, workers + 1) if workers % n == 0)
        raise ValueError(f"{KEY}={fsdp_size} does not divide {workers} training workers: use -1 or one of {sizes}")
    return init_device_mesh(device.type, (workers // fsdp_size, fsdp_size), mesh_dim_names=("replicate", "shard"))


def shard(model: nn.Module, layers: Iterable[nn.Module], mesh: DeviceMesh, device: torch.device) -> FSDPModule:
    """Shard every one of `layers`, then the rest of `model`, over `mesh`: fp32 masters, computing in the device's
    dtype."""
    policy = MixedPrecisionPolicy(param_dtype=compute_dtype(device), reduce_dtype=torch.float32)
    for layer in layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    return fully_shard(model, mesh=mesh, mp_policy=policy)
