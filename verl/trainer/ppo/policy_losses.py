"""Policy losses, per token, and the weights that turn them into the loss of a mini-batch.

A loss takes (R, T) tensors of one micro-batch: `old_log_prob` and `log_prob` of the response tokens, `advantages`, and
the bool `response_mask`; it returns the loss of each token and metrics per token. Nothing is averaged here: the engine
sums loss * `token_weights`, so that how a mini-batch is split never changes its gradient. s denotes a ratio
pi(token) / pi_old(token), A the advantage.
"""

from dataclasses import dataclass

import torch

from verl.trainer.config.schema import ActorConfig
from verl.trainer.ppo.registry import get_token_selection, register_policy_loss, register_token_selection

PolicyLossOutput = tuple[torch.Tensor, dict[str, torch.Tensor]]
LOSS_AGG_MODES = ("token-mean", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm")
# exp() of a larger log-ratio would overflow float32 once multiplied; beyond it the ratio is constant.
MAX_LOG_RATIO = 20.0
# clip_cov: covariances of the tokens it may detach; kl_cov: weight of its penalty (arXiv 2505.22617).
CLIP_COV_RANGE = (1.0, 5.0)
KL_COV_WEIGHT = 1.0


@dataclass(frozen=True)
class LossTotals:
    """Of the whole mini-batch on all workers: response tokens, sequences; and the longest response allowed."""

    tokens: int
    sequences: int
    max_tokens: int


def token_weights(response_mask: torch.Tensor, mode: str, totals: LossTotals) -> torch.Tensor:
    """Weight of each token's loss, (R, T) float32; over a whole mini-batch, loss = sum(weights * token losses).

    - `token-mean`: 1 / tokens;
    - `seq-mean-token-sum`: 1 / sequences;
    - `seq-mean-token-mean`: 1 / (sequences * tokens of the row);
    - `seq-mean-token-sum-norm`: 1 / (sequences * max_tokens), as Dr. GRPO has it (arXiv 2503.20783).
    """
    mask = response_mask.float()
    if mode == "token-mean":
        return mask / totals.tokens
    if mode == "seq-mean-token-sum":
        return mask / totals.sequences
    if mode == "seq-mean-token-mean":
        return mask / (mask.sum(-1, keepdim=True).clamp(min=1) * totals.sequences)
    if mode == "seq-mean-token-sum-norm":
        return mask / (totals.sequences * totals.max_tokens)
    raise ValueError(f"actor_rollout_ref.actor.loss_agg_mode={mode} is unknown; use one of {', '.join(LOSS_AGG_MODES)}")


def _log_ratio(old_log_prob: torch.Tensor, log_prob: torch.Tensor, response_mask: torch.Tensor) -> torch.Tensor:
    difference = torch.where(response_mask.bool(), log_prob - old_log_prob, 0.0)
    return difference.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)


def _sequence_mean(values: torch.Tensor, response_mask: torch.Tensor) -> torch.Tensor:
    """Mean over the response's tokens, (R, 1)."""
    return (values * response_mask).sum(-1, keepdim=True) / response_mask.sum(-1, keepdim=True).clamp(min=1)


def _plain_and_clipped(
    ratio: torch.Tensor, advantages: torch.Tensor, config: ActorConfig
) -> tuple[torch.Tensor, torch.Tensor]:
    """-s A and -clip(s) A, (R, T); PPO's loss is the larger."""
    within = ratio.clamp(1 - config.clip_ratio_low, 1 + config.clip_ratio_high)
    return -advantages * ratio, -advantages * within


def _metrics(clipped: torch.Tensor, clipped_lower: torch.Tensor, log_ratio: torch.Tensor) -> dict[str, torch.Tensor]:
    return {
        "actor/pg_clipfrac": clipped.float(),
        "actor/pg_clipfrac_lower": clipped_lower.float(),
        "actor/ppo_kl": -log_ratio.detach(),
    }


@register_policy_loss("vanilla")
def vanilla(
    old_log_prob: torch.Tensor,
    log_prob: torch.Tensor,
    advantages: torch.Tensor,
    response_mask: torch.Tensor,
    config: ActorConfig,
) -> PolicyLossOutput:
    """PPO's clipped token ratio (arXiv 1707.06347) with a dual clip (arXiv 1912.09729).

    -min(s A, clip(s, 1 - clip_ratio_low, 1 + clip_ratio_high) A), and for A < 0 at most -clip_ratio_c * A.
    """
    log_ratio = _log_ratio(old_log_prob, log_prob, response_mask)
    ratio = log_ratio.exp()
    plain, clipped = _plain_and_clipped(ratio, advantages, config)
    loss = torch.maximum(plain, clipped)
    bound = -advantages * config.clip_ratio_c
    beyond = (advantages < 0) & (loss > bound)
    return torch.where(beyond, bound, loss), _metrics((clipped > plain) & ~beyond, beyond, log_ratio)


@register_policy_loss("gspo")
def gspo(
    old_log_prob: torch.Tensor,
    log_prob: torch.Tensor,
    advantages: torch.Tensor,
    response_mask: torch.Tensor,
    config: ActorConfig,
) -> PolicyLossOutput:
    """The clipped sequence ratio s = (pi(y|x) / pi_old(y|x))^(1/|y|) (arXiv 2507.18071, its token form, eq. 13 ff.).

    -min(s A, clip(s) A), whose gradient reaches token t as s A grad log pi_t. With an advantage constant over the
    response and `seq-mean-token-mean`, this is the paper's sequence objective. Its clip range is 3e-4 / 4e-4.
    """
    log_ratio = _log_ratio(old_log_prob, log_prob, response_mask)
    sequence_ratio = _sequence_mean(log_ratio, response_mask).exp().detach()
    # 1 in value; carries the gradient of the token's own log-prob.
    ratio = sequence_ratio * (log_ratio - log_ratio.detach()).exp()
    plain, clipped = _plain_and_clipped(ratio, advantages, config)
    return torch.maximum(plain, clipped), _metrics(clipped > plain, torch.zeros_like(plain), log_ratio)


@register_policy_loss("gmpo")
def gmpo(
    old_log_prob: torch.Tensor,
    log_prob: torch.Tensor,
    advantages: torch.Tensor,
    response_mask: torch.Tensor,
    config: ActorConfig,
) -> PolicyLossOutput:
    """-A times the geometric mean of the response's token ratios (arXiv 2507.20673).

    Each log-ratio is limited before the mean, from above by clip_ratio_high where A > 0, from below by -clip_ratio_low
    where A < 0; the paper's range is 0.4 for both. A is the mean over the response's tokens.
    """
    log_ratio = _log_ratio(old_log_prob, log_prob, response_mask)
    advantage = _sequence_mean(advantages, response_mask)
    limited = torch.where(
        advantage > 0, log_ratio.clamp(max=config.clip_ratio_high), log_ratio.clamp(min=-config.clip_ratio_low)
    )
    loss = -advantage * _sequence_mean(limited, response_mask).exp()
    clipped = (limited != log_ratio) & response_mask.bool()
    return loss.expand_as(log_prob), _metrics(clipped, torch.zeros_like(log_ratio), log_ratio)


@register_policy_loss("cispo")
def cispo(
    old_log_prob: torch.Tensor,
    log_prob: torch.Tensor,
    advantages: torch.Tensor,
    response_mask: torch.Tensor,
    config: ActorConfig,
) -> PolicyLossOutput:
    """-clip(s, 1 - clip_ratio_low, 1 + clip_ratio_high) A log pi, no gradient through s (arXiv 2506.13585)."""
    log_ratio = _log_ratio(old_log_prob, log_prob, response_mask)
    ratio = log_ratio.detach().exp()
    limited = ratio.clamp(1 - config.clip_ratio_low, 1 + config.clip_ratio_high)
    log_prob = torch.where(response_mask.bool(), log_prob, 0.0)
    return -limited * advantages * log_prob, _metrics(limited != ratio, torch.zeros_like(ratio), log_ratio)


@register_policy_loss("gpg")
def gpg(
    old_log_prob: torch.Tensor,
    log_prob: torch.Tensor,
    advantages: torch.Tensor,
    response_mask: torch.Tensor,
    config: ActorConfig,
) -> PolicyLossOutput:
    """-A log pi, without ratio or clip (arXiv 2504.02546)."""
    nothing = torch.zeros_like(log_prob)
    log_ratio = _log_ratio(old_log_prob, log_prob, response_mask)
    log_prob = torch.where(response_mask.bool(), log_prob, 0.0)
    return -advantages * log_prob, _metrics(nothing, nothing, log_ratio)


# ---------------------------------------------------------------------- losses that choose tokens of a mini-batch
def select_tokens(
    name: str,
    log_prob: torch.Tensor,
    advantages: torch.Tensor,
    response_mask: torch.Tensor,
    mini_batch: torch.Tensor,
    config: ActorConfig,
    seed: int,
    step: int,
) -> torch.Tensor | None:
    """The tokens that the policy loss `name` chooses in each mini-batch, (N, T) bool; None if it chooses none.

    Made once per step on the driver, from the log-probs (N, T) of the policy that the step starts with: exact for the
    first mini-batch, and the same however rows are divided among workers and micro-batches. `mini_batch` (N,) is the
    number of each row's mini-batch.
    """
    select = get_token_selection(name)
    if select is None:
        return None
    chosen = torch.zeros(response_mask.shape, dtype=torch.bool)
    generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
    for number in range(int(mini_batch.max()) + 1):
        rows = mini_batch == number
        chosen[rows] = select(log_prob[rows], advantages[rows], response_mask[rows], config, generator)
    return chosen


def token_covariance(log_prob: torch.Tensor, advantages: torch.Tensor, response_mask: torch.Tensor) -> torch.Tensor:
    """(log pi - mean) (A - mean), means over the response tokens, (R, T) float64 (arXiv 2505.22617, eq. 10)."""
    mask = response_mask.bool()
    log_prob, advantages = log_prob.double(), advantages.double()
    return (log_prob - log_prob[mask].mean()) * (advantages - advantages[mask].mean())


def _num_chosen(response_mask: torch.Tensor, config: ActorConfig) -> int:
    fraction = config.policy_loss.cov_fraction
    if not 0 < fraction <= 1:
        raise ValueError(f"actor_rollout_ref.actor.policy_loss.cov_fraction={fraction} must be in (0, 1]")
    return max(1, int(fraction * int(response_mask.sum())))


@register_token_selection("clip_cov")
def select_clip_cov(
    log_prob: torch.Tensor,
    advantages: torch.Tensor,
    response_mask: torch.Tensor,
    config: ActorConfig,
    generator: torch.Generator,
) -> torch.Tensor:
    """A random `cov_fraction` of all tokens (at least 1), from those whose covariance lies in CLIP_COV_RANGE."""
    covariance = token_covariance(log_prob, advantages, response_mask)
    low, high = CLIP_COV_RANGE
    candidates = ((covariance > low) & (covariance < high) & response_mask.bool()).flatten().nonzero()[:, 0]
    order = torch.randperm(len(candidates), generator=generator)
    chosen = torch.zeros(response_mask.numel(), dtype=torch.bool)
    chosen[candidates[order[: _num_chosen(response_mask, config)]]] = True
    return chosen.view(response_mask.shape)


@register_token_selection("kl_cov")
def select_kl_cov(
    log_prob: torch.Tensor,
    advantages: torch.Tensor,
    response_mask: torch.Tensor,
    config: ActorConfig,
    generator: torch.Generator,
) -> torch.Tensor:
    """The `cov_fraction` of all tokens (at least 1) with the largest covariance."""
    covariance = token_covariance(log_prob, advantages, response_mask)
    covariance = torch.where(response_mask.bool(), covariance, -torch.inf).flatten()
    chosen = torch.zeros(response_mask.numel(), dtype=torch.bool)
    chosen[covariance.topk(min(_num_chosen(response_mask, config), int(response_mask.sum()))).indices] = True
    return chosen.view(response_mask.shape)


@register_policy_loss("clip_cov")
def clip_cov(
    old_log_prob: torch.Tensor,
    log_prob: torch.Tensor,
    advantages: torch.Tensor,
    response_mask: torch.Tensor,
    config: ActorConfig,
    selected: torch.Tensor,
) -> PolicyLossOutput:
    """PPO's clipped token ratio; `selected` tokens that are not clipped already give no gradient (arXiv 2505.22617)."""
    log_ratio = _log_ratio(old_log_prob, log_prob, response_mask)
    ratio = log_ratio.exp()
    plain, clipped = _plain_and_clipped(ratio, advantages, config)
    loss = torch.maximum(plain, clipped)
    detached = selected & ~(clipped > plain)
    metrics = _metrics(clipped > plain, torch.zeros_like(plain), log_ratio)
    return torch.where(detached, loss.detach(), loss), metrics | {"actor/cov_selected": detached.float()}


@register_policy_loss("kl_cov")
def kl_cov(
    old_log_prob: torch.Tensor,
    log_prob: torch.Tensor,
    advantages: torch.Tensor,
    response_mask: torch.Tensor,
    config: ActorConfig,
    selected: torch.Tensor,
) -> PolicyLossOutput:
    """-s A, not clipped, plus KL_COV_WEIGHT |log s| at the `selected` tokens (arXiv 2505.22617)."""
    log_ratio = _log_ratio(old_log_prob, log_prob, response_mask)
    loss = -advantages * log_ratio.exp()
    penalised = loss + KL_COV_WEIGHT * log_ratio.abs()
    metrics = _metrics(torch.zeros_like(loss), torch.zeros_like(loss), log_ratio)
    return torch.where(selected, penalised, loss), metrics | {"actor/cov_selected": selected.float()}
