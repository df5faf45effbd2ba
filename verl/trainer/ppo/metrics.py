"""Metrics of a training batch and of the time a step took, under the field's names."""

import torch

from verl.protocol import DataProto


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
