"""The numbers behind the figures, each simulated with the package's own estimators.

Everything is drawn from fixed seeds: a figure is the same at every run.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from verl.protocol import DataProto, object_array
from verl.trainer.config.schema import AlgorithmConfig, RiskConfig
from verl.trainer.ppo.bundles import BundleLayout
from verl.trainer.ppo.core_algos import get_adv_estimator
from verl.trainer.ppo.exact_credit import exact_score_distribution
from verl.trainer.ppo.pairing import ExactPairing, SampledPairing, ScoreAdvantage
from verl.trainer.ppo.quantile_tracker import QuantileTracker, ScoreDistributionAverage, ScoreTracker
from verl.trainer.ppo.risk import quantile, score_advantage

ALPHA, BETA, OMEGA = 0.2, 0.8, 0.5
BUNDLE_SIZE, RESPONSES = 5, 10
MVAR = (1 + OMEGA, 1.0, 0.0)


def binomial_law(n: int, p: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Support 0..n and probabilities of a binomial score."""
    return poisson_binomial_law(torch.full((n,), p, dtype=torch.float64))


def poisson_binomial_law(p: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Support 0..n and probabilities of the number of successes in n trials of chances `p` (n,)."""
    law = torch.ones(1, dtype=torch.float64)
    for chance in p.tolist():
        law = torch.cat([law * (1 - chance), law.new_zeros(1)]) + torch.cat([law.new_zeros(1), law * chance])
    return torch.arange(len(law), dtype=torch.float64), law


# ------------------------------------------------------------------------------------------------------- tracking
TRACKERS = {
    "sgd": lambda: QuantileTracker((ALPHA, BETA), lr=AlgorithmConfig().lr_q, score_range=BUNDLE_SIZE),
    "ema": lambda: ScoreDistributionAverage((ALPHA, BETA)),
}
BUNDLES_PER_STEP = 20


@dataclass
class Track:
    """Quantiles at ALPHA and BETA over the steps of a run, (steps, 2) each, and the error of the gradient's scale."""

    truth: np.ndarray
    tracked: dict[str, np.ndarray]
    scale_error: dict[str, float]


def follow(success: np.ndarray) -> Track:
    """Both trackers on bundles of questions whose success rate at step t is `success[t]`.

    What is read at step t is what an advantage would use there: moved by the batches before t only. `scale_error` is
    the mean of |c / c_true - 1| over the steps from 20 on, c = E[A(S + 1) - A(S)] the scale of the expected gradient.
    """
    rng = np.random.default_rng(0)
    trackers: dict[str, ScoreTracker] = {name: make() for name, make in TRACKERS.items()}
    truth, tracked = [], {name: [np.full(2, np.nan)] for name in trackers}
    errors: dict[str, list[float]] = {name: [] for name in trackers}
    for step, p in enumerate(success.tolist()):
        support, law = binomial_law(BUNDLE_SIZE, p)
        truth.append(quantile(support, (ALPHA, BETA), law).numpy())
        rewards = rng.random((BUNDLES_PER_STEP, BUNDLE_SIZE, RESPONSES)) < p
        scores, probabilities = exact_score_distribution(torch.from_numpy(rewards.astype(float)))
        for name, tracker in trackers.items():
            if step >= 20:
                errors[name].append(abs(_scale(tracked[name][step], p) / _scale(truth[step], p) - 1))
            tracker.update(scores, probabilities.mean(0))
            tracked[name].append(tracker.values().numpy())
    return Track(
        np.array(truth),
        {name: np.array(values[:-1]) for name, values in tracked.items()},
        {name: float(np.mean(values)) for name, values in errors.items()},
    )


def _scale(q: np.ndarray, p: float) -> float:
    """E[A(S + 1) - A(S)] of a bundle of questions with success rate p, under the quantiles q (2,)."""
    others, law = binomial_law(BUNDLE_SIZE - 1, p)
    low, high = q.tolist()
    slope = score_advantage(others + 1, low, high, MVAR) - score_advantage(others, low, high, MVAR)
    return float((slope * law).sum())


# ------------------------------------------------------------------------------------------------------- variance
def variances(bundle_size: int, responses: int, omega: float = 1.5, bundles: int = 40_000) -> dict[str, float]:
    """Variance of the gradient of one bundle under each estimator, summed over its questions.

    Tabular policies of success rates 0.1 to 0.7; the gradient of question i is mean_j (r_ij - p_i) a_i(j). The
    quantiles are the true ones, held fixed.
    """
    p = torch.linspace(0.1, 0.7, bundle_size, dtype=torch.float64)
    support, law = poisson_binomial_law(p)
    q_alpha, q_beta = quantile(support, (ALPHA, BETA), law).tolist()
    advantage = ScoreAdvantage(q_alpha, q_beta, (1 + omega, 1.0, 0.0))
    shape = (bundles, bundle_size, responses)
    rewards = (torch.rand(shape, generator=torch.Generator().manual_seed(0)) < p[:, None]).double()
    layout = BundleLayout(torch.arange(rewards.numel()).view(shape))
    flat = rewards.flatten()
    exact = ExactPairing.build(layout, flat, bundle_size, max_support=bundle_size + 1)
    assert exact is not None
    found = {}
    for name, pairing in (("paired", SampledPairing(layout, flat, bundle_size, 1, None)), ("exact", exact)):
        credit, baseline = pairing.credit(advantage)
        for kind, a in (("", credit), (" + leave-one-out", credit - baseline)):
            gradient = ((rewards - p[:, None]) * a.view(shape)).mean(-1)  # (bundles, bundle_size)
            found[name + kind] = float(gradient.var(0).sum())
    return found


# ------------------------------------------------------------------------------------------------------ difficulty
SUCCESS_RATES = np.linspace(0.05, 0.95, 19)
QUESTIONS_PER_RATE = 25


@dataclass(frozen=True)
class Arm:
    """An estimator and its settings."""

    estimator: str
    algorithm: dict[str, Any] = field(default_factory=dict)
    risk: dict[str, Any] = field(default_factory=dict)


PUBLISHED = {
    "use_q_track_mode": "batch",
    "quantile_down": ALPHA,
    "quantile_up": BETA,
    "use_mixing_risk_measure": True,
    "w_mix": 1.5,
}
ARMS = {
    "random": Arm("riskpo"),
    "same_question": Arm("riskpo", risk={"bundling": "same_question"}),
    "difficulty": Arm("riskpo", risk={"bundling": "difficulty"}),
    "published, uniform": Arm("grpo_bundle_RVaR_quantile_tracking", PUBLISHED),
    "published, std": Arm("grpo_bundle_RVaR_quantile_tracking", PUBLISHED | {"credit_assign_mode": "std"}),
    "grpo": Arm("grpo"),
}


def weights_by_difficulty(steps: int) -> dict[str, tuple[np.ndarray, float]]:
    """Of each arm: the weight of a question in the expected gradient by its success rate (19,), and a cosine.

    A pool of 25 questions of each success rate 0.05, 0.10 ... 0.95 is sampled anew at every step, the policy held
    still, with the same responses for all arms. The weight of a success rate is the mean of (r - p) A over its
    questions, divided by the same of rloo (the mean objective), and scaled to a mean of 1. The cosine is that between
    the arm's expected gradient and rloo's, over questions. The first 10 steps, while trackers and difficulty estimates
    settle, do not count.
    """
    reference = _mean_gradient(Arm("rloo"), steps)
    found = {}
    for name, arm in ARMS.items():
        gradient = _mean_gradient(arm, steps)
        weight = gradient / reference
        cosine = float(gradient @ reference / np.linalg.norm(gradient) / np.linalg.norm(reference))
        found[name] = (weight / weight.mean(), cosine)
    return found


def _mean_gradient(arm: Arm, steps: int, warm_up: int = 10) -> np.ndarray:
    """Mean of (r - p) A over the responses to the questions of each success rate, (19,)."""
    p = SUCCESS_RATES.repeat(QUESTIONS_PER_RATE)
    config = AlgorithmConfig(bundle_size=BUNDLE_SIZE, risk=RiskConfig(**arm.risk), **arm.algorithm)
    estimator = get_adv_estimator(arm.estimator, config, RESPONSES, seed=1)
    total = np.zeros(len(SUCCESS_RATES))
    for step, rewards, batch in _batches(p, steps):
        if estimator.needs_bundles:
            questions = batch["uid"][::RESPONSES]
            bundle_uid = estimator.assign_bundles(questions, questions, step)
            batch = batch.with_columns(bundle_uid=bundle_uid.repeat(RESPONSES))
        advantages = estimator(batch).advantages[:, 0].double().numpy().reshape(rewards.shape)
        if step > warm_up:
            gradient = ((rewards - p[:, None]) * advantages).mean(1)
            total += gradient.reshape(len(SUCCESS_RATES), -1).mean(1)
    return total / (steps - warm_up)


def _batches(p: np.ndarray, steps: int) -> Iterator[tuple[int, np.ndarray, DataProto]]:
    """Steps 1, 2, ... of sampled 0/1 rewards (Q, G), and the batch that they make."""
    rng = np.random.default_rng(0)
    uid = object_array([str(q) for q in range(len(p))]).repeat(RESPONSES)
    columns = {
        "response_mask": torch.ones(len(uid), 1, dtype=torch.bool),
        "uid": uid,
        "question_id": uid,
        "sample_index": np.tile(np.arange(RESPONSES), len(p)),
    }
    for step in range(1, steps + 1):
        rewards = (rng.random((len(p), RESPONSES)) < p[:, None]).astype(float)
        token_rewards = torch.from_numpy(rewards.reshape(-1, 1))
        yield step, rewards, DataProto.from_dict(columns | {"token_level_rewards": token_rewards}, {"step": step})
