"""Draws from several files by weights: exact shares, and no question again before its file is through."""

import math
from collections.abc import Sequence

import numpy as np

from verl.utils.text import counted


class Mixture:
    """Epochs of `draws` questions, `files[f]` (Q_f,) holding the indices of file f's questions and `weights[f]` its
    share.

    `counts` (F,) int64 are the draws of an epoch from each file, by the method of largest remainders. They go through
    the file's questions pass by pass, across epochs, each pass in an order of its own, and are spread over the epoch:
    any t successive draws hold w t of a file with the share w, to within 2 (1 + w (F - 2)). Everything depends on
    (seed, epoch) alone.
    """

    def __init__(self, files: list[np.ndarray], weights: Sequence[float], draws: int, seed: int, shuffle: bool):
        """Raises ValueError for a weight above 0 of which an epoch gets no question, or whose file has none."""
        self.files = files
        self.seed = seed
        self.shuffle = shuffle
        self.counts = apportion(weights, draws)
        for index, (weight, count, questions) in enumerate(zip(weights, self.counts, files, strict=True)):
            name = f"data.train_weights[{index}] is {weight:g}"
            if weight > 0 and len(questions) == 0:
                raise ValueError(f"{name}: all prompts of its file were dropped for their length; set it to 0")
            if weight > 0 and count == 0:
                raise ValueError(f"{name}: that is none of the {draws} questions of an epoch; raise it, or set it to 0")

    def order(self, epoch: int) -> np.ndarray:
        """(draws,) int64: the questions of an epoch."""
        file_of = self._files_drawn_from(np.random.default_rng([self.seed, epoch]))
        order = np.empty(len(file_of), dtype=np.int64)
        for file, count in enumerate(self.counts.tolist()):
            order[file_of == file] = self._draws(file, epoch * count, count)
        return order

    def _files_drawn_from(self, rng: np.random.Generator) -> np.ndarray:
        """(draws,): the file of each draw of an epoch. A file's j-th of c draws lies somewhere in the j-th of c equal
        parts of a circle, and the epoch begins anywhere on it: so each draw is from a file with its share as
        probability."""
        jitter = [rng.random(count) if self.shuffle else np.full(count, 0.5) for count in self.counts]
        places = np.concatenate([(np.arange(len(j)) + j) / max(1, len(j)) for j in jitter])
        file_of = np.repeat(np.arange(len(self.files)), self.counts)[np.argsort(places, kind="stable")]
        return np.roll(file_of, rng.integers(len(file_of))) if self.shuffle else file_of

    def _draws(self, file: int, first: int, count: int) -> np.ndarray:
        """Draws number `first` to `first + count - 1` from a file, counted from the start of training."""
        questions = self.files[file]
        if count == 0:
            return questions[:0]
        start, end = first // len(questions), -(-(first + count) // len(questions))
        passes = np.concatenate([self._pass(file, number) for number in range(start, end)])
        return passes[first - start * len(questions) :][:count]

    def _pass(self, file: int, number: int) -> np.ndarray:
        questions = self.files[file]
        return (
            np.random.default_rng([self.seed, number, file + 1]).permutation(questions) if self.shuffle else questions
        )


def apportion(weights: Sequence[float], draws: int) -> np.ndarray:
    """(F,) int64: `draws` divided in the ratio of the weights; what rounding leaves goes to the largest remainders."""
    exact = np.asarray(weights, dtype=np.float64) * (draws / math.fsum(weights))
    counts = np.floor(exact).astype(np.int64)
    counts[np.argsort(counts - exact, kind="stable")[: draws - int(counts.sum())]] += 1
    return counts


def check_weights(weights: Sequence[float], num_files: int) -> None:
    """Raises ValueError, naming data.train_weights, unless there is one per file, none negative and not all 0."""
    given = f"data.train_weights is {list(weights)}"
    if len(weights) != num_files:
        raise ValueError(f"{given}, data.train_files has {counted(num_files, 'file')}: give one weight for each")
    if not all(math.isfinite(weight) and weight >= 0 for weight in weights):
        raise ValueError(f"{given}: give weights of 0 or more")
    if not any(weights):
        raise ValueError(f"{given}: one of them must be above 0; null takes every row once per epoch")
