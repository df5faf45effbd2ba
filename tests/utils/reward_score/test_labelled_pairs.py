"""labelled_pairs.jsonl holds responses and ground truths with a verdict by mathematics, worked out by hand."""

import json
import time
from pathlib import Path

import pytest

from verl.utils.reward_score import compute_score

PAIRS = [json.loads(line) for line in Path(__file__).with_name("labelled_pairs.jsonl").read_text().splitlines()]
TOPICS = sorted({pair["topic"] for pair in PAIRS})
LIMIT = 10  # seconds: the time-out of a scoring call


def test_the_pairs_are_many_and_of_both_verdicts():
    assert len(PAIRS) >= 200
    assert len({(pair["response"], pair["ground_truth"]) for pair in PAIRS}) == len(PAIRS)
    assert 0.2 < sum(pair["right"] for pair in PAIRS) / len(PAIRS) < 0.8


@pytest.mark.parametrize("topic", TOPICS)
def test_verdict_is_the_label_of_every_pair(topic):
    for pair in PAIRS:
        if pair["topic"] == topic:
            start = time.perf_counter()
            result = compute_score("lighteval/MATH", pair["response"], pair["ground_truth"])
            assert bool(result["score"]) == pair["right"], pair
            assert time.perf_counter() - start < LIMIT, pair


def test_every_ground_truth_is_its_own_answer():
    for pair in PAIRS:
        box = f"\\boxed{{{pair['ground_truth']}}}"
        assert compute_score("lighteval/MATH", box, pair["ground_truth"])["score"] == 1, pair["ground_truth"]
