import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from verl.trainer.ppo.risk import cvar, mvar, quantile, quantile_integral, rvar, score_advantage

SCORES = st.lists(st.integers(-5, 5), min_size=1, max_size=12)


def brute_integral(scores, weights, a, b):
    """The integral of inf{x : F(x) >= u} on a fine grid of u, by its definition."""
    u = a + (b - a) * (np.arange(20000) + 0.5) / 20000
    order = np.argsort(scores)
    cdf = np.cumsum(np.asarray(weights, float)[order]) / np.sum(weights)
    return np.mean(np.asarray(scores, float)[order][np.searchsorted(cdf, u)]) * (b - a)


@given(SCORES, st.floats(0, 1), st.floats(0, 1), st.data())
def test_integral_of_the_quantile_function_agrees_with_its_definition(scores, a, b, data):
    weights = data.draw(st.lists(st.integers(1, 4), min_size=len(scores), max_size=len(scores)))
    a, b = min(a, b), max(a, b)
    ours = quantile_integral(torch.tensor(scores), a, b, torch.tensor(weights))
    assert float(ours) == pytest.approx(brute_integral(scores, weights, a, b), abs=1e-2)


@given(SCORES, st.floats(0.01, 0.99))
def test_cvar_is_the_largest_value_of_its_dual_problem(scores, a):
    # Rockafellar and Uryasev: CVaR_a = max over c of c - E[(c - z)^+] / a, attained at one of the scores.
    z = np.array(scores, float)
    dual = max(c - np.maximum(c - z, 0).mean() / a for c in z)
    assert float(cvar(torch.tensor(scores), a)) == pytest.approx(dual, abs=1e-9)


def test_measures_of_an_atom_count_it_by_the_fraction_inside():
    scores = torch.tensor([0.0, 1.0, 1.0, 1.0])
    assert float(cvar(scores, 0.5)) == pytest.approx((0.25 * 0 + 0.25 * 1) / 0.5)
    assert float(rvar(scores, 0.1, 0.5)) == pytest.approx((0.15 * 0 + 0.25 * 1) / 0.4)
    expected = (1 + 1.5) * 0.1 * 0 + (0.15 * 0 + 0.25 * 1)
    assert float(mvar(scores, 0.1, 0.5, 1.5)) == pytest.approx(expected)


def test_measures_are_batched_and_take_weights():
    scores = torch.tensor([[3.0, 0.0, 1.0], [2.0, 2.0, 5.0]])
    weights = torch.tensor([[1.0, 2.0, 1.0], [1.0, 1.0, 2.0]])
    repeated = [torch.tensor([3.0, 0, 0, 1]), torch.tensor([2.0, 2, 5, 5])]
    expected = torch.stack([mvar(row, 0.3, 0.7, 0.5) for row in repeated])
    torch.testing.assert_close(mvar(scores, 0.3, 0.7, 0.5, weights), expected, rtol=0, atol=1e-12)


def test_quantile_is_exact_where_a_float_sum_of_weights_is_not():
    # Eight weights of 0.1 sum to 0.7999999999999999.
    scores, weights = torch.arange(10.0), torch.full((10,), 0.1, dtype=torch.float64)
    assert quantile(scores, [0.1, 0.3, 0.8, 0.9], weights).tolist() == [0, 2, 7, 8]
    assert quantile(scores, [0.1, 0.3, 0.8, 0.9]).tolist() == [0, 2, 7, 8]


@given(SCORES, st.lists(st.floats(0.001, 0.999), min_size=1, max_size=4))
def test_quantile_is_the_smallest_score_that_reaches_the_level(scores, levels):
    z = np.array(scores)
    ours = quantile(torch.tensor(scores), levels).tolist()
    assert ours == [min(x for x in z if (z <= x).mean() >= u - 1e-9) for u in levels]


def test_levels_that_make_no_interval_are_refused():
    with pytest.raises(ValueError, match=r"a=0\.5"):
        rvar(torch.ones(3), 0.5, 0.5)
    with pytest.raises(ValueError, match="no scores"):
        cvar(torch.ones(0), 0.5)


@given(st.floats(-4, 4), st.floats(-3, 3), st.floats(0, 3), st.floats(0, 3))
def test_mvar_advantage_is_two_hinges(z, q_alpha, gap, omega):
    q_beta = q_alpha + gap
    expected = -max(q_beta - z, 0) - omega * max(q_alpha - z, 0)
    ours = score_advantage(torch.tensor(z, dtype=torch.float64), q_alpha, q_beta, (1 + omega, 1, 0))
    assert float(ours) == pytest.approx(expected, abs=1e-12)


@given(st.floats(-4, 4), st.floats(-3, 3), st.floats(0, 3))
def test_equal_weights_give_the_score_up_to_a_constant(z, q_alpha, gap):
    ours = score_advantage(torch.tensor([z, z + 1.5], dtype=torch.float64), q_alpha, q_alpha + gap, (1, 1, 1))
    assert float(ours[1] - ours[0]) == pytest.approx(1.5, abs=1e-12)


def test_advantage_broadcasts_quantiles_per_bundle():
    z = torch.tensor([[0.0, 1.0, 2.0], [0.0, 1.0, 2.0]])
    q = torch.tensor([[0.5], [1.5]])
    ours = score_advantage(z, q, q + 0.25, (2, 1, 3))
    for row, (low, high) in enumerate([(0.5, 0.75), (1.5, 1.75)]):
        torch.testing.assert_close(ours[row], score_advantage(z[row], low, high, (2, 1, 3)), rtol=0, atol=0)
