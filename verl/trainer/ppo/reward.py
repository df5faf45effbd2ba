"""From responses to scores: which function scores, the dry run before training, and the managers of a batch."""

import inspect
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from verl.protocol import DataProto, object_array
from verl.trainer.config.evaluation_schema import EvalConfig
from verl.trainer.config.schema import OverlongBufferConfig, PPOConfig, RewardModelConfig, ScoringConfig
from verl.trainer.ppo.registry import get_reward_manager, register_reward_manager
from verl.utils import reward_score
from verl.utils.dataset.rl_dataset import RLHFDataset
from verl.workers.reward.function import Call, RewardBatch, RewardFunction, RewardRequest, describe
from verl.workers.reward.outcomes import FAILURES, ScorerDied, ScoringTimeout
from verl.workers.reward.pool import ScoringPool

logger = logging.getLogger(__name__)
Evaluate = Callable[[Sequence[RewardRequest]], list[Any]]

CODE_TIME = 0.8  # of reward_model.timeout_s: what all tests of a program may take; the rest is for the sandbox
MAX_MESSAGES = 50  # distinct messages logged per run


def load_reward(config: PPOConfig | EvalConfig) -> RewardFunction:
    """The reward function of a configuration: `custom_reward_function` if it has a path, else by data_source.

    Raises a one-line ValueError if the file or the function does not exist or does not take the reward manager's
    arguments.
    """
    custom, model = config.custom_reward_function, config.reward_model
    manager = get_reward_manager(model.reward_manager)
    if custom.path is None:
        if custom.reward_kwargs or custom.name != "compute_score":
            raise ValueError("custom_reward_function.name and .reward_kwargs need custom_reward_function.path")
        if manager.takes_lists:
            raise ValueError(
                f"reward_model.reward_manager={model.reward_manager} calls a function that takes lists: give one in "
                "custom_reward_function.path, or set reward_model.reward_manager=naive"
            )
        return RewardFunction(None, "compute_score", {"code_time_s": CODE_TIME * model.timeout_s})
    reward = RewardFunction(str(Path(custom.path).resolve()), custom.name, dict(custom.reward_kwargs))
    request = RewardRequest("", "", "", {})
    arguments = (RewardBatch([request]) if manager.takes_lists else request).arguments()
    try:
        inspect.signature(reward.function).bind(**arguments, **reward.kwargs)
    except TypeError as error:
        form = f"{custom.name}({', '.join(arguments)}, **kwargs)"
        raise ValueError(
            f"{reward} does not take the arguments of reward_model.reward_manager={model.reward_manager} ({error}); "
            f"its form is {form}"
        ) from error
    return reward


def check_reward(reward: RewardFunction, evaluate: Evaluate, datasets: Sequence[RLHFDataset]) -> None:
    """Score one row of every data source, its ground truth taken as the response, before anything expensive starts, in
    the way (`evaluate`) in which training will.

    Raises a one-line ValueError that names the function, the file and the row: for a data source without a scorer, for
    a function that raises, and for a result that is no score.
    """
    for dataset in datasets:
        for index in dataset.first_of_each_source():
            row = dataset[index]
            request = RewardRequest(
                row["data_source"], str(row["ground_truth"]), row["ground_truth"], row["extra_info"]
            )
            if reward.path is None:
                try:
                    reward_score.check_data_source(request.data_source)
                except ValueError as error:
                    raise ValueError(f"{dataset.key}: {dataset.place(index)}: {error}") from error
            # Twice, since a function of lists may return one result for them all.
            for outcome in map(read_result, evaluate([request, request])):
                if outcome.failure:
                    raise ValueError(
                        f"{reward} fails on {dataset.place(index)} (data_source {request.data_source!r}, with its "
                        f"ground truth as the response): {outcome.message}"
                    )


@dataclass(frozen=True)
class Outcome:
    """A result as it was read. `failure` is the metric that counts it, None if there is a score; `place` then names the
    question, for messages."""

    score: float
    values: dict[str, Any] = field(default_factory=dict)
    failure: str | None = None
    message: str = ""
    place: str = ""


def read_result(result: Any) -> Outcome:
    """A number, a dict with `score`, or an exception, as an outcome; a failed call scores 0 here."""
    if isinstance(result, ScoringTimeout | ScorerDied):
        failure = "timeouts" if isinstance(result, ScoringTimeout) else "crashes"
        return Outcome(0.0, failure=failure, message=str(result))
    if isinstance(result, Exception):
        return Outcome(0.0, failure="exceptions", message=describe(result))
    values = dict(result) if isinstance(result, dict) else {"score": result}
    if "score" not in values:
        return Outcome(0.0, failure="exceptions", message=f"the dict it returned has no 'score', only {list(values)}")
    score = as_number(values.pop("score"))
    if score is None:
        return Outcome(
            0.0, failure="exceptions", message=f"it returned {result!r:.80}, not a number or a dict with one"
        )
    if not np.isfinite(score):
        return Outcome(0.0, failure="non_finite", message=f"its score is {score}")
    return Outcome(score, values)


def as_number(value: Any) -> float | None:
    """The value as a float if it is a number (also of numpy or torch), else None."""
    if isinstance(value, torch.Tensor | np.ndarray) and value.ndim == 0:
        value = value.item()
    return float(value) if isinstance(value, bool | int | float | np.number | np.bool_) else None


@register_reward_manager("naive")
class RewardManager:
    """Scores batches, one response per call, in the processes of `pool` or (None) in this one; a call that fails scores
    as a wrong response, is counted by what happened to it, and is logged once per message.

    A manager of one's own overrides `evaluate` (how the function is called) or `shape` (what its scores are turned
    into), and says what it does: `takes_lists`, the function takes lists; `shapes_overlong`, it applies
    `reward_model.reward_kwargs.overlong_buffer_cfg`, which is refused otherwise.
    """

    takes_lists = False
    shapes_overlong = False

    def __init__(self, reward: RewardFunction, config: ScoringConfig, pool: ScoringPool | None = None):
        self.reward = reward
        self.config = config
        self.pool = pool
        self._logged: set[str] = set()

    def __call__(
        self, batch: DataProto, responses: list[str]
    ) -> tuple[torch.Tensor, dict[str, np.ndarray], dict[str, float]]:
        """Score N responses, given as text; `batch` holds `data_source`, `ground_truth`, `extra_info` and
        `response_mask` (N, T).

        Returns
         - token-level scores (N, T) float32: the score, as `shape` leaves it, at the last response token;
         - extras, each (N,): `score` and `acc` (the function's, or else the score; float64), `pred` (the answer read,
           None if there is none to read; the response itself for a function that reads none), and the function's other
           fields as `reward_extra/{name}` (None where a row has none);
         - metrics: `reward/acc` (mean), `reward/responses` (N), of which `reward/exceptions`, `reward/timeouts`,
           `reward/crashes` and `reward/non_finite` failed, `reward_extra/{name}/mean` of numeric fields,
           and those of `shape`.
        """
        outcomes = self.outcomes(self.requests(batch, responses))
        return self.assemble(batch["response_mask"], responses, outcomes)

    def close(self) -> None:
        """End the scoring processes."""
        if self.pool is not None:
            self.pool.close()

    def requests(self, batch: DataProto, responses: list[str]) -> list[RewardRequest]:
        """What is asked of the reward function for each row."""
        columns = (batch["data_source"], responses, batch["ground_truth"], batch["extra_info"])
        return [RewardRequest(*row) for row in zip(*columns, strict=True)]

    def evaluate(self, requests: Sequence[RewardRequest]) -> list[Any]:
        """Per request, in order, what `ScoringPool.evaluate` gives for it."""
        return self.call(requests)

    def call(self, calls: Sequence[Call]) -> list[Any]:
        """Call the function, for each of `calls` once."""
        return self.reward.evaluate(calls) if self.pool is None else self.pool.evaluate(calls)

    def shape(self, scores: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, dict[str, float]]:
        """What is trained on, (N,) float32, made of the function's scores (N,); mask: (N, T) of response tokens. And
        metrics of it."""
        return scores, {}

    def outcomes(self, requests: list[RewardRequest]) -> list[Outcome]:
        """Call the reward function. A failed call scores what a wrong response of its data source does, or 0 with a
        function of one's own."""
        found = []
        for request, result in zip(requests, self.evaluate(requests), strict=True):
            outcome = read_result(result)
            if outcome.failure:
                own = self.reward.path is not None
                score = 0.0 if own else reward_score.wrong_score(request.data_source)
                outcome = replace(outcome, score=score, place=_place(request))
            found.append(outcome)
        return found

    def assemble(
        self, mask: torch.Tensor, responses: list[str], outcomes: list[Outcome]
    ) -> tuple[torch.Tensor, dict[str, np.ndarray], dict[str, float]]:
        """What `__call__` returns, from the outcomes of all rows; mask: (N, T) of response tokens."""
        metrics = {f"reward/{kind}": 0.0 for kind in FAILURES} | {"reward/responses": float(len(outcomes))}
        for outcome in outcomes:
            if outcome.failure:
                metrics[f"reward/{outcome.failure}"] += 1.0
                self._log(outcome)
        scores = torch.tensor([outcome.score for outcome in outcomes], dtype=torch.float32)
        extras, extra_metrics = _extras(outcomes, responses)
        scores, shape_metrics = self.shape(scores, mask)
        metrics["reward/acc"] = float(extras["acc"].mean())
        return at_last_token(scores, mask), extras, metrics | extra_metrics | shape_metrics

    def _log(self, outcome: Outcome) -> None:
        if outcome.message in self._logged or len(self._logged) > MAX_MESSAGES:
            return
        self._logged.add(outcome.message)
        if len(self._logged) > MAX_MESSAGES:
            logger.warning("%s: further messages are not logged; reward/exceptions still counts them", self.reward)
        else:
            text = "%s failed on a response to %s, which scores as a wrong one: %s"
            logger.warning(text, self.reward, outcome.place, outcome.message)


@register_reward_manager("dapo")
class DapoRewardManager(RewardManager):
    """Adds the overlong penalty, if that is enabled, to the score."""

    shapes_overlong = True

    def shape(self, scores: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, dict[str, float]]:
        assert isinstance(self.config, RewardModelConfig)
        overlong = self.config.reward_kwargs.overlong_buffer_cfg
        if not overlong.enable:
            return scores, {}
        penalty = overlong_penalty(mask.sum(1), mask.shape[1], overlong)
        metrics = {"reward/overlong_penalty": float(penalty.mean()), "reward/overlong": float((penalty < 0).sum())}
        return scores + penalty, metrics


@register_reward_manager("batch")
class BatchRewardManager(RewardManager):
    """Calls the function with lists of up to `batch_size` responses; a call that fails fails for all of them."""

    takes_lists = True
    batch_size = 64

    def evaluate(self, requests: Sequence[RewardRequest]) -> list[Any]:
        batches = [
            RewardBatch(requests[start : start + self.batch_size]) for start in range(0, len(requests), self.batch_size)
        ]
        results = zip(batches, self.call(batches), strict=True)
        return [one for batch, result in results for one in _each(result, len(batch.requests))]


def make_reward_manager(reward: RewardFunction, config: ScoringConfig) -> RewardManager:
    """The manager of `config`, with processes that score, or none (`num_workers=0`, for a debugger)."""
    pool = ScoringPool(reward, config.num_workers, config.timeout_s) if config.num_workers else None
    return get_reward_manager(config.reward_manager)(reward, config, pool)


def _each(result: Any, count: int) -> list[Any]:
    """The results of `count` responses out of what a function of lists returned, or its failure for each of them."""
    if isinstance(result, Exception):
        return [result] * count
    if isinstance(result, np.ndarray | torch.Tensor):
        result = result.tolist()
    if not isinstance(result, list | tuple):
        return [ValueError(f"it returned {result!r:.80} for {count} responses, not a list")] * count
    if len(result) != count:
        return [ValueError(f"it returned {len(result)} results for {count} responses")] * count
    return list(result)


def _place(request: RewardRequest) -> str:
    """The question, as far as its row says which it is."""
    index = request.extra_info.get("index")
    return f"data_source {request.data_source!r}" + (f", extra_info.index {index}" if index is not None else "")


def overlong_penalty(lengths: torch.Tensor, max_length: int, config: OverlongBufferConfig) -> torch.Tensor:
    """Soft overlong punishment (arXiv 2503.14476, eq. 13): 0 up to `max_length - len`, then falling linearly to
    -penalty_factor at `max_length`. lengths (N,) tokens -> (N,) float32."""
    beyond = (lengths - (max_length - config.len)).clamp(min=0)
    return -config.penalty_factor * beyond.float() / config.len


def at_last_token(scores: torch.Tensor, response_mask: torch.Tensor) -> torch.Tensor:
    """(N, T) float32: `scores` (N,) at the last token that is in `response_mask` (N, T), 0 elsewhere."""
    if not bool(response_mask.any(dim=1).all()):
        row = int((~response_mask.any(dim=1)).nonzero()[0])
        raise ValueError(f"row {row} has no response token that could carry its score")
    positions = torch.arange(response_mask.shape[1])
    last = torch.where(response_mask, positions, -1).max(dim=1).values  # (N,)
    out = torch.zeros(response_mask.shape, dtype=torch.float32)
    out[torch.arange(len(scores)), last] = scores
    return out


def _extras(outcomes: list[Outcome], responses: list[str]) -> tuple[dict[str, np.ndarray], dict[str, float]]:
    acc = [0.0 if outcome.failure else as_number(outcome.values.get("acc")) for outcome in outcomes]
    extras: dict[str, np.ndarray] = {
        "score": np.array([outcome.score for outcome in outcomes]),
        "acc": np.array([o.score if a is None else a for o, a in zip(outcomes, acc, strict=True)]),
        "pred": object_array(
            [None if o.failure else o.values.get("pred", text) for o, text in zip(outcomes, responses, strict=True)]
        ),
    }
    metrics = {}
    names = {name: None for outcome in outcomes for name in outcome.values if name not in ("acc", "pred")}
    for name in names:
        column = [outcome.values.get(name) for outcome in outcomes]
        extras[f"reward_extra/{name}"] = object_array(column)
        numbers = [number for value in column if (number := as_number(value)) is not None]
        if numbers:
            metrics[f"reward_extra/{name}/mean"] = float(np.mean(numbers))
    return extras, metrics
