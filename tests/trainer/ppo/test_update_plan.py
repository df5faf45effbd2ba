"""Which worker computes which rows."""

import numpy as np
import pytest
import torch

from verl.protocol import DataProto, object_array
from verl.trainer.config.schema import PPOConfig
from verl.trainer.ppo.update_plan import UpdatePlan

N = 4  # responses to a question


def plan(questions: int, mini_batch: int, workers: int, balance: bool = True) -> tuple[UpdatePlan, np.ndarray]:
    """The plan, and the question of each row. A question's responses have lengths of their own."""
    lengths = np.random.default_rng(0).integers(1, 60, questions * N)
    question = np.arange(questions).repeat(N)
    batch = DataProto.from_dict(
        {
            "uid": object_array([f"q{q}" for q in question]),
            "prompt_length": torch.full((len(lengths),), 10),
            "response_mask": torch.arange(60) < torch.from_numpy(lengths)[:, None],
        }
    )
    config = PPOConfig()
    config.actor_rollout_ref.rollout.n = N
    config.actor_rollout_ref.actor.ppo_mini_batch_size = mini_batch
    config.trainer.balance_batch = balance
    return UpdatePlan.make(batch, config, workers), question


@pytest.mark.parametrize("questions", [6, 48])
@pytest.mark.parametrize("balance", [True, False])
def test_every_row_goes_to_one_worker(questions, balance):
    made, _ = plan(questions, questions // 2, 2, balance)
    assert sorted(np.concatenate(made.rows).tolist()) == list(range(questions * N))
    assert made.mini_batch.tolist() == [0] * (questions * N // 2) + [1] * (questions * N // 2)


def test_questions_stay_whole_where_there_are_enough_of_them():
    made, question = plan(48, 24, 2)
    assert not set(question[made.rows[0]]) & set(question[made.rows[1]])
    few, question = plan(6, 6, 2)
    assert set(question[few.rows[0]]) & set(question[few.rows[1]])


@pytest.mark.parametrize("questions", [6, 48])
def test_each_mini_batch_is_divided_evenly_by_tokens(questions):
    made, _ = plan(questions, questions // 2, 2)
    for number in range(2):
        tokens = [made.lengths[rows][made.mini_batch[rows].numpy() == number].sum() for rows in made.rows]
        assert max(tokens) / min(tokens) < 1.1


def test_without_balancing_rows_stay_in_order():
    made, _ = plan(6, 6, 2, balance=False)
    assert [rows.tolist() for rows in made.rows] == [list(range(12)), list(range(12, 24))]
