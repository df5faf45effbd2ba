"""What bundles do to the expected direction: random ones nothing, same-question ones favour hard questions."""

import numpy as np
import pytest
import torch

from tests.trainer.ppo.batches import make_batch, riskpo, with_quantiles

RESPONSES = 10


def pool(num_questions):
    """Questions of all success rates, with exactly that share of right responses: no sampling noise is left."""
    right = np.arange(num_questions) % (RESPONSES + 1)
    return right / RESPONSES, [[1.0] * k + [0.0] * (RESPONSES - k) for k in right.tolist()]


def directions(advantages, p, rewards):
    """Expected gradient in each question's logit, from these advantages and from the mean's."""
    centred = torch.tensor(rewards, dtype=torch.float64) - torch.from_numpy(p)[:, None]
    return (centred * advantages.view(centred.shape)).mean(1), (centred**2).mean(1)


def cosine(a, b):
    return float((a * b).sum() / (a.norm() * b.norm()))


def test_random_bundles_of_a_large_pool_keep_the_direction_of_the_mean():
    p, rewards = pool(495)
    batch = make_batch(rewards)
    estimator = riskpo(5, RESPONSES, omega=1.5)
    total = torch.zeros(len(p), dtype=torch.float64)
    for step in range(1, 161):
        names = estimator.assign_bundles(np.arange(len(p)), np.arange(len(p)), step)
        bundled = batch.with_columns(bundle_uid=np.repeat(names, RESPONSES))
        with_quantiles(estimator, 2.0, 3.0)  # the same quantiles at every step, that of the mixture
        mine, mean = directions(estimator.estimate(bundled)[0], p, rewards)
        total += mine
    assert cosine(total, mean) > 0.999


def test_same_question_bundles_weigh_hard_questions_more():
    p, rewards = pool(110)
    batch = make_batch(rewards)
    estimator = riskpo(5, RESPONSES, bundling="same_question", quantile_source="batch")
    advantages, metrics = estimator.estimate(batch.with_columns(bundle_uid=batch["uid"]))
    mine, mean = directions(advantages, p, rewards)
    weight = (mine / mean)[1:10]  # success rates .1 to .9
    assert (weight.diff() <= 1e-12).all()
    assert weight[0] > 3 * weight[-1]
    assert cosine(mine, mean) < 0.98
    assert metrics["riskpo/credit_weight/0-0.2"] > 1 > metrics["riskpo/credit_weight/0.8-1"]


@pytest.mark.parametrize("bundling", ["difficulty", "random"])
def test_difficulty_bundles_join_questions_of_like_success(bundling):
    p, rewards = pool(55)
    batch = make_batch(rewards)
    ids = np.array([f"dataset-{q}" for q in range(55)], dtype=object)
    estimator = riskpo(5, RESPONSES, bundling=bundling)
    for step in (1, 2):
        names = estimator.assign_bundles(ids, ids, step)
        spread = np.mean([np.ptp(p[names == name]) for name in np.unique(names)])
        batch.meta_info["step"] = step
        estimator.estimate(batch.with_columns(bundle_uid=np.repeat(names, RESPONSES)))
    assert spread == 0 if bundling == "difficulty" else spread > 0.3
