import numpy as np
import pytest
import torch

from verl.protocol import DataProto
from verl.workers.model import ScoringModel, load_language_model, load_value_model
from verl.workers.sequences import Layout, MicroBatchSpec, Sequences, dummy_row, micro_batches, sequence_lengths

CPU = torch.device("cpu")
PACKED = Layout(packed=True)


def batch() -> DataProto:
    return DataProto.from_dict(
        {
            "prompts": torch.tensor([[0, 0, 11], [12, 13, 14]]),
            "prompt_length": torch.tensor([1, 3]),
            "responses": torch.tensor([[21, 22, 0, 0], [23, 24, 25, 0]]),
            "response_mask": torch.tensor([[1, 1, 0, 0], [1, 1, 1, 0]], dtype=torch.bool),
        }
    )


def answers(prompts: list[int], lengths: list[int], seed: int = 0) -> DataProto:
    """Responses of so many tokens, each to the prompt of that number: prompts of 1 to 5 tokens, in 5 columns."""
    generator = torch.Generator().manual_seed(seed)
    table = torch.randint(5, 60, (8, 5), generator=generator)
    prompt_length = torch.randint(1, 6, (8,), generator=generator)
    table = table * (torch.arange(5) >= 5 - prompt_length[:, None])
    columns = max(lengths)
    return DataProto.from_dict(
        {
            "prompts": table[prompts],
            "prompt_length": prompt_length[prompts],
            "responses": torch.randint(5, 60, (len(lengths), columns), generator=generator),
            "response_mask": torch.arange(columns) < torch.tensor(lengths)[:, None],
        }
    )


def test_rows_hold_prompt_and_response_without_a_gap_and_without_the_last_token():
    sequences = Sequences.from_batch(batch(), CPU)
    assert sequences.input_ids.shape == (2, 5)
    assert sequences.input_ids[0, :2].tolist() == [11, 21]
    assert sequences.input_ids[1].tolist() == [12, 13, 14, 23, 24]


def test_a_packed_row_holds_nothing_else():
    sequences = Sequences.from_batch(batch(), CPU, PACKED)
    assert sequences.input_ids.tolist() == [[11, 21, 12, 13, 14, 23, 24]]
    assert sequences.position_ids.tolist() == [[0, 1, 0, 1, 2, 3, 4]]


def test_a_packed_row_holds_a_prompt_once():
    data = DataProto.from_dict(
        {
            "prompts": torch.tensor([[12, 13, 14], [0, 13, 14], [12, 13, 14], [12, 13, 14]]),
            "prompt_length": torch.tensor([3, 2, 3, 3]),
            "responses": torch.tensor([[23, 24], [25, 26], [27, 0], [28, 29]]),
            "response_mask": torch.tensor([[1, 1], [1, 1], [1, 0], [1, 1]], dtype=torch.bool),
        }
    )
    sequences = Sequences.from_batch(data, CPU, PACKED)
    assert sequences.input_ids.tolist() == [[12, 13, 14, 23, 13, 14, 25, 28]]
    assert sequences.position_ids.tolist() == [[0, 1, 2, 3, 0, 1, 2, 3]]


@pytest.mark.parametrize("layout", [Layout(), PACKED])
def test_a_token_is_predicted_where_its_predecessor_is_read(layout):
    sequences = Sequences.from_batch(batch(), CPU, layout)
    assert sequences.labels.tolist() == [21, 22, 23, 24, 25]
    predecessors = sequences.input_ids.flatten()[sequences.predictors]
    assert predecessors.tolist() == [11, 21, 14, 23, 24]


@pytest.mark.parametrize("layout", [Layout(), PACKED])
def test_values_return_to_their_rows_and_steps(layout):
    rows = Sequences.from_batch(batch(), CPU, layout).to_rows(torch.arange(1.0, 6.0))
    assert rows.tolist() == [[1, 2, 0, 0], [3, 4, 5, 0]]


def test_a_token_masked_from_the_loss_is_still_part_of_the_sequence():
    data = batch().with_columns(response_mask=torch.tensor([[0, 1, 0, 0], [1, 0, 1, 0]], dtype=torch.bool))
    sequences = Sequences.from_batch(data, CPU)
    assert sequences.labels.tolist() == [21, 22, 23, 24, 25]
    assert sequence_lengths(data).tolist() == [3, 6]


# --------------------------------------------------------------------------------------------- packed equals padded
@pytest.fixture(scope="module")
def models(tiny_model):
    """The same model for padded and for packed sequences."""
    return {packed: ScoringModel(load_language_model(str(tiny_model), packed)) for packed in (False, True)}


@pytest.mark.parametrize(
    ("prompts", "lengths"),
    [
        ([0, 1, 2, 3], [7, 7, 7, 7]),
        ([0, 0, 0, 0], [1, 1, 1, 1]),
        ([0, 1, 0, 2, 0, 1], [1, 12, 3, 1, 9, 2]),
        ([3], [1]),
        ([0, 1, 2, 0, 1, 2, 4], [2, 2, 2, 30, 1, 8, 3]),
    ],
)
def test_log_probs_and_gradients_do_not_depend_on_the_layout(models, prompts, lengths):
    data = answers(prompts, lengths)
    results = []
    for packed, model in models.items():
        sequences = Sequences.from_batch(data, CPU, Layout(packed))
        model.zero_grad()
        log_prob, entropy = (sequences.to_rows(values) for values in model(sequences, 0.8))
        (log_prob * torch.arange(1, log_prob.shape[1] + 1) + entropy.square()).sum().backward()
        results.append((log_prob, entropy, *(parameter.grad.clone() for parameter in model.parameters())))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5 * float(b.detach().abs().max()))


def test_values_do_not_depend_on_the_layout(tiny_model):
    data, values = answers([0, 1, 0, 2, 0, 1], [1, 12, 3, 1, 9, 2]), []
    for packed in (False, True):
        model = load_value_model(str(tiny_model), packed)
        torch.nn.init.normal_(model.lm.get_output_embeddings().weight, generator=torch.Generator().manual_seed(0))
        sequences = Sequences.from_batch(data, CPU, Layout(packed))
        values.append(sequences.to_rows(model(sequences)))
    torch.testing.assert_close(*values, rtol=0, atol=1e-4)


def test_a_sequence_changes_no_other(models):
    data = answers([0, 1, 0, 2, 0, 1], [4, 12, 3, 1, 9, 2])
    changed = data["responses"].clone()
    changed[2] += 1
    before, after = (
        sequences.to_rows(models[True](sequences, 1.0)[0])
        for sequences in (
            Sequences.from_batch(data.with_columns(responses=responses), CPU, PACKED)
            for responses in (data["responses"], changed)
        )
    )
    others = torch.arange(6) != 2
    assert torch.equal(before[others], after[others]) and not torch.equal(before[2], after[2])


def test_packed_sequences_never_meet_a_model_that_would_mix_them(models):
    with pytest.raises(RuntimeError, match="call use_packed_attention"):
        models[False](Sequences.from_batch(batch(), CPU, PACKED), 1.0)


# ----------------------------------------------------------------------------------------------------- micro-batches
def split(data: DataProto, spec: MicroBatchSpec, layout: Layout) -> list[list[int]]:
    return [rows.tolist() for rows in micro_batches(data, spec, layout)]


@pytest.fixture
def one_worker(monkeypatch):
    monkeypatch.setattr("torch.distributed.get_world_size", lambda: 1)


def test_a_fixed_size_wins_only_without_a_dynamic_budget():
    assert MicroBatchSpec.from_config(4, False, 100).rows == 4
    assert MicroBatchSpec.from_config(4, True, 100).rows is None


def test_padded_micro_batches_count_the_padding_and_packed_ones_do_not(one_worker):
    data = answers([0, 1, 2, 3], [1, 1, 1, 20])
    data = data.with_columns(prompt_length=torch.ones(4, dtype=torch.int64))
    budget = MicroBatchSpec(None, 21 + 2 + 2)
    assert split(data, budget, Layout()) == [[3], [0, 1, 2]]
    assert split(data, budget, PACKED) == [[0, 1, 2], [3]]
    assert split(data, MicroBatchSpec(None, 27), PACKED) == [[0, 1, 2, 3]]
    with pytest.raises(ValueError, match="a sequence of 21 tokens exceeds the micro-batch budget of 20 tokens"):
        split(data, MicroBatchSpec(None, 20), PACKED)


def test_rows_with_one_prompt_come_together_when_packed(one_worker):
    data = answers([0, 1, 2, 1, 0, 2], [3, 3, 3, 3, 3, 3])
    assert split(data, MicroBatchSpec(2, 0), PACKED) == [[0, 4], [1, 3], [2, 5]]
    assert split(data, MicroBatchSpec(4, 0), PACKED) == [[0, 4, 1, 3], [2, 5]]


def test_the_dummy_row_has_the_columns_of_a_batch_even_of_an_empty_one():
    for data in (batch(), batch().select_rows([])):
        dummy = dummy_row(data.with_columns(advantages=torch.zeros(len(data), 4)))
        assert len(dummy) == 1 and dummy["advantages"].shape == (1, 4)
        for layout in (Layout(), PACKED):
            assert Sequences.from_batch(dummy, CPU, layout).labels.shape == (1,)


def test_an_empty_worker_has_no_micro_batches(one_worker):
    for layout in (Layout(), PACKED):
        assert micro_batches(batch().select_rows([]), MicroBatchSpec(None, 10), layout) == []
    assert np.concatenate(micro_batches(batch(), MicroBatchSpec(None, 10), PACKED)).tolist() == [0, 1]
