import time

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from verl.utils.reward_score import compute_score

LIMIT = 30  # seconds for one answer; a scoring process would be killed before
ATOMS = ["1", "2", "10", "999", "0.5", "1e9", "1e999", "x", "n", "i", "e", r"\pi", r"\infty", r"\alpha", r"\text{cm}"]
FORMS = [
    r"\frac{%s}{%s}", r"\binom{%s}{%s}", r"\sqrt[%s]{%s}", r"\log_{%s} %s", "%s^{%s}", "%s^%s", "%s+%s", "%s-%s",
    "%s=%s", "%s<%s", "(%s)(%s)", "%s %s", "%s,%s", "[%s,%s)", r"\{%s,%s\}", r"%s\cup %s", r"%s\cdot %s", "%s_{%s}",
    r"\begin{pmatrix}%s&1\\2&%s\end{pmatrix}", r"%s\pm %s", r"\mathbb{R}\setminus [%s,%s]", r"%s\approx %s",
]  # fmt: skip
WRAPS = [
    r"\sqrt{%s}",
    "(%s)",
    "-%s",
    "%s!",
    "|%s|",
    r"\sin %s",
    "e^{%s}",
    r"\lfloor %s\rfloor",
    r"%s\%%",
    r"\$%s",
    "f(%s)",
]


def _extend(parts):
    binary = st.tuples(st.sampled_from(FORMS), parts, parts).map(lambda drawn: drawn[0] % drawn[1:])
    return binary | st.tuples(st.sampled_from(WRAPS), parts).map(lambda drawn: drawn[0] % drawn[1])


LATEX = st.recursive(st.sampled_from(ATOMS), _extend, max_leaves=12)
TOKENS = st.lists(
    st.sampled_from([*ATOMS, *"\\{}()[]$^_&!%=,. ", r"\boxed{", "Answer:", "####", r"\frac", "²", "½", "−"])
)
SOUP = TOKENS.map("".join)
RESPONSES = (
    st.text(max_size=200)
    | SOUP
    | st.one_of(st.text(max_size=50), SOUP, LATEX).map(lambda answer: f"So it is $\\boxed{{{answer}}}$.")
    | SOUP.map(lambda answer: f"so\nAnswer: {answer}")
)


def _score(response, ground_truth):
    start = time.perf_counter()
    for data_source in ("math_dapo", "hiyouga/geometry3k"):
        result = compute_score(data_source, response, ground_truth)
        assert result["acc"] in (0.0, 1.0)
        assert result["pred"] is None or isinstance(result["pred"], str)
    assert compute_score("openai/gsm8k", response, "72")["score"] in (0.0, 1.0)
    assert time.perf_counter() - start < LIMIT, (response, ground_truth)


RANDOM = given(RESPONSES, LATEX)
CHECKS = [HealthCheck.too_slow, HealthCheck.data_too_large]


@settings(max_examples=100, deadline=None, suppress_health_check=CHECKS)
@RANDOM
def test_random_answers_neither_raise_nor_hang(response, ground_truth):
    _score(response, ground_truth)


@pytest.mark.slow  # 10,000 examples take a minute or two
@settings(max_examples=10_000, deadline=None, suppress_health_check=CHECKS)
@RANDOM
def test_ten_thousand_random_answers_neither_raise_nor_hang(response, ground_truth):
    _score(response, ground_truth)


@settings(max_examples=100, deadline=None, suppress_health_check=CHECKS)
@given(LATEX)
def test_a_random_answer_is_equal_to_itself(answer):
    assert compute_score("math_dapo", f"\\boxed{{{answer}}}", answer)["acc"] == 1
