"""How a model is divided among the workers by FSDP2."""

from collections.abc import Iterable, Mapping

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

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
    dtype. The weights are those that worker 0's `model` has; what they are on the others does not matter."""
    policy = MixedPrecisionPolicy(param_dtype=compute_dtype(device), reduce_dtype=torch.float32)
    first = dist.get_rank() == 0
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()} if first else {}
    for layer in layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    sharded = fully_shard(model, mesh=mesh, mp_policy=policy)
    if dist.get_world_size() > 1:
        _spread(model, weights, device)
    return sharded


@torch.no_grad()
def _spread(model: nn.Module, weights: Mapping[str, torch.Tensor], device: torch.device) -> None:
    """Bring each worker its part of the `weights` that worker 0 has, one tensor at a time."""
    own = [f"{name} {list(parameter.shape)}" for name, parameter in model.named_parameters()]
    first = [own]
    dist.broadcast_object_list(first, src=0)
    if first[0] != own:  # the workers would wait for each other, or scatter what does not fit
        raise RuntimeError(f"worker 0 has another model; what differs: {sorted(set(first[0]) ^ set(own))[:4]}")
    for name, parameter in model.named_parameters():
        assert isinstance(parameter, DTensor)
        if dist.get_rank() == 0:
            whole = weights[name].to(device)
        else:
            whole = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
        parts = distribute_tensor(whole, parameter.device_mesh, parameter.placements)  # scatters worker 0's
        parameter.to_local().copy_(parts.to_local())
