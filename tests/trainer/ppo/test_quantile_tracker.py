import io

import numpy as np
import pytest
import torch

from verl.trainer.ppo.quantile_tracker import QuantileTracker, ScoreDistribution, ScoreDistributionAverage

LEVELS = (0.1, 0.25, 0.5, 0.75, 0.9)


def binomial_scores(rng, p, n=200, size=5):
    return torch.from_numpy(rng.binomial(size, p, n).astype(float))


def test_first_update_starts_at_the_batch_quantiles():
    tracker = QuantileTracker(LEVELS, lr=0.1)
    tracker.update(torch.arange(10.0))
    assert tracker.values().tolist() == [0, 2, 4, 7, 8]
    assert int(tracker.steps) == 0


@pytest.mark.parametrize("power", [0.0, 0.75])
def test_steps_follow_the_stochastic_gradient(power):
    rng = np.random.default_rng(0)
    tracker = QuantileTracker([0.2, 0.7], lr=0.1, power=power, score_range=5.0)
    tracker.update(torch.tensor([1.0, 2.0, 4.0]))
    q = [1.0, 4.0]
    for k in range(30):
        z = rng.binomial(5, 0.4, 16).astype(float)
        weights = rng.random(16)
        tracker.update(torch.from_numpy(z), torch.from_numpy(weights))
        for i, level in enumerate((0.2, 0.7)):
            below = weights[z < q[i]].sum() / weights.sum()
            q[i] += 0.1 * 5.0 / (1 + k) ** power * (level - below)
        assert tracker.quantiles.tolist() == pytest.approx(q, abs=1e-12)
    assert tracker.values().tolist() == pytest.approx(sorted(q), abs=1e-12)


def test_reaches_the_quantiles_of_a_continuous_distribution():
    generator = torch.Generator().manual_seed(0)
    tracker = QuantileTracker(LEVELS, lr=0.5, power=0.75, score_range=4.0)
    for _ in range(1500):
        tracker.update(torch.randn(64, generator=generator) * 2 + 1)
    expected = torch.distributions.Normal(1.0, 2.0).icdf(torch.tensor(LEVELS))
    torch.testing.assert_close(tracker.values(), expected.double(), rtol=0, atol=0.1)
    assert tracker.calibration(torch.randn(100_000, generator=generator) * 2 + 1).max() < 0.03


@pytest.mark.parametrize("make", [lambda: QuantileTracker(LEVELS, lr=0.02, score_range=5.0), None])
def test_reaches_the_quantiles_of_a_lattice_distribution(make):
    tracker = ScoreDistributionAverage(LEVELS) if make is None else make()
    rng = np.random.default_rng(1)
    for _ in range(500):
        tracker.update(binomial_scores(rng, 0.43))
    exact = torch.tensor([c * 0.43**k * 0.57 ** (5 - k) for k, c in enumerate((1, 5, 10, 10, 5, 1))])
    truth = ScoreDistribution(torch.arange(6.0), exact)
    assert truth.snap(tracker.values()).tolist() == truth.quantile(torch.tensor(LEVELS)).tolist()
    assert tracker.calibration(torch.arange(6.0), exact).max() == 0


@pytest.mark.parametrize("kind", ["sgd", "ema"])
def test_follows_a_drifting_distribution(kind):
    generator = torch.Generator().manual_seed(0)
    tracker = QuantileTracker(LEVELS, lr=0.1, score_range=5.0) if kind == "sgd" else ScoreDistributionAverage(LEVELS)
    for step in range(150):
        scores = torch.randn(100, generator=generator) + 0.02 * step
        tracker.update(scores)
    expected = torch.distributions.Normal(0.02 * 149, 1.0).icdf(torch.tensor(LEVELS)).double()
    # The drift would leave a tracker that stood still 3 away.
    assert (tracker.values() - expected).abs().max() < 0.5


def test_what_is_read_never_crosses_although_the_state_may():
    tracker = QuantileTracker([0.4, 0.6], lr=0.1)
    tracker.update(torch.arange(5.0))
    with torch.no_grad():
        tracker.quantiles.copy_(torch.tensor([3.0, 2.0]))
    assert tracker.values().tolist() == [2.0, 3.0]
    assert tracker.quantiles.tolist() == [3.0, 2.0]
    assert tracker.value(0.4) == 2.0


def test_calibration_is_the_probability_by_which_a_quantile_is_missed():
    tracker = QuantileTracker([0.5], lr=0.1)
    tracker.update(torch.tensor([7.0]))
    # 7 is the 0.9 quantile of ten scores; F(7-) = 0.8 exceeds 0.5 by 0.3, and 6.6 is moved to 7 first.
    scores = torch.tensor([1.0, 2, 3, 4, 4, 5, 5, 6, 7, 9])
    assert float(tracker.calibration(scores)[0]) == pytest.approx(0.3)
    with torch.no_grad():
        tracker.quantiles.fill_(6.6)
    assert float(tracker.calibration(scores)[0]) == pytest.approx(0.3)
    with torch.no_grad():
        tracker.quantiles.fill_(2.2)
    assert float(tracker.calibration(scores)[0]) == pytest.approx(0.5 - 0.2)
    with torch.no_grad():
        tracker.quantiles.fill_(4.3)
    assert float(tracker.calibration(scores)[0]) == 0


def test_exponential_average_weighs_batches_by_age():
    tracker = ScoreDistributionAverage([0.5], decay=0.8)
    for score in (0.0, 1.0, 2.0):
        tracker.update(torch.tensor([score]))
    assert tracker.support.tolist() == [0, 1, 2]
    assert tracker.mass.tolist() == pytest.approx([0.64, 0.16, 0.2])


def test_exponential_average_keeps_a_bounded_number_of_atoms():
    generator = torch.Generator().manual_seed(0)
    tracker = ScoreDistributionAverage(LEVELS, max_atoms=500)
    for _ in range(30):
        tracker.update(torch.randn(200, generator=generator))
    assert len(tracker.support) <= 500
    expected = torch.distributions.Normal(0.0, 1.0).icdf(torch.tensor(LEVELS)).double()
    torch.testing.assert_close(tracker.values(), expected, rtol=0, atol=0.2)


def test_sums_that_differ_in_rounding_are_one_atom():
    tracker = ScoreDistributionAverage([0.5])
    tracker.update(torch.tensor([0.1 + 0.2, 0.3, 0.6], dtype=torch.float64))
    assert len(tracker.support) == 2


@pytest.mark.parametrize("make", [lambda: QuantileTracker(LEVELS, 0.1, 0.75), lambda: ScoreDistributionAverage(LEVELS)])
def test_continues_bit_for_bit_after_save_and_load(make):
    rng = np.random.default_rng(2)
    tracker = make()
    for _ in range(7):
        tracker.update(binomial_scores(rng, 0.5))
    file = io.BytesIO()
    torch.save(tracker.state_dict(), file)
    file.seek(0)
    resumed = make()
    resumed.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(resumed.values(), tracker.values())
    for _ in range(5):
        scores = binomial_scores(rng, 0.6)
        tracker.update(scores)
        resumed.update(scores)
        assert torch.equal(resumed.values(), tracker.values())


def test_checkpoint_of_other_levels_is_refused():
    tracker = QuantileTracker([0.2, 0.8], 0.1)
    tracker.update(torch.arange(4.0))
    with pytest.raises(ValueError, match="quantile levels"):
        QuantileTracker([0.1, 0.8], 0.1).load_state_dict(tracker.state_dict())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: QuantileTracker([0.0, 0.5], 0.1), "inside"),
        (lambda: QuantileTracker([0.5], 0.0), "lr_q=0.0"),
        (lambda: QuantileTracker([0.5], 0.1, power=0.3), "lr_q_power=0.3"),
        (lambda: QuantileTracker([0.5], 0.1).value(0.5), "no scores"),
        (lambda: QuantileTracker([0.5], 0.1).value(0.6), "level 0.6 is not tracked"),
        (lambda: QuantileTracker([0.5], 0.1).update(torch.tensor([1.0, torch.nan])), "not finite"),
        (lambda: ScoreDistributionAverage([0.5]).update(torch.ones(0)), "no scores"),
    ],
)
def test_bad_input_is_refused_with_the_value(make, message):
    with pytest.raises(ValueError, match=message):
        make()
