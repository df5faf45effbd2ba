"""Dynamic sampling: which rows are kept, bundles whole, and the batch filled."""

import numpy as np
import pytest
import torch

from verl.protocol import DataProto, object_array
from verl.trainer.config.schema import OverlongBufferConfig
from verl.trainer.ppo.collect import first_units, informative_rows, merge_metrics
from verl.trainer.ppo.generation import concat_prompts
from verl.trainer.ppo.reward import overlong_penalty


def batch(acc: list[list[float]], bundles: list[str] | None = None) -> DataProto:
    """Questions with the accuracies of their responses."""
    n = len(acc[0])
    columns = {
        "uid": object_array([f"q{i}" for i in range(len(acc)) for _ in range(n)]),
        "acc": np.array(acc).ravel(),
        "score": np.zeros(len(acc) * n),
        "token_level_scores": torch.arange(len(acc) * n)[:, None] * torch.tensor([[0.0, 1.0]]),
    }
    if bundles:
        columns["bundle_uid"] = object_array([b for b in bundles for _ in range(n)])
    return DataProto.from_dict(columns)


ACC = [[1, 1], [0, 1], [0, 0], [1, 0], [0, 0], [1, 1]]


def test_questions_with_equal_responses_are_dropped():
    assert informative_rows(batch(ACC), "acc").reshape(6, 2).all(1).tolist() == [False, True, False, True, False, False]
    assert not informative_rows(batch(ACC), "score").any()
    assert informative_rows(batch(ACC), "seq_reward").all()


def test_a_bundle_with_one_informative_question_is_kept_whole():
    kept = informative_rows(batch(ACC, ["a", "b", "a", "b", "c", "c"]), "acc").reshape(6, 2)
    assert kept.all(1).tolist() == kept.any(1).tolist() == [False, True, False, True, False, False]
    kept = informative_rows(batch(ACC, ["a", "a", "b", "c", "c", "b"]), "acc").reshape(6, 2)
    assert kept.all(1).tolist() == [True, True, False, True, True, False]


def test_the_batch_is_cut_at_whole_units():
    bundles = ["a", "b", "a", "b", "c", "c"]
    assert first_units(batch(ACC, bundles), 8)["uid"].tolist() == [f"q{i}" for i in (0, 1, 2, 3) for _ in range(2)]
    assert first_units(batch(ACC, bundles), 4)["uid"].tolist() == ["q0", "q0", "q2", "q2"]
    assert first_units(batch(ACC), 6)["uid"].tolist() == [f"q{i}" for i in range(3) for _ in range(2)]


def test_metrics_of_several_batches_add_counts_and_average_the_rest():
    parts = [
        {"reward/exceptions": 3.0, "reward/responses": 8.0, "a": 1.0},
        {"reward/exceptions": 4.0, "reward/responses": 8.0, "a": 2.0, "b": 5.0},
    ]
    assert merge_metrics(parts) == {"reward/exceptions": 7.0, "reward/responses": 16.0, "a": 1.5, "b": 5.0}


def test_prompts_of_different_widths_are_padded_on_the_left():
    parts = [
        DataProto.from_dict({"prompts": torch.full((1, w), w), "prompt_length": torch.tensor([w])}) for w in (2, 4)
    ]
    assert concat_prompts(parts)["prompts"].tolist() == [[0, 0, 2, 2], [4, 4, 4, 4]]


def test_the_overlong_penalty_grows_linearly_over_the_buffer():
    config = OverlongBufferConfig(enable=True, len=4, penalty_factor=0.5)
    penalty = overlong_penalty(torch.tensor([1, 6, 7, 8, 10]), 10, config)
    torch.testing.assert_close(penalty, torch.tensor([0.0, 0.0, -0.125, -0.25, -0.5]))


@pytest.mark.parametrize("metric", ["acc", "score"])
def test_row_order_does_not_matter(metric):
    data = batch(ACC, ["a", "a", "b", "c", "c", "b"])
    order = np.random.default_rng(0).permutation(12)
    assert (informative_rows(data.reorder(order), metric) == informative_rows(data, metric)[order]).all()
