"""From questions to scored responses: sampling, rewards, and DAPO's dynamic sampling (arXiv 2503.14476).

With `algorithm.filter_groups.enable`, questions whose responses all have the same metric are dropped, and further ones
are sampled until the batch is full. Under an estimator that bundles, a bundle is the unit: it is dropped when none of
its questions has unequal responses, and kept whole otherwise.
"""

from typing import Any

import numpy as np
import torch

from verl.protocol import DataProto, object_array
from verl.trainer.config.schema import PPOConfig
from verl.trainer.ppo.generation import concat_prompts, expand
from verl.trainer.ppo.groups import Groups
from verl.trainer.ppo.registry import AdvantageEstimator
from verl.trainer.ppo.reward import RewardManager
from verl.trainer.ppo.score_stream import ScoreStream
from verl.utils.dataset.loader import StatefulLoader
from verl.utils.timer import Timer
from verl.workers.reward.outcomes import FAILURES
from verl.workers.rollout.base import Rollout, SamplingParams, ignore

COUNTS = (
    *(f"reward/{kind}" for kind in FAILURES),
    "reward/responses",
    "reward/overlong",
    "rollout/engine_restarts",
)


class Collector:
    """Called with a step: takes questions from the loader, samples n responses to each, scores them, filters.

    Returns N rows, a question's neighbours, with the columns of `expand`, `generate` and `RewardManager`, and
    `token_level_scores` (N, T) and `response_text`; and the metrics.
    """

    def __init__(
        self,
        config: PPOConfig,
        rollout: Rollout,
        loader: StatefulLoader,
        estimator: AdvantageEstimator,
        reward: RewardManager,
        tokenizer: Any,
    ) -> None:
        self.config = config
        self.rollout = rollout
        self.loader = loader
        self.estimator = estimator
        self.reward = reward
        self.tokenizer = tokenizer

    def __call__(self, step: int, timer: Timer) -> tuple[DataProto, dict[str, float]]:
        filters = self.config.algorithm.filter_groups
        if not filters.enable:
            return self._sample(step, 0, timer)
        wanted = self.config.data.train_batch_size * self.config.actor_rollout_ref.rollout.n
        kept: list[DataProto] = []
        parts: list[dict[str, float]] = []
        sampled = 0
        while sum(map(len, kept)) < wanted:
            if filters.max_num_gen_batches > 0 and len(kept) == filters.max_num_gen_batches:
                raise RuntimeError(
                    f"step {step}: {len(kept)} batches of questions (algorithm.filter_groups.max_num_gen_batches) left "
                    f"{sum(map(len, kept))} of {wanted} rows: the questions are too easy or too hard, raise the limit "
                    "or data.gen_batch_size"
                )
            batch, metrics = self._sample(step, len(kept), timer)
            parts.append(metrics)
            sampled += len(batch)
            kept.append(batch.select_rows(informative_rows(batch, filters.metric)))
        metrics = merge_metrics(parts) | {
            "filter_groups/num_gen_batches": float(len(kept)),
            "filter_groups/kept_share": sum(map(len, kept)) / sampled,
        }
        return first_units(concat_prompts(kept), wanted), metrics

    def greedy_rewards(self, batch: DataProto) -> tuple[torch.Tensor, dict[str, float]]:
        """(N,) float32: the reward of the greedy response to each row's question; and the metrics of scoring them."""
        n = self.config.actor_rollout_ref.rollout.n
        questions = batch.select_rows(batch["sample_index"] == 0)
        questions = questions.select(["prompts", "prompt_length", "uid", "data_source", "ground_truth", "extra_info"])
        single = expand(questions, 1, self.config.trainer.seed, batch.meta_info["step"])
        scored, metrics = self._generate_and_score(single, self._sampling_params(greedy=True), 1, Timer())
        return scored["token_level_scores"].sum(1).repeat_interleave(n), metrics

    def _sample(self, step: int, part: int, timer: Timer) -> tuple[DataProto, dict[str, float]]:
        """Responses to the next questions of the loader; `part` counts the loader's batches within the step."""
        n = self.config.actor_rollout_ref.rollout.n
        batch = expand(self._name(next(self.loader), step, part), n, self.config.trainer.seed, step)
        return self._generate_and_score(batch, self._sampling_params(), n, timer)

    def _name(self, questions: DataProto, step: int, part: int) -> DataProto:
        """The questions with a `uid`, and a `bundle_uid` where the estimator bundles."""
        first = part * self.loader.batch_size
        uid = object_array([f"{step}-{first + i}" for i in range(len(questions))])
        questions = questions.with_columns(uid=uid)
        if not self.estimator.needs_bundles:
            return questions
        bundle = self.estimator.assign_bundles(uid, questions["question_id"], step)
        names = object_array([f"{part}-{name}" if name else "" for name in bundle.tolist()])
        # A question without a bundle is left over, under bundle_remainder=drop.
        return questions.with_columns(bundle_uid=names).select_rows(bundle != "")

    def _sampling_params(self, greedy: bool = False) -> SamplingParams:
        rollout = self.config.actor_rollout_ref.rollout
        max_tokens = self.config.data.max_response_length
        return SamplingParams(max_tokens, rollout.temperature, rollout.top_p, rollout.top_k, greedy)

    def _generate_and_score(
        self, batch: DataProto, params: SamplingParams, n: int, timer: Timer
    ) -> tuple[DataProto, dict[str, float]]:
        """Responses and their scores. Under `rollout.mode=async` the ones that are finished are scored while the others
        are generated: the phase `reward` is what is left to wait for."""
        stream = ScoreStream(self.reward, self.tokenizer, batch)
        early = self.config.actor_rollout_ref.rollout.mode == "async"
        with timer("gen"):
            output, metrics = self.rollout.generate(batch, params, n, stream.add if early else ignore)
        batch = batch.with_columns(**output.columns())
        with timer("reward"):
            if not early:
                stream.add(np.arange(len(batch)), output)
            texts, outcomes = stream.finish()
            scores, extras, reward_metrics = self.reward.assemble(batch["response_mask"], texts, outcomes)
        columns = {name: extras[name] for name in ("score", "acc", "pred")}
        batch = batch.with_columns(token_level_scores=scores, response_text=object_array(texts), **columns)
        return batch, metrics | reward_metrics


def informative_rows(batch: DataProto, metric: str) -> np.ndarray:
    """(N,) bool: rows of the units (bundles, or else questions) in which a question's responses differ in `metric`.

    `metric` is `acc`, `score` (what the reward function returned), or `seq_reward` (what is trained on).
    """
    values = batch["token_level_scores"].sum(1) if metric == "seq_reward" else torch.from_numpy(batch[metric])
    questions = Groups(batch["uid"])
    differs = questions.spread((questions.max(values) > questions.min(values)).double())
    units = Groups(_units(batch))
    return (units.spread(units.max(differs)) > 0).numpy()


def merge_metrics(parts: list[dict[str, float]]) -> dict[str, float]:
    """Metrics of several batches as those of one: counts are added, everything else is averaged."""
    merged = {}
    for name in {name: None for part in parts for name in part}:
        values = [part[name] for part in parts if name in part]
        merged[name] = sum(values) if name in COUNTS else sum(values) / len(values)
    return merged


def first_units(batch: DataProto, rows: int) -> DataProto:
    """The first whole units, in the order of their first row, that fill `rows` rows."""
    units = _units(batch)
    names, first, counts = np.unique(units.astype(str), return_index=True, return_counts=True)
    order = np.argsort(first)
    taken = order[np.cumsum(counts[order]) <= rows]
    return batch.select_rows(np.isin(units.astype(str), names[taken]))


def _units(batch: DataProto) -> np.ndarray:
    return batch["bundle_uid"] if "bundle_uid" in batch else batch["uid"]
