"""Metrics of a training batch and of the time a step took, under the field's names."""

import torch

from verl.protocol import DataProto
from verl.trainer.config.schema import PPOConfig, RolloutCorrectionConfig
from verl.trainer.ppo.risk_metrics import covariance_metrics
from verl.trainer.ppo.rollout_correction import rollout_correction
from verl.utils.torch_functional import masked_mean


def describe_batch(batch: DataProto, config: PPOConfig, metrics: dict[str, float]) -> dict[str, float]:
    """Add the metrics of the whole batch, which has advantages, `old_log_probs` and `entropy`, to `metrics`."""
    metrics |= compute_data_metrics(batch, config.data.max_prompt_length)
    metrics |= policy_metrics(batch)
    metrics |= engine_metrics(batch, config.algorithm.rollout_correction)
    return metrics


def engine_metrics(batch: DataProto, correction: RolloutCorrectionConfig) -> dict[str, float]:
    """How far the engine's probabilities are from the trainer's, 0 where they agree. Nothing is known under
    bypass_mode, which takes the engine's for the trainer's, and without the engine's log-probs."""
    if correction.bypass_mode or "rollout_log_probs" not in batch:
        return {}
    old, engine, mask = batch["old_log_probs"], batch["rollout_log_probs"], batch["response_mask"]
    diff = (old.exp() - engine.exp()).abs()[mask]
    return rollout_correction(old, engine, mask, correction).metrics | {
        "training/rollout_probs_diff_mean": float(diff.mean()),
        "training/rollout_probs_diff_max": float(diff.max()),
        "training/rollout_probs_diff_std": float(diff.std(unbiased=False)),
    }


def policy_metrics(batch: DataProto) -> dict[str, float]:
    """Entropy and what drives it."""
    mask = batch["response_mask"]
    covariance = covariance_metrics(
        batch["old_log_probs"], batch["advantages"], mask, batch["token_level_rewards"].sum(1).double(), batch["uid"]
    )
    return covariance | {"actor/entropy": float(masked_mean(batch["entropy"], mask))}


def compute_data_metrics(batch: DataProto, max_prompt_length: int | None = None) -> dict[str, float]:
    """Scores, rewards, advantages, returns, (if there is a critic) values, lengths, and the number of tokens.

    `batch` has N rows with `response_mask` (N, T), `prompt_length` (N,), and `token_level_scores`,
    `token_level_rewards`, `advantages`, `returns`, optionally `values`, each (N, T). Scores and rewards are sums per
    response, advantages, returns and values are per token. `response_length/clip_ratio` is the share of responses as
    long as T, the longest allowed; `prompt_length/clip_ratio` that of prompts of `max_prompt_length`, where given.
    """
    mask = batch["response_mask"].bool()
    prompt_length, response_length = batch["prompt_length"], mask.sum(1)
    metrics = {
        **_spread("critic/score", _per_response(batch["token_level_scores"], mask)),
        **_spread("critic/rewards", _per_response(batch["token_level_rewards"], mask)),
        **_spread("critic/advantages", batch["advantages"][mask]),
        **_spread("critic/returns", batch["returns"][mask]),
        **_spread("response_length", response_length),
        "response_length/clip_ratio": float((response_length == mask.shape[1]).double().mean()),
        **_spread("prompt_length", prompt_length),
        "perf/total_num_tokens": float(prompt_length.sum() + response_length.sum()),
    }
    if max_prompt_length is not None:
        metrics["prompt_length/clip_ratio"] = float((prompt_length >= max_prompt_length).double().mean())
    if "values" in batch:
        metrics |= _spread("critic/values", batch["values"][mask])
        metrics |= _explained_variance(batch["values"][mask].double(), batch["returns"][mask].double())
    return metrics


def compute_timing_metrics(timings: dict[str, float], n_tokens: float, n_workers: int = 1) -> dict[str, float]:
    """`timing_s/{phase}` of each phase in seconds, `perf/time_per_step` in seconds, and `perf/throughput` in tokens per
    second and training worker; `timings` has the whole step as `step`."""
    seconds = timings["step"]
    return {
        **{f"timing_s/{phase}": value for phase, value in timings.items()},
        "perf/time_per_step": seconds,
        "perf/throughput": n_tokens / (seconds * n_workers),
    }


def _per_response(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return torch.where(mask, values, 0.0).sum(1)


def _spread(name: str, values: torch.Tensor) -> dict[str, float]:
    values = values.double()
    return {
        f"{name}/mean": float(values.mean()),
        f"{name}/max": float(values.max()),
        f"{name}/min": float(values.min()),
    }


def _explained_variance(values: torch.Tensor, returns: torch.Tensor) -> dict[str, float]:
    """1 - Var(returns - values) / Var(returns); left out while the returns are all equal, where it is undefined."""
    variance = returns.var(unbiased=False)
    if variance == 0:
        return {}
    return {"critic/vf_explained_var": float(1 - (returns - values).var(unbiased=False) / variance)}
