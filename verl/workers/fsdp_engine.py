"""The training engine: a model sharded by FSDP2, and its optimizer. `engine_checkpoint` saves, loads and exports it.

Every method is a collective: all workers of the group call it together.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from verl.protocol import DataProto
from verl.trainer.config.schema import OptimConfig
from verl.workers.lr_schedule import lr_schedule
from verl.workers.model import ScoringModel
from verl.workers.sequences import MicroBatchSpec, Sequences, dummy_row, micro_batches
from verl.workers.sharding import shard


@dataclass(frozen=True)
class EngineSettings:
    """`grad_clip`: largest norm of the gradient. `max_skipped_updates`: so many in a row are an error."""

    grad_clip: float = 1.0
    gradient_checkpointing: bool = False
    max_skipped_updates: int = 10


class FSDPEngine:
    """See the module's docstring. `optim=None` freezes the model (the reference policy)."""

    def __init__(
        self,
        model: ScoringModel,
        device: torch.device,
        optim: OptimConfig | None = None,
        total_steps: int = -1,
        settings: EngineSettings | None = None,
    ) -> None:
        self.device = device
        self.optim = optim
        self.settings = settings or EngineSettings()
        self.skipped_in_a_row = 0
        self.mesh = init_device_mesh(device.type, (dist.get_world_size(),))
        self.config, self.generation_config = model.lm.config, model.lm.generation_config
        if self.settings.gradient_checkpointing and optim is not None:
            model.lm.gradient_checkpointing_enable({"use_reentrant": False})
        model.train(optim is not None)
        self.model = shard(model.requires_grad_(optim is not None), self.mesh, device)
        if optim is not None:
            self.optimizer = torch.optim.AdamW(
                self.model.parameters(), lr=optim.lr, weight_decay=optim.weight_decay, betas=(0.9, 0.999)
            )
            self.scheduler = lr_schedule(self.optimizer, optim, total_steps)

    # ------------------------------------------------------------------------------------------------- computing
    def forward(self, data: DataProto, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
        """log_prob and entropy, (R, T) float32 on the engine's device, 0 outside the responses; differentiable."""
        sequences = Sequences.from_batch(data, self.device)
        log_prob, entropy = self.model(sequences, temperature)
        return sequences.to_rows(log_prob), sequences.to_rows(entropy)

    @torch.no_grad()
    def log_prob(self, data: DataProto, temperature: float, spec: MicroBatchSpec) -> tuple[torch.Tensor, torch.Tensor]:
        """log_prob and entropy, (N, T) float32 on the CPU, of this worker's rows."""
        log_prob = torch.zeros(data["responses"].shape, dtype=torch.float32)
        entropy = torch.zeros_like(log_prob)
        for rows in micro_batches(data, spec):
            micro = data.select_rows(rows) if len(rows) else dummy_row(data)
            log_p, ent = self.forward(micro, temperature)
            if len(rows):
                log_prob[rows], entropy[rows] = log_p.cpu(), ent.cpu()
        assert isinstance(self.model, FSDPModule)
        self.model.reshard()  # without a backward pass after it, the root would stay gathered
        return log_prob, entropy

    def backward(self, loss: torch.Tensor) -> None:
        """Add the gradient of `loss`, this worker's share of a sum over all workers."""
        # FSDP2 averages gradients over workers: scaled by their number, the average is the sum.
        (loss * dist.get_world_size()).backward()

    def step(self) -> dict[str, float]:
        """Clip the gradient, move the weights, and forget the gradient.

        A non-finite gradient moves nothing; `max_skipped_updates` of them in a row are a RuntimeError.
        """
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.grad_clip)
        grad_norm = float(norm.full_tensor() if isinstance(norm, DTensor) else norm)
        finite = math.isfinite(grad_norm)
        self.skipped_in_a_row = 0 if finite else self.skipped_in_a_row + 1
        if self.skipped_in_a_row >= self.settings.max_skipped_updates:
            raise RuntimeError(
                f"the gradient was not finite in {self.skipped_in_a_row} updates in a row: look at the rewards, lower "
                "the learning rate, or raise actor_rollout_ref.actor.max_skipped_updates"
            )
        lr = self.optimizer.param_groups[0]["lr"]
        if finite:
            self.optimizer.step()
            self.scheduler.step()
        self.optimizer.zero_grad()
        return {"actor/grad_norm": grad_norm, "actor/lr": lr, "actor/skipped_updates": float(not finite)}

    def sum_over_workers(self, values: torch.Tensor) -> torch.Tensor:
        """The elementwise sum of a small CPU tensor over all workers."""
        if dist.get_world_size() > 1:
            dist.all_reduce(values)
        return values

    # --------------------------------------------------------------------------------------------------- weights
    def full_parameters(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Hugging Face name and whole tensor of each parameter, one at a time; tied weights come once."""
        for name, parameter in self.model.lm.named_parameters():
            tensor = parameter.detach()
            yield name, tensor.full_tensor() if isinstance(tensor, DTensor) else tensor

    def parameter_shapes(self) -> dict[str, torch.Size]:
        """The whole shape of each tensor of `full_parameters`, in its order."""
        return {name: parameter.shape for name, parameter in self.model.lm.named_parameters()}
