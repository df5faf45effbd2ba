from itertools import chain, islice

import pytest

from verl.protocol import DataProto
from verl.utils.dataset.loader import StatefulLoader, in_order


class Numbers:
    """Stands for a data set: a batch tells which questions it holds."""

    def __init__(self, n):
        self.n = n

    def __len__(self):
        return self.n

    def batch(self, indices):
        return DataProto.from_dict({"question_id": [int(i) for i in indices]})


def taken(loader, steps):
    return [batch["question_id"].tolist() for batch in islice(loader, steps)]


def test_an_epoch_holds_every_question_once_and_leaves_out_the_rest():
    loader = StatefulLoader(Numbers(10), 3, seed=1)
    assert len(loader) == 3
    steps = taken(loader, 6)
    for epoch in (steps[:3], steps[3:]):
        questions = list(chain(*epoch))
        assert len(set(questions)) == 9 and set(questions) <= set(range(10))
    assert steps[:3] != steps[3:]


def test_order_depends_on_seed_and_epoch_alone():
    assert taken(StatefulLoader(Numbers(50), 10, seed=3), 12) == taken(StatefulLoader(Numbers(50), 10, seed=3), 12)
    assert taken(StatefulLoader(Numbers(50), 10, seed=3), 5) != taken(StatefulLoader(Numbers(50), 10, seed=4), 5)
    whole = taken(StatefulLoader(Numbers(50), 50, seed=3), 2)
    assert list(chain(*taken(StatefulLoader(Numbers(50), 10, seed=3), 10))) == list(chain(*whole))


def test_without_shuffling_the_order_is_that_of_the_files():
    assert taken(StatefulLoader(Numbers(5), 2, seed=0, shuffle=False), 3) == [[0, 1], [2, 3], [0, 1]]


@pytest.mark.parametrize("stop", [0, 1, 2, 3, 4, 7])
def test_resumed_order_continues_the_interrupted_one(stop):
    whole = taken(StatefulLoader(Numbers(10), 3, seed=1), 9)
    first = StatefulLoader(Numbers(10), 3, seed=1)
    taken(first, stop)
    second = StatefulLoader(Numbers(10), 3, seed=1)
    second.load_state_dict(first.state_dict())
    assert taken(second, 9 - stop) == whole[stop:]


def test_resuming_over_other_questions_or_another_order_is_refused():
    state = StatefulLoader(Numbers(10), 3, seed=1).state_dict()
    for other, name in (
        (StatefulLoader(Numbers(11), 3, seed=1), "data.train_files is 11, in the checkpoint it is 10"),
        (StatefulLoader(Numbers(10), 3, seed=2), "data.seed is 2"),
        (StatefulLoader(Numbers(10), 3, seed=1, shuffle=False), "data.shuffle is False"),
    ):
        with pytest.raises(ValueError, match=name):
            other.load_state_dict(state)


def test_impossible_batch_sizes_name_the_key():
    for size in (0, 11):
        with pytest.raises(ValueError, match=f"data.train_batch_size is {size}, .* 10 questions"):
            StatefulLoader(Numbers(10), size, seed=1)
    with pytest.raises(ValueError, match="have 1 question: set it to 1$"):
        StatefulLoader(Numbers(1), 2, seed=1)
    with pytest.raises(ValueError, match="data.seed is -1"):
        StatefulLoader(Numbers(10), 2, seed=-1)


def test_in_order_gives_every_question_once():
    assert [b["question_id"].tolist() for b in in_order(Numbers(5), 2)] == [[0, 1], [2, 3], [4]]
