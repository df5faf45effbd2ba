"""How much variance exact pairing and leave-one-out remove: by enumeration, and sampled at B = 5, G = 10."""

import numpy as np
import pytest
import torch

from tests.trainer.ppo.batches import law_of_sum, make_batch, riskpo, with_quantiles, worlds
from verl.trainer.ppo.bundles import BundleLayout
from verl.trainer.ppo.pairing import ExactPairing, SampledPairing, ScoreAdvantage
from verl.trainer.ppo.risk import quantile

# Summed over questions, of mean_j (r_ij - p_i) a_i(j); p = (.2, .45, .7), B = G = 3, weights (2.5, 1, 0), q = (1, 2).
ENUMERATED = {
    ("aligned", "none"): 0.39954,
    ("exact", "none"): 0.29914,
    ("aligned", "leave_one_out"): 0.38556,
    ("exact", "leave_one_out"): 0.16622,
}


@pytest.mark.parametrize(("pairing", "baseline"), ENUMERATED)
def test_enumerated_variance(pairing, baseline):
    p = torch.tensor([0.2, 0.45, 0.7], dtype=torch.float64)
    answers, chance = worlds([[1 - x, x] for x in p.tolist()], (3, 3, 3))
    rewards = torch.stack(answers, 1).double()  # (W, 3, 3)
    estimator = with_quantiles(riskpo(3, omega=1.5, pairing=pairing, baseline=baseline), 1.0, 2.0)
    advantages, _ = estimator.estimate(make_batch(rewards.flatten(0, 1).tolist(), 3))
    g = ((rewards - p[:, None]) * advantages.view(rewards.shape)).mean(-1)  # (W, 3)
    mean = (chance[:, None] * g).sum(0)
    variance = (chance[:, None] * (g - mean) ** 2).sum()
    assert float(variance) == pytest.approx(ENUMERATED[pairing, baseline], abs=1e-5)


def test_sampled_variance_at_the_size_of_the_paper():
    bundles, size, responses = 12_000, 5, 10
    p = torch.linspace(0.1, 0.7, size, dtype=torch.float64)
    support, chance = law_of_sum([[1 - x, x] for x in p.tolist()], [[0.0, 1.0]] * size)
    q_alpha, q_beta = quantile(support, (0.2, 0.8), chance).tolist()
    advantage = ScoreAdvantage(q_alpha, q_beta, (2.5, 1.0, 0.0))
    shape = (bundles, size, responses)
    rewards = (torch.rand(shape, generator=torch.Generator().manual_seed(0)) < p[:, None]).double()
    layout = BundleLayout(torch.arange(rewards.numel()).view(shape))
    flat = rewards.flatten()

    def gradients(pairing):
        credit, baseline = pairing.credit(advantage)
        return [((rewards - p[:, None]) * a.view(shape)).mean(-1) for a in (credit, credit - baseline)]

    permuted = SampledPairing(layout, flat, size, 1, np.random.default_rng(0))
    paper, paper_centred = gradients(permuted)
    _, exact_centred = gradients(ExactPairing.build(layout, flat, size, 512))
    for other in (paper, paper_centred):
        difference = other - exact_centred
        error = difference.std(0) / bundles**0.5
        assert (difference.mean(0).abs() < 5 * error).all()
    variance = [float(g.var(0).sum()) for g in (paper, paper_centred, exact_centred)]
    assert variance[0] >= 7 * variance[2]
    assert variance[1] >= 4.2 * variance[2]
    assert variance == pytest.approx([0.221, 0.119, 0.025], rel=0.1)
