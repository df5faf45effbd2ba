"""Batches made by hand for the tests of estimators."""

import numpy as np
import torch

from verl.protocol import DataProto, object_array
from verl.trainer.config.schema import AlgorithmConfig, RiskConfig
from verl.trainer.ppo.riskpo import RiskPO


def make_batch(rewards, bundle_size=None, lengths=None, tokens=3, step=1):
    """A batch of the rewards of each question, a list of lists; neighbours of `bundle_size` questions form bundles.

    The reward stands at the last token of a response.
    """
    uid, sample, question = [], [], []
    for q, responses in enumerate(rewards):
        uid += [f"q{q}"] * len(responses)
        sample += range(len(responses))
        question += [q] * len(responses)
    flat = [r for responses in rewards for r in responses]
    n = len(flat)
    lengths = torch.full((n,), tokens) if lengths is None else torch.as_tensor(lengths)
    mask = torch.arange(tokens) < lengths[:, None]
    token_rewards = torch.zeros(n, tokens, dtype=torch.float64)
    token_rewards[torch.arange(n), lengths - 1] = torch.tensor(flat, dtype=torch.float64)
    columns = {
        "token_level_rewards": token_rewards,
        "response_mask": mask,
        "uid": object_array(uid),
        "question_id": object_array([f"dataset-{q}" for q in question]),
        "sample_index": np.array(sample),
    }
    if bundle_size is not None:
        columns["bundle_uid"] = object_array([f"b{q // bundle_size}" for q in question])
    return DataProto.from_dict(columns, {"step": step})


def riskpo(bundle_size, rollout_n=8, seed=1, **risk):
    config = AlgorithmConfig(bundle_size=bundle_size, risk=RiskConfig(**risk))
    return RiskPO(config, rollout_n, seed)


def with_quantiles(estimator, q_alpha, q_beta):
    """The estimator with its tracker started and standing at these quantiles."""
    tracker = estimator.tracker
    with torch.no_grad():
        tracker.quantiles.copy_(torch.where(tracker.levels < estimator.risk.beta, q_alpha, q_beta))
        tracker.started.fill_(True)
    return estimator


def worlds(probabilities, num_responses):
    """Every outcome of sampling `num_responses[i]` answers to question i, whose answers have `probabilities[i]`.

    Returns the answers, a (W, responses) int64 tensor per question, and the probability of each outcome (W,).
    """
    slots = [(i, len(probabilities[i])) for i, n in enumerate(num_responses) for _ in range(n)]
    outcomes = torch.cartesian_prod(*[torch.arange(k) for _, k in slots]).view(-1, len(slots))
    chance = torch.ones(len(outcomes), dtype=torch.float64)
    for s, (i, _) in enumerate(slots):
        chance *= torch.as_tensor(probabilities[i], dtype=torch.float64)[outcomes[:, s]]
    return list(outcomes.split(list(num_responses), dim=1)), chance


def law_of_sum(probabilities, rewards):
    """Support and probabilities of the sum of one answer to each question, by enumeration."""
    answers, chance = worlds(probabilities, [1] * len(probabilities))
    total = sum(torch.as_tensor(r, dtype=torch.float64)[a[:, 0]] for r, a in zip(rewards, answers, strict=True))
    return total, chance
