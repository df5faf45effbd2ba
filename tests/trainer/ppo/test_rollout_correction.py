import itertools
import math
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from verl.trainer.ppo.rollout_correction import check_rollout_correction, rollout_correction

NO_CAP = 1e6
IS_METRICS = (
    "rollout_is_mean",
    "rollout_is_std",
    "rollout_is_min",
    "rollout_is_max",
    "rollout_is_ratio_fraction_high",
    "rollout_is_eff_sample_size",
)
ALWAYS = ("kl", "k3_kl", "chi2_seq")


@dataclass
class Config:
    rollout_is: str | None = None
    rollout_is_threshold: float = 2.0
    rollout_rs: str | None = None
    rollout_rs_threshold: float | None = None
    bypass_mode: bool = False


def correction(log_ratio, config, mask=None):
    """The correction of responses with these log-ratios, (N, T); an engine's log-prob of 0 keeps them exact."""
    log_ratio = torch.as_tensor(log_ratio, dtype=torch.float64)
    mask = torch.ones_like(log_ratio, dtype=torch.bool) if mask is None else mask
    return rollout_correction(log_ratio, torch.zeros_like(log_ratio), mask, config)


def random_batch(rows=6, tokens=5, spread=0.6, seed=0):
    """Log-probs of both engines (float64), and a mask with one response of each length."""
    generator = torch.Generator().manual_seed(seed)
    rollout = -3 * torch.rand(rows, tokens, generator=generator, dtype=torch.float64)
    old = rollout + spread * torch.randn(rows, tokens, generator=generator, dtype=torch.float64)
    lengths = torch.arange(rows) % tokens + 1
    return old, rollout, torch.arange(tokens) < lengths[:, None]


# ------------------------------------------------------------------------------------------------------- weights
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_weights_and_metrics_agree_with_loops(level):
    old, rollout, mask = random_batch()
    cap = 1.3
    got = rollout_correction(old, rollout, mask, Config(rollout_is=level, rollout_is_threshold=cap))

    expected = torch.zeros(old.shape)
    tokens, products, every = [], [], []  # (log rollout, log old) of each token; rho(y); the ratios that are weights
    for row in range(old.shape[0]):
        places = [t for t in range(old.shape[1]) if mask[row, t]]
        ratios = [math.exp(float(old[row, t])) / math.exp(float(rollout[row, t])) for t in places]
        product = math.prod(ratios)
        products.append(product)
        every += ratios if level == "token" else [product]
        tokens += [(float(rollout[row, t]), float(old[row, t])) for t in places]
        for t, ratio in zip(places, ratios, strict=True):
            expected[row, t] = min(ratio if level == "token" else product, cap)

    assert got.weights.dtype == torch.float32 and got.keep.all()
    torch.testing.assert_close(got.weights, expected, rtol=1e-6, atol=0)
    mean = sum(every) / len(every)
    capped = [min(ratio, cap) for ratio in every]
    metrics = {
        "rollout_is_mean": mean,
        "rollout_is_std": math.sqrt(sum((ratio - mean) ** 2 for ratio in every) / len(every)),
        "rollout_is_min": min(every),
        "rollout_is_max": max(every),
        "rollout_is_ratio_fraction_high": sum(ratio > cap for ratio in every) / len(every),
        "rollout_is_eff_sample_size": sum(capped) ** 2 / (len(every) * sum(w * w for w in capped)),
        "kl": sum(a - b for a, b in tokens) / len(tokens),
        "k3_kl": sum(math.exp(b - a) - 1 - (b - a) for a, b in tokens) / len(tokens),
        "chi2_seq": sum(product**2 for product in products) / len(products) - 1,
    }
    assert 0 < metrics["rollout_is_ratio_fraction_high"] < 1
    assert got.metrics == pytest.approx({f"rollout_corr/{name}": value for name, value in metrics.items()}, rel=1e-9)


def test_equal_log_probs_give_weights_of_one_and_nothing_in_the_padding():
    _, rollout, mask = random_batch()
    for level in ("token", "sequence"):
        got = rollout_correction(rollout, rollout, mask, Config(level, rollout_rs="geometric", rollout_rs_threshold=1))
        assert torch.equal(got.weights, mask.float())
        assert got.keep.all()
        assert got.metrics["rollout_corr/rollout_is_eff_sample_size"] == 1
        assert got.metrics["rollout_corr/rollout_is_std"] == got.metrics["rollout_corr/kl"] == 0


def test_without_an_option_there_are_no_weights_and_only_the_divergences():
    got = rollout_correction(*random_batch(), Config())
    assert got.weights is None and got.keep.all()
    assert got.metrics.keys() == {f"rollout_corr/{name}" for name in ALWAYS}


def test_no_gradient_flows_through_the_weights():
    old, rollout, mask = random_batch()
    assert not rollout_correction(old.requires_grad_(), rollout, mask, Config("token")).weights.requires_grad


@given(
    st.lists(
        st.lists(st.sampled_from([0.0, 1e4, -1e4, 1e4 - 1, 30.0, -30.0, 1e-7]), min_size=4, max_size=4),
        min_size=1,
        max_size=4,
    ),
    st.sampled_from([1.0, 2.0, 1e30]),
    st.sampled_from([torch.float32, torch.float64]),
)
@settings(max_examples=60, deadline=None)
def test_nothing_overflows(log_ratio, cap, dtype):
    log_ratio = torch.tensor(log_ratio, dtype=dtype)
    mask = torch.ones_like(log_ratio)  # a mask of numbers will do
    for level in ("token", "sequence"):
        config = Config(level, cap, "geometric", 2.0)
        got = rollout_correction(log_ratio, torch.zeros_like(log_ratio), mask, config)
        assert got.weights.isfinite().all()
        assert got.weights.min() >= 0 and got.weights.max() <= torch.tensor(cap)
        assert all(math.isfinite(value) for value in got.metrics.values())
        assert 0 < got.metrics["rollout_corr/rollout_is_eff_sample_size"] <= 1 + 1e-12


# ------------------------------------------------------------------------------------------------- what is estimated
def two_token_policy(seed):
    """Logits (requiring grad) of a policy on two tokens: of the first, and of the second after either; (3, 2)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(3, 2, generator=generator, dtype=torch.float64).requires_grad_()


def log_probs(logits, responses):
    """(N, T) of responses of one or two tokens."""
    logs = logits.log_softmax(-1)
    return torch.stack([torch.stack([logs[0 if t == 0 else 1 + y[0], y[t]] for t in range(len(y))]) for y in responses])


@pytest.mark.parametrize(("length", "level"), [(1, "token"), (1, "sequence"), (2, "sequence")])
def test_weights_below_the_cap_are_unbiased(length, level):
    responses = list(itertools.product((0, 1), repeat=length))
    old, rollout = (log_probs(two_token_policy(seed), responses).detach() for seed in (1, 2))
    f = torch.tensor([0.3, -1.0, 2.0, 0.7][: len(responses)], dtype=torch.float64)
    weights = rollout_correction(old, rollout, torch.ones(old.shape), Config(level, NO_CAP)).weights[:, 0].double()
    ours = (rollout.sum(-1).exp() * weights * f).sum()
    torch.testing.assert_close(ours, (old.sum(-1).exp() * f).sum(), rtol=0, atol=1e-6)


def test_the_gradient_is_unbiased_under_sequence_weights_and_biased_under_token_weights():
    responses = list(itertools.product((0, 1), repeat=2))
    f = torch.tensor([0.3, -1.0, 2.0, 0.7], dtype=torch.float64)
    logits = two_token_policy(1)
    rollout = log_probs(two_token_policy(2), responses).detach()
    old = log_probs(logits, responses)
    (exact,) = torch.autograd.grad((old.sum(-1).exp() * f).sum(), logits, retain_graph=True)
    bias = {}
    for level in (None, "token", "sequence"):
        weights = 1.0
        if level is not None:
            weights = rollout_correction(old, rollout, torch.ones(4, 2), Config(level, NO_CAP)).weights.double()
        loss = (rollout.sum(-1).exp() * (weights * old).sum(-1) * f).sum()
        (gradient,) = torch.autograd.grad(loss, logits, retain_graph=True)
        bias[level] = float((gradient - exact).norm())
    assert bias["sequence"] < 1e-6
    assert bias["token"] > 1e-2 and bias[None] > 1e-2


def test_truncation_loses_exactly_what_lies_above_the_cap():
    responses = list(itertools.product((0, 1), repeat=2))
    old, rollout = (log_probs(two_token_policy(seed), responses).detach().sum(-1).exp() for seed in (1, 2))
    cap = 1.1
    lost = sum(max(float(p - cap * q), 0.0) for p, q in zip(old, rollout, strict=True))
    assert 0 < lost < 1
    got = rollout_correction(old.log()[:, None], rollout.log()[:, None], torch.ones(4, 1), Config("sequence", cap))
    assert float((rollout * got.weights[:, 0].double()).sum()) == pytest.approx(1 - lost, abs=1e-6)


@pytest.mark.parametrize("estimator", ["kl", "k3_kl"])
def test_the_divergence_estimates_are_unbiased(estimator):
    old, rollout = (log_probs(two_token_policy(seed), [(0,), (1,)]).detach() for seed in (1, 2))
    exact = float((rollout.exp() * (rollout - old)).sum())
    ours = sum(
        float(rollout[y].exp())
        * rollout_correction(old[y : y + 1], rollout[y : y + 1], torch.ones(1, 1), Config()).metrics[
            f"rollout_corr/{estimator}"
        ]
        for y in range(2)
    )
    assert ours == pytest.approx(exact, abs=1e-12)


def test_effective_sample_size_of_sequence_weights_falls_exponentially_with_length():
    """Independent normal log-ratios with divergence kl per token: the share is exp(-2 kl |y|) for whole responses."""
    kl, rows = 0.01, 40_000
    generator = torch.Generator().manual_seed(0)
    for length in (10, 40):
        noise = torch.randn(rows, length, generator=generator, dtype=torch.float64)
        log_ratio = -kl + math.sqrt(2 * kl) * noise
        for level, tokens in (("token", 1), ("sequence", length)):
            metrics = correction(log_ratio, Config(level, NO_CAP)).metrics
            share = math.exp(-2 * kl * tokens)
            assert metrics["rollout_corr/rollout_is_eff_sample_size"] == pytest.approx(share, rel=0.05)
            assert metrics["rollout_corr/rollout_is_mean"] == pytest.approx(1, abs=0.03)
        assert metrics["rollout_corr/kl"] == pytest.approx(kl, rel=0.05)
        assert metrics["rollout_corr/k3_kl"] == pytest.approx(kl, rel=0.05)
        assert metrics["rollout_corr/chi2_seq"] == pytest.approx(math.expm1(2 * kl * length), rel=0.15)


# ----------------------------------------------------------------------------------------------------- rejection
def test_a_ratio_on_the_bound_is_kept_and_one_beyond_is_rejected():
    ratios = torch.tensor([2.0, 2.0 * (1 + 1e-9), 0.5, 0.5 * (1 - 1e-9), 1.0], dtype=torch.float64)
    config = Config(rollout_rs="sequence", rollout_rs_threshold=2.0)
    halves = (ratios.log() / 2)[:, None].expand(-1, 2)
    got = correction(halves, config)
    assert got.keep.tolist() == [True, False, True, False, True]
    assert got.metrics["rollout_corr/rollout_rs_seq_masked_fraction"] == pytest.approx(0.4)
    assert got.weights is None
    # The geometric mean of the two tokens is the square root of their product.
    assert correction(halves, replace(config, rollout_rs="geometric")).keep.all()
    assert correction(2 * halves, replace(config, rollout_rs="geometric")).keep.tolist() == got.keep.tolist()


def test_the_geometric_mean_is_over_the_tokens_of_the_response():
    log_ratio = torch.tensor([[0.3, 0.1, 9.0], [0.3, 0.1, 0.5]], dtype=torch.float64)
    mask = torch.tensor([[True, True, False], [True, True, True]])
    config = Config(rollout_rs="geometric", rollout_rs_threshold=math.exp(0.25))  # means 0.2 and 0.3
    assert correction(log_ratio, config, mask).keep.tolist() == [True, False]


def test_a_batch_may_be_rejected_whole_and_keeps_its_weights():
    got = correction(torch.full((3, 2), 5.0), Config("token", 2.0, "sequence", 2.0))
    assert not got.keep.any()
    assert got.metrics["rollout_corr/rollout_rs_seq_masked_fraction"] == 1.0
    assert torch.equal(got.weights, torch.full((3, 2), 2.0))


def test_ratios_beyond_the_limit_of_the_weights_are_still_told_apart_by_rejection():
    config = Config("sequence", NO_CAP, "sequence", 1e12)
    got = correction([[25.0], [30.0]], config)  # e^25 = 7e10, e^30 = 1e13
    assert got.keep.tolist() == [True, False]


# ----------------------------------------------------------------------------------------------------- bad input
@pytest.mark.parametrize("value", [math.nan, -math.inf])
@pytest.mark.parametrize("which", ["old_log_probs", "rollout_log_probs"])
def test_a_log_prob_that_is_not_finite_is_refused_by_its_row(which, value):
    old, rollout, mask = random_batch()
    (old if which == "old_log_probs" else rollout)[3, 1] = value
    with pytest.raises(ValueError, match=rf"row 3: {which} is (nan|-inf) at response token 1"):
        rollout_correction(old, rollout, mask, Config())


def test_what_stands_in_the_padding_does_not_matter():
    old, rollout, mask = random_batch()
    config = Config("sequence", 1.5, "geometric", 1.2)
    clean = rollout_correction(old, rollout, mask, config)
    dirty = rollout_correction(
        old.masked_fill(~mask, math.nan), rollout.masked_fill(~mask, -math.inf), mask.long(), config
    )
    assert torch.equal(clean.weights, dirty.weights) and torch.equal(clean.keep, dirty.keep)
    assert clean.metrics == dirty.metrics


def sampling(top_p=1.0, top_k=-1, calculate_log_probs=True):
    return SimpleNamespace(top_p=top_p, top_k=top_k, calculate_log_probs=calculate_log_probs)


@pytest.mark.parametrize(
    "config",
    [
        Config(),
        Config("token"),
        Config("sequence", 1.0),
        Config("token", 5.0, "geometric", 1.001),
        Config(bypass_mode=True),
    ],
)
def test_meaningful_configurations_pass(config):
    check_rollout_correction(config, sampling())


def test_without_correction_sampling_is_free():
    check_rollout_correction(Config(), sampling(0.9, 20, False))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (Config("response"), r"rollout_is=response is unknown; use one of token, sequence"),
        (Config("token", 0.5), r"rollout_is_threshold=0.5 must be finite and at least 1"),
        (Config("token", -1.0), r"rollout_is_threshold=-1.0 must be"),
        (Config("token", math.inf), r"rollout_is_threshold=inf must be"),
        (Config("token", math.nan), r"rollout_is_threshold=nan must be"),
        (Config(None, 3.0), r"rollout_is_threshold=3.0 has no effect without algorithm.rollout_correction.rollout_is"),
        (Config(rollout_rs="token", rollout_rs_threshold=2.0), r"rollout_rs=token is unknown"),
        (Config(rollout_rs="sequence"), r"rollout_rs=sequence needs algorithm.rollout_correction.rollout_rs_threshold"),
        (Config(rollout_rs="sequence", rollout_rs_threshold=0.9), r"rollout_rs_threshold=0.9 must be"),
        (Config(rollout_rs="sequence", rollout_rs_threshold=math.nan), r"rollout_rs_threshold=nan must be"),
        (Config(rollout_rs_threshold=2.0), r"rollout_rs_threshold=2.0 has no effect without"),
        (Config("token", bypass_mode=True), r"rollout_is=token has no effect with .*bypass_mode=True"),
        (Config(None, 2.0, "geometric", 2.0, True), r"rollout_rs=geometric has no effect with .*bypass_mode"),
    ],
)
def test_options_without_meaning_or_effect_are_refused(config, message):
    with pytest.raises(ValueError, match=f"^algorithm.rollout_correction.{message}") as error:
        check_rollout_correction(config, sampling())
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("config", "option"),
    [
        (Config("token"), "rollout_is=token"),
        (Config(rollout_rs="geometric", rollout_rs_threshold=1.01), "rollout_rs=geometric"),
        (Config(bypass_mode=True), "bypass_mode=True"),
    ],
)
@pytest.mark.parametrize(
    ("rollout", "remedy"),
    [
        ({"top_p": 0.9}, r"top_p=0.9 .*: set actor_rollout_ref.rollout.top_p=1$"),
        ({"top_k": 20}, r"top_k=20 .*: set actor_rollout_ref.rollout.top_k=-1$"),
        ({"calculate_log_probs": False}, r"set actor_rollout_ref.rollout.calculate_log_probs=True$"),
    ],
)
def test_log_probs_that_cannot_be_compared_are_refused(config, option, rollout, remedy):
    with pytest.raises(ValueError, match=rf"^algorithm.rollout_correction.{option} .*{remedy}"):
        check_rollout_correction(config, sampling(**rollout))


def test_every_metric_is_described_in_the_docs():
    text = (Path(__file__).parents[3] / "docs" / "algorithm.md").read_text()
    config = Config("token", 2.0, "geometric", 1.1)
    names = rollout_correction(*random_batch(), config).metrics.keys()
    assert names == {f"rollout_corr/{name}" for name in (*ALWAYS, *IS_METRICS, "rollout_rs_seq_masked_fraction")}
    assert [name for name in names if f"`{name}`" not in text] == []
