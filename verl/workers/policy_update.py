"""One step's policy update on this worker's rows: mini-batches, losses, gradient, optimizer."""

from collections import defaultdict
from collections.abc import Iterable

import numpy as np
import torch

from verl.protocol import DataProto
from verl.trainer.config.schema import ActorConfig
from verl.trainer.ppo.core_algos import get_policy_loss
from verl.trainer.ppo.kl import kl_penalty
from verl.trainer.ppo.policy_losses import LossTotals, token_weights
from verl.workers.fsdp_engine import FSDPEngine
from verl.workers.sequences import MicroBatchSpec, dummy_row, micro_batches


class PolicyUpdate:
    """Moves the policy of `engine` by the gradient of the configured loss."""

    def __init__(self, engine: FSDPEngine, config: ActorConfig, temperature: float) -> None:
        self.engine = engine
        self.config = config
        self.temperature = temperature
        self.policy_loss = get_policy_loss(config.policy_loss.loss_mode)
        self.spec = MicroBatchSpec.from_config(
            config.ppo_micro_batch_size_per_gpu, config.use_dynamic_bsz, config.ppo_max_token_len_per_gpu
        )

    def __call__(self, data: DataProto) -> tuple[DataProto | None, dict[str, float]]:
        """Run `ppo_epochs` passes over the mini-batches. Returns what the update has seen, (N, T) each, and the
        metrics, averaged over optimizer steps. Seen are `old_log_probs` where `data` has none, and `entropy` if
        meta_info["with_entropy"]; None, if neither is asked for.

        `data` holds this worker's rows of every mini-batch: the columns of `Sequences.from_batch`, `old_log_probs`
        and `advantages` (N, T), and `mini_batch` (N,) int64, the number of the row's mini-batch, of which there are
        meta_info["n_mini_batches"] over all workers. Where configured, each (N, T): `ref_log_prob` of the KL loss,
        `selected` of a policy loss that chooses tokens, `rollout_is_weights` that the policy loss is multiplied with,
        and `loss_mask`, the response tokens that count in the loss (all, where it is missing).
        Without `old_log_probs` they are those of the update's one pass, in which nothing has moved yet: every ratio
        is 1.
        """
        if "old_log_probs" not in data and (self.config.ppo_epochs > 1 or data.meta_info["n_mini_batches"] > 1):
            raise ValueError("old_log_probs may be left out of a batch with one update alone")
        data, own = self.engine.rows_of_group(data)
        wanted = ["entropy"] if data.meta_info["with_entropy"] else []
        wanted += [] if "old_log_probs" in data else ["old_log_probs"]
        seen = {name: torch.zeros(data["responses"].shape) for name in wanted}
        steps: list[dict[str, float]] = []
        for _ in range(self.config.ppo_epochs):
            for number in range(data.meta_info["n_mini_batches"]):
                rows = (data["mini_batch"] == number).nonzero().squeeze(1)
                metrics, parts = self._mini_batch(data.select_rows(rows))
                steps.append(metrics)
                for part, values in parts:
                    for name in wanted:
                        seen[name][rows[part]] = values[name]
        metrics = {
            name: (sum if name == "actor/skipped_updates" else _mean)(step[name] for step in steps) for name in steps[0]
        }
        return DataProto.from_dict(seen).select_rows(own) if wanted else None, metrics

    def _mini_batch(self, data: DataProto) -> tuple[dict[str, float], list[tuple[np.ndarray, dict[str, torch.Tensor]]]]:
        """Metrics; and of each micro-batch its rows with their log-probs and entropies."""
        totals = self._totals(_loss_mask(data))
        sums: dict[str, torch.Tensor] = defaultdict(lambda: torch.zeros((), dtype=torch.float64))
        parts = micro_batches(data, self.spec, self.engine.layout)
        seen = []
        for number, rows in enumerate(parts):
            # The dummy row of a worker that has run out of rows goes the same way, with an empty mask.
            micro = data.select_rows(rows) if len(rows) else dummy_row(data)
            mask = _loss_mask(micro) & (len(rows) > 0)
            values = self._micro_batch(micro, mask.to(self.engine.device), totals, sums, number + 1 == len(parts))
            if len(rows):
                seen.append((rows, values))
        constants = {"actor/kl_coef": self.config.kl_loss_coef} if self.config.use_kl_loss else {}
        totals_of = self.engine.sum_over_workers(torch.stack(list(sums.values())))
        return dict(zip(sums, totals_of.tolist(), strict=True)) | constants | self.engine.step(), seen

    def _micro_batch(
        self,
        data: DataProto,
        mask: torch.Tensor,
        totals: LossTotals,
        sums: dict[str, torch.Tensor],
        last: bool,
    ) -> dict[str, torch.Tensor]:
        config, device = self.config, self.engine.device
        weights = token_weights(mask, config.loss_agg_mode, totals)
        log_prob, entropy = self.engine.forward(data, self.temperature)
        chosen = {"selected": data["selected"].to(device)} if "selected" in data else {}
        old_log_prob = data["old_log_probs"].to(device) if "old_log_probs" in data else log_prob.detach()
        pg_loss, metrics = self.policy_loss(
            old_log_prob, log_prob, data["advantages"].to(device), mask, config, **chosen
        )
        if "rollout_is_weights" in data:
            pg_loss = pg_loss * data["rollout_is_weights"].to(device)
        loss = pg_loss
        if config.entropy_coeff != 0:
            loss = loss - config.entropy_coeff * entropy
        if config.use_kl_loss:
            kl = kl_penalty(log_prob, data["ref_log_prob"].to(device), config.kl_loss_type)
            loss = loss + config.kl_loss_coef * kl
            metrics = metrics | {"actor/kl_loss": kl}
        self.engine.backward((loss * weights).sum(), last)
        sums["actor/pg_loss"] += (pg_loss.detach() * weights).sum().cpu()
        for name, values in metrics.items():
            sums[name] += (values.detach() * mask).sum().cpu() / totals.tokens
        return {"old_log_probs": log_prob.detach().cpu(), "entropy": entropy.detach().cpu()}

    def _totals(self, response_mask: torch.Tensor) -> LossTotals:
        """Tokens and sequences of the whole mini-batch, over all workers."""
        counts = torch.tensor([response_mask.sum(), response_mask.any(dim=1).sum()], dtype=torch.float64)
        tokens, sequences = self.engine.sum_over_workers(counts).tolist()
        return LossTotals(max(1, int(tokens)), max(1, int(sequences)), response_mask.shape[1])


def _loss_mask(data: DataProto) -> torch.Tensor:
    return data["loss_mask"] if "loss_mask" in data else data["response_mask"]


def _mean(values: Iterable[float]) -> float:
    numbers = list(values)
    return sum(numbers) / len(numbers)
