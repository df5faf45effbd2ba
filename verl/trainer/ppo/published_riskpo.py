"""The estimator of the published RiskPO code, kept under its own name for reproducing its runs.

It differs from `riskpo` in what it pairs (the k-th responses of a bundle's questions, "paper" k), in using each
bundle's own quantiles, in its mixing of tails, and in how a paper's advantage is shared out. With tracked quantiles
off (`use_q_track_mode=batch`) it is what the published runs really computed.
"""

import copy
import logging
from typing import Any

import numpy as np
import torch

from verl.protocol import DataProto
from verl.trainer.config.schema import AlgorithmConfig
from verl.trainer.ppo.advantages import response_rewards
from verl.trainer.ppo.bundles import BUNDLE_REMAINDERS, BundleLayout, bundle_names, check_num_questions, random_order
from verl.trainer.ppo.groups import Groups, encode_ids
from verl.trainer.ppo.quantile_tracker import LEVEL_GRID, QuantileTracker
from verl.trainer.ppo.registry import AdvantageEstimator, AdvantageOutput, one_thread, register_adv_est
from verl.trainer.ppo.risk_metrics import score_metrics, tracked_mean_metrics, tracker_metrics

logger = logging.getLogger(__name__)

Q_TRACK_MODES = ("track", "batch", "mix")
CREDIT_MODES = ("uniform", "score", "std", "sum-mean")
SMALLEST_DEVIATION = 1e-3
SMALLEST_SUM = 1e-6


def compute_grpo_bundle_rvar_outcome_advantage_quantile_tracking(
    token_level_rewards: torch.Tensor,
    response_mask: torch.Tensor,
    index: np.ndarray,
    bundle_uid: np.ndarray,
    epsilon: float = 1e-6,
    q_track_down: float | None = None,
    q_track_up: float | None = None,
    g_rvar_avg: float = 0.0,
    g_cvar_avg: float = 0.0,
    quantile_down: float = 0.1,
    quantile_up: float = 0.9,
    norm_adv_by_std_in_grpo: bool = True,
    config: Any = None,
    sample_index: np.ndarray | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor, dict[Any, torch.Tensor]]:
    """Advantages of the published code.

    token_level_rewards (N, T), response_mask (N, T); index (N,) the question and bundle_uid (N,) the bundle of each
    row. Paper k holds the k-th row of each question of a bundle, in the order of `sample_index` (N,) or, without it, of
    the rows. `config`, a mapping or an object, wins over the keywords; its other options are the keys of
    `algorithm` that the schema marks as published.

    Returns advantages and returns, equal, (N, T) in the dtype of the rewards, and the scores of each bundle's papers,
    bundle id -> (P,) float64. ValueError for an unknown credit_assign_mode or use_q_track_mode.
    """

    def option(name: str, default: Any) -> Any:
        return config.get(name, default) if hasattr(config, "get") else getattr(config, name, default)

    down, up = option("quantile_down", quantile_down), option("quantile_up", quantile_up)
    _check_options(down, up, option("use_q_track_mode", "mix"), option("credit_assign_mode", "uniform"))
    rewards = response_rewards(token_level_rewards, response_mask)
    order = np.arange(len(rewards)) if sample_index is None else sample_index
    layout = BundleLayout.from_ids(index, bundle_uid, order)
    in_paper = _in_paper(layout)
    papers = in_paper.any(1)  # (M, P)
    scores = (layout.gather(rewards) * in_paper).sum(1)

    low, high = _bundle_quantiles(scores, papers, (down, up))
    if q_track_down is not None and q_track_up is not None:
        if option("use_q_track_mode", "mix") == "track":
            low, high = torch.full_like(low, q_track_down), torch.full_like(high, q_track_up)
        elif option("use_q_track_mode", "mix") == "mix":
            low, high = (low + q_track_down) / 2, (high + q_track_up) / 2

    use_mean = option("use_mean_as_baseline", False)
    above_low, above_high = (scores - low).clamp(min=0), (scores - high).clamp(min=0)
    advantage = above_low - above_high
    if option("natural_baseline_adv", True):
        advantage = advantage + (low - high)
    if use_mean:
        advantage = advantage - g_rvar_avg
    advantage = advantage / (up - down + epsilon)
    if option("use_mixing_risk_measure", False):
        weight = option("w_mix", 1.5)
        tail = -(low - scores).clamp(min=0)
        if use_mean:
            tail = tail - g_cvar_avg
        advantage = (weight * tail / (down + epsilon) + advantage) / (weight + 1)
    elif option("risk_seeking_upper_tail", False):
        weight = option("upper_weight", 1.5)
        advantage = (weight * above_high / (1 - up + epsilon) + advantage) / (weight + 1)
    if option("norm_adv_by_std_in_grpo", norm_adv_by_std_in_grpo):
        advantage = advantage / (_bundle_deviation(scores, papers) + epsilon)

    mode = option("credit_assign_mode", "uniform")
    shared = torch.zeros_like(rewards)
    layout.scatter(_share(mode, advantage, rewards, layout, in_paper, Groups(index), epsilon), shared)
    advantages = (shared[:, None] * response_mask).to(token_level_rewards.dtype)
    bundle_ids, _ = encode_ids(bundle_uid)
    return (
        advantages,
        advantages,
        {bundle: z[exists] for bundle, z, exists in zip(bundle_ids.tolist(), scores, papers, strict=True)},
    )


def _check_options(down: float, up: float, q_track_mode: str, credit_mode: str) -> None:
    if not 0 < down < up < 1:
        raise ValueError(
            f"algorithm.quantile_down={down} and algorithm.quantile_up={up} must satisfy 0 < quantile_down < "
            "quantile_up < 1"
        )
    if q_track_mode not in Q_TRACK_MODES:
        raise ValueError(f"algorithm.use_q_track_mode={q_track_mode} is unknown; use one of {', '.join(Q_TRACK_MODES)}")
    if credit_mode not in CREDIT_MODES:
        raise ValueError(f"algorithm.credit_assign_mode={credit_mode} is unknown; use one of {', '.join(CREDIT_MODES)}")


def _in_paper(layout: BundleLayout) -> torch.Tensor:
    """Rows that are in a paper, (M, B, G) bool: a bundle has as many papers as its shortest question has responses."""
    responses = layout.valid.sum(-1)  # (M, B)
    exists = responses > 0
    papers = torch.where(exists, responses, responses.max()).min(1).values  # (M,)
    return layout.valid & (torch.arange(layout.rows.shape[2]) < papers[:, None, None])


def _bundle_quantiles(scores: torch.Tensor, papers: torch.Tensor, levels: tuple[float, float]) -> list[torch.Tensor]:
    """Quantiles with linear interpolation over the papers of each bundle, each (M, 1); scores (M, P)."""
    ascending = torch.where(papers, scores, torch.inf).sort(-1).values
    last = papers.sum(-1, keepdim=True) - 1
    quantiles = []
    for level in levels:
        position = level * last.double()
        below = position.floor().long()
        above = torch.minimum(below + 1, last)
        left, right = ascending.gather(1, below), ascending.gather(1, above)
        quantiles.append(left + (position - below) * (right - left))
    return quantiles


def _bundle_deviation(scores: torch.Tensor, papers: torch.Tensor) -> torch.Tensor:
    """Unbiased standard deviation over the papers of each bundle, (M, 1); 1 where there is one paper."""
    count = papers.sum(-1, keepdim=True)
    mean = (scores * papers).sum(-1, keepdim=True) / count
    variance = ((scores - mean) ** 2 * papers).sum(-1, keepdim=True) / (count - 1).clamp(min=1)
    return torch.where(count > 1, variance.sqrt(), 1.0)


def _share(
    mode: str,
    advantage: torch.Tensor,
    rewards: torch.Tensor,
    layout: BundleLayout,
    in_paper: torch.Tensor,
    questions: Groups,
    epsilon: float,
) -> torch.Tensor:
    """The advantage of each response, (M, B, G), from that of its paper, (M, P)."""
    shared = advantage[:, None] * in_paper
    if mode == "score":
        return shared * torch.where(layout.gather(rewards) > 0, 0.5, 1.5)
    if mode == "std":
        deviation = questions.std(rewards)
        deviation = torch.where(deviation <= SMALLEST_DEVIATION, 1.0, deviation)
        return shared / (layout.gather(questions.spread(deviation)) + epsilon)
    if mode == "sum-mean":
        centred = layout.gather(rewards - questions.spread(questions.mean(rewards))) * in_paper
        total = centred.sum(1, keepdim=True)
        vanishing = total.abs() <= SMALLEST_SUM
        share = centred / torch.where(vanishing, 1.0, total)
        return shared * torch.where(vanishing, 1.0 / layout.sizes.double()[:, None, None], share)
    return shared


@register_adv_est("grpo_bundle_RVaR_quantile_tracking")
class PublishedRiskPO(AdvantageEstimator):
    """The function above with its bundles and its quantile tracker.

    The tracker's steps `algorithm.lr_q` are absolute. Its values reach the next step, as `use_q_track_mode` asks, which
    in the published trainer they never did: `use_q_track_mode=batch` reproduces that.
    """

    needs_bundles = True

    def __init__(self, config: AlgorithmConfig, rollout_n: int, seed: int) -> None:
        super().__init__(config, rollout_n, seed)
        _check_options(config.quantile_down, config.quantile_up, config.use_q_track_mode, config.credit_assign_mode)
        self.remainder = config.risk.bundle_remainder or "short"
        if self.remainder not in BUNDLE_REMAINDERS:
            raise ValueError(
                f"algorithm.risk.bundle_remainder={self.remainder} is unknown; "
                f"use one of {', '.join(BUNDLE_REMAINDERS)}"
            )
        if config.bundle_size < 1:
            raise ValueError(f"algorithm.bundle_size={config.bundle_size} must be at least 1")
        levels = (*LEVEL_GRID, config.quantile_down, config.quantile_up)
        self.tracker = QuantileTracker(levels, config.lr_q, config.lr_q_power)
        if config.credit_assign_mode == "sum-mean" and config.quantile_tracking and config.use_q_track_mode != "batch":
            logger.warning(
                "algorithm.credit_assign_mode=sum-mean with tracked quantiles gives easy questions negative weight; "
                "the published runs used each bundle's own quantiles (algorithm.use_q_track_mode=batch)"
            )

    def check_num_questions(self, num_questions: int) -> None:
        check_num_questions(num_questions, self.config.bundle_size, self.remainder)

    def assign_bundles(self, uid: np.ndarray, question_id: np.ndarray, step: int) -> np.ndarray:
        """Bundle id (Q,) of each question, "" for one left out; drawn from (seed, step)."""
        return bundle_names(random_order(len(uid), self.seed, step), self.config.bundle_size, self.remainder, step)

    @one_thread()
    def __call__(self, batch: DataProto) -> AdvantageOutput:
        config = self.config
        started = config.quantile_tracking and bool(self.tracker.started)
        tracked: dict[str, Any] = {}
        metrics: dict[str, float] = {}
        if started:
            low, high = self.tracker.value(config.quantile_down), self.tracker.value(config.quantile_up)
            means = tracked_mean_metrics(
                self.tracker.levels, self.tracker.values(), low, high, config.natural_baseline_base
            )
            metrics |= means
            tracked = {
                "q_track_down": low,
                "q_track_up": high,
                "g_rvar_avg": means["quantile_baseline/g_rvar_avg"],
                "g_cvar_avg": means["quantile_baseline/g_cvar_avg"],
            }
        advantages, returns, scores_by_bundle = compute_grpo_bundle_rvar_outcome_advantage_quantile_tracking(
            batch["token_level_rewards"],
            batch["response_mask"],
            batch["uid"],
            batch["bundle_uid"],
            config=config,
            sample_index=batch["sample_index"],
            **tracked,
        )
        scores = torch.cat(list(scores_by_bundle.values()))
        weights = torch.ones_like(scores)
        metrics |= score_metrics(scores, weights, config.quantile_down, config.quantile_up, self._omega())
        metrics["riskpo/max_abs_advantage"] = float(advantages.abs().max())
        if started:
            metrics |= tracker_metrics(self.tracker, scores, weights)
        if config.quantile_tracking:
            self.tracker.update(scores)
        return AdvantageOutput(advantages.float(), returns.float(), metrics)

    def _omega(self) -> float:
        """The paper's omega that the mixing amounts to, w_mix = (1 + omega) alpha / (beta - alpha)."""
        config = self.config
        weight = config.w_mix if config.use_mixing_risk_measure else 0.0
        return weight * (config.quantile_up - config.quantile_down) / config.quantile_down - 1

    def state_dict(self) -> dict[str, Any]:
        return {"tracker": copy.deepcopy(self.tracker.state_dict())}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.tracker.load_state_dict(state["tracker"])
