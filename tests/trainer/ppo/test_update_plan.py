"""Which worker computes which rows."""

import numpy as np
import pytest
import torch
from transformers import Qwen2Config

from verl.protocol import DataProto, object_array
from verl.trainer.config.schema import PPOConfig
from verl.trainer.ppo.update_plan import UpdatePlan
from verl.utils.flops import matrix_parameters

N = 4  # responses to a question
P, T = 10, 60  # tokens of a prompt, and of the longest response
# Attention over the pairs of a long sequence takes as much as everything else.
MODEL = Qwen2Config(
    vocab_size=100,
    hidden_size=16,
    intermediate_size=16,
    num_hidden_layers=8,
    num_attention_heads=4,
    num_key_value_heads=4,
)


def plan(
    questions: int, mini_batch: int, workers: int, balance: bool = True, packed: bool = True
) -> tuple[UpdatePlan, np.ndarray]:
    """The plan, and the question of each row. A question's responses have lengths of their own."""
    lengths = np.random.default_rng(0).integers(1, T, questions * N)
    question = np.arange(questions).repeat(N)
    batch = DataProto.from_dict(
        {
            "uid": object_array([f"q{q}" for q in question]),
            "prompt_length": torch.full((len(lengths),), P),
            "response_mask": torch.arange(T) < torch.from_numpy(lengths)[:, None],
        }
    )
    config = PPOConfig()
    config.actor_rollout_ref.rollout.n = N
    config.actor_rollout_ref.actor.ppo_mini_batch_size = mini_batch
    config.actor_rollout_ref.model.use_remove_padding = packed
    config.trainer.balance_batch = balance
    return UpdatePlan.make(batch, config, workers, MODEL), question


def operations(lengths: np.ndarray, question: np.ndarray, packed: bool) -> float:
    """Counted token by token: each is multiplied with the matrices, and looks at itself and those before it."""
    total = 0.0
    for q in set(question.tolist()):
        for i, length in enumerate(lengths[question == q]):
            first = P if packed and i else 0  # the prompt is computed already
            for position in range(first, length):
                total += 6 * matrix_parameters(MODEL) + 12 * MODEL.num_hidden_layers * MODEL.hidden_size * (
                    position + 1
                )
    return total


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


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("questions", [6, 48])
def test_each_mini_batch_is_divided_evenly_by_operations(questions, packed):
    made, question = plan(questions, questions // 2, 2, packed=packed)
    for number in range(2):
        parts = [rows[made.mini_batch[rows].numpy() == number] for rows in made.rows]
        work = [operations(made.lengths[rows], question[rows], packed) for rows in parts]
        assert max(work) / min(work) < 1.1


def test_a_long_response_counts_for_its_attention():
    """It takes as much as eight others with twice its tokens."""
    batch = DataProto.from_dict(
        {
            "uid": object_array([f"q{q}" for q in range(9)]),
            "prompt_length": torch.full((9,), 1),
            "response_mask": torch.arange(239) < torch.tensor([239] + [59] * 8)[:, None],
        }
    )
    config = PPOConfig()
    config.actor_rollout_ref.rollout.n = 1
    config.actor_rollout_ref.actor.ppo_mini_batch_size = 9
    made = UpdatePlan.make(batch, config, 2, MODEL)
    assert sorted(rows.tolist() for rows in made.rows) == [[0], list(range(1, 9))]


@pytest.mark.parametrize("balance", [True, False])
def test_a_short_last_mini_batch_may_leave_workers_without_rows(balance):
    made, _ = plan(3, 2, 6, balance)
    last = [made.mini_batch[rows].tolist().count(1) for rows in made.rows]
    assert sorted(last) == [0, 0, 1, 1, 1, 1]


def test_without_balancing_rows_stay_in_order():
    made, _ = plan(6, 6, 2, balance=False)
    assert [rows.tolist() for rows in made.rows] == [list(range(12)), list(range(12, 24))]
