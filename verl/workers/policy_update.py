"""One step's policy update on this worker's rows."""

import torch

from verl.protocol import DataProto
from verl.trainer.config.schema import ActorConfig
from verl.trainer.ppo.core_algos import get_policy_loss
from verl.trainer.ppo.kl import kl_penalty
from verl.trainer.ppo.policy_losses import LossTotals, token_weights
from verl.workers.fsdp_engine import FSDPEngine
from verl.workers.update import MiniBatchUpdate, Sums


class PolicyUpdate(MiniBatchUpdate[dict[str, torch.Tensor]]):
    """Moves the policy of `engine` by the gradient of the configured loss."""

    name = "actor"

    def __init__(self, engine: FSDPEngine, config: ActorConfig, temperature: float) -> None:
        super().__init__(engine, config)
        self.temperature = temperature
        self.policy_loss = get_policy_loss(config.policy_loss.loss_mode)

    def __call__(self, data: DataProto) -> tuple[DataProto | None, dict[str, float]]:
        """Run the passes. Returns what the update has seen, (N, T) each, and the metrics. Seen are `old_log_probs`
        where `data` has none, and `entropy` if meta_info["with_entropy"]; None, if neither is asked for.

        `data` is as in `run`, with `old_log_probs` and `advantages` (N, T). Where configured, each (N, T):
        `ref_log_prob` of the KL loss, `selected` of a policy loss that chooses tokens, and `rollout_is_weights` that
        the policy loss is multiplied with. Without `old_log_probs` they are those of the update's one pass, in which
        nothing has moved yet: every ratio is 1.
        """
        if "old_log_probs" not in data and (self.config.ppo_epochs > 1 or data.meta_info["n_mini_batches"] > 1):
            raise ValueError("old_log_probs may be left out of a batch with one update alone")
        data, own = self.engine.rows_of_group(data)
        wanted = ["entropy"] if data.meta_info["with_entropy"] else []
        wanted += [] if "old_log_probs" in data else ["old_log_probs"]
        metrics, parts = self.run(data)
        if not wanted:
            return None, metrics
        seen = {name: torch.zeros(data["responses"].shape) for name in wanted}
        for rows, values in parts:
            for name in wanted:
                seen[name][rows] = values[name]
        return DataProto.from_dict(seen).select_rows(own), metrics

    def micro_batch(
        self, data: DataProto, mask: torch.Tensor, totals: LossTotals, sums: Sums
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The loss; and the log-probs and entropies it is made from."""
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
            metrics = metrics | {"actor/kl_loss": kl, "actor/kl_coef": torch.full_like(kl, config.kl_loss_coef)}
        sums["actor/pg_loss"] += (pg_loss.detach() * weights).sum().cpu()
        for name, values in metrics.items():
            sums[name] += (values.detach() * mask).sum().cpu() / totals.tokens
        return (loss * weights).sum(), {"old_log_probs": log_prob.detach().cpu(), "entropy": entropy.detach().cpu()}
