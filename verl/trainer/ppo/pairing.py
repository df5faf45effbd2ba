"""From the rewards of a batch in bundles to scores and credit: one class per way of pairing responses.

Each is built once per batch and answers two questions: how are the bundle scores distributed (`score_distribution`),
and, given quantiles, what does each response earn (`credit`). All values are per row of the batch, (N,) float64. A
bundle with b < B questions is measured against the quantiles times b / B, and left out of the score distribution.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from verl.trainer.ppo.bundles import BundleLayout, draw_papers
from verl.trainer.ppo.exact_credit import (
    EncodedRewards,
    credit_of_rewards,
    same_question_credit_of_rewards,
    same_question_distribution,
    score_distribution,
)
from verl.trainer.ppo.risk import score_advantage


@dataclass(frozen=True)
class ScoreAdvantage:
    """A(z) by its quantiles and region weights (`risk.score_advantage`)."""

    q_alpha: float
    q_beta: float
    region_weights: Sequence[float]

    def scaled(self, factor: float) -> "ScoreAdvantage":
        return ScoreAdvantage(self.q_alpha * factor, self.q_beta * factor, self.region_weights)

    def __call__(self, z: torch.Tensor) -> torch.Tensor:
        return score_advantage(z, self.q_alpha, self.q_beta, self.region_weights)


class Pairing(ABC):
    """`rewards` (N,) float64 of a batch, `layout` of its bundles, `bundle_size` B."""

    def __init__(self, layout: BundleLayout, rewards: torch.Tensor, bundle_size: int) -> None:
        self.layout = layout
        self.rewards = rewards
        self.bundle_size = bundle_size

    @abstractmethod
    def score_distribution(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Scores (n,) and their masses (n,), pooled over the full bundles, which weigh the same."""

    @abstractmethod
    def credit(self, advantage: ScoreAdvantage) -> tuple[torch.Tensor, torch.Tensor]:
        """Credit of each row, (N,), and a baseline that does not depend on the row's response, nan where none is."""

    def _rows(self, parts: Sequence[tuple[BundleLayout, torch.Tensor]]) -> torch.Tensor:
        """(M, B, G) values of the parts of the layout -> (N,)"""
        values = torch.zeros_like(self.rewards)
        for layout, part in parts:
            layout.scatter(part, values)
        return values


# ------------------------------------------------------------------------------------ bundles of several questions
def _by_size(layout: BundleLayout, bundle_size: int) -> dict[int, BundleLayout]:
    sizes = sorted(set(layout.sizes.tolist()), reverse=True)
    if sizes[0] != bundle_size:
        raise ValueError(
            f"the largest bundle of the batch has {sizes[0]} questions, algorithm.bundle_size={bundle_size}; "
            "at least one bundle must be whole, and none larger"
        )
    return {size: layout.of_size(size) for size in sizes}


def _mean_of_others(credit: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """Mean over the question's other responses, (M, B, G); nan where there are none."""
    credit = credit * valid
    return (credit.sum(-1, keepdim=True) - credit) / (valid.sum(-1, keepdim=True) - 1)


class ExactPairing(Pairing):
    """The expectation over all pairings (`exact_credit`)."""

    def __init__(
        self, layout: BundleLayout, rewards: torch.Tensor, bundle_size: int, encoded: dict[int, EncodedRewards]
    ) -> None:
        super().__init__(layout, rewards, bundle_size)
        self.parts = _by_size(layout, bundle_size)
        self.encoded = encoded

    @classmethod
    def build(
        cls, layout: BundleLayout, rewards: torch.Tensor, bundle_size: int, max_support: int
    ) -> "ExactPairing | None":
        """None if the scores have more than `max_support` possible values."""
        encoded = {}
        for size, part in _by_size(layout, bundle_size).items():
            found = EncodedRewards.encode(part.gather(rewards), part.valid, size, max_support)
            if found is None:
                return None
            encoded[size] = found
        return cls(layout, rewards, bundle_size, encoded)

    def score_distribution(self) -> tuple[torch.Tensor, torch.Tensor]:
        support, probabilities = score_distribution(self.encoded[self.bundle_size])
        return support, probabilities.mean(0)

    def credit(self, advantage: ScoreAdvantage) -> tuple[torch.Tensor, torch.Tensor]:
        credits, baselines = [], []
        for size, part in self.parts.items():
            a = advantage.scaled(size / self.bundle_size)
            encoded = self.encoded[size]
            credit = credit_of_rewards(encoded, a.q_alpha, a.q_beta, a.region_weights).gather(2, encoded.code)
            credits.append((part, credit))
            baselines.append((part, _mean_of_others(credit, part.valid)))
        return self._rows(credits), self._rows(baselines)


class SampledPairing(Pairing):
    """The mean over `num_pairings` pairings drawn from `generator` (`permute`); None: k-th with k-th (`aligned`)."""

    def __init__(
        self,
        layout: BundleLayout,
        rewards: torch.Tensor,
        bundle_size: int,
        num_pairings: int,
        generator: np.random.Generator | None,
    ) -> None:
        super().__init__(layout, rewards, bundle_size)
        self.parts = _by_size(layout, bundle_size)
        self.papers = {  # [(M, B, P) positions among the question's responses]
            size: [draw_papers(part.valid, generator) for _ in range(num_pairings)] for size, part in self.parts.items()
        }

    def _scores(self, size: int) -> list[torch.Tensor]:
        rewards = self.parts[size].gather(self.rewards)
        return [rewards.gather(-1, paper).sum(1) for paper in self.papers[size]]

    def score_distribution(self) -> tuple[torch.Tensor, torch.Tensor]:
        scores = torch.stack(self._scores(self.bundle_size)).flatten()
        return scores, torch.ones_like(scores)

    def credit(self, advantage: ScoreAdvantage) -> tuple[torch.Tensor, torch.Tensor]:
        credits, baselines = [], []
        for size, part in self.parts.items():
            of_size = advantage.scaled(size / self.bundle_size)
            total = torch.zeros(part.rows.shape, dtype=torch.float64)
            met = torch.zeros_like(total)
            for paper, z in zip(self.papers[size], self._scores(size), strict=True):
                earned = of_size(z)[:, None].expand(paper.shape)
                total.scatter_add_(-1, paper, earned)
                met.scatter_add_(-1, paper, torch.ones_like(earned))
            credit = torch.where(part.valid, total / met, 0.0)
            credits.append((part, credit))
            baselines.append((part, _mean_of_others(credit, part.valid)))
        return self._rows(credits), self._rows(baselines)


# --------------------------------------------------------------------------------------- bundles within one question
def _require_responses(layout: BundleLayout, bundle_size: int) -> None:
    fewest = int(layout.valid.sum(-1).min())
    if fewest < bundle_size:
        raise ValueError(
            f"a question has {fewest} responses, fewer than algorithm.bundle_size={bundle_size}; "
            "bundling=same_question needs at least that many (actor_rollout_ref.rollout.n)"
        )


class ExactSameQuestion(Pairing):
    """The expectation over all sets of B responses to a question (`exact_same_question_credit`)."""

    def __init__(self, layout: BundleLayout, rewards: torch.Tensor, bundle_size: int, encoded: EncodedRewards) -> None:
        super().__init__(layout, rewards, bundle_size)
        self.encoded = encoded

    @classmethod
    def build(
        cls, layout: BundleLayout, rewards: torch.Tensor, bundle_size: int, max_support: int
    ) -> "ExactSameQuestion | None":
        """None if the scores have more than `max_support` possible values."""
        _require_responses(layout, bundle_size)
        encoded = EncodedRewards.encode(layout.gather(rewards), layout.valid, bundle_size, max_support)
        return None if encoded is None else cls(layout, rewards, bundle_size, encoded)

    def score_distribution(self) -> tuple[torch.Tensor, torch.Tensor]:
        support, probabilities = same_question_distribution(self.encoded)
        return support, probabilities.mean(0)

    def credit(self, advantage: ScoreAdvantage) -> tuple[torch.Tensor, torch.Tensor]:
        of_reward = same_question_credit_of_rewards(
            self.encoded, advantage.q_alpha, advantage.q_beta, advantage.region_weights
        )
        credit, baseline = (part[:, None].gather(2, self.encoded.code) for part in of_reward)
        return self._rows([(self.layout, credit)]), self._rows([(self.layout, baseline)])


class SampledSameQuestion(Pairing):
    """The mean over cuts of a question's responses into sets of B, in order (`aligned`) or drawn (`permute`).

    Where B does not divide G the last set begins again with the first responses, so that every response is in a set.
    The baseline of a response is the mean over the sets without it.
    """

    def __init__(
        self,
        layout: BundleLayout,
        rewards: torch.Tensor,
        bundle_size: int,
        num_pairings: int,
        generator: np.random.Generator | None,
    ) -> None:
        super().__init__(layout, rewards, bundle_size)
        _require_responses(layout, bundle_size)
        count = layout.valid[:, 0].sum(-1)  # (Q,)
        num_sets = -(-count // bundle_size)
        member = torch.arange(int(num_sets.max()) * bundle_size) % count[:, None]  # (Q, sets * B)
        self.sets = [
            draw_papers(layout.valid, generator)[:, 0].gather(1, member).view(len(count), -1, bundle_size)
            for _ in range(num_pairings)
        ]
        self.exists = torch.arange(int(num_sets.max())) < num_sets[:, None]  # (Q, sets)

    def _scores(self) -> list[torch.Tensor]:
        rewards = self.layout.gather(self.rewards)[:, 0]
        return [rewards.gather(1, sets.flatten(1)).view(sets.shape).sum(-1) for sets in self.sets]

    def score_distribution(self) -> tuple[torch.Tensor, torch.Tensor]:
        weights = (1.0 / self.exists.sum(1, keepdim=True).double()).expand(self.exists.shape)[self.exists]
        return torch.cat([z[self.exists] for z in self._scores()]), weights.repeat(len(self.sets))

    def credit(self, advantage: ScoreAdvantage) -> tuple[torch.Tensor, torch.Tensor]:
        shape = self.layout.rows[:, 0].shape
        with_it, sets_with, everything = (torch.zeros(shape, dtype=torch.float64) for _ in range(3))
        exists = self.exists.double()
        for sets, z in zip(self.sets, self._scores(), strict=True):
            earned = advantage(z) * exists
            with_it.scatter_add_(1, sets.flatten(1), earned.repeat_interleave(self.bundle_size, 1))
            sets_with.scatter_add_(1, sets.flatten(1), exists.repeat_interleave(self.bundle_size, 1))
            everything += earned.sum(1, keepdim=True)
        sets_without = exists.sum(1, keepdim=True) * len(self.sets) - sets_with
        credit = torch.where(self.layout.valid[:, 0], with_it / sets_with, 0.0)
        baseline = torch.where(sets_without > 0, (everything - with_it) / sets_without, torch.nan)
        return self._rows([(self.layout, credit[:, None])]), self._rows([(self.layout, baseline[:, None])])


def build_pairing(
    kind: str,
    layout: BundleLayout,
    rewards: torch.Tensor,
    bundle_size: int,
    same_question: bool,
    num_pairings: int,
    max_support: int,
    generator: np.random.Generator,
) -> Pairing:
    """The pairing `kind` of a batch; for `exact` with more than `max_support` possible scores, `permute` with
    `num_pairings` draws."""
    if kind == "exact":
        exact = (ExactSameQuestion if same_question else ExactPairing).build(layout, rewards, bundle_size, max_support)
        if exact is not None:
            return exact
    sampled = SampledSameQuestion if same_question else SampledPairing
    return sampled(layout, rewards, bundle_size, num_pairings, None if kind == "aligned" else generator)
