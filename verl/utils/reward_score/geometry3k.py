"""Score of Geometry3K: nine tenths for the answer, one tenth for the format."""

import re
from typing import Any

from verl.utils.reward_score import math
from verl.utils.reward_score.answers import last_box

FORMAT_SHARE = 0.1
THINK = re.compile(r"\s*<think>(.*?)</think>", re.DOTALL)


def has_format(text: str) -> bool:
    """Whether the response begins with one `<think>...</think>` and has a box after it."""
    match = THINK.match(text)
    if not match:
        return False
    rest = text[match.end() :]
    return "<think>" not in match[1] + rest and "</think>" not in rest and last_box(rest) is not None


def compute_score(
    data_source: str, solution_str: str, ground_truth: Any, extra_info: dict[str, Any] | None = None, **kwargs: Any
) -> dict[str, Any]:
    """0.9 if the final answer is equivalent to `ground_truth`, and 0.1 for the format; `acc` is the answer alone,
    `format` the format alone."""
    acc, pred = math.grade(solution_str, ground_truth, data_source)
    formatted = float(has_format(solution_str))
    return {
        "score": (1 - FORMAT_SHARE) * acc + FORMAT_SHARE * formatted,
        "acc": acc,
        "pred": pred,
        "format": formatted,
    }
