import itertools
import math
import random
from fractions import Fraction

import pytest

from verl.trainer.ppo.validation_metrics import majority_accuracy, process_validation_metrics, unbiased_pass_at_k


@pytest.mark.parametrize("n", range(1, 8))
def test_pass_at_k_is_the_share_of_subsets_with_a_right_one(n):
    for c, k in itertools.product(range(n + 1), range(1, n + 1)):
        right = [i < c for i in range(n)]
        subsets = list(itertools.combinations(right, k))
        assert unbiased_pass_at_k(n, c, k) == pytest.approx(sum(map(any, subsets)) / len(subsets), abs=1e-15)


@pytest.mark.parametrize(("n", "c", "k"), [(1000, 3, 500), (10_000, 1, 5_000), (100_000, 7, 2), (2048, 1024, 1)])
def test_pass_at_k_equals_the_exact_fraction_for_large_n(n, c, k):
    exact = 1 - Fraction(math.comb(n - c, k), math.comb(n, k))
    assert unbiased_pass_at_k(n, c, k) == pytest.approx(float(exact), rel=1e-12)


@pytest.mark.parametrize(("n", "c", "k"), [(4, 5, 1), (4, -1, 1), (4, 2, 0), (4, 2, 5)])
def test_pass_at_k_refuses_impossible_counts(n, c, k):
    with pytest.raises(ValueError, match=f"n={n}, c={c}, k={k}"):
        unbiased_pass_at_k(n, c, k)


def test_majority_counts_answers_not_responses():
    assert majority_accuracy([(0.0, "a"), (1.0, "b"), (1.0, "b")]) == 1.0
    assert majority_accuracy([(0.0, "a"), (0.0, "a"), (1.0, "b")]) == 0.0
    assert majority_accuracy([(0.0, "a"), (1.0, "b")]) == 0.5
    assert majority_accuracy([(0.0, None), (0.0, None), (1.0, "b")]) == 1.0
    assert majority_accuracy([(0.0, None)]) == 0.0


# Per question: accuracies and answers of n = 3 responses.
QUESTIONS = {
    "q1": ([1, 1, 0], ["5", "5", "6"]),
    "q2": ([0, 0, 1], ["7", "7", "8"]),
    "q3": ([0, 0, 0], ["9", None, "1"]),
}
LEVELS = {"q1": "1", "q2": "2", "q3": "2"}


def rows(questions=QUESTIONS, levels=LEVELS, source="arithmetic"):
    return [
        (source, name, levels[name], acc, answer)
        for name, (accs, answers) in questions.items()
        for acc, answer in zip(accs, answers, strict=True)
    ]


def metrics_of(table):
    return process_validation_metrics(*(list(column) for column in zip(*table, strict=True)))


def test_metrics_of_a_small_table_by_hand():
    metrics = metrics_of(rows())
    core = {k.removeprefix("val-core/arithmetic/acc/"): v for k, v in metrics.items() if k.startswith("val-core")}
    deviation = math.sqrt(((2 / 3 - 1 / 3) ** 2 + 0 + (0 - 1 / 3) ** 2) / 2)
    assert core == pytest.approx(
        {
            "mean@3": 1 / 3,
            "mean@3_se": deviation / math.sqrt(3),
            "best@3": 2 / 3,
            "maj@3": 1 / 3,
            "pass@1": 1 / 3,
            "pass@2": (1 + 2 / 3 + 0) / 3,
            "pass@3": 2 / 3,
        }
    )
    level_2 = "val-aux/arithmetic/level_2/acc/"
    assert metrics[level_2 + "mean@3"] == pytest.approx(1 / 6)
    assert metrics[level_2 + "mean@3_se"] == pytest.approx(1 / 6)
    level_1 = {k for k in metrics if "level_1" in k}
    assert level_1 == {f"val-aux/arithmetic/level_1/acc/{m}" for m in core if m != "mean@3_se"}


def test_row_order_does_not_matter():
    table = rows()
    random.Random(1).shuffle(table)
    assert metrics_of(table) == pytest.approx(metrics_of(rows()))


def test_data_sources_are_apart_even_with_equal_question_ids():
    other = rows({"q1": ([1, 1, 1, 1, 1], ["1"] * 5)}, {"q1": ""}, source="math")
    metrics = metrics_of(rows() + other)
    assert metrics["val-core/arithmetic/acc/mean@3"] == pytest.approx(1 / 3)
    assert metrics["val-core/math/acc/mean@5"] == 1.0
    assert {k for k in metrics if "math/" in k and "pass@" in k} == {
        f"val-core/math/acc/pass@{k}" for k in (1, 2, 4, 5)
    }
    assert not any(k.startswith("val-aux/math") for k in metrics)


def test_one_response_per_question_is_enough():
    metrics = metrics_of([("s", "a", "", 1.0, "x"), ("s", "b", "", 0.0, None)])
    assert metrics == {
        "val-core/s/acc/mean@1": 0.5,
        "val-core/s/acc/mean@1_se": 0.5,
        "val-core/s/acc/best@1": 0.5,
        "val-core/s/acc/maj@1": 0.5,
        "val-core/s/acc/pass@1": 0.5,
    }


def test_partial_credit_counts_in_the_mean_but_does_not_pass():
    metrics = metrics_of([("s", "a", "", 0.5, "x"), ("s", "a", "", 0.25, "y")])
    assert metrics["val-core/s/acc/mean@2"] == 0.375
    assert metrics["val-core/s/acc/best@2"] == 0.5
    assert metrics["val-core/s/acc/pass@2"] == 0.0


def test_unequal_numbers_of_responses_are_refused():
    with pytest.raises(ValueError, match=r"val-core/arithmetic/acc: questions have \[2, 3\] responses"):
        metrics_of(rows()[:-1])
