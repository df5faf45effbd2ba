"""A critic's values, and one step's update of it on this worker's rows: mini-batches, loss, gradient, optimizer."""

from collections import defaultdict

import torch
from torch.distributed.fsdp import FSDPModule

from verl.protocol import DataProto
from verl.trainer.config.schema import ActorConfig
from verl.trainer.ppo.policy_losses import LossTotals, token_weights
from verl.workers.fsdp_engine import FSDPEngine
from verl.workers.sequences import MicroBatchSpec, Sequences, dummy_row, micro_batches


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


class ValueUpdate:
    """Moves the critic of `engine` towards the returns, with the policy's mini-batches, epochs and aggregation."""

    def __init__(self, engine: FSDPEngine, config: ActorConfig, cliprange: float) -> None:
        self.engine = engine
        self.config = config
        self.cliprange = cliprange
        self.spec = MicroBatchSpec.from_config(
            config.ppo_micro_batch_size_per_gpu, config.use_dynamic_bsz, config.ppo_max_token_len_per_gpu
        )

    def __call__(self, data: DataProto) -> dict[str, float]:
        """Run `ppo_epochs` passes over the mini-batches and return the metrics, averaged over optimizer steps.

        `data` holds this worker's rows of every mini-batch: the columns of `Sequences.from_batch`, `values` before the
        update and `returns` (N, T), and `mini_batch` (N,) int64, the number of the row's mini-batch, of which there are
        meta_info["n_mini_batches"] over all workers; `loss_mask` (N, T), the response tokens that count, if not all.
        """
        data, _ = self.engine.rows_of_group(data)
        steps: list[dict[str, float]] = []
        for _ in range(self.config.ppo_epochs):
            for number in range(data.meta_info["n_mini_batches"]):
                rows = (data["mini_batch"] == number).nonzero().squeeze(1)
                steps.append(self._mini_batch(data.select_rows(rows)))
        totals = {name: sum(step[name] for step in steps) for name in steps[0]}
        return {
            name: total if name == "critic/skipped_updates" else total / len(steps) for name, total in totals.items()
        }

    def _mini_batch(self, data: DataProto) -> dict[str, float]:
        totals = self._totals(_loss_mask(data))
        sums: dict[str, torch.Tensor] = defaultdict(lambda: torch.zeros((), dtype=torch.float64))
        parts = micro_batches(data, self.spec, self.engine.layout)
        for number, rows in enumerate(parts):
            # The dummy row of a worker that has run out of rows goes the same way, with an empty mask.
            micro = data.select_rows(rows) if len(rows) else dummy_row(data)
            mask = _loss_mask(micro) & (len(rows) > 0)
            self._micro_batch(micro, mask.to(self.engine.device), totals, sums, last=number + 1 == len(parts))
        values = self.engine.sum_over_workers(torch.stack(list(sums.values())))
        step = self.engine.step()
        return dict(zip(sums, values.tolist(), strict=True)) | {
            "critic/grad_norm": step["actor/grad_norm"],
            "critic/lr": step["actor/lr"],
            "critic/skipped_updates": step["actor/skipped_updates"],
        }

    def _micro_batch(
        self,
        data: DataProto,
        mask: torch.Tensor,
        totals: LossTotals,
        sums: dict[str, torch.Tensor],
        last: bool,
    ) -> None:
        device = self.engine.device
        weights = token_weights(mask, self.config.loss_agg_mode, totals)
        values = forward_values(self.engine, data)
        loss, clipped = value_loss(values, data["values"].to(device), data["returns"].to(device), self.cliprange)
        self.engine.backward((loss * weights).sum(), last)
        sums["critic/vf_loss"] += (loss.detach() * weights).sum().cpu()
        sums["critic/vf_clipfrac"] += (clipped * mask).sum().cpu() / totals.tokens

    def _totals(self, mask: torch.Tensor) -> LossTotals:
        """Tokens and sequences of the whole mini-batch, over all workers."""
        counts = torch.tensor([mask.sum(), mask.any(dim=1).sum()], dtype=torch.float64)
        tokens, sequences = self.engine.sum_over_workers(counts).tolist()
        return LossTotals(max(1, int(tokens)), max(1, int(sequences)), mask.shape[1])


def _loss_mask(data: DataProto) -> torch.Tensor:
    return data["loss_mask"] if "loss_mask" in data else data["response_mask"]
