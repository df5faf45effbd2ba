from itertools import islice

import numpy as np
import pytest

from verl.protocol import DataProto
from verl.utils.dataset.loader import StatefulLoader
from verl.utils.dataset.mixture import Mixture, apportion

SIZES = (50, 8, 30)
WEIGHTS = [0.5, 0.3, 0.2]


class Files:
    """Stands for a data set of several files; question q of file f is the number 1000 f + q."""

    def __init__(self, *sizes):
        self.numbers = np.concatenate([1000 * f + np.arange(size) for f, size in enumerate(sizes)])
        self.sizes = sizes

    def __len__(self):
        return len(self.numbers)

    def questions_of_files(self):
        return [np.flatnonzero(self.numbers // 1000 == f) for f in range(len(self.sizes))]

    def batch(self, indices):
        return DataProto.from_dict({"question_id": [int(self.numbers[i]) for i in indices]})


def loader(weights=WEIGHTS, sizes=SIZES, batch_size=20, seed=7, shuffle=True):
    return StatefulLoader(Files(*sizes), batch_size, seed, shuffle, weights=weights)


def taken(source, steps):
    """(steps, batch_size) numbers."""
    return np.array([batch["question_id"].tolist() for batch in islice(source, steps)])


def test_rounding_goes_to_the_largest_remainders():
    assert apportion([0.5, 0.3, 0.2], 10).tolist() == [5, 3, 2]
    assert apportion([1, 1, 1], 10).tolist() == [4, 3, 3]
    assert apportion([2, 0, 5], 9).tolist() == [3, 0, 6]  # 2.57, 0, 6.43
    assert apportion([0.1] * 10, 1000).tolist() == [100] * 10


def test_an_epoch_has_as_many_batches_and_exact_shares():
    source = loader()
    assert len(source) == 4  # 88 questions
    for epoch in range(3):
        files, counts = np.unique(taken(source, 4) // 1000, return_counts=True)
        assert source.epoch == epoch and files.tolist() == [0, 1, 2] and counts.tolist() == [40, 24, 16]


@pytest.mark.parametrize("shuffle", [True, False])
def test_the_questions_of_a_file_are_all_used_before_any_comes_again(shuffle):
    drawn = taken(loader(shuffle=shuffle), 40).ravel()
    for file, size in enumerate(SIZES):
        own = drawn[drawn // 1000 == file] - 1000 * file
        passes = own[: len(own) // size * size].reshape(-1, size)
        assert len(passes) >= 3
        assert (np.sort(passes, axis=1) == np.arange(size)).all()
        assert (np.diff(passes, axis=0) == 0).all() == (not shuffle)  # each pass has an order of its own


def test_batches_keep_to_the_weights():
    """Any t successive draws of an epoch hold w t to within 2 (1 + w (F - 2)); and on average exactly."""
    files = taken(loader(sizes=(500, 40, 300)), 42 * 5) // 1000  # (batches, 20)
    for file, weight in enumerate(WEIGHTS):
        in_batch = (files == file).sum(axis=1)
        assert abs(in_batch - 20 * weight).max() < 2 * (1 + weight)
        assert in_batch.mean() == pytest.approx(20 * weight)
        for epoch in files.reshape(5, 840):
            after = np.arange(1, 841)
            assert abs((epoch == file).cumsum() - weight * after).max() < 2 * (1 + weight)


def test_which_file_comes_next_is_drawn_with_the_weights():
    """Over seeds, the file at a place in the middle of an epoch; five standard errors."""
    mixtures = [Mixture(Files(40, 40, 40).questions_of_files(), WEIGHTS, 100, seed, True) for seed in range(400)]
    at_place = np.array([mixture.order(0)[[33, 50, 71]] // 40 for mixture in mixtures])
    for file, weight in enumerate(WEIGHTS):
        shares = (at_place == file).mean(axis=0)
        assert (abs(shares - weight) < 5 * (weight * (1 - weight) / 400) ** 0.5).all()


def test_a_weight_of_zero_leaves_a_file_out():
    assert set((taken(loader(weights=[1, 0, 3]), 8) // 1000).ravel()) == {0, 2}


def test_the_order_depends_on_seed_and_epoch_alone():
    assert (taken(loader(), 9) == taken(loader(), 9)).all()
    assert (taken(loader(), 9) == taken(loader(weights=[5, 3, 2]), 9)).all()
    assert not (taken(loader(), 4) == taken(loader(seed=8), 4)).all()
    assert (taken(loader(batch_size=40), 4).ravel() == taken(loader(batch_size=20), 8).ravel()).all()


@pytest.mark.parametrize("stop", [0, 1, 4, 5, 11])
def test_resumed_draws_continue_the_interrupted_ones(stop):
    whole = taken(loader(), 14)
    first, second = loader(), loader()
    taken(first, stop)
    second.load_state_dict(first.state_dict())
    assert (taken(second, 14 - stop) == whole[stop:]).all()


def test_resuming_with_other_weights_is_refused():
    state = loader().state_dict()
    for other in (loader(weights=[0.4, 0.4, 0.2]), loader(weights=None), loader(batch_size=30)):
        with pytest.raises(
            ValueError, match=r"data.train_weights.* in the checkpoint it is \[40, 24, 16\]: restore it"
        ):
            other.load_state_dict(state)


def test_a_weight_that_gives_no_question_is_refused():
    with pytest.raises(ValueError, match=r"data.train_weights\[1\] is 0.001: that is none of the 80 questions"):
        loader(weights=[1, 0.001, 1])
    with pytest.raises(ValueError, match=r"data.train_weights\[1\] is 0.5: all prompts of its file were dropped"):
        loader(weights=[1, 0.5], sizes=(50, 0))
