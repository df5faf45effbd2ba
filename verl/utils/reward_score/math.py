"""Score of general mathematics: MATH, AIME, AMC, Minerva, OlympiadBench and the like."""

from typing import Any

from verl.utils.reward_score.answers import final_answer, last_box
from verl.utils.reward_score.equivalence import MAX_LENGTH, close, equivalent, form, vote


def grade(solution: str, ground_truth: Any, data_source: str, tolerance: str | None = None) -> tuple[float, str | None]:
    """1.0 or 0.0, whether the final answer of a solution is equivalent to the ground truth, or a number within the
    `tolerance` of it, and this answer as it counts in a vote, None if there is none of at most `MAX_LENGTH` characters.
    A ground truth may stand in a box."""
    gold = read_gold(ground_truth, data_source)
    answer = final_answer(solution)
    if answer is None or len(answer) > MAX_LENGTH:
        return 0.0, None
    right = equivalent(answer, gold) or (bool(tolerance) and close(answer, gold, str(tolerance)))
    return float(right), vote(answer)


def read_gold(ground_truth: Any, data_source: str) -> str:
    gold = str(ground_truth)
    box = last_box(gold)
    gold = box[1] if box else gold
    if not isinstance(ground_truth, str | int | float) or len(gold) > MAX_LENGTH or not form(gold):
        raise ValueError(
            f"ground_truth {ground_truth!r:.80} of data_source {data_source!r} is no answer: give a text of at most "
            f"{MAX_LENGTH} characters"
        )
    return gold


def compute_score(
    data_source: str, solution_str: str, ground_truth: Any, extra_info: dict[str, Any] | None = None, **kwargs: Any
) -> dict[str, Any]:
    """1 if the final answer of the response is equivalent to `ground_truth`, or a number within
    `extra_info["tolerance"]` of it (OlympiadBench publishes one for some), else 0; `pred` is the answer read. What is
    the final answer, `answers.final_answer` says, what is equivalent, `equivalence.equivalent`."""
    score, pred = grade(solution_str, ground_truth, data_source, (extra_info or {}).get("tolerance"))
    return {"score": score, "acc": score, "pred": pred}
