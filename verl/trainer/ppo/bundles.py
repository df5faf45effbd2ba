"""Bundles: which questions form one, and which of their responses meet in a bundle score.

A bundle has B questions; a bundle score z is the sum of the rewards of one response to each. Everything here works on
ids: `uid` names a question, `bundle_uid` its bundle ("": the question is left out), `sample_index` 0..G-1 the response.
"""

from dataclasses import dataclass

import numpy as np
import torch

from verl.trainer.ppo.exact_credit import (
    MAX_SUPPORT,
    exact_credit,
    exact_same_question_credit,
    exact_same_question_distribution,
    exact_score_distribution,
)
from verl.trainer.ppo.groups import encode_ids

__all__ = [
    "BUNDLE_REMAINDERS",
    "BUNDLINGS",
    "MAX_SUPPORT",
    "PAIRINGS",
    "BundleLayout",
    "bundle_names",
    "check_num_questions",
    "draw_papers",
    "exact_credit",
    "exact_same_question_credit",
    "exact_same_question_distribution",
    "exact_score_distribution",
    "random_order",
]

BUNDLINGS = ("random", "same_question", "difficulty")
BUNDLE_REMAINDERS = ("error", "drop", "short")
PAIRINGS = ("exact", "permute", "aligned")


def check_num_questions(num_questions: int, bundle_size: int, remainder: str) -> None:
    """ValueError if a step of `num_questions` cannot be cut into bundles of `bundle_size`."""
    if bundle_size > num_questions:
        raise ValueError(
            f"algorithm.bundle_size={bundle_size} is larger than the step's {num_questions} questions "
            "(data.train_batch_size); use smaller bundles or more questions"
        )
    if remainder == "error" and num_questions % bundle_size:
        below = num_questions - num_questions % bundle_size
        raise ValueError(
            f"data.train_batch_size={num_questions} is not a multiple of algorithm.bundle_size={bundle_size}; "
            f"use {below} or {below + bundle_size}, or set algorithm.risk.bundle_remainder to drop or short"
        )


def bundle_names(order: np.ndarray, bundle_size: int, remainder: str, step: int) -> np.ndarray:
    """Bundle id (Q,) of each question when every `bundle_size` neighbours of `order` (Q,) form a bundle.

    What is left over at the end is a smaller bundle (`short`) or left out, id "" (`drop`).
    """
    check_num_questions(len(order), bundle_size, remainder)
    bundle = np.empty(len(order), dtype=np.int64)
    bundle[order] = np.arange(len(order)) // bundle_size
    names = np.array([f"{step}:{b}" for b in range(-(-len(order) // bundle_size))], dtype=object)
    if remainder == "drop" and len(order) % bundle_size:
        names[-1] = ""
    return names[bundle]


def random_order(num_questions: int, seed: int, step: int, keys: np.ndarray | None = None) -> np.ndarray:
    """A permutation (Q,) drawn from (seed, step); with `keys` (Q,), ascending in them and random within ties."""
    draw = np.random.default_rng((seed, step, 0)).random(num_questions)
    return np.argsort(draw) if keys is None else np.lexsort((draw, keys))


@dataclass(frozen=True)
class BundleLayout:
    """Where the responses of M bundles of at most B questions with at most G responses stand in the batch.

    rows: (M, B, G) int64, the row of the batch, -1 where there is none; the order is that of the ids, whatever that of
    the rows. valid: rows >= 0. sizes: (M,) int64, the number of questions.
    """

    rows: torch.Tensor

    @property
    def valid(self) -> torch.Tensor:
        return self.rows >= 0

    @property
    def sizes(self) -> torch.Tensor:
        return (self.rows[:, :, 0] >= 0).sum(1)

    @classmethod
    def from_ids(cls, uid: np.ndarray, bundle_uid: np.ndarray, sample_index: np.ndarray) -> "BundleLayout":
        """The layout of N rows by their ids, each (N,)."""
        bundle_ids, bundle = encode_ids(bundle_uid)
        question_ids, question = encode_ids(uid)
        sample = np.asarray(sample_index).astype(np.int64)
        _check_ids(question_ids, question, bundle, bundle_ids, sample)
        order = _order(bundle, question, sample, len(question_ids))
        if len(order) == 0 or bundle_ids[0] == "":  # "" sorts first
            raise ValueError("the batch holds rows of no bundle; leave out questions whose bundle_uid is empty")
        new_question = np.diff(question[order], prepend=-1) != 0
        new_bundle = np.diff(bundle[order], prepend=-1) != 0
        question_number = np.cumsum(new_question) - 1
        bundle_number = np.cumsum(new_bundle) - 1
        k = np.arange(len(order)) - np.flatnonzero(new_question)[question_number]
        b = question_number - question_number[new_bundle][bundle_number]
        rows = np.full((bundle_number[-1] + 1, b.max() + 1, k.max() + 1), -1, dtype=np.int64)
        rows[bundle_number, b, k] = order
        return cls(torch.from_numpy(rows))

    def of_size(self, size: int) -> "BundleLayout":
        """Only the bundles of `size` questions, without room for more."""
        return BundleLayout(self.rows[self.sizes == size, :size])

    def gather(self, values: torch.Tensor) -> torch.Tensor:
        """(N,) -> (M, B, G), 0 where there is no row."""
        return torch.where(self.valid, values[self.rows.clamp(min=0)], torch.zeros((), dtype=values.dtype))

    def scatter(self, values: torch.Tensor, out: torch.Tensor) -> None:
        """Write (M, B, G) into the rows of `out` (N,)."""
        out[self.rows[self.valid]] = values[self.valid]


def _check_ids(
    question_ids: np.ndarray, question: np.ndarray, bundle: np.ndarray, bundle_ids: np.ndarray, sample: np.ndarray
) -> None:
    """ValueError for a question in two bundles, or for two rows with the same question and sample."""
    bundle_of = np.zeros(len(question_ids), dtype=np.int64)
    bundle_of[question] = bundle
    if (astray := np.flatnonzero(bundle_of[question] != bundle)).size:
        row = astray[0]
        raise ValueError(
            f"question {question_ids[question[row]]} is in bundles {bundle_ids[bundle[row]]} and "
            f"{bundle_ids[bundle_of[question[row]]]}; bundle_uid must be assigned once per question"
        )
    if sample.size and sample.min() < 0:
        raise ValueError(f"sample_index of row {sample.argmin()} is {sample.min()}; it counts from 0")


def _order(bundle: np.ndarray, question: np.ndarray, sample: np.ndarray, num_questions: int) -> np.ndarray:
    """Rows by (bundle, question, sample), (N,); ValueError if two rows agree in all."""
    width = int(sample.max(initial=0)) + 1
    key = (bundle * num_questions + question) * width + sample
    order = np.argsort(key)
    if (twice := np.flatnonzero(np.diff(key[order]) == 0)).size:
        row, other = order[twice[0]], order[twice[0] + 1]
        raise ValueError(f"rows {row} and {other} have the same uid and sample_index; number the responses 0..G-1")
    return order


def draw_papers(valid: torch.Tensor, generator: np.random.Generator | None) -> torch.Tensor:
    """Which response of each question meets which: (..., P, ) positions into the last axis of `valid` (..., G).

    `generator` None keeps the order of `sample_index` (`aligned`); else each question's responses are permuted
    independently (`permute`). P = G; a question with fewer responses than the largest begins again with its first, so
    that every response is met and, by a mean over its papers, weighs the same.
    """
    count = valid.sum(-1, keepdim=True)
    keys = torch.arange(valid.shape[-1], dtype=torch.float64).expand(valid.shape)
    if generator is not None:
        keys = torch.from_numpy(generator.random(valid.shape))
    order = torch.where(valid, keys, torch.inf).argsort(-1)
    return order.gather(-1, torch.arange(valid.shape[-1]).expand(valid.shape) % count)
