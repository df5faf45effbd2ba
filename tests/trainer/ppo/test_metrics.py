import math
import random

import pytest
import torch

from verl.protocol import DataProto
from verl.trainer.ppo.metrics import compute_data_metrics, compute_timing_metrics


def make_batch(n=7, width=5, with_values=False):
    generator = torch.Generator().manual_seed(0)
    lengths = torch.tensor([1, 5, 3, 5, 2, 4, 5][:n])
    columns = {
        name: torch.randn(n, width, generator=generator)
        for name in ("token_level_scores", "token_level_rewards", "advantages", "returns")
    }
    if with_values:
        columns["values"] = torch.randn(n, width, generator=generator)
    mask = torch.arange(width) < lengths[:, None]
    prompt_length = torch.tensor([3, 9, 4, 9, 5, 6, 7][:n])
    return DataProto.from_dict({**columns, "response_mask": mask, "prompt_length": prompt_length})


def by_hand(batch, name, per_response):
    """mean, max and min with plain loops; padding holds noise that must not count."""
    values = []
    for row, mask in zip(batch[name].tolist(), batch["response_mask"].tolist(), strict=True):
        kept = [v for v, m in zip(row, mask, strict=True) if m]
        values += [sum(kept)] if per_response else kept
    return {"mean": sum(values) / len(values), "max": max(values), "min": min(values)}


@pytest.mark.parametrize(
    ("metric", "column", "per_response"),
    [
        ("critic/score", "token_level_scores", True),
        ("critic/rewards", "token_level_rewards", True),
        ("critic/advantages", "advantages", False),
        ("critic/returns", "returns", False),
        ("critic/values", "values", False),
    ],
)
def test_spreads_ignore_padding(metric, column, per_response):
    batch = make_batch(with_values=True)
    metrics = compute_data_metrics(batch)
    for kind, expected in by_hand(batch, column, per_response).items():
        assert metrics[f"{metric}/{kind}"] == pytest.approx(expected, abs=1e-6)


def test_lengths_clip_ratios_and_tokens():
    metrics = compute_data_metrics(make_batch(), max_prompt_length=9)
    assert [metrics[f"response_length/{k}"] for k in ("mean", "max", "min")] == [25 / 7, 5, 1]
    assert [metrics[f"prompt_length/{k}"] for k in ("mean", "max", "min")] == [43 / 7, 9, 3]
    assert metrics["response_length/clip_ratio"] == 3 / 7
    assert metrics["prompt_length/clip_ratio"] == 2 / 7
    assert metrics["perf/total_num_tokens"] == 25 + 43
    assert all(type(value) is float for value in metrics.values())


def test_explained_variance_needs_varying_returns():
    batch = make_batch(with_values=True)
    mask = batch["response_mask"]
    returns, values = batch["returns"][mask].tolist(), batch["values"][mask].tolist()

    def variance(xs):
        mean = math.fsum(xs) / len(xs)
        return math.fsum((x - mean) ** 2 for x in xs) / len(xs)

    expected = 1 - variance([r - v for r, v in zip(returns, values, strict=True)]) / variance(returns)
    assert compute_data_metrics(batch)["critic/vf_explained_var"] == pytest.approx(expected, rel=1e-6)
    flat = batch.with_columns(returns=torch.ones(7, 5))
    assert "critic/vf_explained_var" not in compute_data_metrics(flat)
    assert not any(name.startswith("critic/v") for name in compute_data_metrics(make_batch()))


def test_row_order_does_not_matter():
    batch = make_batch()
    order = list(range(7))
    random.Random(0).shuffle(order)
    assert compute_data_metrics(batch.reorder(order)) == pytest.approx(compute_data_metrics(batch))


def test_throughput_is_tokens_per_second_and_worker():
    metrics = compute_timing_metrics({"step": 4.0, "gen": 1.5}, 1000, n_workers=2)
    assert metrics == {
        "timing_s/step": 4.0,
        "timing_s/gen": 1.5,
        "perf/time_per_step": 4.0,
        "perf/throughput": 125.0,
    }
