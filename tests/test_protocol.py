import pickle

import numpy as np
import pytest
import torch

from verl.protocol import DataProto, object_array


def batch(n_rows: int = 6) -> DataProto:
    return DataProto.from_dict(
        {
            "ids": torch.arange(n_rows * 3).reshape(n_rows, 3),
            "logp": torch.arange(n_rows, dtype=torch.bfloat16),
            "uid": np.array([f"q{i}" for i in range(n_rows)], dtype=object),
            "info": [{"row": i} for i in range(n_rows)],
        },
        {"step": 3},
    )


def test_columns_are_sorted_by_type_and_sizes_must_agree():
    data = batch()
    assert len(data) == 6 and set(data.batch.keys()) == {"ids", "logp"}
    assert data["info"][2] == {"row": 2}
    with pytest.raises(ValueError, match="field 'uid' has 2 rows, field 'ids' has 3"):
        DataProto.from_dict({"ids": torch.zeros(3), "uid": ["a", "b"]})
    with pytest.raises(KeyError, match="no field 'rewards'"):
        data["rewards"]


def test_union_adds_columns_and_refuses_conflicts_by_name():
    data = batch()
    both = data.union(DataProto.from_dict({"score": torch.ones(6)}, {"seed": 1}))
    assert torch.equal(both["score"], torch.ones(6)) and both.meta_info == {"step": 3, "seed": 1}
    with pytest.raises(ValueError, match="field 'ids' is in both"):
        data.union(DataProto.from_dict({"ids": torch.zeros(6, 3, dtype=torch.int64)}))
    with pytest.raises(ValueError, match="cannot unite 6 rows .* with 5 rows"):
        data.union(DataProto.from_dict({"score": torch.ones(5)}))
    with pytest.raises(ValueError, match="meta_info 'step' is 3 and 4"):
        data.union(DataProto.from_dict({"score": torch.ones(6)}, {"step": 4}))


def test_select_and_pop():
    data = batch()
    assert set(data.select(["ids", "uid"]).columns()) == {"ids", "uid"}
    taken = data.pop(["logp", "info"])
    assert set(taken.columns()) == {"logp", "info"} and set(data.columns()) == {"ids", "uid"}
    with pytest.raises(KeyError, match="no field 'logp'"):
        data.pop(["logp"])


def test_selected_rows_are_copies():
    data = batch()
    part = data.select_rows([4, 1])
    part["ids"].zero_()
    assert part["uid"].tolist() == ["q4", "q1"] and data["ids"][4, 0] == 12
    assert data.select_rows(np.array([True, False] * 3))["uid"].tolist() == ["q0", "q2", "q4"]
    assert len(data.select_rows([])) == 0
    with pytest.raises(IndexError, match="row 6 of a batch of 6 rows"):
        data.select_rows([6])
    with pytest.raises(ValueError, match="a mask over 6 rows"):
        data.select_rows(np.array([True]))


def test_reorder_and_its_inverse():
    data = batch()
    order = np.array([3, 1, 5, 0, 2, 4])
    assert data.reorder(order)["uid"].tolist() == [f"q{i}" for i in order]
    assert data.reorder(order).reorder(np.argsort(order))["uid"].tolist() == data["uid"].tolist()
    with pytest.raises(ValueError, match="must be a permutation"):
        data.reorder([0, 0, 1, 2, 3, 4])


def test_repeat_interleaves_or_tiles():
    data = batch(2)
    assert data.repeat(2)["uid"].tolist() == ["q0", "q0", "q1", "q1"]
    assert data.repeat(2, interleave=False)["uid"].tolist() == ["q0", "q1", "q0", "q1"]


def test_chunk_and_concat_are_inverse_and_refuse_mismatches():
    data = batch()
    parts = data.chunk(3)
    assert [len(p) for p in parts] == [2, 2, 2]
    whole = DataProto.concat(parts)
    assert torch.equal(whole["ids"], data["ids"]) and whole["uid"].tolist() == data["uid"].tolist()
    with pytest.raises(ValueError, match="6 rows do not divide into 4"):
        data.chunk(4)
    with pytest.raises(ValueError, match="part 1 lacks field 'logp'"):
        DataProto.concat([data, data.select(["ids"])])
    with pytest.raises(ValueError, match="part 1 has field 'logp'"):
        DataProto.concat([data.select(["ids"]), data.select(["ids", "logp"])])
    with pytest.raises(ValueError, match="field 'ids' has rows of different shapes"):
        DataProto.concat([data, data.with_columns(ids=torch.zeros(6, 2))])


def test_pad_to_a_divisor_and_back():
    data = batch(5)
    padded, pad = data.pad_to_divisor(4)
    assert len(padded) == 8 and pad == 3 and padded["uid"].tolist()[5:] == ["q0", "q1", "q2"]
    assert padded.unpad(pad)["uid"].tolist() == data["uid"].tolist()
    assert batch(1).pad_to_divisor(4)[0]["uid"].tolist() == ["q0"] * 4
    with pytest.raises(ValueError, match="cannot take 6 rows off a batch of 5"):
        data.unpad(6)


def test_pickles_as_plain_buffers_without_copying_tensors():
    data = batch()
    buffers: list[pickle.PickleBuffer] = []
    blob = pickle.dumps(data, protocol=5, buffer_callback=buffers.append)
    assert len(buffers) >= 2, "tensors must travel out of band"
    back = pickle.loads(blob, buffers=buffers)
    assert torch.equal(back["ids"], data["ids"]) and torch.equal(back["logp"], data["logp"])
    assert back["logp"].dtype == torch.bfloat16 and back["info"].tolist() == data["info"].tolist()
    assert back.meta_info == {"step": 3}


def test_objects_that_are_lists_stay_objects():
    array = object_array([[1, 2], [3, 4]])
    assert array.shape == (2,) and array[1] == [3, 4]
