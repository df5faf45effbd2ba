import io
import itertools
import logging

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.trainer.ppo.batches import make_batch, riskpo, with_quantiles
from verl.protocol import object_array
from verl.trainer.config.schema import AlgorithmConfig, RiskConfig
from verl.trainer.ppo.core_algos import get_adv_estimator
from verl.trainer.ppo.exact_credit import exact_credit
from verl.trainer.ppo.registry import ADV_ESTIMATORS

RISK_CHOICES = st.fixed_dictionaries(
    {
        "bundling": st.sampled_from(["random", "same_question", "difficulty"]),
        "pairing": st.sampled_from(["exact", "permute", "aligned"]),
        "baseline": st.sampled_from(["leave_one_out", "none"]),
        "adv_norm": st.sampled_from(["none", "batch"]),
        "quantile_source": st.sampled_from(["tracked", "batch", "mixed"]),
        "tracker": st.sampled_from(["sgd", "ema"]),
        "update_order": st.sampled_from(["after", "before"]),
        "region_weights": st.sampled_from([None, [1, 1, 1], [0, 1, 2.5], [1, 0, 0], [0, 1, 0]]),
    }
)


@st.composite
def rewards_of_questions(draw, num_questions=6, least=3, most=5):
    values = draw(st.sampled_from([(0.0, 1.0), (-1.0, 1.0), (0.0, 0.25, 1.0)]))
    return [draw(st.lists(st.sampled_from(values), min_size=least, max_size=most)) for _ in range(num_questions)]


def batches_of_steps(rewards, same_question, steps=2, size=3):
    for step in range(1, steps + 1):
        batch = make_batch(rewards[step:] + rewards[:step], size, step=step)
        yield batch.with_columns(bundle_uid=batch["uid"]) if same_question else batch


@settings(deadline=None, max_examples=50)
@given(rewards_of_questions(), RISK_CHOICES, st.integers(0, 10**6))
def test_results_depend_on_ids_not_on_the_order_of_rows(rewards, risk, seed):
    rng = np.random.default_rng(seed)
    estimator, shuffled = riskpo(3, **risk), riskpo(3, **risk)
    for batch in batches_of_steps(rewards, risk["bundling"] == "same_question"):
        order = rng.permutation(len(batch))
        expected, metrics = estimator.estimate(batch)
        ours, moved_metrics = shuffled.estimate(batch.reorder(order))
        torch.testing.assert_close(ours, expected[order], rtol=1e-9, atol=1e-12)
        assert moved_metrics == pytest.approx(metrics, rel=1e-9, abs=1e-12)


@settings(deadline=None, max_examples=50)
@given(rewards_of_questions(), RISK_CHOICES.filter(lambda risk: risk["pairing"] != "permute"), st.randoms())
def test_results_do_not_depend_on_what_questions_and_bundles_are_called(rewards, risk, random):
    estimator, renamed = riskpo(3, **risk), riskpo(3, **risk)
    for batch in batches_of_steps(rewards, risk["bundling"] == "same_question"):
        new_names = {}
        for column in ("uid", "bundle_uid"):
            ids = sorted(set(batch[column]))
            new_names[column] = dict(zip(ids, random.sample(range(1000), len(ids)), strict=True))
        columns = {c: object_array([f"name{names[i]}" for i in batch[c]]) for c, names in new_names.items()}
        expected, _ = estimator.estimate(batch)
        ours, _ = renamed.estimate(batch.with_columns(**columns))
        torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-12)


@settings(deadline=None, max_examples=40)
@given(
    st.data(),
    RISK_CHOICES,
    st.sampled_from([(1, 1, 1), (1, 1, 4), (2, 1, 4), (3, 3, 3), (2, 2, 6), (3, 1, 3)]),
    st.booleans(),
)
def test_nothing_is_ever_nan(data, risk, shape, all_equal):
    size, least, questions = shape
    if risk["bundling"] == "same_question":
        least = max(least, size)
    rewards = data.draw(rewards_of_questions(questions, least, least + 2))
    if all_equal:
        rewards = [[1.0] * len(r) for r in rewards]
    estimator = riskpo(size, 8, **risk)
    for batch in batches_of_steps(rewards, risk["bundling"] == "same_question", steps=3, size=size):
        output = estimator(batch)
        assert output.advantages.isfinite().all() and output.returns.isfinite().all()
        assert all(np.isfinite(list(output.metrics.values())))


def test_masked_tokens_and_rows_outside_bundles_get_0():
    batch = make_batch([[0, 1, 1], [1, 0, 0], [0, 1, 0]], 2, lengths=[1, 2, 3, 3, 2, 1, 1, 2, 3])
    outside = np.array(batch["uid"] == "q2")
    batch = batch.with_columns(bundle_uid=np.where(outside, "", batch["bundle_uid"]).astype(object))
    output = riskpo(2)(batch)
    assert output.advantages.dtype == torch.float32 and output.advantages.shape == (9, 3)
    assert (output.advantages[~batch["response_mask"]] == 0).all()
    assert (output.advantages[torch.from_numpy(outside)] == 0).all()
    expected = riskpo(2)(batch.select_rows(~outside)).advantages
    assert torch.equal(output.advantages[torch.from_numpy(~outside)], expected)
    per_row = output.advantages.sum(-1) / batch["response_mask"].sum(-1)
    torch.testing.assert_close(output.advantages, per_row[:, None] * batch["response_mask"])


def random_rewards(seed, questions, responses, values=(0.0, 1.0)):
    return np.random.default_rng(seed).choice(values, (questions, responses)).tolist()


@pytest.mark.parametrize("values", [(0.0, 1.0), (-1.0, 1.0), (0.0, 0.3, 1.7)])
def test_equal_weights_exact_and_leave_one_out_are_rloo(values):
    batch = make_batch(random_rewards(0, 20, 6, values), 5)
    ours, _ = riskpo(5, region_weights=[1, 1, 1]).estimate(batch)
    rewards = batch["token_level_rewards"].sum(-1).view(20, 6)
    expected = rewards - (rewards.sum(1, keepdim=True) - rewards) / 5
    torch.testing.assert_close(ours, expected.flatten(), rtol=0, atol=1e-12)
    rloo = get_adv_estimator("rloo", AlgorithmConfig(), 6, 1)(batch)
    torch.testing.assert_close(ours[:, None] * batch["response_mask"], rloo.advantages.double(), rtol=0, atol=1e-6)


def test_many_permutations_approach_the_exact_credit():
    batch = make_batch(random_rewards(1, 6, 5), 3)
    settings = {"baseline": "leave_one_out", "omega": 1.5}
    exact, _ = with_quantiles(riskpo(3, **settings), 1.0, 2.0).estimate(batch)
    few, _ = with_quantiles(riskpo(3, pairing="permute", **settings), 1.0, 2.0).estimate(batch)
    many, _ = with_quantiles(riskpo(3, pairing="permute", num_pairings=2000, **settings), 1.0, 2.0).estimate(batch)
    assert (many - exact).abs().max() < 0.1 < (few - exact).abs().max()


def test_questions_weigh_the_same_whatever_their_number_of_responses():
    rewards = [[0.0, 1.0], [1.0, 0.0, 0.0, 1.0]]
    ours, _ = with_quantiles(riskpo(2, baseline="none"), 0.0, 1.0).estimate(make_batch(rewards, 2))
    padded = torch.tensor([[rewards[0] + [0.0, 0.0], rewards[1]]], dtype=torch.float64)
    valid = torch.tensor([[[True, True, False, False], [True] * 4]])
    credit = exact_credit(padded, 0.0, 1.0, (1.5, 1, 0), valid)[valid]
    torch.testing.assert_close(ours, credit * torch.tensor([3 / 2] * 2 + [3 / 4] * 4), rtol=0, atol=1e-12)


def test_a_short_bundle_is_measured_against_scaled_quantiles_and_kept_from_the_tracker():
    rewards = random_rewards(2, 5, 4)
    batch = make_batch(rewards, 3)  # bundles of 3 and 2 questions
    estimator = riskpo(3, baseline="none", bundle_remainder="short")
    ours, metrics = with_quantiles(estimator, 1.0, 2.0).estimate(batch)
    tensor = torch.tensor(rewards, dtype=torch.float64)
    whole = exact_credit(tensor[None, :3], 1.0, 2.0, (1.5, 1, 0))
    short = exact_credit(tensor[None, 3:], 1.0 * 2 / 3, 2.0 * 2 / 3, (1.5, 1, 0))
    torch.testing.assert_close(ours, torch.cat([whole.flatten(), short.flatten()]), rtol=0, atol=1e-12)
    _, alone = with_quantiles(riskpo(3, baseline="none"), 1.0, 2.0).estimate(make_batch(rewards[:3], 3))
    assert metrics["riskpo/bundle_score_mean"] == pytest.approx(alone["riskpo/bundle_score_mean"])


def test_batch_norm_divides_by_the_standard_deviation_of_all_advantages():
    batch = make_batch(random_rewards(3, 10, 6), 5)
    plain, _ = riskpo(5).estimate(batch)
    normed, _ = riskpo(5, adv_norm="batch").estimate(batch)
    torch.testing.assert_close(normed, plain / plain.std(correction=0), rtol=0, atol=1e-12)


# ------------------------------------------------------------------------------------------------------ the tracker
def test_the_tracker_of_step_k_changes_the_advantages_of_step_k_plus_1():
    first_low, first_high = make_batch(random_rewards(0, 10, 6), 5), make_batch([[1.0] * 5 + [0.0]] * 10, 5)
    second = make_batch(random_rewards(4, 10, 6), 5, step=2)

    def second_step(first, **risk):
        estimator = riskpo(5, **risk)
        estimator(first)
        return estimator.estimate(second)[0]

    assert not torch.equal(second_step(first_low), second_step(first_high))
    assert not torch.equal(second_step(first_low, tracker="ema"), second_step(first_high, tracker="ema"))
    batch_only = {"quantile_source": "batch"}
    assert torch.equal(second_step(first_low, **batch_only), second_step(first_high, **batch_only))


def test_quantiles_used_are_those_before_the_batch_unless_updated_first():
    steps = [make_batch(random_rewards(seed, 10, 6), 5, step=seed + 1) for seed in range(4)]
    after, before = riskpo(5), riskpo(5, update_order="before")
    for batch in steps:
        tracked = after.tracker.value(0.8) if after.tracker.started else None
        _, metrics = after.estimate(batch)
        own = metrics["riskpo/batch_quantile_beta"]
        assert metrics["riskpo/quantile_beta_used"] == (own if tracked is None else tracked)
        _, metrics = before.estimate(batch)
        assert metrics["riskpo/quantile_beta_used"] == before.tracker.value(0.8)


def test_mixed_quantiles_are_the_mean_of_tracked_and_batch():
    estimator = with_quantiles(riskpo(5, quantile_source="mixed"), 0.5, 4.5)
    _, metrics = estimator.estimate(make_batch(random_rewards(0, 10, 6), 5))
    assert metrics["riskpo/quantile_alpha_used"] == (0.5 + metrics["riskpo/batch_quantile_alpha"]) / 2
    assert metrics["riskpo/quantile_beta_used"] == (4.5 + metrics["riskpo/batch_quantile_beta"]) / 2


def test_tracker_steps_scale_with_the_range_of_rewards():
    # -1/+1 rewards are 0/1 rewards times 2 minus 1: scores, and so quantiles, must follow z -> 2 z - B throughout.
    zero_one, minus_plus = riskpo(5), riskpo(5)
    for step in range(1, 6):
        rewards = np.array(random_rewards(step, 20, 6))
        zero_one.estimate(make_batch(rewards.tolist(), 5, step=step))
        minus_plus.estimate(make_batch((2 * rewards - 1).tolist(), 5, step=step))
        torch.testing.assert_close(minus_plus.tracker.values(), 2 * zero_one.tracker.values() - 5, rtol=0, atol=1e-9)
    assert float(zero_one.tracker.score_range) == 5 and float(minus_plus.tracker.score_range) == 10


@pytest.mark.parametrize("tracker", ["sgd", "ema"])
@pytest.mark.parametrize("value", [0.0, 1.0, -1.0])
def test_a_first_batch_without_differences_neither_breaks_nor_stalls_the_tracker(tracker, value):
    estimator = riskpo(5, tracker=tracker)
    for step in (1, 2):
        output = estimator(make_batch([[value] * 4] * 10, 5, step=step))
        assert (output.advantages == 0).all()
        assert not estimator.tracker.started
    for step in range(3, 40):
        output = estimator(make_batch(random_rewards(step, 20, 6), 5, step=step))
        assert output.advantages.isfinite().all() and (output.advantages != 0).any()
    assert estimator.tracker.value(0.2) == pytest.approx(1.5, abs=0.8)
    assert estimator.tracker.value(0.8) == pytest.approx(3.5, abs=0.8)


@pytest.mark.parametrize("risk", [{}, {"tracker": "ema"}, {"bundling": "difficulty"}, {"pairing": "permute"}])
def test_a_run_resumed_from_its_state_goes_on_bit_for_bit(risk):
    ids = object_array([f"dataset-{q}" for q in range(10)])

    def step_of(estimator, step):
        names = estimator.assign_bundles(ids, ids, step)
        batch = make_batch(random_rewards(step, 10, 4), 5, step=step)
        return estimator.estimate(batch.with_columns(bundle_uid=np.repeat(names, 4)))

    estimator = riskpo(5, **risk)
    for step in range(1, 5):
        step_of(estimator, step)
    file = io.BytesIO()
    torch.save(estimator.state_dict(), file)
    state_then = estimator.state_dict()
    resumed = riskpo(5, **risk)
    resumed.load_state_dict(torch.load(io.BytesIO(file.getvalue()), weights_only=False))
    for step in range(5, 9):
        (ours, our_metrics), (theirs, metrics) = step_of(resumed, step), step_of(estimator, step)
        assert torch.equal(ours, theirs) and our_metrics == metrics
    # The state handed out earlier did not move on with the run.
    kept = torch.load(io.BytesIO(file.getvalue()), weights_only=False)
    assert str(state_then) == str(kept)


# --------------------------------------------------------------------------------------- metrics, warnings, refusals
def test_a_dead_zone_is_measured_and_warned_of_once(caplog):
    # One right response in 60: F(0) is far above beta, every advantage is 0.
    batch = make_batch([[1.0] + [0.0] * 5] + [[0.0] * 6] * 9, 5)
    estimator = riskpo(5)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            output = estimator(batch)
    assert (output.advantages == 0).all()
    assert output.metrics["riskpo/dead_zone_share"] == 1
    assert output.metrics["riskpo/all_equal_questions"] == 0.9
    assert len(caplog.records) == 1 and "region of weight 0" in caplog.text


def test_too_many_scores_fall_back_to_permutations_and_say_so_once(caplog):
    rewards = np.random.default_rng(0).random((10, 6)).tolist()
    estimator, permute = riskpo(5, num_pairings=4), riskpo(5, pairing="permute", num_pairings=4)
    with caplog.at_level(logging.WARNING):
        for step in (1, 2):
            batch = make_batch(rewards, 5, step=step)
            assert torch.equal(estimator.estimate(batch)[0], permute.estimate(batch)[0])
    assert len(caplog.records) == 1 and "num_pairings=4" in caplog.text


def test_beyond_the_cap_on_possible_scores_pairings_are_sampled(caplog, monkeypatch):
    batch = make_batch([[0, 1, 1], [1, 0, 0], [1, 1, 0]], 3)  # scores 0..3
    exact, sampled = riskpo(3).estimate(batch)[0], riskpo(3, pairing="permute").estimate(batch)[0]
    with caplog.at_level(logging.WARNING):
        monkeypatch.setattr("verl.trainer.ppo.riskpo.MAX_SUPPORT", 4)
        assert torch.equal(riskpo(3).estimate(batch)[0], exact)
        assert not caplog.records
        monkeypatch.setattr("verl.trainer.ppo.riskpo.MAX_SUPPORT", 3)
        assert torch.equal(riskpo(3).estimate(batch)[0], sampled)
    assert "more than 3 possible values" in caplog.text


def test_metrics_tell_what_was_measured():
    rewards = random_rewards(0, 20, 6)
    estimator = riskpo(5, omega=0.5)
    estimator.estimate(make_batch(random_rewards(1, 20, 6), 5))
    batch = make_batch(rewards, 5, step=2)
    advantages, metrics = estimator.estimate(batch)
    sums = [
        sum(pairing)
        for start in range(0, 20, 5)
        for pairing in itertools.product(*[rewards[q] for q in range(start, start + 5)])
    ]
    ordered = np.sort(sums)
    n = len(ordered)
    low, high = ordered[: n // 5].sum() / n, ordered[n // 5 : n * 4 // 5].sum() / n
    assert metrics["quantile_baseline/cvar"] == pytest.approx(low / 0.2, abs=2e-3)
    assert metrics["quantile_baseline/rvar"] == pytest.approx(high / 0.6, abs=2e-3)
    assert metrics["quantile_baseline/mvar"] == pytest.approx(1.5 * low + high, abs=2e-3)
    histogram = [metrics[f"riskpo/score_histogram/{k}"] for k in range(6)]
    assert histogram == pytest.approx([(ordered == k).mean() for k in range(6)])
    assert metrics["riskpo/max_abs_advantage"] == float(advantages.abs().max())
    assert {f"quantile_tracking/{level}_th_quantile" for level in ("0.05", "0.2", "0.8", "0.95")} <= metrics.keys()
    assert {"quantile_baseline/g_rvar_avg", "quantile_baseline/g_cvar_avg", "riskpo/calibration_max"} <= metrics.keys()


def test_equal_weights_weigh_every_success_rate_alike():
    _, metrics = riskpo(5, region_weights=[1, 1, 1]).estimate(make_batch(random_rewards(0, 20, 6), 5))
    weights = [v for k, v in metrics.items() if k.startswith("riskpo/credit_weight/")]
    assert len(weights) >= 3 and weights == pytest.approx([1.0] * len(weights))
    assert metrics["riskpo/credit_scale"] == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"risk": {"alpha": 0.8, "beta": 0.2}}, r"algorithm\.risk\.alpha=0\.8 must be smaller"),
        ({"risk": {"alpha": 0.5, "beta": 0.5}}, r"algorithm\.risk\.alpha=0\.5 must be smaller"),
        ({"risk": {"alpha": 0.0}}, r"algorithm\.risk\.alpha=0\.0 must lie inside"),
        ({"risk": {"beta": 1.0}}, r"algorithm\.risk\.beta=1\.0 must lie inside"),
        ({"risk": {"beta": float("nan")}}, r"algorithm\.risk\.beta=nan must lie inside"),
        ({"risk": {"omega": -0.1}}, r"algorithm\.risk\.omega=-0\.1"),
        ({"risk": {"region_weights": [1, 2]}}, r"algorithm\.risk\.region_weights=\[1\.0, 2\.0\]"),
        ({"risk": {"region_weights": [0, 0, 0]}}, "not all 0"),
        ({"risk": {"bundling": "rnadom"}}, r"algorithm\.risk\.bundling=rnadom is unknown; use one of random"),
        ({"risk": {"bundle_remainder": "keep"}}, r"algorithm\.risk\.bundle_remainder=keep"),
        ({"risk": {"pairing": "all"}}, r"algorithm\.risk\.pairing=all"),
        ({"risk": {"baseline": "mean"}}, r"algorithm\.risk\.baseline=mean"),
        ({"risk": {"adv_norm": "group"}}, r"algorithm\.risk\.adv_norm=group"),
        ({"risk": {"quantile_source": "own"}}, r"algorithm\.risk\.quantile_source=own"),
        ({"risk": {"tracker": "adam"}}, r"algorithm\.risk\.tracker=adam"),
        ({"risk": {"update_order": "never"}}, r"algorithm\.risk\.update_order=never"),
        ({"risk": {"num_pairings": 0}}, r"algorithm\.risk\.num_pairings=0"),
        ({"risk": {"num_pairings": 2, "pairing": "aligned"}}, r"algorithm\.risk\.num_pairings=2"),
        ({"risk": {"bundling": "same_question"}, "bundle_size": 9}, r"rollout\.n=8"),
        ({"bundle_size": 0}, r"algorithm\.bundle_size=0"),
        ({"lr_q": -1.0}, r"algorithm\.lr_q=-1\.0"),
        ({"lr_q_power": 0.4}, r"algorithm\.lr_q_power=0\.4"),
    ],
)
def test_meaningless_configurations_are_refused_by_key_and_value(config, message):
    config = dict(config)
    risk = RiskConfig(**config.pop("risk", {}))
    with pytest.raises(ValueError, match=message):
        get_adv_estimator("riskpo", AlgorithmConfig(risk=risk, **config), 8, 1)


def test_batches_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"bundle_size=5"):
        riskpo(5).check_num_questions(22)
    with pytest.raises(ValueError, match=r"bundle_size=5 is larger"):
        riskpo(5).check_num_questions(4)
    riskpo(5, bundling="same_question").check_num_questions(3)
    with pytest.raises(ValueError, match="row 2 sum to nan"):
        riskpo(2).estimate(make_batch([[0.0, 1.0], [float("nan"), 0.0]], 2))
    with pytest.raises(ValueError, match="largest bundle of the batch has 2"):
        riskpo(5).estimate(make_batch([[0.0, 1.0], [1.0, 0.0]], 2))
    batch = make_batch([[0.0, 1.0]] * 3)
    with pytest.raises(ValueError, match="a question has 2 responses"):
        riskpo(3, bundling="same_question").estimate(batch.with_columns(bundle_uid=batch["uid"]))


def test_it_is_registered():
    assert ADV_ESTIMATORS["riskpo"].needs_bundles
