"""Rollout correction: weights and rejection for responses that another engine sampled.

The engine gives a token a slightly different probability than the trainer does with the same weights. Throughout,
rho_t = pi_old(token) / pi_rollout(token) is the ratio of the trainer's probability to the engine's, and rho(y) the
product over a response's tokens. docs/algorithm.md, "Rollout correction", says when to use what and names the sources.
"""

import math
from dataclasses import dataclass

import torch

from verl.trainer.config.schema import RolloutConfig, RolloutCorrectionConfig
from verl.trainer.ppo.kl import MAX_LOG_RATIO, kl_penalty

IS_LEVELS = ("token", "sequence")
RS_LEVELS = ("sequence", "geometric")
KEY = "algorithm.rollout_correction"


@dataclass(frozen=True)
class RolloutCorrection:
    """What to do with N responses of up to T tokens.

    `weights` (N, T) float32, constants to multiply token losses with, 0 in the padding; None without importance
    weighting. `keep` (N,) bool, the responses that stay in the loss. A rejected response has its weights all the same.
    """

    weights: torch.Tensor | None
    keep: torch.Tensor
    metrics: dict[str, float]


def rollout_correction(
    old_log_probs: torch.Tensor,
    rollout_log_probs: torch.Tensor,
    response_mask: torch.Tensor,
    config: RolloutCorrectionConfig,
) -> RolloutCorrection:
    """Importance weights and rejection, as `config` has them (which `check_rollout_correction` has passed).

    The log-probs (N, T) are the trainer's and the engine's of the sampled tokens; outside `response_mask` (N, T) they
    may be anything. ValueError for one inside it that is not finite. Computed in float64.
    """
    mask = response_mask.bool()
    _check_finite("old_log_probs", old_log_probs, mask)
    _check_finite("rollout_log_probs", rollout_log_probs, mask)
    old = torch.where(mask, old_log_probs.detach().double(), 0.0)
    rollout = torch.where(mask, rollout_log_probs.detach().double(), 0.0)
    token = old - rollout  # (N, T) log rho_t, 0 in the padding
    sequence = token.sum(-1)  # (N,) log rho(y)
    metrics = _divergence_metrics(old[mask], rollout[mask], sequence)
    weights = None
    if config.rollout_is is not None:
        # (M,) of the response tokens, or (N,): one ratio per weight
        ratio = _ratio(token[mask] if config.rollout_is == "token" else sequence)
        weight = ratio.clamp(max=config.rollout_is_threshold)
        per_token = weight if config.rollout_is == "token" else weight.unsqueeze(-1).expand(mask.shape)[mask]
        weights = torch.zeros(mask.shape).masked_scatter(mask, per_token.float())
        metrics |= _weight_metrics(ratio, weight)
    keep = torch.ones_like(sequence, dtype=torch.bool)
    if config.rollout_rs is not None:
        n_tokens = mask.sum(-1).clamp(min=1)
        keep = _inside(sequence if config.rollout_rs == "sequence" else sequence / n_tokens, config)
        metrics["rollout_corr/rollout_rs_seq_masked_fraction"] = float((~keep).double().mean())
    return RolloutCorrection(weights, keep, metrics)


def _check_finite(name: str, log_probs: torch.Tensor, mask: torch.Tensor) -> None:
    bad = mask & ~log_probs.isfinite()
    if bad.any():
        row, position = bad.nonzero()[0].tolist()
        raise ValueError(
            f"row {row}: {name} is {float(log_probs[row, position])} at response token {position}; a sampled token "
            "must have a finite log-prob, look for overflow in that engine's logits"
        )


def _ratio(log_ratio: torch.Tensor) -> torch.Tensor:
    """exp of a log-ratio limited to +-20, so that neither it nor its square overflows."""
    return log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()


def _inside(log_ratio: torch.Tensor, config: RolloutCorrectionConfig) -> torch.Tensor:
    """Whether each ratio is in [1 / upper, upper], bounds included; compared as logarithms, without limit."""
    upper = config.rollout_rs_threshold
    assert upper is not None
    return log_ratio.abs() <= math.log(upper)


def _divergence_metrics(old: torch.Tensor, rollout: torch.Tensor, sequence: torch.Tensor) -> dict[str, float]:
    """How far the policies are apart: from the log-probs of the M response tokens (M,) and log rho(y) (N,).

    KL(pi_rollout || pi_old) per token by two estimators (joschu.net/blog/kl-approx.html): -log rho, and
    rho - 1 - log rho; and the chi-square divergence of whole responses, mean of rho(y)^2 - 1.
    """
    return {
        "rollout_corr/kl": float(kl_penalty(rollout, old, "kl").mean()),
        "rollout_corr/k3_kl": float(kl_penalty(rollout, old, "low_var_kl").mean()),
        "rollout_corr/chi2_seq": float(_ratio(sequence).square().mean()) - 1,
    }


def _weight_metrics(ratio: torch.Tensor, weight: torch.Tensor) -> dict[str, float]:
    """Of n ratios before truncation, and of the n weights after it.

    Effective sample size of the weights, as a share: (sum w)^2 / (n sum w^2), in (0, 1].
    """
    return {
        "rollout_corr/rollout_is_mean": float(ratio.mean()),
        "rollout_corr/rollout_is_std": float(ratio.std(unbiased=False)),
        "rollout_corr/rollout_is_min": float(ratio.min()),
        "rollout_corr/rollout_is_max": float(ratio.max()),
        "rollout_corr/rollout_is_ratio_fraction_high": float((ratio > weight).double().mean()),
        "rollout_corr/rollout_is_eff_sample_size": float(weight.mean().square() / weight.square().mean()),
    }


def check_rollout_correction(config: RolloutCorrectionConfig, sampling: RolloutConfig) -> None:
    """ValueError, in one line, for the first key that has no meaning, has no effect, or cannot be served."""
    _check_importance_weights(config)
    _check_rejection(config)
    active = {name: value for name in ("rollout_is", "rollout_rs") if (value := getattr(config, name)) is not None}
    if config.bypass_mode:
        for name, value in active.items():
            raise ValueError(
                f"{KEY}.{name}={value} has no effect with {KEY}.bypass_mode=True, where every ratio is 1: "
                "leave one of them out"
            )
        active = {"bypass_mode": True}
    for name, value in active.items():
        _check_comparable(f"{KEY}.{name}={value}", sampling)


def _check_importance_weights(config: RolloutCorrectionConfig) -> None:
    level, cap = config.rollout_is, config.rollout_is_threshold
    if level is None:
        if cap != RolloutCorrectionConfig().rollout_is_threshold:
            raise ValueError(
                f"{KEY}.rollout_is_threshold={cap} has no effect without {KEY}.rollout_is: set that, or leave it out"
            )
        return
    if level not in IS_LEVELS:
        raise ValueError(f"{KEY}.rollout_is={level} is unknown; use one of {', '.join(IS_LEVELS)}, or null")
    if not 1 <= cap < math.inf:
        raise ValueError(
            f"{KEY}.rollout_is_threshold={cap} must be finite and at least 1: a lower cap would scale down the tokens "
            "on which engine and trainer agree"
        )


def _check_rejection(config: RolloutCorrectionConfig) -> None:
    level, upper = config.rollout_rs, config.rollout_rs_threshold
    if level is None:
        if upper is not None:
            raise ValueError(
                f"{KEY}.rollout_rs_threshold={upper} has no effect without {KEY}.rollout_rs: set that, or leave it out"
            )
        return
    if level not in RS_LEVELS:
        raise ValueError(f"{KEY}.rollout_rs={level} is unknown; use one of {', '.join(RS_LEVELS)}, or null")
    if upper is None:
        raise ValueError(f"{KEY}.rollout_rs={level} needs {KEY}.rollout_rs_threshold, the largest ratio that is kept")
    if not 1 <= upper < math.inf:
        raise ValueError(
            f"{KEY}.rollout_rs_threshold={upper} must be finite and at least 1, so that a ratio of 1 is kept"
        )


def _check_comparable(option: str, sampling: RolloutConfig) -> None:
    """The engine must report log-probs, of the distribution that the trainer computes."""
    rollout = "actor_rollout_ref.rollout"
    if not sampling.calculate_log_probs:
        raise ValueError(f"{option} needs the engine's log-probs: set {rollout}.calculate_log_probs=True")
    for name, value, off in (("top_p", sampling.top_p, 1.0), ("top_k", sampling.top_k, -1)):
        if value != off:
            raise ValueError(
                f"{option} compares the engine's log-probs with the trainer's, but with {rollout}.{name}={value} they "
                f"are those of a truncated distribution: set {rollout}.{name}={off:g}"
            )
