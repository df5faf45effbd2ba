"""Scores responses in processes of its own, each call with a time-out that nothing can ignore."""

import pickle
import threading
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any

from verl.workers.reward.dispatcher import Counts, Dispatcher
from verl.workers.reward.function import Call, RewardFunction


class ScoringPool:
    """`num_workers` processes that call one reward function.

    A call that takes longer than `timeout_s`, from when it begins, is killed with its process and all descendants of
    that; the process's other calls go elsewhere, and a new one takes its place. An asynchronous function has up to 64
    calls at a time in each process. Waiting in the queue and importing the function do not count.

    The function is imported once, by a parent of the processes, which starts with the pool; an error there is raised by
    the first `evaluate`, or given by the first future.
    """

    def __init__(self, reward: RewardFunction, num_workers: int, timeout_s: float):
        """Raises ValueError for a count or a time below its least value, and what pickle raises for the kwargs."""
        if num_workers < 1 or timeout_s <= 0:
            raise ValueError(f"a scoring pool needs workers and a time-out, not {num_workers} and {timeout_s} s")
        pickle.dumps(reward)
        self._lock, self._closed = threading.Lock(), False
        self._dispatcher = Dispatcher(reward, num_workers, timeout_s)
        self._thread = threading.Thread(target=self._dispatcher.run, name="scoring-pool", daemon=True)
        self._thread.start()

    def submit(self, requests: Sequence[Call]) -> Future:
        """Begin to score; the future's result is that of `evaluate`. Earlier submissions come first. A request is
        pickled when a process gets it, so that what requests share is there once; change none until then."""
        future: Future = Future()
        future.set_running_or_notify_cancel()
        with self._lock:
            if self._closed or not self._thread.is_alive():
                raise RuntimeError("the scoring pool is closed")
            self._dispatcher.loop.call_soon_threadsafe(self._dispatcher.add, future, list(requests))
        return future

    def evaluate(self, requests: Sequence[Call]) -> list[Any]:
        """Per request, in order: what the function returned; the exception that it raised; ScoringTimeout; ScorerDied;
        or RuntimeError, if it cannot be pickled. Raises RuntimeError, naming the function, if that cannot be imported.
        """
        return self.submit(requests).result()

    @property
    def counts(self) -> Counts:
        """Calls, time-outs, deaths, kills and started processes since the pool began."""
        return self._dispatcher.counts

    def close(self) -> None:
        """End all processes; futures that are not done raise RuntimeError."""
        with self._lock:
            if not self._closed and self._thread.is_alive():
                self._dispatcher.loop.call_soon_threadsafe(self._dispatcher.loop.stop)
            self._closed = True
        self._thread.join()

    def __enter__(self) -> "ScoringPool":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
