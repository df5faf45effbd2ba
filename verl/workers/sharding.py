"""How a model is divided among the workers by FSDP2."""

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from verl.utils.device import compute_dtype
from verl.workers.model import ScoringModel


def shard(model: ScoringModel, mesh: DeviceMesh, device: torch.device) -> ScoringModel:
    """Shard every decoder layer, then the rest, over `mesh`: fp32 masters, computing in the device's dtype."""
    policy = MixedPrecisionPolicy(param_dtype=compute_dtype(device), reduce_dtype=torch.float32)
    for layer in model.lm.get_decoder().layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    return model
