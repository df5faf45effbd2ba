"""The published estimator against a loop written from its description."""

import io
import itertools
import logging
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.trainer.ppo.batches import make_batch
from verl.trainer.config.schema import AlgorithmConfig, RiskConfig
from verl.trainer.ppo.core_algos import (
    compute_grpo_bundle_rvar_outcome_advantage_quantile_tracking,
    get_adv_estimator,
)
from verl.trainer.ppo.risk import mvar

NAME = "grpo_bundle_RVaR_quantile_tracking"
DEFAULTS = {
    "quantile_down": 0.1,
    "quantile_up": 0.9,
    "norm_adv_by_std_in_grpo": True,
    "credit_assign_mode": "uniform",
    "use_q_track_mode": "mix",
    "use_mixing_risk_measure": False,
    "risk_seeking_upper_tail": False,
    "upper_weight": 1.5,
    "w_mix": 1.5,
    "use_mean_as_baseline": False,
    "natural_baseline_adv": True,
}


def mean(values):
    return sum(values) / len(values)


def deviation(values):
    return math.sqrt(sum((v - mean(values)) ** 2 for v in values) / (len(values) - 1))


def loop_bundle(questions, q_track, g_avgs, given, eps=1e-6):
    """Advantages of one bundle, a list of lists like `questions`, and its paper scores."""
    o = DEFAULTS | given
    papers = min(len(q) for q in questions)
    scores = [sum(q[k] for q in questions) for k in range(papers)]
    if papers == 1:
        low = high = scores[0]
        spread = 1.0
    else:
        low, high = (float(np.quantile(scores, o[name])) for name in ("quantile_down", "quantile_up"))
        spread = deviation(scores)
    if q_track is not None and o["use_q_track_mode"] == "track":
        low, high = q_track
    elif q_track is not None and o["use_q_track_mode"] == "mix":
        low, high = (low + q_track[0]) / 2, (high + q_track[1]) / 2
    advantages = [[0.0] * len(q) for q in questions]
    for k, score in enumerate(scores):
        a = max(score - low, 0) - max(score - high, 0)
        a += (low - high) if o["natural_baseline_adv"] else 0
        a -= g_avgs[0] if o["use_mean_as_baseline"] else 0
        a /= o["quantile_up"] - o["quantile_down"] + eps
        if o["use_mixing_risk_measure"]:
            c = -max(low - score, 0) - (g_avgs[1] if o["use_mean_as_baseline"] else 0)
            a = (o["w_mix"] * c / (o["quantile_down"] + eps) + a) / (o["w_mix"] + 1)
        elif o["risk_seeking_upper_tail"]:
            u = max(score - high, 0) / (1 - o["quantile_up"] + eps)
            a = (o["upper_weight"] * u + a) / (o["upper_weight"] + 1)
        if o["norm_adv_by_std_in_grpo"]:
            a /= spread + eps
        centred = [q[k] - mean(q) for q in questions]
        for i, q in enumerate(questions):
            if o["credit_assign_mode"] == "uniform":
                share = a
            elif o["credit_assign_mode"] == "score":
                share = 0.5 * a if q[k] > 0 else 1.5 * a
            elif o["credit_assign_mode"] == "std":
                own = deviation(q) if len(q) > 1 else 1.0
                share = a / ((own if own > 1e-3 else 1.0) + eps)
            elif abs(sum(centred)) <= 1e-6:
                share = a / len(questions)
            else:
                share = a * centred[i] / sum(centred)
            advantages[i][k] = share
    return advantages, scores


OPTIONS = st.fixed_dictionaries(
    {},
    optional={
        "quantile_down": st.sampled_from([0.1, 0.25]),
        "quantile_up": st.sampled_from([0.7, 0.9]),
        "norm_adv_by_std_in_grpo": st.booleans(),
        "credit_assign_mode": st.sampled_from(["uniform", "score", "std", "sum-mean"]),
        "use_q_track_mode": st.sampled_from(["track", "batch", "mix"]),
        "use_mixing_risk_measure": st.booleans(),
        "risk_seeking_upper_tail": st.booleans(),
        "upper_weight": st.sampled_from([0.5, 2.0]),
        "w_mix": st.sampled_from([0.5, 2.0]),
        "use_mean_as_baseline": st.booleans(),
        "natural_baseline_adv": st.booleans(),
    },
)
QUESTIONS = st.lists(st.lists(st.sampled_from([-1.0, 0.0, 0.5, 1.0]), min_size=1, max_size=5), min_size=1, max_size=7)


@settings(deadline=None, max_examples=150)
@given(QUESTIONS, OPTIONS, st.one_of(st.none(), st.just((0.3, 1.6))), st.randoms())
def test_agrees_with_its_description(questions, options, q_track, random):
    size = 3
    batch = make_batch(questions, size)
    expected, scores = [], {}
    for start in range(0, len(questions), size):
        advantages, papers = loop_bundle(questions[start : start + size], q_track, (0.2, -0.1), options)
        expected += [a for responses in advantages for a in responses]
        scores[f"b{start // size}"] = papers
    order = list(range(len(batch)))
    random.shuffle(order)
    shuffled = batch.reorder(order)
    tracked = {} if q_track is None else {"q_track_down": q_track[0], "q_track_up": q_track[1]}
    ours, returns, our_scores = compute_grpo_bundle_rvar_outcome_advantage_quantile_tracking(
        shuffled["token_level_rewards"],
        shuffled["response_mask"],
        shuffled["uid"],
        shuffled["bundle_uid"],
        g_rvar_avg=0.2,
        g_cvar_avg=-0.1,
        config=options,
        sample_index=shuffled["sample_index"],
        **tracked,
    )
    expected = torch.tensor(expected, dtype=torch.float64)[order, None] * shuffled["response_mask"]
    torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-9)
    assert torch.equal(ours, returns)
    assert our_scores.keys() == scores.keys()
    for bundle, papers in scores.items():
        assert our_scores[bundle].tolist() == pytest.approx(papers)


def test_keywords_hold_where_the_configuration_is_silent():
    batch = make_batch([[0.0, 1.0, 1.0], [1.0, 0.0, 1.0]], 2)
    arguments = batch["token_level_rewards"].float(), batch["response_mask"], batch["uid"], batch["bundle_uid"]
    function = compute_grpo_bundle_rvar_outcome_advantage_quantile_tracking
    by_keyword = function(*arguments, quantile_down=0.3, quantile_up=0.6, norm_adv_by_std_in_grpo=False)[0]
    by_config = function(
        *arguments,
        quantile_down=0.2,
        config={"quantile_down": 0.3, "quantile_up": 0.6, "norm_adv_by_std_in_grpo": False},
    )[0]
    by_object = function(
        *arguments, config=AlgorithmConfig(quantile_down=0.3, quantile_up=0.6, norm_adv_by_std_in_grpo=False)
    )[0]
    assert torch.equal(by_keyword, by_config) and torch.equal(by_keyword, by_object)
    assert by_keyword.dtype == torch.float32


def test_without_sample_index_papers_follow_the_rows():
    batch = make_batch([[0.0, 1.0], [0.0, 1.0]], 2)
    arguments = batch["token_level_rewards"], batch["response_mask"], batch["uid"], batch["bundle_uid"]
    function = compute_grpo_bundle_rvar_outcome_advantage_quantile_tracking
    assert function(*arguments)[2]["b0"].tolist() == [0.0, 2.0]
    swapped = batch.reorder([1, 0, 2, 3])
    arguments = swapped["token_level_rewards"], swapped["response_mask"], swapped["uid"], swapped["bundle_uid"]
    assert function(*arguments)[2]["b0"].tolist() == [1.0, 1.0]


@pytest.mark.parametrize("options", [{}, {"use_mixing_risk_measure": True, "natural_baseline_adv": False}])
@pytest.mark.parametrize("groups", [[[1.0]], [[1.0], [0.0]], [[1.0, 1.0], [1.0, 1.0, 1.0]], [[0.0] * 3] * 5])
@pytest.mark.parametrize("mode", ["uniform", "score", "std", "sum-mean"])
def test_nothing_is_nan(groups, options, mode):
    config = AlgorithmConfig(bundle_size=2, credit_assign_mode=mode, **options)
    estimator = get_adv_estimator(NAME, config, 3, 1)
    for step in (1, 2):
        output = estimator(make_batch(groups, 2, step=step))
        assert output.advantages.isfinite().all()
        assert all(np.isfinite(list(output.metrics.values())))


def random_batch(seed, questions=10, responses=6, step=1):
    rewards = np.random.default_rng(seed).choice([0.0, 1.0], (questions, responses)).tolist()
    return make_batch(rewards, 5, step=step)


def paper_scores(batch):
    """Scores of the papers of the 2 bundles of 5 questions with 6 responses."""
    return batch["token_level_rewards"].sum(-1).view(2, 5, 6).sum(1).flatten()


def estimator_of(**options):
    return get_adv_estimator(NAME, AlgorithmConfig(**options), 6, 1)


def test_the_tracked_quantiles_reach_the_next_step_where_asked():
    def second_step(first_seed, **options):
        estimator = estimator_of(**options)
        estimator(random_batch(first_seed))
        return estimator(random_batch(5, step=2)).advantages

    assert not torch.equal(second_step(0), second_step(1))
    assert not torch.equal(second_step(0, use_q_track_mode="track"), second_step(1, use_q_track_mode="track"))
    assert torch.equal(second_step(0, use_q_track_mode="batch"), second_step(1, use_q_track_mode="batch"))
    assert torch.equal(second_step(0, quantile_tracking=False), second_step(0, use_q_track_mode="batch"))


def test_tracker_steps_are_absolute_and_follow_the_pooled_paper_scores():
    estimator = estimator_of(lr_q=0.1, quantile_down=0.2, quantile_up=0.8)
    first, second = random_batch(0), random_batch(1, step=2)
    estimator(first)
    level, papers = 0.2, paper_scores(first)
    start = min(x for x in papers.tolist() if (papers <= x).double().mean() >= level)
    assert estimator.tracker.value(level) == start
    estimator(second)
    raw = dict(zip(estimator.tracker.levels.tolist(), estimator.tracker.quantiles.tolist(), strict=True))
    below = float((paper_scores(second) < start).double().mean())
    assert raw[level] == pytest.approx(start + 0.1 * (level - below))


@pytest.mark.parametrize("natural", [True, False])
def test_mean_baselines_are_trapezoids_over_the_tracked_levels(natural):
    estimator = estimator_of(natural_baseline_base=natural, quantile_down=0.2, quantile_up=0.9)
    estimator(random_batch(0))
    levels, q = estimator.tracker.levels.tolist(), estimator.tracker.values().tolist()
    low, high = estimator.tracker.value(0.2), estimator.tracker.value(0.9)
    rvar = [max(x - low, 0) - max(x - high, 0) + (low - high if natural else 0) for x in q]
    cvar = [-max(low - x, 0) for x in q]
    metrics = estimator(random_batch(1, step=2)).metrics
    for name, g in (("g_rvar_avg", rvar), ("g_cvar_avg", cvar)):
        pairs = itertools.pairwise(zip(levels, g, strict=True))
        expected = sum((b - a) * (x + y) / 2 for (a, x), (b, y) in pairs)
        assert metrics[f"quantile_baseline/{name}"] == pytest.approx(expected)


def test_mixing_weight_corresponds_to_omega():
    # At levels 0.2 and 0.8 the scripts' w_mix of 1.5 is omega = 3.5, the paper's omega of 0.5 is w_mix 0.5.
    batch = random_batch(0)
    scores = paper_scores(batch)
    for w_mix, omega in ((1.5, 3.5), (0.5, 0.5)):
        options = {"quantile_down": 0.2, "quantile_up": 0.8, "use_mixing_risk_measure": True, "w_mix": w_mix}
        metrics = estimator_of(**options)(batch).metrics
        assert metrics["quantile_baseline/mvar"] == pytest.approx(float(mvar(scores, 0.2, 0.8, omega)))


def test_state_continues_bit_for_bit():
    estimator = estimator_of()
    for step in (1, 2, 3):
        estimator(random_batch(step, step=step))
    file = io.BytesIO()
    torch.save(estimator.state_dict(), file)
    resumed = estimator_of()
    resumed.load_state_dict(torch.load(io.BytesIO(file.getvalue()), weights_only=False))
    for step in (4, 5):
        batch = random_batch(step, step=step)
        ours, theirs = resumed(batch), estimator(batch)
        assert torch.equal(ours.advantages, theirs.advantages) and ours.metrics == theirs.metrics


def test_left_over_questions_form_a_short_bundle_by_default():
    uid = np.arange(12)
    names = estimator_of().assign_bundles(uid, uid, 1)
    assert sorted(np.unique(names, return_counts=True)[1]) == [2, 5, 5]
    with pytest.raises(ValueError, match="use 10 or 15"):
        strict = AlgorithmConfig(risk=RiskConfig(bundle_remainder="error"))
        get_adv_estimator(NAME, strict, 6, 1).check_num_questions(12)


def test_sum_mean_credit_with_pooled_quantiles_is_warned_of(caplog):
    with caplog.at_level(logging.WARNING):
        estimator_of(credit_assign_mode="sum-mean", use_q_track_mode="batch")
        assert not caplog.records
        estimator_of(credit_assign_mode="sum-mean")
    assert "negative weight" in caplog.text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"credit_assign_mode": "mean"}, r"algorithm\.credit_assign_mode=mean is unknown; use one of uniform"),
        ({"use_q_track_mode": "own"}, r"algorithm\.use_q_track_mode=own"),
        ({"quantile_down": 0.9, "quantile_up": 0.1}, r"algorithm\.quantile_down=0\.9"),
        ({"quantile_up": 1.0}, r"algorithm\.quantile_up=1\.0"),
        ({"bundle_size": 0}, r"algorithm\.bundle_size=0"),
    ],
)
def test_meaningless_settings_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        estimator_of(**options)
    if "bundle_size" not in options:
        batch = random_batch(0)
        with pytest.raises(ValueError, match=message):
            compute_grpo_bundle_rvar_outcome_advantage_quantile_tracking(
                batch["token_level_rewards"],
                batch["response_mask"],
                batch["uid"],
                batch["bundle_uid"],
                config=replace(AlgorithmConfig(), **options),
            )
