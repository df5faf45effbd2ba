"""Every baseline against a small loop written from its formula."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.trainer.ppo.batches import make_batch
from verl.trainer.config.schema import AlgorithmConfig
from verl.trainer.ppo import advantages as estimators
from verl.trainer.ppo.core_algos import ADV_ESTIMATORS, get_adv_estimator

EPS = 1e-6
OWN = {"passk_training": {"k": 2}}  # algorithm.estimator_kwargs


def flatten(lists):
    return [value for values in lists for value in values]


def mean(values):
    return sum(values) / len(values)


def std(values):
    return math.sqrt(sum((v - mean(values)) ** 2 for v in values) / (len(values) - 1)) if len(values) > 1 else 0.0


def loop_grpo(group, lengths, batch):
    return [(r - mean(group)) / (std(group) + EPS) for r in group]


def loop_dr_grpo(group, lengths, batch):
    return [r - mean(group) for r in group]


def loop_rloo(group, lengths, batch):
    return [r - mean(group[:i] + group[i + 1 :]) for i, r in enumerate(group)]


def loop_opo(group, lengths, batch):
    baseline = sum(n * r for n, r in zip(lengths, group, strict=True)) / sum(lengths)
    return [r - baseline for r in group]


def loop_gpg(group, lengths, batch):
    rows, unequal = sum(map(len, batch)), sum(len(g) for g in batch if len(set(g)) > 1)
    return [(r - mean(group)) * rows / max(unequal, 1) for r in group]


def loop_qae(group, lengths, batch):
    baseline = min(x for x in group if sum(r <= x for r in group) / len(group) >= 0.4 - 1e-12)
    return [r - baseline for r in group]


def loop_rs_grpo(group, lengths, batch):
    utilities = [math.exp(2.0 * r) for r in group]
    return [(u / mean(utilities) - 1) / 2.0 for u in utilities]


def loop_grpo_passk(group, lengths, batch):
    best, second = sorted(group)[-1], sorted(group)[-2]
    first = group.index(best)
    return [best - second if i == first else 0.0 for i in range(len(group))]


def loop_passk_training(group, lengths, batch):
    # By definition: over all sets of k responses, the mean over the sets with a response of (pass - R), over s.
    k = 2
    passes = {s: float(any(group[i] > 0 for i in s)) for s in itertools.combinations(range(len(group)), k)}
    rate = mean(list(passes.values()))
    deviation = math.sqrt(rate * (1 - rate))
    if deviation == 0:
        return [0.0] * len(group)
    return [
        mean([value - rate for s, value in passes.items() if i in s]) / (deviation + EPS) for i in range(len(group))
    ]


LOOPS = {
    "grpo": loop_grpo,
    "dr_grpo": loop_dr_grpo,
    "rloo": loop_rloo,
    "opo": loop_opo,
    "gpg": loop_gpg,
    "qae": loop_qae,
    "rs_grpo": loop_rs_grpo,
    "grpo_passk": loop_grpo_passk,
    "passk_training": loop_passk_training,
}
GROUPS = st.lists(st.lists(st.sampled_from([-1.0, 0.0, 0.3, 1.0, 2.5]), min_size=2, max_size=5), min_size=1, max_size=4)


@settings(deadline=None, max_examples=25)
@given(GROUPS, st.randoms())
@pytest.mark.parametrize("name", LOOPS)
def test_group_estimator_agrees_with_its_formula(name, groups, random):
    lengths = [[random.randint(1, 4) for _ in group] for group in groups]
    batch = make_batch(groups, lengths=flatten(lengths), tokens=4)
    expected = [LOOPS[name](g, n, groups) for g, n in zip(groups, lengths, strict=True)]
    expected = torch.tensor(flatten(expected), dtype=torch.float64)[:, None] * batch["response_mask"]
    order = list(range(len(batch)))
    random.shuffle(order)
    shuffled = batch.reorder(order)
    function = getattr(estimators, name)
    ours, returns = function(
        shuffled["token_level_rewards"],
        shuffled["response_mask"],
        AlgorithmConfig(),
        index=shuffled["uid"],
        **OWN.get(name, {}),
    )
    if name == "grpo_passk":  # which of two equally good responses is the best is arbitrary, and earns 0
        ours, expected = ours.sort(0).values, expected.sort(0).values
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-9)
    else:
        torch.testing.assert_close(ours, expected[order], rtol=0, atol=1e-9)
        assert torch.equal(returns, ours)


def test_grpo_without_division_is_dr_grpo():
    batch = make_batch([[0.0, 1.0, 1.0], [0.5, 0.2, 0.9]])
    arguments = batch["token_level_rewards"], batch["response_mask"]
    ours, _ = estimators.grpo(*arguments, AlgorithmConfig(norm_adv_by_std_in_grpo=False), index=batch["uid"])
    expected, _ = estimators.dr_grpo(*arguments, AlgorithmConfig(), index=batch["uid"])
    assert torch.equal(ours, expected)


@given(st.integers(1, 9), st.integers(0, 9))
def test_quantile_baseline_switches_at_a_success_rate_of_one_minus_k(n, right):
    # arXiv 2509.22611: with p <= 1 - K only successes are reinforced, above it only failures are punished.
    right = min(right, n)
    batch = make_batch([[1.0] * right + [0.0] * (n - right)])
    ours, _ = estimators.qae(
        batch["token_level_rewards"], batch["response_mask"], AlgorithmConfig(), batch["uid"], level=0.4
    )
    hard = right / n <= 0.6 + 1e-12
    expected = [float(hard)] * right + [0.0 if hard else -1.0] * (n - right)
    assert ours[:, 0].tolist() == expected


def test_risk_seeking_utility_survives_large_rewards():
    batch = make_batch([[1000.0, 0.0, -1000.0]])
    ours, _ = estimators.rs_grpo(
        batch["token_level_rewards"], batch["response_mask"], AlgorithmConfig(), index=batch["uid"]
    )
    assert ours[:, 0].tolist() == pytest.approx([(3 - 1) / 2, -0.5, -0.5])


def test_remax_subtracts_the_greedy_reward():
    batch = make_batch([[0.0, 1.0], [1.0, 1.0]]).with_columns(reward_baselines=torch.tensor([1.0, 1.0, 0.25, 0.25]))
    output = get_adv_estimator("remax", AlgorithmConfig(), 2, 1)(batch)
    assert output.advantages[:, 0].tolist() == [-1.0, 0.0, 0.75, 0.75]
    assert ADV_ESTIMATORS["remax"].needs_greedy_baseline


# -------------------------------------------------------------------------------------------------- token by token
def token_batch(seed=0):
    """Rewards at every token; lengths differ, and one response has a masked stretch inside."""
    rng = np.random.default_rng(seed)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 0, 0, 1, 1], [1, 0, 0, 0, 0]], dtype=torch.bool)
    rewards = torch.from_numpy(rng.normal(size=(4, 5)))
    values = torch.from_numpy(rng.normal(size=(4, 5)))
    return rewards, mask, values, np.array(["a", "a", "b", "b"], dtype=object)


def loop_whiten(rows):
    """Whiten a list of lists of token values over all of them."""
    flat = [v for row in rows for v in row]
    return [[(v - mean(flat)) / (std(flat) + EPS) for v in row] for row in rows]


def steps_of(tensor, mask):
    """The values at the policy's own tokens, a list per row."""
    return [row[m].tolist() for row, m in zip(tensor, mask, strict=True)]


def assert_rows(ours, expected, mask):
    for row, values in zip(steps_of(ours, mask), expected, strict=True):
        assert row == pytest.approx(values, abs=1e-9)
    assert (ours[~mask] == 0).all()


def test_reinforce_plus_plus_whitens_discounted_returns():
    rewards, mask, _, uid = token_batch()
    config = AlgorithmConfig(gamma=0.9)
    ours, returns = estimators.reinforce_plus_plus(rewards, mask, config, index=uid)
    expected = [
        [sum(0.9 ** (s - t) * row[s] for s in range(t, len(row))) for t in range(len(row))]
        for row in steps_of(rewards, mask)
    ]
    assert_rows(returns, expected, mask)
    assert_rows(ours, loop_whiten(expected), mask)


def test_reinforce_plus_plus_baseline_whitens_centred_rewards():
    rewards, mask, _, uid = token_batch()
    totals = [sum(row) for row in steps_of(rewards, mask)]
    centred = [totals[0] - mean(totals[:2]), totals[1] - mean(totals[:2])]
    centred += [totals[2] - mean(totals[2:]), totals[3] - mean(totals[2:])]
    expected = loop_whiten([[c] * int(n) for c, n in zip(centred, mask.sum(1), strict=True)])
    ours, _ = estimators.reinforce_plus_plus_baseline(rewards, mask, AlgorithmConfig(), index=uid)
    assert_rows(ours, expected, mask)


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 1.0), (0.9, 0.8), (0.95, 0.0)])
def test_gae_is_the_discounted_sum_of_temporal_differences(gamma, lam):
    rewards, mask, values, uid = token_batch(1)
    ours, returns = estimators.gae(rewards, mask, AlgorithmConfig(gamma=gamma, lam=lam), index=uid, values=values)
    expected = []
    for r, v in zip(steps_of(rewards, mask), steps_of(values, mask), strict=True):
        delta = [r[t] + gamma * (v[t + 1] if t + 1 < len(v) else 0.0) - v[t] for t in range(len(r))]
        expected.append([sum((gamma * lam) ** (s - t) * delta[s] for s in range(t, len(r))) for t in range(len(r))])
    totals = [
        [a + x for a, x in zip(row, v, strict=True)] for row, v in zip(expected, steps_of(values, mask), strict=True)
    ]
    assert_rows(returns, totals, mask)
    assert_rows(ours, loop_whiten(expected), mask)
    if gamma == lam == 1:  # the return is what is left of the reward
        left = [[sum(row[t:]) for t in range(len(row))] for row in steps_of(rewards, mask)]
        assert_rows(returns, left, mask)


# ------------------------------------------------------------------------------------------------- all of them alike
BUNDLING = {"riskpo", "grpo_bundle_RVaR_quantile_tracking"}


@pytest.mark.parametrize("name", sorted(ADV_ESTIMATORS.keys() - BUNDLING))
@pytest.mark.parametrize("groups", [[[0.0, 1.0, 1.0], [1.0, 1.0]], [[1.0, 1.0], [1.0, 1.0]], [[0.0] * 4]])
def test_nothing_is_nan_and_masked_tokens_get_0(name, groups):
    n = sum(map(len, groups))
    batch = make_batch(groups, lengths=[1 + i % 3 for i in range(n)])
    batch = batch.with_columns(values=torch.zeros(n, 3), reward_baselines=torch.zeros(n))
    output = get_adv_estimator(name, AlgorithmConfig(estimator_kwargs=OWN.get(name, {})), 2, 1)(batch)
    for tensor in (output.advantages, output.returns):
        assert tensor.shape == (n, 3) and tensor.dtype == torch.float32
        assert tensor.isfinite().all() and (tensor[~batch["response_mask"]] == 0).all()


@pytest.mark.parametrize("name", ["grpo", "rloo", "dr_grpo", "opo", "gpg", "qae", "rs_grpo", "grpo_passk"])
def test_a_single_response_has_no_advantage(name):
    batch = make_batch([[1.0], [0.0, 1.0]])
    ours, _ = getattr(estimators, name)(
        batch["token_level_rewards"], batch["response_mask"], AlgorithmConfig(), index=batch["uid"]
    )
    assert ours.isfinite().all() and (ours[0] == 0).all()
    with pytest.raises(ValueError, match=rf"{name} .*rollout\.n must be at least 2, not 1"):
        get_adv_estimator(name, AlgorithmConfig(), 1, 1)


@pytest.mark.parametrize("name", sorted(ADV_ESTIMATORS.keys() - BUNDLING))
def test_rewards_that_are_not_finite_are_refused(name):
    batch = make_batch([[0.0, 1.0], [float("inf"), 1.0]])
    batch = batch.with_columns(values=torch.zeros(4, 3), reward_baselines=torch.zeros(4))
    with pytest.raises(ValueError, match="row 2 sum to inf"):
        get_adv_estimator(name, AlgorithmConfig(estimator_kwargs=OWN.get(name, {})), 2, 1)(batch)


@pytest.mark.parametrize(
    ("name", "config", "message"),
    [
        ("qae", {"level": 1.0}, r"algorithm\.estimator_kwargs\.level=1\.0"),
        ("rs_grpo", {"beta": 0.0}, r"algorithm\.estimator_kwargs\.beta=0\.0"),
        ("passk_training", {"k": 5}, r"algorithm\.estimator_kwargs\.k=5 .*rollout\.n=2"),
        ("passk_training", {"k": 0}, r"algorithm\.estimator_kwargs\.k=0"),
    ],
)
def test_meaningless_settings_are_refused_at_the_start(name, config, message):
    with pytest.raises(ValueError, match=message):
        get_adv_estimator(name, AlgorithmConfig(estimator_kwargs=config), 2, 1)
