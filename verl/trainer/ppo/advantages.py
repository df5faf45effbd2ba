"""Advantage estimators of the field, each a pure function of a batch of token rewards.

All take `token_level_rewards` (N, T), `response_mask` (N, T) bool, the algorithm's configuration and `index` (N,), the
id of each row's question; they compute in float64 and return (advantages, returns), both (N, T). The reward of a
response is the sum of its tokens' rewards. `eps` is 1e-6.
"""

import numpy as np
import torch

from verl.trainer.config.schema import AlgorithmConfig
from verl.trainer.ppo.groups import Groups
from verl.trainer.ppo.registry import register_adv_est

EPS = 1e-6
Estimate = tuple[torch.Tensor, torch.Tensor]


def response_rewards(token_level_rewards: torch.Tensor, response_mask: torch.Tensor) -> torch.Tensor:
    """Reward of each response, (N,) float64; ValueError naming the first row that is not finite."""
    rewards = torch.where(response_mask.bool(), token_level_rewards.double(), 0.0).sum(-1)
    if not rewards.isfinite().all():
        row = int((~rewards.isfinite()).nonzero()[0])
        raise ValueError(f"token_level_rewards of row {row} sum to {rewards[row].item()}; rewards must be finite")
    return rewards


def per_token(advantages: torch.Tensor, response_mask: torch.Tensor) -> Estimate:
    """One advantage per response, (N,), given to each of its tokens, (N, T); as advantages and as returns."""
    spread = advantages[:, None] * response_mask
    return spread, spread


@register_adv_est("grpo", min_responses=2)
def grpo(
    token_level_rewards: torch.Tensor, response_mask: torch.Tensor, config: AlgorithmConfig, index: np.ndarray
) -> Estimate:
    """(r - mean) / (std + eps) over the responses of a question, std unbiased (arXiv 2402.03300).

    `algorithm.norm_adv_by_std_in_grpo=False` leaves out the division.
    """
    rewards, groups = response_rewards(token_level_rewards, response_mask), Groups(index)
    advantages = rewards - groups.spread(groups.mean(rewards))
    if config.norm_adv_by_std_in_grpo:
        advantages = advantages / (groups.spread(groups.std(rewards)) + EPS)
    return per_token(advantages, response_mask)


@register_adv_est("rloo", min_responses=2)
def rloo(
    token_level_rewards: torch.Tensor, response_mask: torch.Tensor, config: AlgorithmConfig, index: np.ndarray
) -> Estimate:
    """r_i - mean of the question's other responses; 0 for a question with one response (arXiv 2402.14740)."""
    rewards, groups = response_rewards(token_level_rewards, response_mask), Groups(index)
    advantages = (rewards - groups.mean_of_others(rewards)) * (groups.spread(groups.count) > 1)
    return per_token(advantages, response_mask)


@register_adv_est("dr_grpo", min_responses=2)
def dr_grpo(
    token_level_rewards: torch.Tensor, response_mask: torch.Tensor, config: AlgorithmConfig, index: np.ndarray
) -> Estimate:
    """r - mean of the question's responses (arXiv 2503.20783); its loss is `seq-mean-token-sum-norm`."""
    rewards, groups = response_rewards(token_level_rewards, response_mask), Groups(index)
    return per_token(rewards - groups.spread(groups.mean(rewards)), response_mask)


@register_adv_est("opo", min_responses=2)
def opo(
    token_level_rewards: torch.Tensor, response_mask: torch.Tensor, config: AlgorithmConfig, index: np.ndarray
) -> Estimate:
    """r - sum(l r) / sum(l) over the responses of a question, l their lengths in tokens (arXiv 2505.23585)."""
    rewards, groups = response_rewards(token_level_rewards, response_mask), Groups(index)
    lengths = response_mask.sum(-1).double()
    baseline = groups.sum(lengths * rewards) / groups.sum(lengths).clamp(min=1)
    return per_token(rewards - groups.spread(baseline), response_mask)


@register_adv_est("gpg", min_responses=2)
def gpg(
    token_level_rewards: torch.Tensor, response_mask: torch.Tensor, config: AlgorithmConfig, index: np.ndarray
) -> Estimate:
    """(r - mean) * N / rows of questions with unequal rewards (arXiv 2504.02546); its loss is `gpg`."""
    rewards, groups = response_rewards(token_level_rewards, response_mask), Groups(index)
    informative = groups.count[groups.max(rewards) > groups.min(rewards)].sum()
    advantages = rewards - groups.spread(groups.mean(rewards))
    return per_token(advantages * len(rewards) / informative.clamp(min=1), response_mask)


@register_adv_est("qae", min_responses=2)
def qae(
    token_level_rewards: torch.Tensor,
    response_mask: torch.Tensor,
    config: AlgorithmConfig,
    index: np.ndarray,
    *,
    level: float = 0.4,
) -> Estimate:
    """r - K-quantile of the question's rewards, inf{x : F(x) >= K}, K the `level` (arXiv 2509.22611).

    With 0/1 rewards and success rate p: the baseline is 0 where p <= 1 - K, else 1.
    """
    if not 0 < level < 1:
        raise ValueError(f"algorithm.estimator_kwargs.level={level} must lie inside (0, 1)")
    rewards, groups = response_rewards(token_level_rewards, response_mask), Groups(index)
    order, start = groups.ascending(rewards)
    rank = (level * groups.count - 1e-9).ceil().long() - 1
    return per_token(rewards - groups.spread(rewards[order[start + rank]]), response_mask)


@register_adv_est("rs_grpo", min_responses=2)
def rs_grpo(
    token_level_rewards: torch.Tensor,
    response_mask: torch.Tensor,
    config: AlgorithmConfig,
    index: np.ndarray,
    *,
    beta: float = 2.0,
) -> Estimate:
    """(1/b) (e^(b r) / mean e^(b r) - 1) over a question's responses, b the `beta`: above 0 it seeks risk, below it
    avoids it (arXiv 2509.24261)."""
    if beta == 0:
        raise ValueError(
            f"algorithm.estimator_kwargs.beta={beta} must not be 0; the limit is algorithm.adv_estimator=dr_grpo"
        )
    rewards, groups = response_rewards(token_level_rewards, response_mask), Groups(index)
    # The largest exponent of each question is 0: nothing overflows, and the ratio does not change.
    utility = (beta * rewards - groups.spread(groups.max(beta * rewards))).exp()
    return per_token((utility / groups.spread(groups.mean(utility)) - 1) / beta, response_mask)


@register_adv_est("grpo_passk", min_responses=2)
def grpo_passk(
    token_level_rewards: torch.Tensor, response_mask: torch.Tensor, config: AlgorithmConfig, index: np.ndarray
) -> Estimate:
    """The question's best response earns its lead over the second best, all others 0 (arXiv 2503.19595)."""
    rewards, groups = response_rewards(token_level_rewards, response_mask), Groups(index)
    order, start = groups.ascending(rewards)
    best = start + groups.count.long() - 1
    second = torch.maximum(best - 1, start)
    advantages = torch.zeros_like(rewards)
    advantages[order[best]] = rewards[order[best]] - rewards[order[second]]
    return per_token(advantages, response_mask)


@register_adv_est("passk_training", min_responses=2)
def passk_training(
    token_level_rewards: torch.Tensor,
    response_mask: torch.Tensor,
    config: AlgorithmConfig,
    index: np.ndarray,
    *,
    k: int = 4,
) -> Estimate:
    """Closed-form advantages of pass@k over all sets of k responses of a question (arXiv 2508.10751, section 2.4).

    A response is right if its reward is positive. With n responses, w of them wrong, R = 1 - C(w, k) / C(n, k) and
    s = sqrt(R (1 - R)): right (1 - R) / s, wrong (1 - R - C(w - 1, k - 1) / C(n - 1, k - 1)) / s; 0 where s is 0.
    """
    rewards, groups = response_rewards(token_level_rewards, response_mask), Groups(index)
    if not 1 <= k <= groups.count.min():
        raise ValueError(
            f"algorithm.estimator_kwargs.k={k} must be at least 1 and at most the responses per question, "
            f"actor_rollout_ref.rollout.n={int(groups.count.min())}"
        )
    right = rewards > 0
    wrong = groups.count - groups.sum(right)
    failure = _all_inside(wrong, groups.count, k)
    deviation = (failure * (1 - failure)).sqrt()
    others_wrong = _all_inside((wrong - 1).clamp(min=0), groups.count - 1, k - 1)
    if_right = failure / (deviation + EPS)
    if_wrong = (failure - others_wrong) / (deviation + EPS) * (deviation > 0)
    return per_token(
        torch.where(right, groups.spread(if_right * (deviation > 0)), groups.spread(if_wrong)), response_mask
    )


def _all_inside(part: torch.Tensor, whole: torch.Tensor, k: int) -> torch.Tensor:
    """Chance that k draws without replacement from `whole` all fall in `part`: C(part, k) / C(whole, k)."""
    chance = torch.ones_like(whole)
    for i in range(k):
        chance = chance * (part - i).clamp(min=0) / (whole - i)
    return chance


@register_adv_est("remax", needs_greedy_baseline=True)
def remax(
    token_level_rewards: torch.Tensor,
    response_mask: torch.Tensor,
    config: AlgorithmConfig,
    index: np.ndarray,
    reward_baselines: torch.Tensor,
) -> Estimate:
    """r - reward of the greedy response to the question, `reward_baselines` (N,) (arXiv 2310.10505)."""
    rewards = response_rewards(token_level_rewards, response_mask)
    return per_token(rewards - torch.as_tensor(reward_baselines).double(), response_mask)


# ------------------------------------------------------------------------------------------------ token by token
def whiten(values: torch.Tensor, response_mask: torch.Tensor) -> torch.Tensor:
    """(v - mean) / (std + eps) over the response tokens of the batch, (N, T); std unbiased; 0 at masked tokens."""
    tokens = values[response_mask.bool()]
    deviation = tokens.std() if len(tokens) > 1 else torch.zeros((), dtype=values.dtype)
    return (values - tokens.mean()) / (deviation + EPS) * response_mask


@register_adv_est("reinforce_plus_plus")
def reinforce_plus_plus(
    token_level_rewards: torch.Tensor, response_mask: torch.Tensor, config: AlgorithmConfig, index: np.ndarray
) -> Estimate:
    """Discounted return from each token on, whitened over the batch (arXiv 2501.03262); discount `algorithm.gamma`."""
    response_rewards(token_level_rewards, response_mask)  # refuses what is not finite
    mask = response_mask.bool()
    rewards = torch.where(mask, token_level_rewards.double(), 0.0)
    returns = torch.zeros_like(rewards)
    running = torch.zeros(len(rewards), dtype=torch.float64)
    for t in range(rewards.shape[1] - 1, -1, -1):
        # A masked token inside a response (a tool's output) is no step of the policy's: nothing is discounted.
        running = torch.where(mask[:, t], rewards[:, t] + config.gamma * running, running)
        returns[:, t] = running
    return whiten(returns, response_mask), returns * response_mask


@register_adv_est("reinforce_plus_plus_baseline", min_responses=2)
def reinforce_plus_plus_baseline(
    token_level_rewards: torch.Tensor, response_mask: torch.Tensor, config: AlgorithmConfig, index: np.ndarray
) -> Estimate:
    """r - mean of the question's responses, at each token, whitened over the batch (arXiv 2501.03262)."""
    centred, _ = dr_grpo(token_level_rewards, response_mask, config, index)
    advantages = whiten(centred, response_mask)
    return advantages, advantages


@register_adv_est("gae", needs_critic=True)
def gae(
    token_level_rewards: torch.Tensor,
    response_mask: torch.Tensor,
    config: AlgorithmConfig,
    index: np.ndarray,
    values: torch.Tensor,
) -> Estimate:
    """Generalised advantages from a critic's `values` (N, T) (arXiv 1506.02438), whitened over the batch.

    A_t = sum_l (gamma lam)^l d_(t+l), d_t = r_t + gamma V_(t+1) - V_t, V after the last token 0; the returns, A + V
    before whitening, are what the critic learns.
    """
    response_rewards(token_level_rewards, response_mask)  # refuses what is not finite
    mask = response_mask.bool()
    rewards, values = token_level_rewards.double(), values.double()
    advantages = torch.zeros_like(rewards)
    ahead = torch.zeros(len(rewards), dtype=torch.float64)
    next_value = torch.zeros_like(ahead)
    for t in range(rewards.shape[1] - 1, -1, -1):
        delta = rewards[:, t] + config.gamma * next_value - values[:, t]
        ahead = torch.where(mask[:, t], delta + config.gamma * config.lam * ahead, ahead)
        next_value = torch.where(mask[:, t], values[:, t], next_value)
        advantages[:, t] = ahead
    returns = torch.where(mask, advantages + values, 0.0)
    return whiten(advantages, response_mask), returns
