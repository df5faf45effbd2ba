"""The training engine: a model sharded by FSDP2, and its optimizer. `engine_checkpoint` saves, loads and exports it.

Every method is a collective: all workers of the group call it together.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from verl.protocol import DataProto
from verl.trainer.config.schema import ActorRolloutRefConfig, OptimConfig
from verl.utils.device import release_memory
from verl.workers.lora import hub_name, is_adapter, merged_parameters
from verl.workers.lr_schedule import lr_schedule
from verl.workers.model import ScoringModel, ValueModel
from verl.workers.offload import move_optimizer, move_parameters
from verl.workers.sequences import Layout, MicroBatchSpec, Sequences, dummy_row, micro_batches
from verl.workers.sharding import make_mesh, shard
from verl.workers.ulysses import check_size, gather_rows, make_group

CPU = torch.device("cpu")
MAX_SKIPPED_UPDATES = 10  # in a row, with a loss or gradient that is not finite: then the run is lost


@dataclass(frozen=True)
class EngineSettings:
    """How a model is trained.

    grad_clip: largest norm of the gradient. fsdp_size: see `make_mesh`. param_offload, optimizer_offload: what waits in
    the CPU's memory outside `resident`. reduce_per_mini_batch: gradients stay whole on every worker until the last
    micro-batch (see `backward`). packed: see `Layout`; the model was loaded for it. sequence_parallel_size: workers
    that share a packed row (Ulysses).
    """

    grad_clip: float = 1.0
    gradient_checkpointing: bool = False
    fsdp_size: int = -1
    param_offload: bool = False
    optimizer_offload: bool = False
    reduce_per_mini_batch: bool = False
    packed: bool = False
    sequence_parallel_size: int = 1

    @classmethod
    def of_actor(cls, config: ActorRolloutRefConfig) -> "EngineSettings":
        actor, fsdp = config.actor, config.actor.fsdp_config
        return cls(
            actor.grad_clip,
            config.model.enable_gradient_checkpointing,
            fsdp.fsdp_size,
            fsdp.param_offload,
            fsdp.optimizer_offload,
            fsdp.reduce_per_mini_batch,
            config.model.use_remove_padding,
            actor.ulysses_sequence_parallel_size,
        )


class FSDPEngine:
    """See the module's docstring. `optim=None` freezes the model (the reference policy)."""

    def __init__(
        self,
        model: ScoringModel | ValueModel,
        device: torch.device,
        optim: OptimConfig | None = None,
        total_steps: int = -1,
        settings: EngineSettings | None = None,
    ) -> None:
        self.device = device
        self.optim = optim
        self.settings = settings or EngineSettings()
        self.skipped_in_a_row = 0
        size = self.settings.sequence_parallel_size
        check_size(model.lm.config, size, dist.get_world_size())
        self.layout = Layout(self.settings.packed, make_group(size))
        self.mesh = make_mesh(device, self.settings.fsdp_size)
        self.config, self.generation_config = model.lm.config, model.lm.generation_config
        if self.settings.gradient_checkpointing and optim is not None:
            model.lm.gradient_checkpointing_enable({"use_reentrant": False})
        model.train(optim is not None)
        set_trainable(model, optim is not None)
        self.lm = model.lm
        self.model = model
        self.sharded = shard(model, model.lm.get_decoder().layers, self.mesh, device)  # the same, as FSDP2 sees it
        if optim is not None:
            trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
            self.optimizer = torch.optim.AdamW(trained, lr=optim.lr, weight_decay=optim.weight_decay)
            self.scheduler = lr_schedule(self.optimizer, optim, total_steps)
            if self.settings.reduce_per_mini_batch:
                moments = 0 if self.settings.optimizer_offload else 2
                own = sum(p.to_local().numel() if isinstance(p, DTensor) else p.numel() for p in trained)
                check_gradient_memory(sum(p.numel() for p in trained), moments * own, device)
        self._offload()

    # ---------------------------------------------------------------------------------------------------- memory
    @contextmanager
    def resident(self, optimizer: bool = False) -> Iterator[None]:
        """Within, the weights (and the optimizer's state) are on the device; afterwards what is offloaded leaves."""
        if self.settings.param_offload:
            move_parameters(self.model, self.device)
        if optimizer and self.settings.optimizer_offload:
            move_optimizer(self.optimizer, self.device)
        try:
            yield
        finally:
            self._offload()

    def _offload(self) -> None:
        if self.settings.param_offload:
            move_parameters(self.model, CPU)
        if self.settings.optimizer_offload and self.optim is not None:
            move_optimizer(self.optimizer, CPU)
        release_memory()

    # ------------------------------------------------------------------------------------------------- computing
    def forward(self, data: DataProto, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
        """log_prob and entropy, (R, T) float32 on the engine's device, 0 outside the responses; differentiable."""
        sequences = Sequences.from_batch(data, self.device, self.layout)
        log_prob, entropy = self.model(sequences, temperature)
        return sequences.to_rows(log_prob), sequences.to_rows(entropy)

    def rows_of_group(self, data: DataProto) -> tuple[DataProto, np.ndarray]:
        """The rows to compute on, those of all workers that share packed rows, and which of them are this worker's."""
        return gather_rows(data, self.layout.group)

    @torch.no_grad()
    def log_prob(self, data: DataProto, temperature: float, spec: MicroBatchSpec) -> tuple[torch.Tensor, torch.Tensor]:
        """log_prob and entropy, (N, T) float32 on the CPU, of this worker's rows."""
        data, own = self.rows_of_group(data)
        log_prob = torch.zeros(data["responses"].shape, dtype=torch.float32)
        entropy = torch.zeros_like(log_prob)
        for rows in micro_batches(data, spec, self.layout):
            micro = data.select_rows(rows) if len(rows) else dummy_row(data)
            log_p, ent = self.forward(micro, temperature)
            if len(rows):
                log_prob[rows], entropy[rows] = log_p.cpu(), ent.cpu()
        self.sharded.reshard()  # without a backward pass after it, the root would stay gathered
        return log_prob[own], entropy[own]

    def backward(self, loss: torch.Tensor, last: bool = True) -> None:
        """Add the gradient of `loss`, this worker's share of a sum over all workers. `last`: of the mini-batch."""
        if self.settings.reduce_per_mini_batch:
            self.sharded.set_requires_gradient_sync(last)
        # FSDP2 averages gradients over workers: scaled by their number, the average is the sum.
        (loss * dist.get_world_size()).backward()

    def step(self, usable: bool = True) -> dict[str, float]:
        """Clip the gradient, move the weights, and forget the gradient.

        One that is not finite, or (`usable`) whose loss is not, moves nothing; MAX_SKIPPED_UPDATES of them in a row are
        a RuntimeError.
        """
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.grad_clip)
        grad_norm = float(norm.full_tensor() if isinstance(norm, DTensor) else norm)
        finite = usable and math.isfinite(grad_norm)
        self.skipped_in_a_row = 0 if finite else self.skipped_in_a_row + 1
        if self.skipped_in_a_row >= MAX_SKIPPED_UPDATES:
            raise RuntimeError(
                f"the loss or its gradient was not finite in {self.skipped_in_a_row} updates in a row: look at the "
                "rewards, or lower the learning rate"
            )
        lr = self.optimizer.param_groups[0]["lr"]
        if finite:
            self.optimizer.step()
            self.scheduler.step()
        self.optimizer.zero_grad()
        return {"grad_norm": grad_norm, "lr": lr, "skipped_updates": float(not finite)}

    def sum_over_workers(self, values: torch.Tensor) -> torch.Tensor:
        """The elementwise sum of a small CPU tensor over all workers, those that share their rows counted once."""
        if dist.get_world_size() > 1:
            dist.all_reduce(values)
        return values / self.layout.workers

    # --------------------------------------------------------------------------------------------------- weights
    def full_parameters(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Hugging Face name and whole tensor of each parameter, one at a time, adapters merged; tied ones come once."""
        return merged_parameters(self.lm)

    def parameter_shapes(self) -> dict[str, torch.Size]:
        """The whole shape of each tensor of `full_parameters`, in its order."""
        named = self.lm.named_parameters()
        return {hub_name(name): parameter.shape for name, parameter in named if not is_adapter(name)}


def set_trainable(model: nn.Module, trained: bool) -> None:
    """Train all parameters, or the adapters alone where there are any, or (a reference policy) none."""
    adapters = any(is_adapter(name) for name, _ in model.named_parameters())
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trained and (not adapters or is_adapter(name)))


def check_gradient_memory(parameters: int, moments: int, device: torch.device) -> None:
    """ValueError if whole float32 gradients, beside the optimizer's moments (so many numbers of this worker), do not
    fit into what the GPU has free. Activations come on top."""
    if device.type != "cuda":
        return
    needed, free = 4 * parameters, torch.cuda.mem_get_info(device)[0] - 4 * moments
    if needed > free:
        raise ValueError(
            f"actor_rollout_ref.actor.fsdp_config.reduce_per_mini_batch=True keeps {needed / 2**30:.1f} GiB of "
            f"gradients on every GPU, which has {free / 2**30:.1f} GiB free beside the optimizer: set it to False"
        )
