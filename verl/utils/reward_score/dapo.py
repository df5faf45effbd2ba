"""Score of DAPO-Math-17k (arXiv 2503.14476, section 2.4): the verifier of math.py with the rewards 1 and -1."""

from typing import Any

from verl.utils.reward_score import math

RIGHT, WRONG = 1.0, -1.0


def compute_score(
    data_source: str, solution_str: str, ground_truth: Any, extra_info: dict[str, Any] | None = None, **kwargs: Any
) -> dict[str, Any]:
    """1 if the final answer of the response is equivalent to `ground_truth`, else -1; `acc` is 1 or 0. A soft overlong
    punishment is added by the reward manager (`reward_model.reward_kwargs.overlong_buffer_cfg`)."""
    acc, pred = math.grade(solution_str, ground_truth, data_source)
    return {"score": RIGHT if acc else WRONG, "acc": acc, "pred": pred}
