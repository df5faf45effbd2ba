import numpy as np
import torch

from verl.protocol import DataProto
from verl.workers.sequences import MicroBatchSpec, Sequences, dummy_row, sequence_lengths


def batch() -> DataProto:
    return DataProto.from_dict(
        {
            "prompts": torch.tensor([[0, 0, 11], [12, 13, 14]]),
            "prompt_length": torch.tensor([1, 3]),
            "responses": torch.tensor([[21, 22, 0, 0], [23, 24, 25, 0]]),
            "response_mask": torch.tensor([[1, 1, 0, 0], [1, 1, 1, 0]], dtype=torch.bool),
        }
    )


def test_rows_hold_prompt_and_response_without_a_gap():
    sequences = Sequences.from_batch(batch(), torch.device("cpu"))
    assert sequences.input_ids.shape == (2, 6)
    assert sequences.input_ids[0, :3].tolist() == [11, 21, 22]
    assert sequences.input_ids[1].tolist() == [12, 13, 14, 23, 24, 25]
    assert sequences.labels.tolist() == [21, 22, 23, 24, 25]
    # A token is predicted where its predecessor is read.
    predecessors = sequences.input_ids[sequences.token_rows, sequences.hidden_positions]
    assert predecessors.tolist() == [11, 21, 14, 23, 24]


def test_values_return_to_their_rows_and_steps():
    sequences = Sequences.from_batch(batch(), torch.device("cpu"))
    rows = sequences.to_rows(torch.arange(1.0, 6.0))
    assert rows.tolist() == [[1, 2, 0, 0], [3, 4, 5, 0]]


def test_a_token_masked_from_the_loss_is_still_part_of_the_sequence():
    data = batch().with_columns(response_mask=torch.tensor([[0, 1, 0, 0], [1, 0, 1, 0]], dtype=torch.bool))
    sequences = Sequences.from_batch(data, torch.device("cpu"))
    assert sequences.labels.tolist() == [21, 22, 23, 24, 25]
    assert sequence_lengths(data).tolist() == [3, 6]


def test_a_fixed_size_wins_only_without_a_dynamic_budget():
    assert MicroBatchSpec.from_config(4, False, 100).rows == 4
    assert MicroBatchSpec.from_config(4, True, 100).rows is None
    assert [len(p) for p in MicroBatchSpec.from_config(None, False, 10).split(np.array([5, 5, 5]))] == [2, 1]


def test_the_dummy_row_has_the_columns_of_a_batch_even_of_an_empty_one():
    for data in (batch(), batch().select_rows([])):
        dummy = dummy_row(data.with_columns(advantages=torch.zeros(len(data), 4)))
        assert len(dummy) == 1 and dummy["advantages"].shape == (1, 4)
        assert Sequences.from_batch(dummy, torch.device("cpu")).labels.shape == (1,)
