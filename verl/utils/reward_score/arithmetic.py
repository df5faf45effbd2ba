"""Score of the arithmetic ladder (data_processing/make_arithmetic.py): is the number after the marker the sum?"""

import re
from typing import Any

ANSWER = re.compile(r"[^#]*#([0-9]+)")


def compute_score(
    data_source: str, solution_str: str, ground_truth: str, extra_info: dict[str, Any] | None = None
) -> dict[str, Any]:
    """1 if the response has exactly one marker `#`, after it nothing but the digits of `ground_truth`; else 0.
    `pred` is the answer read, None if the response does not have that form."""
    match = ANSWER.fullmatch(solution_str)
    pred = match.group(1) if match else None
    score = float(pred == ground_truth)
    return {"score": score, "acc": score, "pred": pred}
