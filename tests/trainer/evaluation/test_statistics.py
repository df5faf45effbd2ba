import itertools
import math
import random
from fractions import Fraction

import numpy as np
import pytest

from verl.trainer.evaluation.statistics import (
    Bootstrapped,
    bootstrap_means,
    majority_accuracy,
    process_validation_metrics,
    question_measures,
    unbiased_pass_at_k,
)


@pytest.mark.parametrize("n", range(1, 8))
def test_pass_at_k_is_the_share_of_subsets_with_a_right_one(n):
    for c, k in itertools.product(range(n + 1), range(1, n + 1)):
        right = [i < c for i in range(n)]
        subsets = list(itertools.combinations(right, k))
        assert unbiased_pass_at_k(n, c, k) == pytest.approx(sum(map(any, subsets)) / len(subsets), abs=1e-15)


@pytest.mark.parametrize("n", [1, 2, 3, 5, 6, 8])
def test_measures_of_random_tables_equal_an_enumeration(n):
    """pass@k by looking at every k-subset of the responses, whatever their order."""
    rng = np.random.default_rng(n)
    acc = (rng.random((7, n)) < rng.random((7, 1))).astype(float)
    measures = question_measures(acc, [["x"] * n] * 7)
    ks = [1, 2, 4, 8]
    assert {name for name in measures if "pass" in name} == {f"pass@{k}" for k in {*(k for k in ks if k <= n), n}}
    for name, values in measures.items():
        kind, _, k = name.partition("@")
        for row, value in zip(acc, values, strict=True):
            if kind == "pass":
                subsets = list(itertools.combinations(row, int(k)))
                assert value == pytest.approx(sum(max(subset) for subset in subsets) / len(subsets), abs=1e-15)
            else:
                assert value == (max(row) if kind == "best" else pytest.approx(sum(row) / n))


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
    with pytest.raises(ValueError, match=r"arithmetic: questions have \[2, 3\] responses"):
        metrics_of(rows()[:-1])


# ----------------------------------------------------------------------------------------------------- bootstrap
def test_the_spread_of_resampled_means_is_the_standard_error():
    """Exactly: the variance of a resampled mean is the population variance of the values over Q."""
    rng = np.random.default_rng(1)
    values = np.stack([rng.normal(3.0, 2.0, 50), rng.beta(0.5, 0.5, 50)], axis=1)
    resampled = bootstrap_means(values, 20_000, rng)
    assert resampled.shape == (20_000, 2)
    expected = values.std(axis=0) / math.sqrt(50)
    assert resampled.std(axis=0) == pytest.approx(expected, rel=0.03)  # itself known to 0.5 %
    assert resampled.mean(axis=0) == pytest.approx(values.mean(axis=0), abs=5 * expected.max() / math.sqrt(20_000))
    # Measures of a question are drawn together: their correlation stays.
    correlation = np.corrcoef(values.T)[0, 1]
    assert np.corrcoef(resampled.T)[0, 1] == pytest.approx(correlation, abs=0.04)


def test_resampled_means_of_zeros_and_ones_are_binomial():
    n_questions, right, samples = 20, 6, 40_000
    values = np.repeat([1.0, 0.0], [right, n_questions - right])[:, None]
    counts = np.rint(bootstrap_means(values, samples, np.random.default_rng(2))[:, 0] * n_questions).astype(int)
    p = right / n_questions
    expected = [math.comb(n_questions, c) * p**c * (1 - p) ** (n_questions - c) for c in range(n_questions + 1)]
    # A count of multinomial draws is off by at most 0.0025 in one standard deviation.
    assert np.bincount(counts, minlength=n_questions + 1) / samples == pytest.approx(expected, abs=0.0125)


def test_the_interval_covers_the_true_mean_as_often_as_it_says():
    rng = np.random.default_rng(3)
    covered, trials, true_mean = 0, 300, 0.3 / (0.3 + 0.5)
    for _ in range(trials):
        measures = {"mean@1": rng.beta(0.3, 0.5, 100)}
        estimate = Bootstrapped.of(measures, 300, rng).estimates()["mean@1"]
        covered += estimate.low <= true_mean <= estimate.high
    assert 0.90 <= covered / trials <= 0.985  # 0.95 less a little, with a standard deviation of 0.013


def test_the_average_weighs_data_sources_equally_and_adds_their_variances():
    rng = np.random.default_rng(4)
    tables = [
        {"mean@2": rng.random(40), "pass@2": rng.random(40)},
        {"mean@2": rng.random(10), "pass@4": rng.random(10)},
    ]
    parts = [Bootstrapped.of(measures, 20_000, rng) for measures in tables]
    average = Bootstrapped.average(parts)
    assert average.names == ["mean@2"]  # what both have
    assert average.means == pytest.approx([(tables[0]["mean@2"].mean() + tables[1]["mean@2"].mean()) / 2])
    variance = sum(table["mean@2"].var() / len(table["mean@2"]) for table in tables) / 4
    assert average.resampled.var() == pytest.approx(variance, rel=0.05)


def test_equal_seeds_give_equal_intervals():
    measures = {"mean@1": np.random.default_rng(5).random(30)}
    one, two, other = (Bootstrapped.of(measures, 500, np.random.default_rng(seed)).estimates() for seed in (6, 6, 7))
    assert one == two and one != other
    assert one["mean@1"].low < one["mean@1"].value < one["mean@1"].high


def test_a_single_question_has_no_interval():
    estimate = Bootstrapped.of({"mean@1": np.array([0.5])}, 100, np.random.default_rng(1)).estimates()["mean@1"]
    assert (estimate.value, estimate.low, estimate.high) == (0.5, None, None)
