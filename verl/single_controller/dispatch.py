"""How one call of the driver fans out over the workers and how their results come back.

A worker method that the driver may call carries `@register(dispatch)`:

- `Dispatch.ALL`: every worker gets the same arguments; the call returns the results, by rank.
- `Dispatch.RANK_ZERO`: the same, but the call returns rank 0's result.
- `Dispatch.ROWS`: the first argument is a `DataProto` of N rows, and each worker gets some of them. The driver may say
  which by the keyword `rows`, one index array per rank; else they are contiguous, sizes differing by at most one. A
  rank may have none. The method returns a `DataProto` with one row per row it got, or that and a dict of metrics, or
  only the dict: the call returns the rows in the caller's order, or (rows, dicts by rank), or dicts by rank.
"""

import inspect
from collections.abc import Callable, Sequence
from enum import Enum
from typing import Any, TypeVar

import numpy as np
import torch

from verl.protocol import DataProto

Method = TypeVar("Method", bound=Callable[..., Any])
Rows = list[np.ndarray]  # per rank, the rows of the driver's batch that it gets

_MARK = "_dispatch"


class Dispatch(Enum):
    ALL = "all"
    RANK_ZERO = "rank_zero"
    ROWS = "rows"


def register(dispatch: Dispatch) -> Callable[[Method], Method]:
    """Let the driver call this worker method through its group."""

    def mark(method: Method) -> Method:
        if dispatch is Dispatch.ROWS and "rows" in inspect.signature(method).parameters:
            raise ValueError(f"{method.__qualname__}: a ROWS method has no parameter `rows`, the call takes it")
        setattr(method, _MARK, dispatch)
        return method

    return mark


def registered_methods(worker_cls: type) -> dict[str, Dispatch]:
    """Name -> dispatch of a worker class's registered methods; one that overrides a registered method counts."""
    found: dict[str, Dispatch] = {}
    for cls in reversed(worker_cls.__mro__):
        for name, value in vars(cls).items():
            if dispatch := getattr(value, _MARK, None):
                found[name] = dispatch
    return found


# ---------------------------------------------------------------------------------------------------- driver side
def partition_rows(method: str, args: Sequence[Any], rows: Sequence[Any] | None, world_size: int) -> Rows:
    """Which rows of the batch `args[0]` go to which rank: `rows`, checked, or contiguous shares."""
    if not args or not isinstance(args[0], DataProto):
        got = type(args[0]).__name__ if args else "nothing"
        raise TypeError(f"{method} takes a DataProto as first positional argument, not {got}")
    n_rows = len(args[0])
    if rows is None:
        return np.array_split(np.arange(n_rows), world_size)
    if len(rows) != world_size:
        raise ValueError(f"{method}: `rows` has {len(rows)} index arrays, there are {world_size} workers")
    partition = [np.asarray(index, dtype=np.int64).reshape(-1) for index in rows]
    order = np.concatenate(partition)
    if outside := sorted(set(order[(order < 0) | (order >= n_rows)].tolist())):
        raise ValueError(f"{method}: `rows` names row {outside[0]} of a batch of {n_rows} rows")
    counts = np.bincount(order, minlength=n_rows)
    if (counts != 1).any():
        row = int(np.flatnonzero(counts != 1)[0])
        raise ValueError(f"{method}: `rows` gives row {row} to {counts[row]} workers; each row goes to exactly one")
    return partition


def collect(method: str, dispatch: Dispatch, results: list[Any], rows: Rows | None) -> Any:
    """What the driver's call returns, from the workers' results by rank."""
    if dispatch is Dispatch.RANK_ZERO:
        return results[0]
    if rows is None:
        return results
    parts = [_rows_of(result) for result in results]
    if all(part is None for part in parts):
        return results
    for rank, part in enumerate(parts):
        if part is None:
            raise TypeError(f"{method} returned rows on some ranks but {type(results[rank]).__name__} on rank {rank}")
    merged = _in_callers_order([part for part in parts if part is not None], np.concatenate(rows))
    return (merged, [result[1] for result in results]) if isinstance(results[0], tuple) else merged


def _rows_of(result: Any) -> DataProto | None:
    first = result[0] if isinstance(result, tuple) and result else result
    return first if isinstance(first, DataProto) else None


def _in_callers_order(parts: list[DataProto], order: np.ndarray) -> DataProto:
    # A rank without rows cannot know the trailing shapes (the longest response of its batch), so it has no say.
    merged = DataProto.concat([part for part in parts if len(part)] or parts[:1])
    return merged if (np.diff(order) == 1).all() else merged.select_rows(np.argsort(order))


# ---------------------------------------------------------------------------------------------------- worker side
def run_method(worker: Any, method: str, args: Sequence[Any], kwargs: dict[str, Any], rows: np.ndarray | None) -> Any:
    """Run one call on one worker: `rows` of the batch, or all. Batches are copied.

    What came from Ray's object store is memory shared with other processes, and torch writes to it without complaint.
    """
    own_args = [_copy(arg) for arg in args[1:]]
    if args:
        own_args.insert(0, _copy(args[0]) if rows is None else args[0].select_rows(rows))
    result = getattr(worker, method)(*own_args, **{name: _copy(value) for name, value in kwargs.items()})
    part = _rows_of(result)
    if part is None:
        return result
    if rows is not None and len(part) != len(rows):
        raise ValueError(f"{method} got {len(rows)} rows and returned {len(part)}; it must return one per row")
    part = _detached(part)
    return (part, *result[1:]) if isinstance(result, tuple) else part


def _copy(value: Any) -> Any:
    return value.select_rows(np.arange(len(value))) if isinstance(value, DataProto) else value


def _detached(data: DataProto) -> DataProto:
    # As pickling does, so that a worker in the driver's process returns the same as a remote one.
    columns = {k: v.detach().cpu() if isinstance(v, torch.Tensor) else v for k, v in data.columns().items()}
    return DataProto.from_dict(columns, data.meta_info)
