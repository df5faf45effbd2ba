"""Scores of responses, chosen by the data source of the question."""

from collections.abc import Callable
from typing import Any

from verl.utils.reward_score import arithmetic

SCORERS: dict[str, Callable[..., float | dict[str, Any]]] = {
    "arithmetic": arithmetic.compute_score,
}


def check_data_source(data_source: str) -> None:
    """ValueError for a data source without a scorer."""
    if data_source not in SCORERS:
        raise ValueError(
            f"no reward is known for data_source {data_source!r}; there are {', '.join(sorted(SCORERS))}: "
            "rename it in the data, or give a function of your own in custom_reward_function.path"
        )


def compute_score(
    data_source: str, solution_str: str, ground_truth: Any, extra_info: dict[str, Any] | None = None, **kwargs: Any
) -> float | dict[str, Any]:
    """The score of one response by the scorer of its data source: a number, or a dict with `score` and what else the
    scorer tells (`acc`: whether it is right, `pred`: the answer it read)."""
    check_data_source(data_source)
    return SCORERS[data_source](data_source, solution_str, ground_truth, extra_info, **kwargs)
