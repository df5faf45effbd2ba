"""The reward managers: what each calls, that all count and time out alike, and what is refused at start-up."""

import json

import pytest
import torch

from data_processing.make_tiny_model import build_tokenizer
from verl.protocol import DataProto
from verl.trainer.config.schema import (
    CustomRewardConfig,
    DataConfig,
    OverlongBufferConfig,
    PPOConfig,
    RewardKwargsConfig,
    RewardModelConfig,
)
from verl.trainer.ppo.registry import REWARD_MANAGERS, register_reward_manager
from verl.trainer.ppo.reward import RewardManager, check_reward, load_reward, make_reward_manager
from verl.utils.dataset.loader import StatefulLoader
from verl.utils.dataset.rl_dataset import RLHFDataset

ONE = """
def compute_score(data_source, solution_str, ground_truth, extra_info=None, bonus=0):
    return one(solution_str, ground_truth, extra_info) + bonus
"""
LISTS = """
def compute_score(data_sources, solution_strs, ground_truths, extra_infos, bonus=0):
    print("called with", len(solution_strs))
    rows = zip(data_sources, solution_strs, ground_truths, extra_infos, strict=True)
    return [one(*row[1:]) + bonus for row in rows]
"""
SCORE = """
import time
def one(response, truth, extra_info):
    if response == "hang":
        time.sleep(1000)
    return 10 * int(response) + int(truth) + extra_info["tenths"] / 10
"""
MANAGERS = {"naive": ONE, "dapo": ONE, "batch": LISTS}


def settings(tmp_path, name, source, num_workers=1, timeout_s=20.0, overlong=None, **kwargs):
    path = None
    if source:
        path = str(tmp_path / "scores.py")
        (tmp_path / "scores.py").write_text(SCORE + source)
    model = RewardModelConfig(name, num_workers, timeout_s, RewardKwargsConfig(overlong or OverlongBufferConfig()))
    return PPOConfig(custom_reward_function=CustomRewardConfig(path=path, reward_kwargs=kwargs), reward_model=model)


def score(config, responses, width=4):
    n = len(responses)
    columns = {"data_source": ["any"] * n, "ground_truth": [str(i) for i in range(n)]}
    columns |= {"extra_info": [{"tenths": i % 10} for i in range(n)]}
    batch = DataProto.from_dict({"response_mask": torch.ones(n, width, dtype=torch.bool), **columns})
    manager = make_reward_manager(load_reward(config), config.reward_model)
    try:
        scores, _, metrics = manager(batch, responses)
    finally:
        manager.close()
    assert (scores[:, :-1] == 0).all()
    return scores[:, -1].tolist(), metrics


def dataset(tmp_path, *sources, name="rows"):
    row = {"prompt": "1+1=", "reward_model": {"style": "rule", "ground_truth": "2"}, "extra_info": {"tenths": 1}}
    path = tmp_path / f"{name}.jsonl"
    path.write_text("".join(json.dumps({"data_source": source, **row}) + "\n" for source in sources))
    return str(path)


def dry_run(config, *files):
    train = RLHFDataset(list(files), build_tokenizer(), DataConfig())
    reward = load_reward(config)
    check_reward(reward, make_reward_manager(reward, config.reward_model).evaluate, [train])
    return train


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("name", MANAGERS)
def test_a_function_of_ones_own_plain_or_async_gets_every_row_in_order(tmp_path, name, asynchronous, num_workers):
    source = MANAGERS[name].replace("def compute_score", "async def compute_score") if asynchronous else MANAGERS[name]
    scores, metrics = score(settings(tmp_path, name, source, num_workers, bonus=100), ["3", "x", "1"])
    # By hand: 10 x the response + the ground truth + tenths / 10 + the bonus. In a list, an exception takes all along.
    assert scores == pytest.approx([130.0, 0.0, 112.2] if name != "batch" else [0.0] * 3)
    assert metrics["reward/exceptions"] == (1.0 if name != "batch" else 3.0)
    scores, metrics = score(settings(tmp_path, name, source, num_workers), ["3", "2", "1"])
    assert scores == pytest.approx([30.0, 21.1, 12.2]) and metrics["reward/exceptions"] == 0.0


@pytest.mark.parametrize("name", MANAGERS)
def test_a_hung_call_is_killed_and_counted(tmp_path, name):
    scores, metrics = score(settings(tmp_path, name, MANAGERS[name], timeout_s=0.5), ["3", "hang"])
    assert scores == ([30.0, 0.0] if name != "batch" else [0.0, 0.0])
    assert metrics["reward/timeouts"] == (1.0 if name != "batch" else 2.0)
    assert metrics["reward/exceptions"] == metrics["reward/crashes"] == 0.0


def test_lists_have_at_most_64_responses(tmp_path, capfd):
    scores, _ = score(settings(tmp_path, "batch", LISTS), ["1"] * 150)
    assert scores == pytest.approx([10 + i + i % 10 / 10 for i in range(150)])
    lengths = [line.split()[-1] for line in capfd.readouterr().out.splitlines() if line.startswith("called with")]
    assert sorted(lengths) == ["22", "64", "64"]


@pytest.mark.parametrize(
    ("result", "scores", "message"),
    [
        ("[1.0] * (len(solution_strs) + 1)", [0, 0, 0], "it returned 4 results for 3 responses"),
        ("1.0", [0, 0, 0], "it returned 1.0 for 3 responses, not a list"),
        ("{'score': 1.0}", [0, 0, 0], "it returned {'score': 1.0} for 3 responses, not a list"),
        ("[1.0, 'no number', {'score': 2, 'acc': 1}]", [1, 0, 2], "it returned 'no number', not a number"),
        ("__import__('numpy').array([1.0, 2.0, 3.0])", [1, 2, 3], None),
        ("__import__('torch').tensor([1.0, 2.0, 3.0])", [1, 2, 3], None),
    ],
)
def test_what_a_function_of_lists_returns_is_checked(tmp_path, caplog, result, scores, message):
    source = f"def compute_score(data_sources, solution_strs, ground_truths, extra_infos):\n    return {result}\n"
    found, metrics = score(settings(tmp_path, "batch", source, num_workers=0), ["1", "2", "3"])
    assert found == scores and metrics["reward/exceptions"] == scores.count(0)
    logged = [record.getMessage() for record in caplog.records]
    assert logged == [] if message is None else len(logged) == 1
    assert message is None or (message in logged[0] and "scores.py" in logged[0])


def test_one_result_for_a_whole_list_is_refused_before_training(tmp_path):
    source = "def compute_score(data_sources, solution_strs, ground_truths, extra_infos):\n    return [1.0]\n"
    config = settings(tmp_path, "batch", source, num_workers=0)
    with pytest.raises(ValueError, match=r"rows.jsonl, row 0 .* it returned 1 results for 2 responses"):
        dry_run(config, dataset(tmp_path, "any"))


@pytest.mark.parametrize(
    ("name", "wrong", "form"), [("naive", LISTS, "data_source, "), ("batch", ONE, "data_sources, ")]
)
def test_a_function_of_the_other_form_is_refused(tmp_path, name, wrong, form):
    with pytest.raises(ValueError, match=rf"arguments of reward_model.reward_manager={name} .*compute_score\({form}"):
        load_reward(settings(tmp_path, name, wrong))


def test_lists_need_a_function_of_ones_own(tmp_path):
    with pytest.raises(ValueError, match="reward_model.reward_manager=batch calls a function that takes lists: give"):
        load_reward(settings(tmp_path, "batch", None))


@pytest.mark.parametrize("name", MANAGERS)
def test_the_dry_run_passes_and_names_the_row_that_fails(tmp_path, name):
    config = settings(tmp_path, name, MANAGERS[name], num_workers=0)
    dry_run(config, dataset(tmp_path, "any", "other"))
    (tmp_path / "other").mkdir()
    broken = settings(tmp_path / "other", name, MANAGERS[name].replace("one(", "absent("), num_workers=0)
    with pytest.raises(ValueError, match=r"rows.jsonl, row 0 .*NameError"):
        dry_run(broken, dataset(tmp_path, "any"))


@pytest.mark.parametrize("name", ["naive", "dapo"])
def test_an_unknown_data_source_of_a_mixture_is_refused_with_file_and_row(tmp_path, name):
    """Whatever the weight of its file."""
    files = dataset(tmp_path, "arithmetic"), dataset(tmp_path, "arithmetic", "arithmetics", name="second")
    config = settings(tmp_path, name, None, num_workers=0)
    train = RLHFDataset(list(files), build_tokenizer(), DataConfig())
    StatefulLoader(train, 2, seed=1, weights=[1, 0])
    with pytest.raises(
        ValueError, match="^data.train_files: .*second.jsonl, row 1: no reward is known for data_source 'arithmetics'"
    ):
        dry_run(config, *files)


def test_dapo_adds_the_overlong_penalty_to_the_score(tmp_path):
    """By hand: 4 tokens, a buffer of 2 before the limit of 4, so the whole penalty."""
    overlong = OverlongBufferConfig(enable=True, len=2, penalty_factor=0.5)
    scores, metrics = score(settings(tmp_path, "dapo", ONE, 0, overlong=overlong), ["3", "2"])
    assert scores == pytest.approx([29.5, 20.6])
    assert metrics["reward/overlong_penalty"] == -0.5 and metrics["reward/overlong"] == 2.0
    scores, metrics = score(settings(tmp_path, "dapo", ONE, 0), ["3", "2"])
    assert scores == pytest.approx([30.0, 21.1]) and "reward/overlong" not in metrics


def test_a_manager_of_ones_own_is_found_by_name(tmp_path, monkeypatch):
    monkeypatch.setattr("verl.trainer.ppo.registry.REWARD_MANAGERS", dict(REWARD_MANAGERS))

    @register_reward_manager("doubled")
    class Doubled(RewardManager):
        def shape(self, scores, mask):
            return 2 * scores, {"reward_extra/doubled": 1.0}

    scores, metrics = score(settings(tmp_path, "doubled", ONE, 0), ["3", "2"])
    assert scores == pytest.approx([60.0, 42.2]) and metrics["reward_extra/doubled"] == 1.0
    with pytest.raises(ValueError, match="'doubled' is registered already"):
        register_reward_manager("doubled")(Doubled)
    with pytest.raises(ValueError, match="reward_model.reward_manager=double is not registered; did you mean doubled"):
        load_reward(settings(tmp_path, "double", ONE))
