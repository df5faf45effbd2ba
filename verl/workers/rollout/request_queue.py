"""Which request goes to which engine, and when: longest first, each to the engine with the least to do."""

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence

import numpy as np


class LengthEstimate:
    """Expected response length of a question: what its last responses had; of a new one, the mean over all."""

    def __init__(self) -> None:
        self.known: dict[str, float] = {}
        self.mean = 0.0

    def __call__(self, question_id: str) -> float:
        return self.known.get(question_id, self.mean)

    def observe(self, question_ids: Iterable[str], lengths: Iterable[int]) -> None:
        found = defaultdict(list)
        for question, length in zip(question_ids, lengths, strict=True):
            found[question].append(length)
        for question, values in found.items():
            self.known[question] = float(np.mean(values))
        self.mean = float(np.mean(list(self.known.values())))


class RequestQueue:
    """The rows still to be handed out, a question's rows together so that they share its prompt.

    Args:
        units: rows of each question.
        cost: expected tokens of each row, prompt and response.
        capacity: most rows that one engine holds at a time, somewhat more than it computes together, so that a place
            that becomes free is filled without waiting for the driver.
    """

    def __init__(self, units: Sequence[Sequence[int]], cost: Sequence[float], capacity: int) -> None:
        self.cost = cost
        self.capacity = capacity
        self.unit_of = {row: number for number, unit in enumerate(units) for row in unit}
        # Longest last: taken from the end.
        self.waiting = sorted((list(unit) for unit in units), key=self._cost_of)

    def __len__(self) -> int:
        return len(self.waiting)

    def deal(self, held: Sequence[set[int]], free: set[int]) -> list[list[int]]:
        """New rows for each engine, given the rows that each one holds and which engines can take any now.

        What should go to an engine that is busy waits until it is free, or until another has less to do.
        """
        dealt: list[list[int]] = [[] for _ in held]
        rows = [len(own) for own in held]
        load = [self._cost_of(own) for own in held]
        while self.waiting:
            unit = self.waiting[-1]
            fits = [e for e in range(len(held)) if rows[e] == 0 or rows[e] + len(unit) <= self.capacity]
            engine = min(fits, key=lambda e: (load[e], e), default=None)
            if engine not in free:
                break
            dealt[engine] += self.waiting.pop()
            rows[engine] += len(unit)
            load[engine] += self._cost_of(unit)
        return dealt

    def give_back(self, rows: Iterable[int]) -> None:
        """Rows that an engine has lost: they go first."""
        units = defaultdict(list)
        for row in sorted(rows):
            units[self.unit_of[row]].append(row)
        self.waiting += units.values()

    def _cost_of(self, rows: Iterable[int]) -> float:
        return math.fsum(self.cost[row] for row in rows)
