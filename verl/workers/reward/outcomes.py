"""What a call came to when it is no plain result, and how results travel between processes."""

import pickle
from typing import Any

from verl.workers.reward.function import RewardFunction, describe

FAILURES = ("exceptions", "timeouts", "crashes", "non_finite")  # calls without a score, as metrics count them


class ScoringTimeout(Exception):
    """The call took longer than the time-out and was ended."""


class ScorerDied(Exception):
    """The process ended during the call: a crash, os._exit, or the kernel out of memory."""


def encode(result: Any) -> bytes:
    """A result or an exception as bytes; one that cannot be pickled becomes an exception that says so."""
    try:
        body = pickle.dumps(result, protocol=pickle.HIGHEST_PROTOCOL)
    except Exception as error:  # pickling runs the result's own code
        body = pickle.dumps(RuntimeError(f"{_name(result)} cannot be sent to the driver: {describe(error)}"))
    return pickle.dumps((body, _name(result)))


def decode(payload: bytes) -> Any:
    """What `encode` was given; an exception that says so if it cannot be rebuilt here."""
    body, name = pickle.loads(payload)
    try:
        return pickle.loads(body)
    except Exception as error:  # as does unpickling: exceptions that need two arguments, classes not known here
        return RuntimeError(f"{name} (not readable outside of the scoring process: {describe(error)})")


def _name(result: Any) -> str:
    return describe(result) if isinstance(result, BaseException) else f"a result of type {type(result).__name__}"


def as_exception(error: BaseException) -> Exception:
    """An Exception for what a function may raise besides: SystemExit, KeyboardInterrupt, asyncio.CancelledError."""
    return error if isinstance(error, Exception) else RuntimeError(f"it raised {describe(error)}")


def timed_out(reward: RewardFunction, timeout_s: float) -> ScoringTimeout:
    return ScoringTimeout(f"{reward} took longer than {timeout_s:g} s")
