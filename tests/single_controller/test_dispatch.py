import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.single_controller.counting_worker import CountingWorker
from verl.protocol import DataProto
from verl.single_controller.dispatch import (
    Dispatch,
    collect,
    partition_rows,
    register,
    registered_methods,
    run_method,
)


def batch(n_rows: int) -> DataProto:
    return DataProto.from_dict({"x": torch.arange(n_rows), "uid": np.array([f"q{i}" for i in range(n_rows)], object)})


class Doubler:
    def double(self, data: DataProto) -> DataProto:
        return DataProto.from_dict({"twice": 2 * data["x"], "uid": data["uid"]})


@given(st.integers(0, 40), st.integers(1, 7))
def test_default_shares_are_contiguous_and_differ_by_at_most_one(n_rows: int, world_size: int):
    shares = partition_rows("f", [batch(n_rows)], None, world_size)
    assert len(shares) == world_size
    assert np.concatenate(shares).tolist() == list(range(n_rows))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


@given(st.lists(st.integers(0, 4), max_size=30), st.randoms(use_true_random=False))
def test_any_partition_comes_back_in_the_callers_order(owner: list[int], random):
    """`owner[i]` is the rank of row i; each rank gets its rows in a shuffled order, and some ranks get none."""
    data = batch(len(owner))
    rows = [[i for i, rank in enumerate(owner) if rank == r] for r in range(5)]
    for index in rows:
        random.shuffle(index)
    checked = partition_rows("double", [data], rows, 5)
    results = [run_method(Doubler(), "double", [data], {}, index) for index in checked]
    out = collect("double", Dispatch.ROWS, results, checked)
    assert out["twice"].tolist() == [2 * i for i in range(len(owner))]
    assert out["uid"].tolist() == data["uid"].tolist()


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([[0, 1, 2]], "`rows` has 1 index arrays, there are 2 workers"),
        ([[0, 1], [1, 2]], "gives row 1 to 2 workers"),
        ([[0], [2]], "gives row 1 to 0 workers"),
        ([[0, 1, 2], [3]], "names row 3 of a batch of 3 rows"),
        ([[0, 1, 2], [-1]], "names row -1 of a batch of 3 rows"),
    ],
)
def test_rows_that_are_no_partition_are_refused(rows, message):
    with pytest.raises(ValueError, match=message):
        partition_rows("update", [batch(3)], rows, 2)


def test_rows_method_needs_a_batch_first():
    with pytest.raises(TypeError, match="update takes a DataProto as first positional argument, not dict"):
        partition_rows("update", [{}], None, 2)
    with pytest.raises(TypeError, match="not nothing"):
        partition_rows("update", [], None, 2)


def test_ranks_must_agree_on_what_they_return():
    rows = [np.array([0]), np.array([1])]
    with pytest.raises(TypeError, match="f returned rows on some ranks but dict on rank 1"):
        collect("f", Dispatch.ROWS, [batch(1), {}], rows)


def test_an_overridden_method_stays_registered_and_others_are_not():
    class Louder(CountingWorker):
        def describe(self, suffix: str = "") -> str:
            return super().describe(suffix).upper()

    methods = registered_methods(Louder)
    assert methods["describe"] is Dispatch.ALL and methods["square"] is Dispatch.ROWS
    assert "not_registered" not in methods and "setup_distributed" not in methods


def test_a_rows_method_cannot_have_a_parameter_that_the_call_takes():
    with pytest.raises(ValueError, match="no parameter `rows`"):

        @register(Dispatch.ROWS)
        def update(self, batch, rows):
            pass
