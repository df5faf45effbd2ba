import time

import pytest

from verl.utils.reward_score import compute_score
from verl.utils.reward_score.answers import final_answer

LONG = 200_000
BOX = "\\boxed{%s}"
RESPONSES = {
    "unclosed boxes": "\\boxed{" * (LONG // 7),
    "nested boxes": "\\boxed{" * 2000 + "5" + "}" * 2000,
    "many boxes": "\\boxed{1}, " * (LONG // 11),
    "boxes far apart": "\\boxed{1}" + " " * LONG + "\\boxed{2}",
    "a huge box": BOX % ("1+" * LONG + "1"),
    "a box of spaces": BOX % (" " * LONG),
    "empty lines": "\n" * LONG,
    "the word answer": "answer " * (LONG // 7),
    "answer lines": "Answer:\n" * (LONG // 8),
    "dollars": "$" * LONG,
    "a question after spaces": "the answer is" + " " * LONG + "?",
    "spaces before a hope": "the answer is 1." + " " * LONG + "I hoped",
    "a marker and stars": "####" + "*" * LONG,
    "a number and spaces": BOX % ("1 mod 2" + " " * 1900 + "x"),
    "hashes": "#" * LONG,
    "markers": "#### 1\n" * (LONG // 7),
    "thoughts": "<think>" * (LONG // 7),
    "a tower": BOX % "10^{10^{10^{10}}}",
    "a tower in a root": BOX % r"\sqrt[10^{10^{10}}]{2}",
    "a tower in an interval": BOX % r"\mathbb{R}\setminus(1,9^{9^{9^{9^9}}})",
    "a tower of e": BOX % "e^{e^{e^{e^{x}}}}",
    "factorials": BOX % "((9!)!)!",
    "many factorials": BOX % ("5" + "!" * 450),
    "a huge factorial": BOX % "999999999!",
    "a huge coefficient": BOX % r"\binom{999999999}{5}",
    "a coefficient of letters": BOX % r"\binom{999}{i}",
    "a huge exponent": BOX % "1e999999999",
    "a power of a sum": BOX % "(x+y+1)^{999}",
    "digits": BOX % ("7" * 1900),
    "brackets": BOX % ("(" * 900 + "1" + ")" * 900),
    "signs": BOX % ("-" * 450 + "5"),
    "a long list": BOX % ("1," * 900 + "1"),
    "a long sum": BOX % "+".join(rf"\sqrt{{{i}}}" for i in range(2, 60)),
    "a sum over a billion": BOX % r"\sum_{k=1}^{1000000000} k",
    "an integral": BOX % r"\int_0^1 x^{x^{x}} dx",
    "a matrix of a billion ones": BOX % r"\operatorname{eye}(100000)",
}


@pytest.mark.parametrize("name", RESPONSES)
@pytest.mark.parametrize("data_source", ["math_dapo", "openai/gsm8k", "hiyouga/geometry3k"])
def test_a_hostile_response_is_scored_soon(name, data_source):
    start = time.perf_counter()
    assert compute_score(data_source, RESPONSES[name], "7919")["acc"] == 0
    assert time.perf_counter() - start < 10


def test_what_is_not_parsed_can_be_right_as_text():
    for answer in [r"\sum_{k=1}^{n} k^k", r"\int_0^1 f(x)\,dx", "10^{10^{10^{10}}}", r"\sqrt[10^{10}]{2}"]:
        assert compute_score("math_dapo", BOX % answer, answer)["acc"] == 1
        assert compute_score("math_dapo", BOX % (answer + "+1"), answer)["acc"] == 0


def test_numbers_within_the_limits_are_compared_to_the_last_digit():
    for right, wrong in [("4^{1010}", "2^{2020}+1"), (r"\frac{1}{2}\cdot 2^{2021}", "2^{2021}-2^{2020}-1")]:
        assert compute_score("math_dapo", BOX % right, "2^{2020}")["acc"] == 1
        assert compute_score("math_dapo", BOX % wrong, "2^{2020}")["acc"] == 0


def test_an_answer_is_taken_from_the_end_of_a_long_response():
    assert final_answer("We see $1$.\n" * 20_000 + "Answer: 5") == "5"
    assert final_answer(r"Maybe \boxed{1}. " * 20_000 + r"No, \boxed{5}") == "5"
