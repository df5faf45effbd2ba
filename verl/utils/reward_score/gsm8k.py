"""Score of grade school word problems (GSM8K), whose answer is one number: `\\boxed{n}` or `#### n`."""

import re
from typing import Any

from verl.utils.reward_score.answers import last_box
from verl.utils.reward_score.latex import normal_form
from verl.utils.reward_score.numerals import Number
from verl.utils.reward_score.structure import relation
from verl.utils.reward_score.units import quantity

MAX_LENGTH = 200  # characters of an answer
MARKER = re.compile(r"####([^\n]*)")
DIGIT = re.compile(r"\d")


def read_number(text: str) -> Number | None:
    """The number of an answer, with or without thousands separators, currency, unit, `x =` and trailing period."""
    if len(text) > MAX_LENGTH:
        return None
    return quantity(relation(normal_form(text.strip(" \t*`")))[1])


def compute_score(
    data_source: str, solution_str: str, ground_truth: Any, extra_info: dict[str, Any] | None = None, **kwargs: Any
) -> dict[str, Any]:
    """1 if the answer of the response is the number `ground_truth`, else 0. Whichever stands last counts, the last box
    or the last `####`. `pred` is the number read, None if there is none."""
    gold = read_number(str(ground_truth))
    if gold is None:
        raise ValueError(f"ground_truth {ground_truth!r:.80} of data_source {data_source!r} is not a number")
    markers = [(match.start(), match[1]) for match in MARKER.finditer(solution_str) if DIGIT.search(match[1])]
    candidates = [*markers[-1:], *filter(None, [last_box(solution_str)])]
    read = read_number(max(candidates)[1]) if candidates else None
    score = float(read is not None and read.equals(gold))
    return {"score": score, "acc": score, "pred": None if read is None else str(read)}
