"""What the risk estimators report about a step: plain functions from a batch's numbers to metrics."""

import numpy as np
import torch

from verl.trainer.ppo.groups import Groups
from verl.trainer.ppo.quantile_tracker import ScoreDistribution, ScoreTracker
from verl.trainer.ppo.risk import cvar, mvar, quantile_integral, rvar

BANDS = ((0.0, 0.2), (0.2, 0.4), (0.4, 0.6), (0.6, 0.8), (0.8, 1.0))


def score_metrics(
    scores: torch.Tensor, weights: torch.Tensor, alpha: float, beta: float, omega: float
) -> dict[str, float]:
    """Risk measures and quantiles of the batch's own score distribution, (n,) scores with masses (n,)."""
    low, high = ScoreDistribution(scores, weights).quantile(torch.tensor([alpha, beta])).tolist()
    return {
        "quantile_baseline/mvar": float(mvar(scores, alpha, beta, omega, weights)),
        "quantile_baseline/rvar": float(rvar(scores, alpha, beta, weights)),
        "quantile_baseline/cvar": float(cvar(scores, alpha, weights)),
        "riskpo/bundle_score_mean": float(quantile_integral(scores, 0.0, 1.0, weights)),
        "riskpo/batch_quantile_alpha": low,
        "riskpo/batch_quantile_beta": high,
    }


def score_histogram(
    scores: torch.Tensor, weights: torch.Tensor, low: float, high: float, bins: int
) -> dict[str, float]:
    """Share of the scores in each of `bins` cells centred on an even grid from `low` to `high`.

    With 0/1 rewards, B + 1 cells from 0 to B are the shares of 0, 1, ... B correct answers.
    """
    width = (high - low) / max(bins - 1, 1)
    cell = torch.zeros(scores.shape) if width == 0 else ((scores - low) / width).round().clamp(0, bins - 1)
    share = torch.zeros(bins, dtype=torch.float64).index_add_(0, cell.long(), weights / weights.sum())
    return {f"riskpo/score_histogram/{i}": value for i, value in enumerate(share.tolist())}


def tracker_metrics(tracker: ScoreTracker, scores: torch.Tensor, weights: torch.Tensor) -> dict[str, float]:
    """Every tracked quantile and how far it is from the batch's, in probability (`ScoreTracker.calibration`)."""
    levels = [f"{level:g}" for level in tracker.levels.tolist()]
    calibration = tracker.calibration(scores, weights).tolist()
    values = {
        f"quantile_tracking/{level}_th_quantile": q for level, q in zip(levels, tracker.values().tolist(), strict=True)
    }
    errors = {f"riskpo/calibration/{level}": error for level, error in zip(levels, calibration, strict=True)}
    return values | errors | {"riskpo/calibration_max": max(calibration)}


def tracked_mean_metrics(
    levels: torch.Tensor, quantiles: torch.Tensor, low: float, high: float, natural_baseline: bool = False
) -> dict[str, float]:
    """Trapezoid integrals over the tracked levels of the two clipped scores of the published estimator.

    g_rvar = (q - low)^+ - (q - high)^+, plus low - high if `natural_baseline`; g_cvar = -(low - q)^+.
    """
    g_rvar = (quantiles - low).clamp(min=0) - (quantiles - high).clamp(min=0) + (low - high) * natural_baseline
    g_cvar = -(low - quantiles).clamp(min=0)
    return {
        "quantile_baseline/g_rvar_avg": float(torch.trapezoid(g_rvar, levels)),
        "quantile_baseline/g_cvar_avg": float(torch.trapezoid(g_cvar, levels)),
    }


def unequal_questions(rewards: torch.Tensor, questions: Groups) -> torch.Tensor:
    """Questions whose responses do not all have the same reward, (Q,) bool."""
    return questions.max(rewards) > questions.min(rewards)


def dead_zone_share(credit: torch.Tensor, rewards: torch.Tensor, questions: Groups) -> float:
    """Share, among questions with unequal rewards, of those whose responses all earn the same credit; 0 if none.

    Such a question would teach under the mean objective and teaches nothing here: all its bundle's scores lie in a
    region of weight 0.
    """
    unequal = unequal_questions(rewards, questions)
    if not unequal.any():
        return 0.0
    # Exact credits agree up to the rounding of their sums.
    same = questions.max(credit) - questions.min(credit) <= 1e-12 * max(1.0, float(credit.abs().max()))
    return int((same & unequal).sum()) / int(unequal.sum())


def credit_weight_metrics(
    advantages: torch.Tensor, rewards: torch.Tensor, questions: Groups, low: float, high: float
) -> dict[str, float]:
    """How much each question weighs, by its success rate, compared with the mean objective.

    A question's weight is the slope of its advantages (N,) on its leave-one-out advantages r - mean of the others: for
    0/1 rewards and exact credit, E[A(S+1) - A(S)]. `riskpo/credit_scale` is the mean weight of the questions with
    unequal rewards, `riskpo/credit_weight/LOW-HIGH` that of those whose mean reward, as a share of the way from `low`
    to `high`, is in the band, over the scale. A band without questions, or a scale of 0, gives no metric.
    """
    unequal = unequal_questions(rewards, questions)
    if not unequal.any():
        return {}
    reference = rewards - questions.mean_of_others(rewards)
    slope = (questions.sum(advantages * reference) / questions.sum(reference**2).clamp(min=1e-300))[unequal]
    success = ((questions.mean(rewards) - low) / (high - low))[unequal]
    scale = float(slope.mean())
    metrics = {"riskpo/credit_scale": scale}
    if abs(scale) * (high - low) <= 1e-9 * float(advantages.abs().max()):  # 0 up to rounding
        return metrics
    for start, end in BANDS:
        inside = (success >= start) & ((success < end) if end < 1 else (success <= 1))
        if inside.any():
            metrics[f"riskpo/credit_weight/{start:g}-{end:g}"] = float(slope[inside].mean()) / scale
    return metrics


def covariance_metrics(
    log_probs: torch.Tensor,
    advantages: torch.Tensor,
    response_mask: torch.Tensor,
    rewards: torch.Tensor,
    uid: np.ndarray,
) -> dict[str, float]:
    """The covariance that drives the entropy, for any estimator: H(k+1) - H(k) = -eta Cov(log pi, A) + O(step^2).

    log_probs, advantages, response_mask (N, T); rewards (N,) of the responses; uid (N,). log pi is that of the whole
    response, A the mean over its tokens. `actor/cov_logp_adv` is the unbiased covariance over the responses of a
    question, averaged over questions with two or more; `actor/cov_logp_adv_ratio` divides it by the same of
    r - mean of the others, the mean objective's, and is left out where that is 0.
    """
    questions = Groups(uid)
    several = questions.count > 1
    if not several.any():
        return {}
    mask = response_mask.double()
    log_prob = (torch.where(response_mask.bool(), log_probs.double(), 0.0)).sum(-1)
    advantage = (advantages.double() * mask).sum(-1) / mask.sum(-1).clamp(min=1)
    centred = log_prob - questions.spread(questions.mean(log_prob))

    def mean_covariance(values: torch.Tensor) -> float:
        return float((questions.sum(centred * values)[several] / (questions.count[several] - 1)).mean())

    covariance = mean_covariance(advantage)
    reference = mean_covariance(rewards - questions.mean_of_others(rewards))
    metrics = {"actor/cov_logp_adv": covariance}
    if reference != 0:
        metrics["actor/cov_logp_adv_ratio"] = covariance / reference
    return metrics
