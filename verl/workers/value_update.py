"""A critic's values, and one step's update of it on this worker's rows."""

import torch
from torch.distributed.fsdp import FSDPModule

from verl.protocol import DataProto
from verl.trainer.config.schema import ActorConfig
from verl.trainer.ppo.policy_losses import LossTotals, token_weights
from verl.workers.fsdp_engine import FSDPEngine
from verl.workers.sequences import MicroBatchSpec, Sequences, dummy_row, micro_batches
from verl.workers.update import MiniBatchUpdate, Sums


def value_loss(
    values: torch.Tensor, old_values: torch.Tensor, returns: torch.Tensor, cliprange: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss of each token, and whether it is clipped; all tensors have one shape.

    0.5 max((v - R)^2, (clip(v, v_old - c, v_old + c) - R)^2), c the `cliprange`: a value that has come more than c
    closer to its return gives no gradient. "Value function clipping" in arXiv 2005.12729, section 3.
    """
    clipped = torch.clamp(values, old_values - cliprange, old_values + cliprange)
    error, clipped_error = (values - returns).square(), (clipped - returns).square()
    return 0.5 * torch.maximum(error, clipped_error), clipped_error > error


def forward_values(engine: FSDPEngine, data: DataProto) -> torch.Tensor:
    """(R, T) float32 on the engine's device, the value of the state before each response token, 0 elsewhere;
    differentiable. `engine` holds a ValueModel."""
    sequences = Sequences.from_batch(data, engine.device, engine.layout)
    return sequences.to_rows(engine.model(sequences))


@torch.no_grad()
def compute_values(engine: FSDPEngine, data: DataProto, spec: MicroBatchSpec) -> torch.Tensor:
    """(N, T) float32 on the CPU, the values of this worker's rows."""
    data, own = engine.rows_of_group(data)
    values = torch.zeros(data["responses"].shape, dtype=torch.float32)
    for rows in micro_batches(data, spec, engine.layout):
        micro = forward_values(engine, data.select_rows(rows) if len(rows) else dummy_row(data))
        if len(rows):
            values[rows] = micro.cpu()
    assert isinstance(engine.model, FSDPModule)
    engine.model.reshard()  # without a backward pass after it, the root would stay gathered
    return values[own]


class ValueUpdate(MiniBatchUpdate[None]):
    """Moves the critic of `engine` towards the returns, with the policy's mini-batches, epochs and aggregation."""

    name = "critic"

    def __init__(self, engine: FSDPEngine, config: ActorConfig, cliprange: float) -> None:
        super().__init__(engine, config)
        self.cliprange = cliprange

    def __call__(self, data: DataProto) -> dict[str, float]:
        """Run the passes over `data`, which is as in `run`, with `values` before the update and `returns` (N, T).
        Returns the metrics."""
        data, _ = self.engine.rows_of_group(data)
        return self.run(data)[0]

    def micro_batch(
        self, data: DataProto, mask: torch.Tensor, totals: LossTotals, sums: Sums
    ) -> tuple[torch.Tensor, None]:
        """The loss."""
        device = self.engine.device
        weights = token_weights(mask, self.config.loss_agg_mode, totals)
        values = forward_values(self.engine, data)
        loss, clipped = value_loss(values, data["values"].to(device), data["returns"].to(device), self.cliprange)
        sums["critic/vf_loss"] += (loss.detach() * weights).sum().cpu()
        sums["critic/vf_clipfrac"] += (clipped * mask).sum().cpu() / totals.tokens
        return (loss * weights).sum(), None
