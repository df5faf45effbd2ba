from itertools import pairwise

import numpy as np
import pytest

from verl.utils.seqlen_balancing import (
    balanced_partition,
    contiguous_partition,
    split_by_rows,
    split_by_sum,
    split_by_tokens,
)

LENGTHS = np.array([5, 30, 7, 7, 12, 3, 28, 9, 9, 14])


def test_partitions_hold_each_index_once():
    for parts in (balanced_partition(LENGTHS, 3), contiguous_partition(len(LENGTHS), 3)):
        assert sorted(np.concatenate(parts).tolist()) == list(range(10))
    assert [len(p) for p in contiguous_partition(2, 3)] == [1, 1, 0]


def test_balanced_partition_evens_out_costs():
    sums = [int(LENGTHS[p].sum()) for p in balanced_partition(LENGTHS, 2)]
    assert sum(sums) == LENGTHS.sum() and abs(sums[0] - sums[1]) <= LENGTHS.min()


def test_micro_batches_hold_rows_of_similar_length_within_the_budget():
    parts = split_by_tokens(LENGTHS, 60)
    assert sorted(np.concatenate(parts).tolist()) == list(range(10))
    assert all(len(p) * LENGTHS[p].max() <= 60 for p in parts)
    bounds = [(LENGTHS[p].max(), LENGTHS[p].min()) for p in parts]
    assert all(a[1] >= b[0] for a, b in pairwise(bounds))
    assert [len(p) for p in split_by_rows(LENGTHS, 4)] == [4, 4, 2]
    with pytest.raises(ValueError, match="30 tokens exceeds the micro-batch budget of 29"):
        split_by_tokens(LENGTHS, 29)


def test_micro_batches_are_filled_in_order_up_to_the_budget():
    nothing = np.zeros(10, dtype=np.int64)
    parts = split_by_sum(LENGTHS, 31, np.arange(10)[::-1], nothing)
    assert [part.tolist() for part in parts] == [[9, 8], [7], [6, 5], [4, 3, 2], [1], [0]]
    with pytest.raises(ValueError, match="30 tokens exceeds the micro-batch budget of 29"):
        split_by_sum(LENGTHS, 29, np.arange(10), nothing)


def test_what_rows_share_counts_once_in_a_micro_batch():
    lengths = np.array([10, 12, 11, 10, 10])
    shared = np.array([0, 8, 8, 8, 0])  # the four first have a prompt of 8 tokens
    parts = split_by_sum(lengths, 17, np.arange(5), shared)
    # 10 + 4 + 3 = 17; then the prompt again: 10, and no room for another prompt
    assert [part.tolist() for part in parts] == [[0, 1, 2], [3], [4]]
    assert [part.tolist() for part in split_by_sum(lengths, 20, np.arange(5), shared)] == [[0, 1, 2, 3], [4]]


def test_rows_that_share_a_long_prompt_are_not_too_many_for_its_copies():
    lengths, shared = np.full(9, 101), np.array([0, *[100] * 8])  # 109 tokens of their own, 909 keys
    parts = split_by_sum(lengths, 202, np.arange(9), shared)
    assert [len(part) for part in parts] == [8, 1]
