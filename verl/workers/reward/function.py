"""The scoring function by name, and one response to score. Light to import: every scoring process does."""

import asyncio
import functools
import importlib.util
import inspect
import sys
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class RewardRequest:
    """One response to score."""

    data_source: str
    solution_str: str
    ground_truth: Any
    extra_info: dict[str, Any]

    def arguments(self) -> dict[str, Any]:
        return {
            "data_source": self.data_source,
            "solution_str": self.solution_str,
            "ground_truth": self.ground_truth,
            "extra_info": self.extra_info,
        }


@dataclass(frozen=True)
class RewardBatch:
    """Several responses for one call of a function that takes lists."""

    requests: Sequence[RewardRequest]

    def arguments(self) -> dict[str, Any]:
        return {
            "data_sources": [request.data_source for request in self.requests],
            "solution_strs": [request.solution_str for request in self.requests],
            "ground_truths": [request.ground_truth for request in self.requests],
            "extra_infos": [request.extra_info for request in self.requests],
        }


Call = RewardRequest | RewardBatch


@dataclass(frozen=True)
class RewardFunction:
    """A scoring function by name, so that it can be sent to another process and loaded there.

    `path` is the Python file it is in, None for the scorers of `verl.utils.reward_score`.
    """

    path: str | None
    name: str
    kwargs: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"reward function {self.name} of {self.path or 'verl.utils.reward_score'}"

    @property
    def function(self) -> Callable[..., Any]:
        if self.path is not None:
            return _load_function(self.path, self.name)
        from verl.utils import reward_score  # here, since a function of the user's own does without its libraries

        return reward_score.compute_score

    def call(self, request: Call) -> Any:
        """What the function returns (of an async function: the coroutine), or the exception that it raised."""
        try:
            return self.function(**request.arguments(), **self.kwargs)
        except Exception as error:  # a user's function may raise anything; the caller counts and logs it
            return error

    def evaluate(self, requests: Sequence[Call]) -> list[Any]:
        """Per request what the function returned or the exception it raised; async calls run concurrently. In this
        process, without a time-out: for a dry run. ScoringPool is for what matters."""
        results = [self.call(request) for request in requests]
        waiting = [i for i, result in enumerate(results) if inspect.isawaitable(result)]
        if waiting:
            # A thread of its own: this one may run an event loop already, as in a notebook.
            with ThreadPoolExecutor(1) as thread:
                awaited = thread.submit(asyncio.run, _gather([results[i] for i in waiting])).result()
            for i, result in zip(waiting, awaited, strict=True):
                results[i] = result
        return results


async def _gather(calls: list[Awaitable[Any]]) -> list[Any]:
    return await asyncio.gather(*calls, return_exceptions=True)


@functools.cache
def _load_function(path: str, name: str) -> Callable[..., Any]:
    file = Path(path)
    if not file.is_file():
        raise ValueError(f"custom_reward_function.path: there is no file {path}")
    spec = importlib.util.spec_from_file_location(f"custom_reward_{file.stem}", file)
    if spec is None or spec.loader is None:
        raise ValueError(f"custom_reward_function.path is {path}: give a Python file (.py)")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up there
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # importing a user's file may raise anything
        raise ValueError(f"custom_reward_function.path: importing {path} raised {describe(error)}") from error
    function = getattr(module, name, None)
    if not callable(function):
        own = [n for n, v in vars(module).items() if inspect.isfunction(v) and v.__module__ == spec.name]
        raise ValueError(
            f"custom_reward_function.name: {path} has no function {name!r}; it has {', '.join(own) or 'none'}"
        )
    return function


def describe(error: BaseException) -> str:
    """Type and message of an exception in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}".rstrip(": ")
