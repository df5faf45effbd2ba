import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from verl.trainer.ppo.bundles import (
    exact_credit,
    exact_same_question_credit,
    exact_same_question_distribution,
    exact_score_distribution,
)
from verl.trainer.ppo.risk import score_advantage

REWARD_KINDS = st.sampled_from([(0.0, 1.0), (-1.0, 1.0), (0.0, 0.1, 0.2, 0.7), (-0.31, 0.0, 0.77), (0.0,)])
WEIGHTS = st.sampled_from([(2.5, 1, 0), (0, 1, 0), (1, 0, 0), (1, 1, 1), (0, 1, 2.5)])


def advantage(z, q_alpha, q_beta, weights):
    return float(score_advantage(torch.tensor(z, dtype=torch.float64), q_alpha, q_beta, weights))


def brute_credit(bundle, a):
    """Mean advantage of each response over all pairings; `bundle` is a list of lists of rewards."""
    earned = [[0.0] * len(responses) for responses in bundle]
    times = [[0] * len(responses) for responses in bundle]
    for pairing in itertools.product(*[range(len(responses)) for responses in bundle]):
        value = a(sum(bundle[i][j] for i, j in enumerate(pairing)))
        for i, j in enumerate(pairing):
            earned[i][j] += value
            times[i][j] += 1
    return [[e / t for e, t in zip(es, ts, strict=True)] for es, ts in zip(earned, times, strict=True)]


@st.composite
def bundles(draw):
    """Bundles of questions with unequal numbers of responses, padded: rewards and valid, (M, B, G)."""
    values = draw(REWARD_KINDS)
    m, b, g = draw(st.integers(1, 3)), draw(st.integers(1, 4)), draw(st.integers(1, 4))
    counts = draw(st.lists(st.integers(1, g), min_size=m * b, max_size=m * b))
    codes = draw(st.lists(st.integers(0, len(values) - 1), min_size=m * b * g, max_size=m * b * g))
    rewards = torch.tensor(values, dtype=torch.float64)[torch.tensor(codes)].view(m, b, g)
    return rewards, torch.arange(g) < torch.tensor(counts).view(m, b, 1)


@settings(deadline=None, max_examples=60)
@given(bundles(), WEIGHTS, st.floats(-1, 2), st.floats(0, 2))
def test_exact_credit_is_the_mean_over_all_pairings(drawn, weights, q_alpha, gap):
    rewards, valid = drawn
    ours = exact_credit(rewards, q_alpha, q_alpha + gap, weights, valid)
    for m in range(len(rewards)):
        bundle = [row[v].tolist() for row, v in zip(rewards[m], valid[m], strict=True)]
        expected = brute_credit(bundle, lambda z: advantage(z, q_alpha, q_alpha + gap, weights))
        for i, row in enumerate(expected):
            assert ours[m, i][valid[m, i]].tolist() == pytest.approx(row, abs=1e-12)
    assert (ours[~valid] == 0).all()


@settings(deadline=None, max_examples=30)
@given(bundles())
def test_exact_score_distribution_counts_all_pairings(drawn):
    rewards, valid = drawn
    support, probabilities = exact_score_distribution(rewards, valid)
    for m in range(len(rewards)):
        bundle = [row[v].tolist() for row, v in zip(rewards[m], valid[m], strict=True)]
        sums = np.array([sum(p) for p in itertools.product(*bundle)])
        expected = [(np.abs(sums - x) < 1e-9).mean() for x in support.tolist()]
        assert probabilities[m].tolist() == pytest.approx(expected, abs=1e-12)


@settings(deadline=None, max_examples=40)
@given(st.data(), REWARD_KINDS, WEIGHTS)
def test_same_question_credit_is_the_mean_over_all_subsets(data, values, weights):
    size = data.draw(st.integers(1, 3))
    counts = data.draw(st.lists(st.integers(size, 6), min_size=1, max_size=3))
    g = max(counts)
    codes = data.draw(st.lists(st.integers(0, len(values) - 1), min_size=len(counts) * g, max_size=len(counts) * g))
    rewards = torch.tensor(values, dtype=torch.float64)[torch.tensor(codes)].view(len(counts), g)
    valid = torch.arange(g) < torch.tensor(counts)[:, None]
    credit, baseline = exact_same_question_credit(rewards, size, 0.4, 1.3, weights, valid)
    support, probabilities = exact_same_question_distribution(rewards, size, valid)
    for q, n in enumerate(counts):
        r = rewards[q, :n].tolist()
        for j in range(n):
            others = [r[k] for k in range(n) if k != j]
            with_j = [r[j] + sum(s) for s in itertools.combinations(others, size - 1)]
            expected = np.mean([advantage(z, 0.4, 1.3, weights) for z in with_j])
            assert float(credit[q, j]) == pytest.approx(expected, abs=1e-12)
            without_j = [sum(s) for s in itertools.combinations(others, size)]
            if without_j:
                expected = np.mean([advantage(z, 0.4, 1.3, weights) for z in without_j])
                assert float(baseline[q, j]) == pytest.approx(expected, abs=1e-12)
            else:
                assert baseline[q, j].isnan()
        sums = np.array([sum(s) for s in itertools.combinations(r, size)])
        expected = [(np.abs(sums - x) < 1e-9).mean() for x in support.tolist()]
        assert probabilities[q].tolist() == pytest.approx(expected, abs=1e-12)


def test_binary_credit_is_a_weight_times_the_leave_one_out_reward():
    rewards = (torch.rand(4, 5, 6, generator=torch.Generator().manual_seed(0)) < 0.4).double()
    credit = exact_credit(rewards, 1.0, 3.0, (2.5, 1, 0))
    others = (credit.sum(-1, keepdim=True) - credit) / 5
    rloo = rewards - (rewards.sum(-1, keepdim=True) - rewards) / 5
    for m, i in itertools.product(range(4), range(5)):
        rest = torch.cat([rewards[m, :i], rewards[m, i + 1 :]])
        support, law = exact_score_distribution(rest[None])
        gain = score_advantage(support + 1, 1.0, 3.0, (2.5, 1, 0)) - score_advantage(support, 1.0, 3.0, (2.5, 1, 0))
        expected = rloo[m, i] * (law[0] * gain).sum()
        torch.testing.assert_close((credit - others)[m, i], expected, rtol=0, atol=1e-12)


def test_multiples_of_a_step_stored_in_single_precision_stay_on_their_lattice():
    # 0.1f + 0.2f is not 0.3f: taken literally, sums of five of eleven such values have thousands of points.
    tenths = torch.randint(0, 11, (2, 5, 8), generator=torch.Generator().manual_seed(1))
    single = (tenths.double() / 10).float().double()
    support, _ = exact_score_distribution(single)
    assert len(support) <= 51
    expected = exact_credit(tenths.double(), 10.0, 30.0, (2.5, 1, 0)) / 10
    torch.testing.assert_close(exact_credit(single, 1.0, 3.0, (2.5, 1, 0)), expected, rtol=0, atol=1e-12)


def test_more_sums_than_the_cap_are_refused_with_the_remedy():
    rewards = torch.rand(2, 3, 8, dtype=torch.float64)
    with pytest.raises(ValueError, match="pairing=permute"):
        exact_credit(rewards, 0.5, 1.0, (2.5, 1, 0))
    with pytest.raises(ValueError, match="more than 3 possible"):
        exact_score_distribution(torch.tensor([[[0.0, 1.0], [0.0, 1.0], [1.0, 0.0]]]), max_support=3)


def test_work_done_in_chunks_is_the_same(monkeypatch):
    rewards = (torch.rand(7, 3, 4, generator=torch.Generator().manual_seed(2)) < 0.5).double()
    whole = exact_credit(rewards, 1.0, 2.0, (2.5, 1, 0)), exact_score_distribution(rewards)[1]
    alone = exact_same_question_credit(rewards[:, 0], 2, 1.0, 2.0, (2.5, 1, 0))
    monkeypatch.setattr("verl.trainer.ppo.exact_credit.CHUNK_ENTRIES", 1)
    assert torch.equal(whole[0], exact_credit(rewards, 1.0, 2.0, (2.5, 1, 0)))
    assert torch.equal(whole[1], exact_score_distribution(rewards)[1])
    assert torch.equal(alone[0], exact_same_question_credit(rewards[:, 0], 2, 1.0, 2.0, (2.5, 1, 0))[0])
