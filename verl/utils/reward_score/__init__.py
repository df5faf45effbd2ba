"""Scores of responses, chosen by the data source of the question."""

import difflib
import importlib
from collections.abc import Callable
from typing import Any

from verl.utils.reward_score import arithmetic, dapo, geometry3k, gsm8k, math

Scorer = Callable[..., float | dict[str, Any]]


def _livecodebench(*args: Any, **kwargs: Any) -> float | dict[str, Any]:
    """Loaded when it is needed, because running code brings more than scoring text."""
    return importlib.import_module("verl.utils.reward_score.livecodebench").compute_score(*args, **kwargs)


SCORERS: dict[str, Scorer] = {
    "arithmetic": arithmetic.compute_score,
    "openai/gsm8k": gsm8k.compute_score,
    "lighteval/MATH": math.compute_score,
    "DigitalLearningGmbH/MATH-lighteval": math.compute_score,
    "HuggingFaceH4/MATH-500": math.compute_score,
    "HuggingFaceH4/aime_2024": math.compute_score,
    "math_dapo": dapo.compute_score,
    "hiyouga/geometry3k": geometry3k.compute_score,
    "livecodebench": _livecodebench,
}

# Test sets go by many names (aime2024, aime24, AIME_2025_I): each of these is the beginning of names, in any case.
FAMILIES: dict[str, Scorer] = {
    **dict.fromkeys(["aime", "amc", "math500", "math-500", "minerva", "olympiadbench"], math.compute_score),
    "livecodebench": _livecodebench,
}


def find_scorer(data_source: str) -> Scorer:
    """The scorer of a data source, by its name in `SCORERS`, else by its beginning in `FAMILIES`; ValueError for a data
    source without one."""
    if data_source in SCORERS:
        return SCORERS[data_source]
    for name, scorer in FAMILIES.items():
        if data_source.lower().startswith(name):
            return scorer
    known = sorted([*SCORERS, *(f"{name}*" for name in FAMILIES)])
    nearest = difflib.get_close_matches(data_source, known, n=1, cutoff=0)[0]
    raise ValueError(
        f"no reward is known for data_source {data_source!r}; there are {', '.join(known)}; the nearest is "
        f"{nearest!r}: rename it in the data, or give a function of your own in custom_reward_function.path"
    )


def check_data_source(data_source: str) -> None:
    """ValueError for a data source without a scorer."""
    find_scorer(data_source)


def wrong_score(data_source: str) -> float:
    """The score of a wrong response: what one gets whose scoring failed, so that failing pays no more."""
    return dapo.WRONG if find_scorer(data_source) is dapo.compute_score else 0.0


def compute_score(
    data_source: str,
    solution_str: str,
    ground_truth: Any,
    extra_info: dict[str, Any] | None = None,
    code_time_s: float | None = None,
    **kwargs: Any,
) -> float | dict[str, Any]:
    """The score of one response by the scorer of its data source: a number, or a dict with `score` and what else the
    scorer tells (`acc`: whether it is right, `pred`: the answer it read). `code_time_s`: the `total_s` of a scorer that
    runs programs."""
    scorer = find_scorer(data_source)
    if scorer is _livecodebench and code_time_s is not None:
        kwargs["total_s"] = code_time_s
    return scorer(data_source, solution_str, ground_truth, extra_info, **kwargs)
