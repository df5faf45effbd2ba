"""The covariance that drives the entropy: as an identity on a tabular policy, and as it is measured on a batch."""

import numpy as np
import pytest
import torch

from tests.trainer.ppo.batches import make_batch, riskpo, with_quantiles
from verl.protocol import object_array
from verl.trainer.ppo.core_algos import covariance_metrics
from verl.trainer.ppo.exact_credit import exact_credit


def entropy(logits):
    log = logits.log_softmax(-1)
    return float(-(log.exp() * log).sum())


def covariance(policy, x, y):
    return float((policy * x * y).sum() - (policy * x).sum() * (policy * y).sum())


@pytest.fixture
def tabular():
    """Logits of five answers, and their credit when they meet one answer to each of two other questions."""
    logits = torch.tensor([0.2, -1.0, 0.7, 1.4, -0.3], dtype=torch.float64)
    answers = torch.tensor([[0.0, 1.0, 0.0, 1.0, 0.0], [1.0, 0.0, 0.0, 0.0, 1.0], [0.0, 1.0, 1.0, 1.0, 0.0]])
    return logits, exact_credit(answers[None].double(), 1.0, 2.0, (2.5, 1, 0))[0, 0]


@pytest.mark.parametrize("step", ["natural", "vanilla"])
def test_entropy_falls_by_the_covariance_to_second_order(tabular, step):
    logits, advantage = tabular
    policy = logits.softmax(-1)
    direction = advantage if step == "natural" else policy * advantage
    errors = []
    for eta in (0.02, 0.01, 0.005):
        change = entropy(logits + eta * direction) - entropy(logits)
        predicted = -eta * covariance(policy, policy.log(), direction)
        errors.append(abs(change - predicted))
        assert change == pytest.approx(predicted, rel=0.05)
    # Halving the step quarters the error.
    assert errors[0] / errors[1] == pytest.approx(4, rel=0.1) and errors[1] / errors[2] == pytest.approx(4, rel=0.1)


def test_measured_covariance_is_that_of_a_loop():
    rng = np.random.default_rng(0)
    groups = [rng.integers(0, 2, n).astype(float).tolist() for n in (4, 3, 5, 1)]
    lengths = rng.integers(1, 4, 13)
    batch = make_batch(groups, lengths=lengths)
    log_probs = torch.from_numpy(-rng.random((13, 3)))
    per_row = rng.normal(size=13)
    advantages = torch.from_numpy(per_row)[:, None] * batch["response_mask"]
    rewards = batch["token_level_rewards"].sum(-1)
    ours = covariance_metrics(log_probs, advantages, batch["response_mask"], rewards, batch["uid"])
    mine, reference, start = [], [], 0
    for group in groups:
        rows = range(start, start + len(group))
        start += len(group)
        if len(group) > 1:
            log = [float(log_probs[i, : lengths[i]].sum()) for i in rows]
            rloo = [r - (sum(group) - r) / (len(group) - 1) for r in group]
            mine.append(np.cov(log, per_row[list(rows)])[0, 1])
            reference.append(np.cov(log, rloo)[0, 1])
    assert ours["actor/cov_logp_adv"] == pytest.approx(np.mean(mine))
    assert ours["actor/cov_logp_adv_ratio"] == pytest.approx(np.mean(mine) / np.mean(reference))


def test_a_mixed_risk_measure_can_lower_the_entropy_faster_than_the_mean():
    # One question, bundles of one, success 0.9: both quantiles are 1, the slope of A is 1 + omega everywhere.
    batch = make_batch([[1.0] * 9 + [0.0]], 1)
    log_probs = torch.tensor([0.9] * 9 + [0.1]).log()[:, None] * torch.tensor([1.0, 0.0, 0.0])
    output = with_quantiles(riskpo(1, 10, omega=0.5), 1.0, 1.0)(batch)
    rewards = batch["token_level_rewards"].sum(-1)
    metrics = covariance_metrics(log_probs, output.advantages, batch["response_mask"], rewards, batch["uid"])
    assert metrics["actor/cov_logp_adv"] > 0
    assert metrics["actor/cov_logp_adv_ratio"] == pytest.approx(1.5, rel=1e-6)


def test_no_ratio_without_a_reference_and_nothing_without_pairs():
    mask = torch.ones(2, 1, dtype=torch.bool)
    arguments = torch.tensor([[-1.0], [-2.0]]), torch.tensor([[0.5], [-0.5]]), mask, torch.zeros(2)
    assert covariance_metrics(*arguments, object_array(["a", "a"])).keys() == {"actor/cov_logp_adv"}
    assert covariance_metrics(*arguments, object_array(["a", "b"])) == {}
