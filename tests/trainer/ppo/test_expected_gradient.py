"""The estimator's expected gradient, by enumeration, is the derivative of the exact objective of a tabular policy.

A question has a few answers with softmax probabilities; the objective is the sum of region weights times the integral
of F^-1 over the region, F the law of the bundle score. Quantiles stand at their true values; levels stay 1e-3 away from
the values of F, where the objective has kinks.
"""

import itertools

import numpy as np
import pytest
import torch

from tests.trainer.ppo.batches import law_of_sum, make_batch, riskpo, with_quantiles, worlds
from verl.trainer.ppo.risk import quantile, quantile_integral

OBJECTIVES = {
    "mvar": (2.5, 1.0, 0.0),
    "cvar": (1.0, 0.0, 0.0),
    "rvar": (0.0, 1.0, 0.0),
    "mean": (1.0, 1.0, 1.0),
    "risk-seeking": (0.0, 1.0, 2.5),
}
# Rewards of the answers to each of two questions.
REWARDS = {
    "0/1": ([0.0, 1.0], [1.0, 0.0]),
    "-1/+1": ([-1.0, 1.0], [1.0, -1.0]),
    "real": ([-0.4, 0.9], [0.31, 1.7, -0.2]),
}
ALPHA, BETA = 0.23, 0.71


def softmax(logits):
    return torch.softmax(torch.as_tensor(logits, dtype=torch.float64), -1)


def score_law(logits, rewards):
    return law_of_sum([softmax(x) for x in logits], rewards)


def objective(law, weights):
    z, chance = law
    edges = (0.0, ALPHA, BETA, 1.0)
    parts = [quantile_integral(z, a, b, chance) for a, b in itertools.pairwise(edges)]
    return float(sum(w * part for w, part in zip(weights, parts, strict=True)))


def finite_differences(value, logits, h=1e-5):
    gradient = []
    for i, row in enumerate(logits):
        gradient.append(torch.zeros(len(row), dtype=torch.float64))
        for k in range(len(row)):
            moved = [[list(x) for x in logits] for _ in range(2)]
            moved[0][i][k] += h
            moved[1][i][k] -= h
            gradient[i][k] = (value(moved[0]) - value(moved[1])) / (2 * h)
    return gradient


def true_quantiles(law):
    z, chance = law
    levels = [float(chance[z <= x + 1e-9].sum()) for x in z]
    assert min(abs(level - edge) for level in levels for edge in (ALPHA, BETA)) > 1e-3
    return quantile(z, (ALPHA, BETA), chance).tolist()


def score_function(answers, logits):
    """Gradient of log pi of each answer (W, G) in the question's logits, (W, G, K)."""
    probabilities = softmax(logits)
    return torch.eye(len(probabilities), dtype=torch.float64)[answers] - probabilities


def expected_gradient(advantages, answers, logits, chance):
    """Mean over outcomes of the mean over responses of A grad log pi, per question; advantages [(W, G_i)]."""
    rows = sum(a.shape[1] for a in advantages) / len(advantages)
    return [
        torch.einsum("w,wg,wgk->k", chance, a, score_function(y, x)) / rows
        for a, y, x in zip(advantages, answers, logits, strict=True)
    ]


def outcome_batch(rewards, answers):
    """All outcomes as the bundles of one batch: rows in order of outcome, question, response."""
    values = [torch.tensor(r, dtype=torch.float64)[y].tolist() for r, y in zip(rewards, answers, strict=True)]
    return [question for outcome in zip(*values, strict=True) for question in outcome]


def split_outcomes(flat, answers):
    widths = [y.shape[1] for y in answers]
    return list(flat.view(len(answers[0]), sum(widths)).split(widths, dim=1))


LOGITS = {"0/1": [[0.3, -0.5], [0.2, 0.9]], "-1/+1": [[0.3, -0.5], [0.2, 0.9]], "real": [[0.3, -0.5], [0.1, 0.6, -0.8]]}


def check_against_objective(advantages, answers, chance, kind, weights):
    ours = expected_gradient(split_outcomes(advantages, answers), answers, LOGITS[kind], chance)
    exact = finite_differences(lambda x: objective(score_law(x, REWARDS[kind]), weights), LOGITS[kind])
    for mine, true in zip(ours, exact, strict=True):
        torch.testing.assert_close(mine, true, rtol=0, atol=1e-6)


@pytest.mark.parametrize("responses", [(2, 2), (2, 3)])
@pytest.mark.parametrize("baseline", ["leave_one_out", "none"])
@pytest.mark.parametrize("pairing", ["exact", "aligned"])
@pytest.mark.parametrize("kind", REWARDS)
@pytest.mark.parametrize("name", OBJECTIVES)
def test_bundles_of_questions(name, kind, pairing, baseline, responses):
    quantiles = true_quantiles(score_law(LOGITS[kind], REWARDS[kind]))
    answers, chance = worlds([softmax(x) for x in LOGITS[kind]], responses)
    weights = OBJECTIVES[name]
    estimator = riskpo(2, alpha=ALPHA, beta=BETA, region_weights=list(weights), pairing=pairing, baseline=baseline)
    batch = make_batch(outcome_batch(REWARDS[kind], answers), 2)
    advantages, _ = with_quantiles(estimator, *quantiles).estimate(batch)
    check_against_objective(advantages, answers, chance, kind, weights)


@pytest.mark.parametrize("baseline", ["leave_one_out", "none"])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_bundles_of_questions_paired_at_random(name, baseline):
    # The same permutation must meet every outcome: one call per outcome, with the same ids, seed and step.
    quantiles = true_quantiles(score_law(LOGITS["0/1"], REWARDS["0/1"]))
    answers, chance = worlds([softmax(x) for x in LOGITS["0/1"]], (2, 2))
    weights = OBJECTIVES[name]
    outcomes = outcome_batch(REWARDS["0/1"], answers)
    advantages = []
    for start in range(0, len(outcomes), 2):
        risk = {"alpha": ALPHA, "beta": BETA, "region_weights": list(weights), "baseline": baseline}
        estimator = with_quantiles(riskpo(2, pairing="permute", num_pairings=3, **risk), *quantiles)
        advantages.append(estimator.estimate(make_batch(outcomes[start : start + 2], 2))[0])
    check_against_objective(torch.cat(advantages), answers, chance, "0/1", weights)


@pytest.mark.parametrize("baseline", ["leave_one_out", "none"])
@pytest.mark.parametrize("pairing", ["exact", "aligned"])
@pytest.mark.parametrize("kind", ["0/1", "-1/+1"])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_bundles_within_one_question(name, kind, pairing, baseline):
    # The pool has two questions; a score is the sum of two responses of one of them.
    weights, rewards, logits, size = OBJECTIVES[name], REWARDS[kind], LOGITS[kind], 2

    def law(x):
        parts = [law_of_sum([softmax(row)] * size, [r] * size) for row, r in zip(x, rewards, strict=True)]
        return torch.cat([z for z, _ in parts]), torch.cat([c for _, c in parts]) / len(x)

    quantiles = true_quantiles(law(logits))
    risk = {"alpha": ALPHA, "beta": BETA, "region_weights": list(weights), "pairing": pairing, "baseline": baseline}
    ours = []
    for i in range(2):
        answers, chance = worlds([softmax(logits[i])], [4])
        batch = make_batch(torch.tensor(rewards[i], dtype=torch.float64)[answers[0]].tolist())
        batch = batch.with_columns(bundle_uid=batch["uid"])
        flat, _ = with_quantiles(riskpo(size, bundling="same_question", **risk), *quantiles).estimate(batch)
        gradient = expected_gradient(split_outcomes(flat, answers), answers, [logits[i]], chance)[0]
        ours.append(gradient * size / 2)  # B responses in a score, half of the pool
    exact = finite_differences(lambda x: objective(law(x), weights), logits)
    for mine, true in zip(ours, exact, strict=True):
        torch.testing.assert_close(mine, true, rtol=0, atol=1e-6)


def test_lone_responses_are_centred_by_other_bundles_without_bias():
    # Two bundles of one question, one response each; every outcome is a batch of its own.
    rewards, logits = REWARDS["0/1"], LOGITS["0/1"]
    probabilities = [softmax(x) for x in logits]
    answers, chance = worlds(probabilities, [1, 1])
    plain, centred = [], []
    for w in range(len(chance)):
        batch = make_batch([[rewards[i][int(answers[i][w, 0])]] for i in range(2)], 1)
        for out, baseline in ((plain, "none"), (centred, "leave_one_out")):
            estimator = with_quantiles(riskpo(1, 1, baseline=baseline, region_weights=[1, 1, 1]), 0.0, 1.0)
            out.append(estimator.estimate(batch)[0])
    plain, centred = torch.stack(plain), torch.stack(centred)
    for flat in (plain, centred):
        ours = expected_gradient(split_outcomes(flat.flatten(), answers), answers, logits, chance)
        for i in range(2):
            p = probabilities[i]
            r = torch.tensor(rewards[i], dtype=torch.float64)
            torch.testing.assert_close(ours[i], p * (r - (p * r).sum()), rtol=0, atol=1e-12)
    assert torch.equal(centred, plain - plain.flip(1))


@pytest.mark.parametrize("seed", range(3))
def test_many_answers_and_three_questions(seed):
    rng = np.random.default_rng(seed)
    rewards = [rng.choice([0.0, 0.5, 1.0, 2.5], 2).tolist() for _ in range(3)]
    logits = rng.normal(size=(3, 2)).tolist()
    quantiles = true_quantiles(score_law(logits, rewards))
    answers, chance = worlds([softmax(x) for x in logits], (2, 2, 2))
    estimator = riskpo(3, alpha=ALPHA, beta=BETA, omega=0.5)
    flat, _ = with_quantiles(estimator, *quantiles).estimate(make_batch(outcome_batch(rewards, answers), 3))
    ours = expected_gradient(split_outcomes(flat, answers), answers, logits, chance)
    exact = finite_differences(lambda x: objective(score_law(x, rewards), (1.5, 1, 0)), logits)
    for mine, true in zip(ours, exact, strict=True):
        torch.testing.assert_close(mine, true, rtol=0, atol=1e-6)
