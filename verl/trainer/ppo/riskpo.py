"""RiskPO: the advantage of bundle scores under a mixture of risk measures, with tracked quantiles (arXiv 2510.00911).

A step: read rewards and bundles -> distribution of the bundle scores -> quantiles -> credit of each response under
`algorithm.risk.region_weights` -> baseline -> advantage; then the tracker moves.
"""

import copy
import logging
import math
from typing import Any

import numpy as np
import torch

from verl.protocol import DataProto
from verl.trainer.config.schema import AlgorithmConfig
from verl.trainer.ppo.advantages import per_token, response_rewards
from verl.trainer.ppo.bundles import (
    BUNDLE_REMAINDERS,
    BUNDLINGS,
    PAIRINGS,
    BundleLayout,
    bundle_names,
    check_num_questions,
    random_order,
)
from verl.trainer.ppo.exact_credit import MAX_SUPPORT
from verl.trainer.ppo.groups import Groups
from verl.trainer.ppo.pairing import Pairing, SampledPairing, SampledSameQuestion, ScoreAdvantage, build_pairing
from verl.trainer.ppo.quantile_tracker import LEVEL_GRID, QuantileTracker, ScoreDistributionAverage
from verl.trainer.ppo.registry import AdvantageEstimator, AdvantageOutput, one_thread, register_adv_est
from verl.trainer.ppo.risk import RegionWeights, quantile
from verl.trainer.ppo.risk_metrics import (
    credit_weight_metrics,
    dead_zone_share,
    score_histogram,
    score_metrics,
    tracked_mean_metrics,
    tracker_metrics,
    unequal_questions,
)

logger = logging.getLogger(__name__)

CHOICES = {
    "bundling": BUNDLINGS,
    "bundle_remainder": BUNDLE_REMAINDERS,
    "pairing": PAIRINGS,
    "baseline": ("leave_one_out", "none"),
    "adv_norm": ("none", "batch"),
    "quantile_source": ("tracked", "batch", "mixed"),
    "tracker": ("sgd", "ema"),
    "update_order": ("after", "before"),
}


def check_risk_config(config: AlgorithmConfig, rollout_n: int) -> None:
    """ValueError naming the first key of `algorithm` whose value has no meaning."""
    risk = config.risk
    for name, level in (("alpha", risk.alpha), ("beta", risk.beta)):
        if not 0 < level < 1:
            raise ValueError(f"algorithm.risk.{name}={level} must lie inside (0, 1)")
    if risk.alpha >= risk.beta:
        raise ValueError(f"algorithm.risk.alpha={risk.alpha} must be smaller than algorithm.risk.beta={risk.beta}")
    if not (math.isfinite(risk.omega) and risk.omega >= 0):
        raise ValueError(f"algorithm.risk.omega={risk.omega} must be finite and at least 0")
    weights = region_weights(config)
    if len(weights) != 3 or not all(math.isfinite(w) for w in weights) or not any(weights):
        raise ValueError(f"algorithm.risk.region_weights={list(weights)} must be three finite numbers, not all 0")
    for name, allowed in CHOICES.items():
        if (value := getattr(risk, name)) not in allowed and not (name == "bundle_remainder" and value is None):
            raise ValueError(f"algorithm.risk.{name}={value} is unknown; use one of {', '.join(allowed)}")
    if config.bundle_size < 1:
        raise ValueError(f"algorithm.bundle_size={config.bundle_size} must be at least 1")
    if risk.num_pairings < 1:
        raise ValueError(f"algorithm.risk.num_pairings={risk.num_pairings} must be at least 1")
    if risk.pairing == "aligned" and risk.num_pairings > 1:
        raise ValueError(
            f"algorithm.risk.num_pairings={risk.num_pairings}: pairing=aligned has one pairing; use 1 or permute"
        )
    if risk.bundling == "same_question" and rollout_n < config.bundle_size:
        raise ValueError(
            f"algorithm.risk.bundling=same_question bundles algorithm.bundle_size={config.bundle_size} responses of a "
            f"question, but actor_rollout_ref.rollout.n={rollout_n}; raise rollout.n or lower bundle_size"
        )


def region_weights(config: AlgorithmConfig) -> RegionWeights:
    """`algorithm.risk.region_weights`, by default MVaR's (1 + omega, 1, 0)."""
    if config.risk.region_weights is None:
        return (1.0 + config.risk.omega, 1.0, 0.0)
    return tuple(float(w) for w in config.risk.region_weights)  # type: ignore[return-value]


class RewardRange:
    """The smallest and largest reward seen in the run."""

    def __init__(self) -> None:
        self.low = math.inf
        self.high = -math.inf

    @property
    def width(self) -> float:
        return self.high - self.low if self.high >= self.low else 0.0

    def see(self, rewards: torch.Tensor) -> None:
        self.low = min(self.low, float(rewards.min()))
        self.high = max(self.high, float(rewards.max()))


class DifficultyEstimate:
    """Mean reward of each question of the data set: half the last visit's, half the estimate before it."""

    def __init__(self) -> None:
        self.means: dict[str, float] = {}

    def update(self, question_ids: np.ndarray, means: np.ndarray) -> None:
        """Question ids (Q,) and the mean reward of this step's responses, (Q,)."""
        for question, mean in zip(question_ids.tolist(), means.tolist(), strict=True):
            self.means[question] = 0.5 * (self.means.get(question, mean) + mean)

    def read(self, question_ids: np.ndarray) -> np.ndarray:
        """Estimates (Q,); a question not met yet counts as average."""
        average = float(np.mean(list(self.means.values()))) if self.means else 0.0
        return np.array([self.means.get(question, average) for question in question_ids.tolist()])


@register_adv_est("riskpo")
class RiskPO(AdvantageEstimator):
    """RiskPO with every choice of `algorithm.risk`.

    Advantage of a response: the credit of `pairing` under A(z) of `risk.score_advantage`, minus `baseline`, times
    (mean responses per question) / (responses of its question), so that questions weigh the same; divided by the
    batch's standard deviation if `adv_norm=batch`.

    Quantiles: the tracker's, the batch's own, or their mean. The tracker's steps are relative to the range of bundle
    scores, B times the range of rewards seen in the run so far: 5 for 0/1 rewards and 10 for -1/+1 rewards at B = 5, so
    both learn alike. Until two different rewards have been seen there is no range and no scale to track on; the tracker
    then starts at the first batch after which there is, and the batch's own quantiles are used until it has started.
    """

    needs_bundles = True

    def __init__(self, config: AlgorithmConfig, rollout_n: int, seed: int) -> None:
        super().__init__(config, rollout_n, seed)
        check_risk_config(config, rollout_n)
        self.risk = config.risk
        self.remainder = self.risk.bundle_remainder or "error"
        self.region_weights = region_weights(config)
        self.same_question = self.risk.bundling == "same_question"
        levels = (*LEVEL_GRID, self.risk.alpha, self.risk.beta)
        self.tracker: QuantileTracker | ScoreDistributionAverage = (
            ScoreDistributionAverage(levels)
            if self.risk.tracker == "ema"
            else QuantileTracker(levels, config.lr_q, config.lr_q_power)
        )
        self.reward_range = RewardRange()
        self.difficulty = DifficultyEstimate()
        self._warned: set[str] = set()

    # --------------------------------------------------------------------------------------------------- bundling
    def check_num_questions(self, num_questions: int) -> None:
        if not self.same_question:
            check_num_questions(num_questions, self.config.bundle_size, self.remainder)

    def assign_bundles(self, uid: np.ndarray, question_id: np.ndarray, step: int) -> np.ndarray:
        """Bundle id (Q,) of each question, "" for one left out; drawn from (seed, step) and the questions' order."""
        if self.same_question:
            return np.asarray(uid, dtype=object)
        keys = self.difficulty.read(question_id) if self.risk.bundling == "difficulty" else None
        order = random_order(len(uid), self.seed, step, keys)
        return bundle_names(order, self.config.bundle_size, self.remainder, step)

    # -------------------------------------------------------------------------------------------------- advantages
    def __call__(self, batch: DataProto) -> AdvantageOutput:
        """Advantages of a batch; rows whose `bundle_uid` is "" get 0."""
        mask = batch["response_mask"]
        bundled = torch.from_numpy(batch["bundle_uid"] != "")
        advantages = torch.zeros(len(batch), dtype=torch.float64)
        advantages[bundled], metrics = self.estimate(batch if bundled.all() else batch.select_rows(bundled))
        spread, returns = per_token(advantages.float(), mask)
        return AdvantageOutput(spread, returns, metrics)

    @one_thread()
    def estimate(self, batch: DataProto) -> tuple[torch.Tensor, dict[str, float]]:
        """Advantage of each response, (N,) float64, and the step's metrics; then the state moves on."""
        rewards = response_rewards(batch["token_level_rewards"], batch["response_mask"])
        layout = BundleLayout.from_ids(batch["uid"], batch["bundle_uid"], batch["sample_index"])
        questions = Groups(batch["uid"])
        pairing = self._pairing(layout, rewards, int(batch.meta_info["step"]))
        scores, weights = pairing.score_distribution()
        self.reward_range.see(rewards)

        if self.risk.update_order == "before":
            self._move_tracker(scores, weights)
        score_advantage = self._score_advantage(scores, weights)
        credit, baseline = pairing.credit(score_advantage)
        advantages = self._advantages(credit, baseline, layout, questions)
        metrics = self._metrics(questions, rewards, layout, scores, weights, credit, advantages, score_advantage)
        if self.risk.update_order == "after":
            self._move_tracker(scores, weights)
        if self.risk.bundling == "difficulty":
            self._update_difficulty(batch, rewards)
        return advantages, metrics

    def _pairing(self, layout: BundleLayout, rewards: torch.Tensor, step: int) -> Pairing:
        pairing = build_pairing(
            self.risk.pairing,
            layout,
            rewards,
            self.config.bundle_size,
            self.same_question,
            self.risk.num_pairings,
            MAX_SUPPORT,
            np.random.default_rng((self.seed, step, 1)),
        )
        if self.risk.pairing == "exact" and isinstance(pairing, SampledPairing | SampledSameQuestion):
            self._warn_once(
                f"bundle scores have more than {MAX_SUPPORT} possible values, too many for "
                f"algorithm.risk.pairing=exact; the mean of "
                f"algorithm.risk.num_pairings={self.risk.num_pairings} random pairings is used"
            )
        return pairing

    def _score_advantage(self, scores: torch.Tensor, weights: torch.Tensor) -> ScoreAdvantage:
        levels = (self.risk.alpha, self.risk.beta)
        q_alpha, q_beta = quantile(scores, levels, weights).tolist()
        if self.tracker.started and self.risk.quantile_source != "batch":
            tracked = [self.tracker.value(level) for level in levels]
            if self.risk.quantile_source == "mixed":
                tracked = [0.5 * (t + b) for t, b in zip(tracked, (q_alpha, q_beta), strict=True)]
            q_alpha, q_beta = tracked
        return ScoreAdvantage(q_alpha, q_beta, self.region_weights)

    def _advantages(
        self, credit: torch.Tensor, baseline: torch.Tensor, layout: BundleLayout, questions: Groups
    ) -> torch.Tensor:
        if self.risk.baseline == "leave_one_out":
            elsewhere = _mean_over_other_bundles(credit, layout)
            credit = credit - torch.where(baseline.isnan(), elsewhere, baseline)
        responses = questions.spread(questions.count)
        advantages = credit * (questions.count.mean() / responses)
        if self.risk.adv_norm == "batch":
            deviation = advantages.std(correction=0)
            # Advantages that are all alike have no scale to be brought to.
            if deviation > 1e-12 * advantages.abs().max():
                advantages = advantages / deviation
        return advantages

    # ------------------------------------------------------------------------------------------------------- state
    def _move_tracker(self, scores: torch.Tensor, weights: torch.Tensor) -> None:
        score_range = self.config.bundle_size * self.reward_range.width
        if score_range == 0:
            return
        if isinstance(self.tracker, QuantileTracker):
            self.tracker.score_range.fill_(score_range)
        self.tracker.update(scores, weights)

    def _update_difficulty(self, batch: DataProto, rewards: torch.Tensor) -> None:
        questions = Groups(batch["question_id"])
        self.difficulty.update(questions.ids, questions.mean(rewards).numpy())

    def state_dict(self) -> dict[str, Any]:
        """Tracker, reward range and difficulty estimates, copied."""
        return {
            "tracker": copy.deepcopy(self.tracker.state_dict()),
            "reward_range": (self.reward_range.low, self.reward_range.high),
            "difficulty": dict(self.difficulty.means),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.tracker.load_state_dict(state["tracker"])
        self.reward_range.low, self.reward_range.high = state["reward_range"]
        self.difficulty.means = dict(state["difficulty"])

    # ----------------------------------------------------------------------------------------------------- metrics
    def _metrics(
        self,
        questions: Groups,
        rewards: torch.Tensor,
        layout: BundleLayout,
        scores: torch.Tensor,
        weights: torch.Tensor,
        credit: torch.Tensor,
        advantages: torch.Tensor,
        used: ScoreAdvantage,
    ) -> dict[str, float]:
        low, high = self.reward_range.low, self.reward_range.high
        size = self.config.bundle_size
        dead = dead_zone_share(credit, rewards, questions)
        metrics = {
            "riskpo/quantile_alpha_used": used.q_alpha,
            "riskpo/quantile_beta_used": used.q_beta,
            "riskpo/num_bundles": float(len(layout.rows)),
            "riskpo/all_equal_questions": float((~unequal_questions(rewards, questions)).double().mean()),
            "riskpo/max_abs_advantage": float(advantages.abs().max()),
            "riskpo/dead_zone_share": dead,
        }
        metrics |= score_metrics(scores, weights, self.risk.alpha, self.risk.beta, self.risk.omega)
        metrics |= score_histogram(scores, weights, size * low, size * high, size + 1)
        metrics |= credit_weight_metrics(advantages, rewards, questions, low, high)
        if self.tracker.started:
            metrics |= tracker_metrics(self.tracker, scores, weights)
            metrics |= tracked_mean_metrics(self.tracker.levels, self.tracker.values(), used.q_alpha, used.q_beta)
        if dead == 1.0:
            self._warn_once(
                "every bundle score lies in a region of weight 0: the advantages of this step are 0 although rewards "
                "differ; lower algorithm.bundle_size, raise algorithm.risk.beta, or start from a better model"
            )
        return metrics

    def _warn_once(self, message: str) -> None:
        if message not in self._warned:
            self._warned.add(message)
            logger.warning(message)


def _mean_over_other_bundles(credit: torch.Tensor, layout: BundleLayout) -> torch.Tensor:
    """Mean credit of the rows of all other bundles, (N,): independent of the row's own; 0 with a single bundle."""
    per_bundle = layout.gather(credit).sum((1, 2))
    rows_per_bundle = layout.valid.sum((1, 2))
    others = (credit.sum() - per_bundle) / (len(credit) - rows_per_bundle).clamp(min=1)
    mean = torch.zeros_like(credit)
    if len(per_bundle) > 1:
        layout.scatter(others[:, None, None].expand(layout.rows.shape), mean)
    return mean
