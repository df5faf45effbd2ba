"""Validation metrics from n responses to each question: mean@n, best@n, maj@n and the unbiased pass@k."""

import math
from collections import Counter, defaultdict
from collections.abc import Sequence

import numpy as np


def unbiased_pass_at_k(n: int, c: int, k: int) -> float:
    """Chance that k responses, drawn without replacement from n of which c are right, hold a right one:
    1 - C(n-c, k) / C(n, k) (arXiv 2107.03374, eq. 1). As a product of n-c+1..n it never overflows, and through the
    logarithm it keeps its precision where it is small."""
    if not (0 <= c <= n and 1 <= k <= n):
        raise ValueError(f"pass@k needs 0 <= c <= n and 1 <= k <= n, not n={n}, c={c}, k={k}")
    if n - c < k:
        return 1.0
    return -math.expm1(math.fsum(math.log1p(-k / i) for i in range(n - c + 1, n + 1)))


def process_validation_metrics(
    data_sources: Sequence[str],
    question_ids: Sequence[str],
    levels: Sequence[str],
    acc: Sequence[float] | np.ndarray,
    answers: Sequence[str | None],
) -> dict[str, float]:
    """Metrics of N responses, in any order; every question of a data source has the same number n of them.

    Under `val-core/{data_source}/acc/`, and per level under `val-aux/{data_source}/level_{level}/acc/` (for questions
    that have a level), each the mean over questions of
     - `mean@n`: the mean accuracy of its responses; `mean@n_se` is the standard error over questions (from 2 on);
     - `best@n`: the largest accuracy;
     - `maj@n`: the accuracy of the most frequent answer (None does not vote; tied answers count equally);
     - `pass@k` for k = 1, 2, 4, ... and n: the chance that one of k responses is right, that is, has accuracy >= 1.
    """
    questions: dict[tuple[str, str, str], list[tuple[float, str | None]]] = defaultdict(list)
    for source, question, level, a, answer in zip(data_sources, question_ids, levels, acc, answers, strict=True):
        questions[source, question, level].append((float(a), answer))
    by_source: dict[str, list[list[tuple[float, str | None]]]] = defaultdict(list)
    by_level: dict[tuple[str, str], list[list[tuple[float, str | None]]]] = defaultdict(list)
    for (source, _, level), responses in questions.items():
        by_source[source].append(responses)
        if level:
            by_level[source, level].append(responses)
    metrics: dict[str, float] = {}
    for source, group in by_source.items():
        metrics |= _group_metrics(f"val-core/{source}/acc", group)
    for (source, level), group in sorted(by_level.items()):
        metrics |= _group_metrics(f"val-aux/{source}/level_{level}/acc", group)
    return metrics


def majority_accuracy(responses: Sequence[tuple[float, str | None]]) -> float:
    """Mean accuracy of those (accuracy, answer) pairs that have a most frequent answer; 0 if none has an answer."""
    votes = Counter(answer for _, answer in responses if answer is not None)
    if not votes:
        return 0.0
    most = max(votes.values())
    winners = {answer for answer, count in votes.items() if count == most}
    return float(np.mean([a for a, answer in responses if answer in winners]))


def _group_metrics(prefix: str, questions: list[list[tuple[float, str | None]]]) -> dict[str, float]:
    n = len(questions[0])
    if any(len(responses) != n for responses in questions):
        raise ValueError(f"{prefix}: questions have {sorted({len(r) for r in questions})} responses, not one number")
    acc = np.array([[a for a, _ in responses] for responses in questions])  # (questions, n)
    means = acc.mean(axis=1)
    metrics = {f"{prefix}/mean@{n}": float(means.mean())}
    if len(questions) > 1:
        metrics[f"{prefix}/mean@{n}_se"] = float(means.std(ddof=1) / math.sqrt(len(questions)))
    metrics[f"{prefix}/best@{n}"] = float(acc.max(axis=1).mean())
    metrics[f"{prefix}/maj@{n}"] = float(np.mean([majority_accuracy(responses) for responses in questions]))
    right = (acc >= 1).sum(axis=1).tolist()
    for k in sorted({2**i for i in range(n.bit_length())} | {n}):
        metrics[f"{prefix}/pass@{k}"] = float(np.mean([unbiased_pass_at_k(n, c, k) for c in right]))
    return metrics
