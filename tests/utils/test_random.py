import numpy as np
import torch

from verl.utils.random import row_keys, uniform


def test_draws_are_uniform_and_uncorrelated():
    keys = torch.from_numpy(row_keys(1, 7, [str(i) for i in range(2000)], [0] * 2000))
    draws = torch.stack([uniform(keys, t) for t in range(50)], dim=1)  # (rows, positions)
    assert draws.min() >= 0 and draws.max() < 1
    counts = np.histogram(draws.numpy(), bins=20, range=(0, 1))[0]
    expected = draws.numel() / 20
    chi2 = ((counts - expected) ** 2 / expected).sum()
    assert chi2 < 43.8  # 99.9 % of chi-square with 19 degrees of freedom
    for other in (draws.roll(1, dims=1), draws.roll(1, dims=0)):
        correlation = np.corrcoef(draws.flatten(), other.flatten())[0, 1]
        assert abs(correlation) < 4 / np.sqrt(draws.numel())


def test_a_draw_depends_on_its_key_and_position_alone():
    keys = torch.from_numpy(row_keys(1, 7, ["a", "b", "a"], [0, 0, 1]))
    assert len(set(keys.tolist())) == 3
    alone = torch.stack([uniform(keys[i : i + 1], 3) for i in range(3)]).flatten()
    assert torch.equal(uniform(keys, 3), alone)
    assert not torch.equal(uniform(keys, 3), uniform(keys, 4))
    for other in (row_keys(2, 7, ["a"], [0]), row_keys(1, 8, ["a"], [0]), row_keys(1, 7, ["a"], [1])):
        assert other[0] != keys[0]
    assert row_keys(1, 7, ["a"], [0])[0] == keys[0]
