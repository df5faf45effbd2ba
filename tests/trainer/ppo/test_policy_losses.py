"""Policy losses against loops written from their formulas, in value and in gradient."""

import math

import pytest
import torch

from verl.trainer.config.schema import ActorConfig, PolicyLossConfig
from verl.trainer.ppo import policy_losses
from verl.trainer.ppo.core_algos import POLICY_LOSSES, get_policy_loss
from verl.trainer.ppo.policy_losses import (
    LOSS_AGG_MODES,
    LossTotals,
    select_tokens,
    token_covariance,
    token_weights,
)

CONFIG = ActorConfig(
    clip_ratio_low=0.2, clip_ratio_high=0.28, clip_ratio_c=3.0, policy_loss=PolicyLossConfig(cov_fraction=0.25)
)
ROWS, TOKENS = 12, 6


def inputs(seed=0, spread=0.4, per_row=False):
    """Log-probs of both policies, advantages and mask; masked tokens hold large values that must not matter."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, TOKENS + 1, (ROWS, 1), generator=generator)
    mask = torch.arange(TOKENS) < lengths
    old = -torch.rand(ROWS, TOKENS, generator=generator, dtype=torch.float64) * 3
    new = old + spread * torch.randn(ROWS, TOKENS, generator=generator, dtype=torch.float64)
    advantages = torch.randn(ROWS, 1 if per_row else TOKENS, generator=generator, dtype=torch.float64)
    advantages = advantages.expand(ROWS, TOKENS) * mask
    return torch.where(mask, old, 50.0), torch.where(mask, new, -900.0).requires_grad_(), advantages, mask


def clip(x, low, high):
    return min(max(x, low), high)


def token_loop(formula, old, new, advantages, mask):
    """The formula at each response token; 0 elsewhere."""
    loss = torch.zeros(mask.shape, dtype=torch.float64)
    for i, t in mask.nonzero().tolist():
        loss[i, t] = formula(math.exp(new[i, t] - old[i, t]), float(advantages[i, t]), float(new[i, t]))
    return loss


def vanilla(ratio, a, log_prob):
    loss = -min(ratio * a, clip(ratio, 0.8, 1.28) * a)
    return min(loss, -3.0 * a) if a < 0 else loss


def cispo(ratio, a, log_prob):
    return -clip(ratio, 0.8, 1.28) * a * log_prob


def gpg(ratio, a, log_prob):
    return -a * log_prob


@pytest.mark.parametrize("formula", [vanilla, cispo, gpg])
@pytest.mark.parametrize("spread", [0.2, 1.5])
def test_token_loss_agrees_with_its_formula(formula, spread):
    old, new, advantages, mask = inputs(spread=spread)
    loss, _ = get_policy_loss(formula.__name__)(old, new, advantages, mask, CONFIG)
    expected = token_loop(formula, old, new.detach(), advantages, mask)
    torch.testing.assert_close(loss.detach() * mask, expected, rtol=0, atol=1e-10)
    assert loss.isfinite().all()


def numeric_gradient(value, new, mask, h=1e-6):
    gradient = torch.zeros_like(new)
    for i, t in mask.nonzero().tolist():
        up, down = new.clone(), new.clone()
        up[i, t] += h
        down[i, t] -= h
        gradient[i, t] = (value(up) - value(down)) / (2 * h)
    return gradient


def gspo_objective(old, new, advantages, mask, low, high):
    """Mean over sequences of -min(s A, clip(s) A), s the length-normalised sequence ratio (arXiv 2507.18071, eq. 5)."""
    total = 0.0
    for row in range(ROWS):
        m = mask[row]
        s = math.exp(float((new[row] - old[row])[m].mean()))
        a = float(advantages[row, 0])
        total += -min(s * a, clip(s, 1 - low, 1 + high) * a)
    return total / ROWS


def gmpo_objective(old, new, advantages, mask, low, high):
    """Mean over sequences of -A times the geometric mean of ratios clipped on the side that A pushes to."""
    total = 0.0
    for row in range(ROWS):
        a = float(advantages[row, 0])
        logs = (new[row] - old[row])[mask[row]].tolist()
        logs = [min(x, high) if a > 0 else max(x, -low) for x in logs]
        total += -a * math.exp(sum(logs) / len(logs))
    return total / ROWS


@pytest.mark.parametrize(
    ("name", "objective", "low", "high"),
    [("gspo", gspo_objective, 0.1, 0.15), ("gmpo", gmpo_objective, 0.4, 0.4)],
)
def test_sequence_loss_is_its_objective_and_has_its_gradient(name, objective, low, high):
    old, new, advantages, mask = inputs(spread=0.5, per_row=True)
    config = ActorConfig(clip_ratio_low=low, clip_ratio_high=high)
    loss, metrics = get_policy_loss(name)(old, new, advantages, mask, config)
    weights = token_weights(mask, "seq-mean-token-mean", LossTotals(int(mask.sum()), ROWS, TOKENS))
    total = (loss * weights).sum()
    exact = objective(old, new.detach(), advantages, mask, low, high)
    assert float(total.detach()) == pytest.approx(exact, abs=1e-7)  # the weights are float32
    total.backward()
    numeric = numeric_gradient(lambda x: objective(old, x, advantages, mask, low, high), new.detach(), mask)
    torch.testing.assert_close(new.grad, numeric, rtol=0, atol=1e-7)
    assert metrics["actor/pg_clipfrac"][mask].any() and not metrics["actor/pg_clipfrac"][mask].all()


def test_token_losses_have_the_gradient_of_their_clipped_ratio():
    old, new, advantages, mask = inputs(spread=0.5)
    for name, value in (("vanilla", vanilla), ("gpg", gpg)):
        new.grad = None
        loss, _ = get_policy_loss(name)(old, new, advantages, mask, CONFIG)
        (loss * mask).sum().backward()
        numeric = numeric_gradient(
            lambda x, value=value: float(token_loop(value, old, x, advantages, mask).sum()), new.detach(), mask
        )
        torch.testing.assert_close(new.grad, numeric, rtol=0, atol=1e-6)
        assert (new.grad[~mask] == 0).all()
    # cispo: the clipped ratio is a constant, so clipped tokens still learn.
    new.grad = None
    loss, _ = get_policy_loss("cispo")(old, new, advantages, mask, CONFIG)
    (loss * mask).sum().backward()
    ratio = torch.where(mask, new.detach() - old, 0.0).exp()
    torch.testing.assert_close(new.grad, -ratio.clamp(0.8, 1.28) * advantages * mask, rtol=0, atol=1e-10)


def test_first_ratio_of_a_step_gives_the_policy_gradient_under_every_loss():
    _, new, advantages, mask = inputs(per_row=True)
    old = new.detach().clone()
    own = {name for name, loss in POLICY_LOSSES.items() if loss.__module__ == policy_losses.__name__}
    assert len(own) >= 6  # those that another test has registered are not meant
    for name in own - {"gmpo"}:
        new.grad = None
        extra = {"selected": torch.zeros_like(mask)} if name in ("clip_cov", "kl_cov") else {}
        loss, metrics = get_policy_loss(name)(old, new, advantages, mask, CONFIG, **extra)
        (loss * mask).sum().backward()
        torch.testing.assert_close(new.grad, -advantages * mask, rtol=0, atol=1e-10)
        assert not metrics["actor/pg_clipfrac"].any() and not metrics["actor/pg_clipfrac_lower"].any()
        assert (metrics["actor/ppo_kl"] == 0).all()


def test_clip_metrics_of_the_token_loss():
    log = math.log
    ratios = torch.tensor([[log(1.5), log(0.5), log(1.5), log(0.5), log(4.0)]], dtype=torch.float64)
    advantages = torch.tensor([[1.0, 1.0, -1.0, -1.0, -1.0]], dtype=torch.float64)
    mask = torch.ones(1, 5, dtype=torch.bool)
    loss, metrics = get_policy_loss("vanilla")(torch.zeros(1, 5), ratios, advantages, mask, CONFIG)
    # Clipped above for A > 0, below for A < 0; beyond clip_ratio_c the dual clip; free on the other sides.
    assert metrics["actor/pg_clipfrac"].tolist() == [[1, 0, 0, 1, 0]]
    assert metrics["actor/pg_clipfrac_lower"].tolist() == [[0, 0, 0, 0, 1]]
    assert loss[0].tolist() == pytest.approx([-1.28, -0.5, 1.5, 0.8, 3.0])
    torch.testing.assert_close(metrics["actor/ppo_kl"], -ratios)


def test_extreme_log_ratios_stay_finite():
    old = torch.tensor([[0.0, -3000.0]])
    new = torch.tensor([[-3000.0, 0.0]], requires_grad=True)
    for name in POLICY_LOSSES:
        new.grad = None
        extra = {"selected": torch.zeros(1, 2, dtype=torch.bool)} if name in ("clip_cov", "kl_cov") else {}
        for sign in (1.0, -1.0):
            mask = torch.ones(1, 2, dtype=torch.bool)
            loss, _ = get_policy_loss(name)(old, new, sign * torch.ones(1, 2), mask, CONFIG, **extra)
            loss.sum().backward()
            assert loss.isfinite().all() and new.grad.isfinite().all()


# ------------------------------------------------------------------------------------- tokens chosen by covariance
def loop_covariance(log_prob, advantages, mask):
    positions = mask.nonzero().tolist()
    mean_log = sum(float(log_prob[i, t]) for i, t in positions) / len(positions)
    mean_a = sum(float(advantages[i, t]) for i, t in positions) / len(positions)
    return {(i, t): (float(log_prob[i, t]) - mean_log) * (float(advantages[i, t]) - mean_a) for i, t in positions}


def test_covariance_of_a_token_is_the_product_of_its_deviations():
    old, _, advantages, mask = inputs()
    ours = token_covariance(old, advantages, mask)
    for (i, t), expected in loop_covariance(old, advantages, mask).items():
        assert float(ours[i, t]) == pytest.approx(expected, abs=1e-12)


def test_kl_cov_chooses_the_largest_covariances_of_each_mini_batch():
    old, _, advantages, mask = inputs()
    mini_batch = torch.tensor([0, 1] * (ROWS // 2))
    chosen = select_tokens("kl_cov", old, advantages, mask, mini_batch, CONFIG, seed=1, step=1)
    for number in (0, 1):
        rows = mini_batch == number
        covariance = loop_covariance(old[rows], advantages[rows], mask[rows])
        count = int(0.25 * int(mask[rows].sum()))
        expected = sorted(covariance, key=covariance.get)[-count:]
        assert sorted(map(tuple, chosen[rows].nonzero().tolist())) == sorted(expected)


def test_clip_cov_chooses_at_random_from_a_band_of_covariances():
    old, _, advantages, mask = inputs()
    mini_batch = torch.zeros(ROWS, dtype=torch.int64)
    advantages = 3 * advantages
    band = {at for at, c in loop_covariance(old, advantages, mask).items() if 1 < c < 5}
    config = ActorConfig(policy_loss=PolicyLossConfig(cov_fraction=0.05))
    count = int(0.05 * int(mask.sum()))
    drawn = set()
    for step in range(30):
        chosen = select_tokens("clip_cov", old, advantages, mask, mini_batch, config, seed=1, step=step)
        again = select_tokens("clip_cov", old, advantages, mask, mini_batch, config, seed=1, step=step)
        assert torch.equal(chosen, again)
        positions = set(map(tuple, chosen.nonzero().tolist()))
        assert len(positions) == count and positions <= band
        drawn |= positions
    assert len(band) > count and drawn == band


def test_clip_cov_takes_the_gradient_from_chosen_tokens_that_are_not_clipped():
    old, new, advantages, mask = inputs(spread=0.5)
    selected = (torch.arange(TOKENS) % 2 == 0).expand(ROWS, TOKENS) & mask
    loss, metrics = get_policy_loss("clip_cov")(old, new, advantages, mask, CONFIG, selected=selected)

    def formula(ratio, a, log_prob):
        return -min(ratio * a, clip(ratio, 0.8, 1.28) * a)

    expected = token_loop(formula, old, new.detach(), advantages, mask)
    torch.testing.assert_close(loss.detach() * mask, expected, rtol=0, atol=1e-10)
    (loss * mask).sum().backward()
    numeric = numeric_gradient(lambda x: float(token_loop(formula, old, x, advantages, mask).sum()), new.detach(), mask)
    torch.testing.assert_close(new.grad, torch.where(selected, 0.0, numeric), rtol=0, atol=1e-6)
    clipped = metrics["actor/pg_clipfrac"].bool()
    assert torch.equal(metrics["actor/cov_selected"].bool(), selected & ~clipped)


def test_kl_cov_penalises_the_chosen_tokens():
    old, new, advantages, mask = inputs(spread=0.5)
    selected = (torch.arange(TOKENS) % 2 == 0).expand(ROWS, TOKENS) & mask
    loss, _ = get_policy_loss("kl_cov")(old, new, advantages, mask, CONFIG, selected=selected)
    plain = token_loop(lambda ratio, a, _: -ratio * a, old, new.detach(), advantages, mask)
    penalty = torch.where(selected, (new.detach() - old).abs(), 0.0)
    torch.testing.assert_close(loss.detach() * mask, plain + penalty, rtol=0, atol=1e-10)


def test_losses_without_a_selection_have_none():
    old, _, advantages, mask = inputs()
    assert select_tokens("vanilla", old, advantages, mask, torch.zeros(ROWS).long(), CONFIG, 1, 1) is None
    config = ActorConfig(policy_loss=PolicyLossConfig(cov_fraction=0.0))
    with pytest.raises(ValueError, match=r"cov_fraction=0\.0"):
        select_tokens("kl_cov", old, advantages, mask, torch.zeros(ROWS).long(), config, 1, 1)


# ------------------------------------------------------------------------------------------------------ aggregation
def loop_aggregate(loss, mask, mode):
    sums = [float(row[m].sum()) for row, m in zip(loss, mask, strict=True)]
    lengths = mask.sum(1).tolist()
    if mode == "token-mean":
        return sum(sums) / sum(lengths)
    if mode == "seq-mean-token-sum":
        return sum(sums) / len(sums)
    if mode == "seq-mean-token-mean":
        return sum(s / n for s, n in zip(sums, lengths, strict=True)) / len(sums)
    return sum(s / TOKENS for s in sums) / len(sums)


@pytest.mark.parametrize("mode", LOSS_AGG_MODES)
def test_aggregation_agrees_with_its_name_however_rows_are_split(mode):
    old, _, _, mask = inputs()
    totals = LossTotals(int(mask.sum()), ROWS, TOKENS)
    for parts in (1, 2, 5, ROWS):
        pieces = zip(old.chunk(parts), mask.chunk(parts), strict=True)
        total = sum(float((token_weights(m, mode, totals) * loss).sum()) for loss, m in pieces)
        assert total == pytest.approx(loop_aggregate(old, mask, mode), rel=1e-5)


def test_rows_without_tokens_weigh_nothing():
    mask = torch.tensor([[True, True], [False, False]])
    for mode in LOSS_AGG_MODES:
        weights = token_weights(mask, mode, LossTotals(2, 2, 2))
        assert weights.isfinite().all() and (weights[1] == 0).all()
    with pytest.raises(ValueError, match=r"loss_agg_mode=mean is unknown"):
        token_weights(mask, "mean", LossTotals(2, 2, 2))
