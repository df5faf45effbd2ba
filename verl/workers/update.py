"""What the policy's and the critic's update share: epochs, mini-batches, micro-batches, gradient, optimizer."""

import math
from collections import defaultdict
from typing import Generic, TypeVar

import numpy as np
import torch

from verl.protocol import DataProto
from verl.trainer.config.schema import ActorConfig
from verl.trainer.ppo.policy_losses import LossTotals
from verl.workers.fsdp_engine import FSDPEngine
from verl.workers.sequences import MicroBatchSpec, dummy_row, micro_batches

Sums = dict[str, torch.Tensor]  # this worker's share of metrics that are sums over a mini-batch: name -> float64 scalar
Seen = TypeVar("Seen")


class MiniBatchUpdate(Generic[Seen]):
    """Moves the model of `engine` by the gradient of the loss that a subclass computes in `micro_batch`. `name` begins
    the names of the metrics."""

    name: str

    def __init__(self, engine: FSDPEngine, config: ActorConfig) -> None:
        self.engine = engine
        self.config = config
        self.spec = MicroBatchSpec.from_config(
            config.ppo_micro_batch_size_per_gpu, config.use_dynamic_bsz, config.ppo_max_token_len_per_gpu
        )

    def micro_batch(
        self, data: DataProto, mask: torch.Tensor, totals: LossTotals, sums: Sums
    ) -> tuple[torch.Tensor, Seen]:
        """The loss of some rows, a share of the mini-batch's, and what the caller of `run` is to see. `mask` (R, T), on
        the device: the tokens that count. Adds to `sums`."""
        raise NotImplementedError

    def run(self, data: DataProto) -> tuple[dict[str, float], list[tuple[np.ndarray, Seen]]]:
        """`ppo_epochs` passes over the mini-batches of `data`. Returns metrics, averaged over optimizer steps, and what
        was seen of which rows, in that order.

        `data` holds this worker's rows of every mini-batch: the columns of `Sequences.from_batch`, those of the loss,
        and `mini_batch` (N,) int64, the number of the row's mini-batch, of which there are meta_info["n_mini_batches"]
        over all workers. `loss_mask` (N, T): the response tokens that count in the loss; all, where it is missing.
        """
        steps, seen = [], []
        for _ in range(self.config.ppo_epochs):
            for number in range(data.meta_info["n_mini_batches"]):
                rows = (data["mini_batch"] == number).nonzero().squeeze(1)
                metrics, parts = self._mini_batch(data.select_rows(rows))
                steps.append(metrics)
                seen += [(rows.numpy()[part], values) for part, values in parts]
        totals = {name: sum(step[name] for step in steps) for name in steps[0]}
        skipped = f"{self.name}/skipped_updates"
        return {name: total if name == skipped else total / len(steps) for name, total in totals.items()}, seen

    def _mini_batch(self, data: DataProto) -> tuple[dict[str, float], list[tuple[np.ndarray, Seen]]]:
        totals = self._totals(_loss_mask(data))
        sums: Sums = defaultdict(lambda: torch.zeros((), dtype=torch.float64))
        parts = micro_batches(data, self.spec, self.engine.layout)
        seen, whole = [], torch.zeros((), dtype=torch.float64)
        for number, rows in enumerate(parts):
            # The dummy row of a worker that has run out of rows goes the same way, with an empty mask.
            micro = data.select_rows(rows) if len(rows) else dummy_row(data)
            mask = _loss_mask(micro) & (len(rows) > 0)
            loss, values = self.micro_batch(micro, mask.to(self.engine.device), totals, sums)
            whole += loss.detach().cpu()
            self.engine.backward(loss, last=number + 1 == len(parts))
            if len(rows):
                seen.append((rows, values))
        # Of all workers: they skip a step together.
        total_loss, *totalled = self.engine.sum_over_workers(torch.stack([whole, *sums.values()])).tolist()
        stepped = self.engine.step(usable=math.isfinite(total_loss))
        metrics = dict(zip(sums, totalled, strict=True))
        return metrics | {f"{self.name}/{key}": value for key, value in stepped.items()}, seen

    def _totals(self, mask: torch.Tensor) -> LossTotals:
        """Tokens and sequences of the whole mini-batch, over all workers."""
        counts = torch.tensor([mask.sum(), mask.any(dim=1).sum()], dtype=torch.float64)
        tokens, sequences = self.engine.sum_over_workers(counts).tolist()
        return LossTotals(max(1, int(tokens)), max(1, int(sequences)), mask.shape[1])


def _loss_mask(data: DataProto) -> torch.Tensor:
    return data["loss_mask"] if "loss_mask" in data else data["response_mask"]
