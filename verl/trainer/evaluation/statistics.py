"""What n responses to each question tell: mean@n, best@n, maj@n, the unbiased pass@k, and confidence intervals.

Validation during training and `main_eval` both compute with this module.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

Measures = dict[str, np.ndarray]  # by name, one value for each of Q questions: (Q,) float64

CONFIDENCE = 0.95
BLOCK = 256  # resamples drawn at a time, which bounds memory


# ---------------------------------------------------------------------------------------------------- one question
def unbiased_pass_at_k(n: int, c: int, k: int) -> float:
    """Chance that k responses, drawn without replacement from n of which c are right, hold a right one:
    1 - C(n-c, k) / C(n, k) (arXiv 2107.03374, eq. 1). As a product of n-c+1..n it never overflows, and through the
    logarithm it keeps its precision where it is small."""
    if not (0 <= c <= n and 1 <= k <= n):
        raise ValueError(f"pass@k needs 0 <= c <= n and 1 <= k <= n, not n={n}, c={c}, k={k}")
    if n - c < k:
        return 1.0
    return -math.expm1(math.fsum(math.log1p(-k / i) for i in range(n - c + 1, n + 1)))


def majority_accuracy(responses: Sequence[tuple[float, str | None]]) -> float:
    """Mean accuracy of those (accuracy, answer) pairs that have a most frequent answer; 0 if none has an answer."""
    votes = Counter(answer for _, answer in responses if answer is not None)
    if not votes:
        return 0.0
    most = max(votes.values())
    winners = {answer for answer, count in votes.items() if count == most}
    return float(np.mean([a for a, answer in responses if answer in winners]))


# -------------------------------------------------------------------------------------------------- many questions
def question_measures(acc: np.ndarray, answers: Sequence[Sequence[str | None]]) -> Measures:
    """Of Q questions with n responses each, per question:
     - `mean@n`: the mean accuracy of its responses;
     - `best@n`: the largest accuracy;
     - `maj@n`: the accuracy of the most frequent answer (None does not vote; tied answers count equally);
     - `pass@k` for k = 1, 2, 4, ... and n: the chance that one of k responses is right, that is, has accuracy >= 1.

    acc: (Q, n) float; answers: Q lists of n.
    """
    n = acc.shape[1]
    pairs = [list(zip(row.tolist(), given, strict=True)) for row, given in zip(acc, answers, strict=True)]
    measures = {
        f"mean@{n}": acc.mean(axis=1),
        f"best@{n}": acc.max(axis=1),
        f"maj@{n}": np.array([majority_accuracy(responses) for responses in pairs]),
    }
    right = (acc >= 1).sum(axis=1)
    for k in sorted({2**i for i in range(n.bit_length())} | {n}):
        by_count = np.array([unbiased_pass_at_k(n, c, k) for c in range(n + 1)])
        measures[f"pass@{k}"] = by_count[right]
    return measures


def measures_by_group(
    data_sources: Sequence[str],
    question_ids: Sequence[str],
    levels: Sequence[str],
    acc: Sequence[float] | np.ndarray,
    answers: Sequence[str | None],
) -> dict[tuple[str, str], Measures]:
    """`question_measures` of N responses, in any order, for each (data source, "") and for each (data source, level) of
    the questions that have a level. ValueError unless the questions of a data source all have as many responses."""
    questions: dict[tuple[str, str, str], list[tuple[float, str | None]]] = defaultdict(list)
    for source, question, level, a, answer in zip(data_sources, question_ids, levels, acc, answers, strict=True):
        questions[source, question, level].append((float(a), answer))
    groups: dict[tuple[str, str], list[list[tuple[float, str | None]]]] = defaultdict(list)
    by_level: dict[tuple[str, str], list[list[tuple[float, str | None]]]] = defaultdict(list)
    for (source, _, level), responses in questions.items():
        groups[source, ""].append(responses)
        if level:
            by_level[source, level].append(responses)
    measures = {}
    for (source, level), group in [*groups.items(), *sorted(by_level.items())]:
        counts = {len(responses) for responses in group}
        if len(counts) > 1:
            raise ValueError(f"{source}: questions have {sorted(counts)} responses, not one number")
        table = np.array([[a for a, _ in responses] for responses in group])
        measures[source, level] = question_measures(table, [[answer for _, answer in r] for r in group])
    return measures


def process_validation_metrics(
    data_sources: Sequence[str],
    question_ids: Sequence[str],
    levels: Sequence[str],
    acc: Sequence[float] | np.ndarray,
    answers: Sequence[str | None],
) -> dict[str, float]:
    """`val-core/{data_source}/acc/{measure}`, and per level `val-aux/{data_source}/level_{level}/acc/{measure}`: the
    means over questions of what `measures_by_group` gives, and `mean@n_se`, the standard error of mean@n over questions
    (from 2 on)."""
    metrics: dict[str, float] = {}
    for (source, level), measures in measures_by_group(data_sources, question_ids, levels, acc, answers).items():
        prefix = f"val-aux/{source}/level_{level}/acc" if level else f"val-core/{source}/acc"
        for name, values in measures.items():
            metrics[f"{prefix}/{name}"] = float(values.mean())
            if name.startswith("mean@") and len(values) > 1:
                metrics[f"{prefix}/{name}_se"] = float(values.std(ddof=1) / math.sqrt(len(values)))
    return metrics


# --------------------------------------------------------------------------------------------- confidence intervals
@dataclass(frozen=True)
class Estimate:
    """A mean over questions and its confidence interval; `low` and `high` are None where a single question leaves
    nothing to resample."""

    value: float
    low: float | None
    high: float | None


def bootstrap_means(values: np.ndarray, samples: int, rng: np.random.Generator) -> np.ndarray:
    """Means of `samples` bootstrap resamples: Q questions drawn from Q with replacement, all measures of a question
    together. values: (Q, m) -> (samples, m)."""
    n_questions = len(values)
    blocks = [min(BLOCK, samples - start) for start in range(0, samples, BLOCK)]
    drawn = [rng.multinomial(n_questions, np.full(n_questions, 1 / n_questions), size=size) for size in blocks]
    return np.concatenate([counts @ values / n_questions for counts in drawn])


@dataclass(frozen=True)
class Bootstrapped:
    """Means over questions, (m,), and those of the resamples, (samples, m), or None for a single question."""

    names: list[str]
    means: np.ndarray
    resampled: np.ndarray | None

    @classmethod
    def of(cls, measures: Measures, samples: int, rng: np.random.Generator) -> "Bootstrapped":
        values = np.stack(list(measures.values()), axis=1)  # (Q, m)
        resampled = bootstrap_means(values, samples, rng) if len(values) > 1 else None
        return cls(list(measures), values.mean(axis=0), resampled)

    @classmethod
    def average(cls, parts: Sequence["Bootstrapped"]) -> "Bootstrapped":
        """The mean over data sources, each with equal weight, of the measures that all of them have. `parts` are
        resampled independently."""
        names = [name for name in parts[0].names if all(name in part.names for part in parts)]
        columns = [[part.names.index(name) for name in names] for part in parts]
        means = np.mean([part.means[c] for part, c in zip(parts, columns, strict=True)], axis=0)
        resampled = [part.resampled[:, c] for part, c in zip(parts, columns, strict=True) if part.resampled is not None]
        return cls(names, means, np.mean(resampled, axis=0) if len(resampled) == len(parts) else None)

    def estimates(self) -> dict[str, Estimate]:
        """Each measure with its percentile interval."""
        if self.resampled is None:
            return {name: Estimate(float(mean), None, None) for name, mean in zip(self.names, self.means, strict=True)}
        tail = (1 - CONFIDENCE) / 2
        low, high = np.quantile(self.resampled, [tail, 1 - tail], axis=0)
        return {name: Estimate(*map(float, row)) for name, *row in zip(self.names, self.means, low, high, strict=True)}
