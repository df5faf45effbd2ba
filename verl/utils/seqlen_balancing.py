"""Which rows go together: over workers by cost, into micro-batches by size or token budget."""

import heapq
from collections.abc import Sequence

import numpy as np

MAX_KEYS = 4  # times the token budget; see `split_by_sum`


def balanced_partition(costs: Sequence[float] | np.ndarray, parts: int) -> list[np.ndarray]:
    """Split indices 0..n-1 into `parts` groups of nearly equal total cost, each in ascending order.

    Longest first, each to the group with the least so far (at most 4/3 of the optimum; Graham 1969).
    """
    costs = np.asarray(costs, dtype=np.float64)
    heap: list[tuple[float, int]] = [(0.0, part) for part in range(parts)]
    groups: list[list[int]] = [[] for _ in range(parts)]
    for index in np.argsort(-costs, kind="stable"):
        cost, part = heapq.heappop(heap)
        groups[part].append(int(index))
        heapq.heappush(heap, (cost + float(costs[index]), part))
    return [np.array(sorted(group), dtype=np.int64) for group in groups]


def contiguous_partition(n: int, parts: int) -> list[np.ndarray]:
    """Split indices 0..n-1 into `parts` runs whose sizes differ by at most one."""
    return np.array_split(np.arange(n), parts)


def split_by_rows(lengths: np.ndarray, rows: int) -> list[np.ndarray]:
    """Micro-batches of at most `rows` rows of similar length: index arrays, longest rows first."""
    return runs(np.argsort(-lengths, kind="stable"), rows)


def runs(order: np.ndarray, size: int) -> list[np.ndarray]:
    """`order` in pieces of `size`, the last perhaps shorter."""
    return [order[start : start + size] for start in range(0, len(order), size)]


def split_by_tokens(lengths: np.ndarray, budget: int) -> list[np.ndarray]:
    """Micro-batches of rows of similar length that take at most `budget` tokens once padded to their longest.

    Raises ValueError where one sequence alone exceeds the budget.
    """
    _check_budget(lengths, budget)
    order = np.argsort(-lengths, kind="stable")
    parts, start = [], 0
    while start < len(order):
        rows = max(1, budget // int(lengths[order[start]]))
        parts.append(order[start : start + rows])
        start += rows
    return parts


def split_by_sum(lengths: np.ndarray, budget: int, order: np.ndarray, shared: np.ndarray) -> list[np.ndarray]:
    """Micro-batches of rows that take at most `budget` tokens together, filled in the given order of indices.
    shared: of each index, how many of its tokens it has in common with the one before it in `order`; they count once,
    but attention copies their keys for every row: with these, rows take at most MAX_KEYS times the budget.

    Raises ValueError where one sequence alone exceeds the budget.
    """
    _check_budget(lengths, budget)
    parts: list[list[int]] = []
    taken, keys = budget, 0
    for index in order:
        if taken + lengths[index] - shared[index] > budget or keys + lengths[index] > MAX_KEYS * budget:
            parts.append([])
            taken, keys = shared[index], 0  # not in this micro-batch yet
        parts[-1].append(index)
        taken += lengths[index] - shared[index]
        keys += lengths[index]
    return [np.array(part, dtype=np.int64) for part in parts]


def _check_budget(lengths: np.ndarray, budget: int) -> None:
    if len(lengths) and lengths.max() > budget:
        raise ValueError(f"a sequence of {lengths.max()} tokens exceeds the micro-batch budget of {budget} tokens")
