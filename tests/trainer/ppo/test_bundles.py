import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from verl.trainer.ppo.bundles import BundleLayout, bundle_names, check_num_questions, draw_papers, random_order


@pytest.mark.parametrize("remainder", ["error", "drop", "short"])
def test_questions_that_divide_fall_into_whole_bundles(remainder):
    names = bundle_names(random_order(20, seed=1, step=3), 5, remainder, step=3)
    assert sorted(np.unique(names, return_counts=True)[1]) == [5, 5, 5, 5]


def test_left_over_questions_are_refused_dropped_or_bundled():
    order = random_order(22, seed=1, step=3)
    with pytest.raises(ValueError, match=r"data\.train_batch_size=22.*use 20 or 25"):
        bundle_names(order, 5, "error", step=3)
    assert (bundle_names(order, 5, "drop", step=3) == "").sum() == 2
    assert sorted(np.unique(bundle_names(order, 5, "short", step=3), return_counts=True)[1]) == [2, 5, 5, 5, 5]


@pytest.mark.parametrize("remainder", ["error", "drop", "short"])
def test_a_bundle_larger_than_the_step_is_refused(remainder):
    with pytest.raises(ValueError, match=r"algorithm\.bundle_size=8 .* 6 questions"):
        check_num_questions(6, 8, remainder)


def test_order_is_drawn_from_seed_and_step():
    assert (random_order(50, 1, 2) == random_order(50, 1, 2)).all()
    assert (random_order(50, 1, 2) != random_order(50, 1, 3)).any()
    assert (random_order(50, 1, 2) != random_order(50, 2, 2)).any()


def test_order_by_keys_is_ascending_and_random_within_ties():
    keys = np.repeat([0.5, 0.1, 0.9], 20)
    first, second = random_order(60, 1, 1, keys), random_order(60, 1, 2, keys)
    assert (np.diff(keys[first]) >= 0).all()
    assert (first != second).any()


@given(st.integers(0, 10**6))
def test_layout_depends_on_ids_alone(seed):
    rng = np.random.default_rng(seed)
    sizes = rng.integers(1, 4, rng.integers(1, 4))
    uid, bundle, sample = [], [], []
    for m, size in enumerate(sizes):
        for i in range(size):
            g = int(rng.integers(1, 4))
            uid += [f"q{m}-{i}"] * g
            bundle += [f"b{m}"] * g
            sample += range(g)
    uid, bundle, sample = np.array(uid, object), np.array(bundle, object), np.array(sample)
    values = torch.from_numpy(rng.random(len(uid)))
    layout = BundleLayout.from_ids(uid, bundle, sample)
    order = rng.permutation(len(uid))
    moved = BundleLayout.from_ids(uid[order], bundle[order], sample[order])
    assert torch.equal(layout.gather(values), moved.gather(values[order]))
    assert torch.equal(layout.sizes, moved.sizes) and layout.sizes.tolist() == sizes.tolist()
    back = torch.zeros_like(values)
    layout.scatter(layout.gather(values), back)
    assert torch.equal(back, values)


def test_ids_that_contradict_each_other_are_refused():
    with pytest.raises(ValueError, match="question a is in bundles"):
        BundleLayout.from_ids(np.array(["a", "a"]), np.array(["x", "y"]), np.array([0, 1]))
    with pytest.raises(ValueError, match="same uid and sample_index"):
        BundleLayout.from_ids(np.array(["a", "a"]), np.array(["x", "x"]), np.array([1, 1]))
    with pytest.raises(ValueError, match="bundle_uid is empty"):
        BundleLayout.from_ids(np.array(["a", "b"]), np.array(["x", ""]), np.array([0, 0]))


def test_permuted_papers_use_each_response_once_and_aligned_ones_keep_the_order():
    valid = torch.ones(4, 3, 6, dtype=torch.bool)
    papers = draw_papers(valid, np.random.default_rng(0))
    assert torch.equal(papers.sort(-1).values, torch.arange(6).expand(4, 3, 6))
    assert len({tuple(p) for p in papers.flatten(0, 1).tolist()}) > 6
    assert torch.equal(draw_papers(valid, None), torch.arange(6).expand(4, 3, 6))


def test_a_question_with_fewer_responses_begins_again():
    valid = torch.arange(5) < torch.tensor([[5], [2]])
    assert draw_papers(valid, None).tolist() == [[0, 1, 2, 3, 4], [0, 1, 0, 1, 0]]
    assert set(draw_papers(valid, np.random.default_rng(0))[1].tolist()) == {0, 1}
