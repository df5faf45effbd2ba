"""What both sides of `benchmarks/trl_step.py` share: how they take turns, and the reward. Needs no package, since TRL's
side has another environment."""

import json
import os
import resource
import sys
import time
from collections.abc import Callable
from typing import Any

REWARDED = "7"


def compute_score(data_source: str, solution_str: str, ground_truth: str, extra_info: dict | None = None) -> float:
    """How often a character occurs: cheap, and seldom alike for all responses of a question."""
    return float(solution_str.count(REWARDED))


class Turns:
    """Makes a training loop wait at the start of each step until it is told, on standard input, to go on.

    `save`: writes the model as a Hugging Face folder. A step's seconds go from there to the start of the next one, so
    whatever the loop does between two steps is counted. Replies are lines of JSON; `cpu_seconds`, which a busy machine
    lengthens less, and memory are those of this process.
    """

    def __init__(self, save: Callable[[str], Any]) -> None:
        self.save = save
        self.facts: dict[str, Any] = {}  # of the running step
        self.start: float | None = None
        self.cpu_start = 0.0
        self._replies = os.fdopen(os.dup(1), "w", buffering=1)
        os.dup2(2, 1)  # what libraries print must not come between the replies

    def begin(self) -> bool:
        """Called where a step starts; False: the measurement is over."""
        if self.start is not None:
            self.facts["seconds"] = self.elapsed()
            self.facts["cpu_seconds"] = time.process_time() - self.cpu_start
        self.facts["peak_memory_gib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        self._reply(self.facts)
        self.facts = {}
        while (order := sys.stdin.readline().strip()).startswith("save "):
            self.save(order.removeprefix("save "))
            self._reply({})
        self.start, self.cpu_start = time.perf_counter(), time.process_time()
        return order == "go"

    def elapsed(self) -> float:
        """Seconds since the step started."""
        assert self.start is not None
        return time.perf_counter() - self.start

    def _reply(self, message: dict[str, Any]) -> None:
        self._replies.write(json.dumps(message) + "\n")
