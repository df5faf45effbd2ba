"""How requests are dealt to engines: longest first, to the engine with the least to do, and lost ones once more."""

import itertools

import numpy as np
import pytest

from verl.workers.rollout.request_queue import LengthEstimate, RequestQueue


def deal_all(queue: RequestQueue, engines: int) -> list[list[int]]:
    """What each of several idle engines gets."""
    return queue.deal([set() for _ in range(engines)], set(range(engines)))


def test_a_new_question_is_expected_to_be_as_long_as_the_others():
    lengths = LengthEstimate()
    assert lengths("a") == 0
    lengths.observe(["a", "a", "b"], [10, 20, 45])
    assert lengths("a") == 15 and lengths("b") == 45
    assert lengths("c") == 30  # mean over questions, however many responses each has
    lengths.observe(["a"], [5])
    assert lengths("a") == 5 and lengths("c") == 25


def test_the_longest_question_goes_first_to_the_engine_with_the_least_to_do():
    cost = [3.0, 7.0, 5.0, 4.0]
    dealt = deal_all(RequestQueue([[0], [1], [2], [3]], cost, capacity=10), 2)
    # 7 -> first; 5 -> second; 4 -> second (5 < 7); 3 -> first (7 < 9)
    assert dealt == [[1, 0], [2, 3]]


def test_the_rows_of_a_question_stay_together_and_each_row_is_dealt_once():
    units = np.arange(30).reshape(-1, 3).tolist()
    queue = RequestQueue(units, np.random.default_rng(0).uniform(1, 9, 30).tolist(), capacity=100)
    dealt = deal_all(queue, 4)
    assert sorted(itertools.chain(*dealt)) == list(range(30)) and len(queue) == 0
    for rows in dealt:
        assert [sorted(rows[i : i + 3]) in units for i in range(0, len(rows), 3)] == [True] * (len(rows) // 3)


@pytest.mark.parametrize("seed", range(20))
def test_the_last_engine_ends_within_grahams_bound(seed):
    """Longest first: the makespan is at most 4/3 - 1/(3m) of the best one (Graham 1969, theorem 2), found by trying."""
    generator, engines = np.random.default_rng(seed), 3
    cost = generator.integers(1, 20, 7).astype(float).tolist()
    dealt = deal_all(RequestQueue([[i] for i in range(7)], cost, capacity=100), engines)
    best = min(
        max(sum(c for c, e in zip(cost, split, strict=True) if e == engine) for engine in range(engines))
        for split in itertools.product(range(engines), repeat=7)
    )
    assert max(sum(cost[row] for row in rows) for rows in dealt) <= (4 / 3 - 1 / (3 * engines)) * best + 1e-9


def test_an_engine_holds_no_more_rows_than_it_has_room_for():
    queue = RequestQueue(np.arange(12).reshape(-1, 2).tolist(), [1.0] * 12, capacity=5)
    dealt = deal_all(queue, 2)
    assert [len(rows) for rows in dealt] == [4, 4] and len(queue) == 2
    held = [set(rows) for rows in dealt]
    assert queue.deal(held, {0, 1}) == [[], []]
    held[1] = set(dealt[1][:1])  # three of the second engine's rows are finished
    assert [len(rows) for rows in queue.deal(held, {0, 1})] == [0, 4]


def test_a_question_with_more_responses_than_an_engine_has_room_for_is_dealt_to_an_empty_one():
    queue = RequestQueue([[0, 1, 2, 3], [4, 5, 6, 7]], [1.0] * 8, capacity=3)
    assert queue.deal([set()], {0}) == [[4, 5, 6, 7]]
    assert queue.deal([{7}], {0}) == [[]]
    assert queue.deal([set()], {0}) == [[0, 1, 2, 3]]


def test_what_should_go_to_a_busy_engine_waits_for_it():
    queue = RequestQueue([[0], [1], [2]], [1.0, 2.0, 10.0], capacity=10)
    assert queue.deal([set(), set()], {0, 1}) == [[2], [1, 0]]
    queue.give_back([0])
    assert queue.deal([{2}, {1}], {0}) == [[], []]  # the second has less to do, but computes
    assert queue.deal([{2}, {1}], {0, 1}) == [[], [0]]
    queue.give_back([0])
    assert queue.deal([set(), {1}], {0}) == [[0], []]


def test_without_an_engine_all_waits():
    queue = RequestQueue([[0], [1]], [1.0, 1.0], capacity=1)
    assert queue.deal([], set()) == [] and len(queue) == 2
    assert queue.deal([set()], set()) == [[]] and len(queue) == 2


def test_lost_rows_go_before_all_others_and_once():
    queue = RequestQueue(np.arange(9).reshape(-1, 3).tolist(), [1.0] * 9, capacity=3)
    first = queue.deal([set()], {0})[0]
    lost = first[:2]  # the third response had arrived
    queue.give_back(set(lost))
    assert queue.deal([set()], {0})[0] == sorted(lost)
    rest = [queue.deal([set()], {0})[0] for _ in range(2)]
    assert sorted(itertools.chain(*rest)) == sorted(set(range(9)) - set(first)) and len(queue) == 0


def test_lost_rows_of_several_questions_keep_to_their_questions():
    queue = RequestQueue(np.arange(6).reshape(-1, 3).tolist(), [1.0] * 6, capacity=6)
    queue.deal([set()], {0})
    queue.give_back({5, 1, 0, 3})
    assert sorted(deal_all(queue, 2)) == [[0, 1], [3, 5]]


@pytest.mark.parametrize("seed", range(5))
def test_every_row_is_computed_once_whatever_engines_do(seed):
    """Engines finish at random, are busy at random, and lose all that they hold at random."""
    generator = np.random.default_rng(seed)
    queue = RequestQueue(np.arange(60).reshape(-1, 4).tolist(), generator.uniform(1, 9, 60).tolist(), capacity=9)
    held: list[set[int]] = [set(), set(), set()]
    finished: list[int] = []
    while len(finished) < 60:
        for own, rows in zip(held, queue.deal(held, set(np.flatnonzero(generator.random(3) < 0.7))), strict=True):
            assert not own & set(rows)
            own |= set(rows)
        assert sum(map(len, held)) == len(set().union(*held))
        engine = int(generator.integers(3))
        if generator.random() < 0.2:
            queue.give_back(held[engine])
            held[engine] = set()
        for row in list(held[engine])[:3]:
            held[engine].remove(row)
            finished.append(row)
    assert sorted(finished) == list(range(60)) and len(queue) == 0
