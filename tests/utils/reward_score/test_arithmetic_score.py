import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from verl.utils.reward_score import compute_score


@pytest.mark.parametrize(
    ("response", "score", "pred"),
    [
        ("21 31 #132", 1.0, "132"),
        ("#132", 1.0, "132"),
        ("21 31 #133", 0.0, "133"),
        ("21 31 #0132", 0.0, "0132"),
        ("21 31 132", 0.0, None),
        ("#1#132", 0.0, None),
        ("#132 ", 0.0, None),
        ("#132\n", 0.0, None),
        ("# 132", 0.0, None),
        ("#-132", 0.0, None),
        ("#١٣٢", 0.0, None),
        ("#", 0.0, None),
        ("", 0.0, None),
    ],
)
def test_answer_is_what_follows_the_one_marker(response, score, pred):
    assert compute_score("arithmetic", response, "132") == {"score": score, "acc": score, "pred": pred}


@settings(max_examples=50, deadline=None)
@given(st.text())
def test_any_text_is_scored(text):
    result = compute_score("arithmetic", text, "132")
    assert result["score"] == float(text.endswith("#132") and text.count("#") == 1)
