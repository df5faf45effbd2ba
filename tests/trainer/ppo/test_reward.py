import asyncio
import logging
import pickle
from unittest.mock import ANY

import numpy as np
import pytest
import torch

from data_processing.make_tiny_model import build_tokenizer
from verl.protocol import DataProto, object_array
from verl.trainer.config.schema import CustomRewardConfig, DataConfig, PPOConfig, RewardModelConfig
from verl.trainer.ppo.reward import RewardManager, at_last_token, check_reward, load_reward
from verl.utils.dataset.rl_dataset import RLHFDataset
from verl.workers.reward.pool import ScoringPool

HEAD = "def compute_score(data_source, solution_str, ground_truth, extra_info=None, **kwargs):\n"


def custom(tmp_path, body, **options):
    path = tmp_path / "scores.py"
    path.write_text(body if "compute_score" in body else HEAD + f"    {body}\n")
    return PPOConfig(custom_reward_function=CustomRewardConfig(path=str(path), **options))


def batch(sources, answers, lengths, width=6):
    mask = torch.arange(width) < torch.tensor(lengths)[:, None]
    columns = {"data_source": sources, "ground_truth": answers, "extra_info": [{}] * len(sources)}
    return DataProto.from_dict({"response_mask": mask, **columns})


def manager_of(config):
    return RewardManager(load_reward(config), config.reward_model)


def score(config, responses, answers=None, lengths=None):
    n = len(responses)
    data = batch(["arithmetic"] * n, answers or ["2"] * n, lengths or [3] * n)
    return manager_of(config)(data, responses)


def failures(**counts):
    kinds = ("exceptions", "timeouts", "crashes", "non_finite")
    return {f"reward/{kind}": counts.get(kind, 0.0) for kind in kinds} | {"reward/acc": ANY, "reward/responses": ANY}


def check_dry(reward, datasets):
    check_reward(reward, reward.evaluate, datasets)


def dataset(tmp_path, *sources):
    import json

    rows = [
        {
            "data_source": source,
            "prompt": "1+1=",
            "reward_model": {"style": "rule", "ground_truth": "#2"},
            "extra_info": {"index": i},
        }
        for i, source in enumerate(sources)
    ]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return RLHFDataset(str(tmp_path / "data.jsonl"), build_tokenizer(), DataConfig())


def test_score_lies_at_the_last_response_token():
    scores, extras, metrics = score(PPOConfig(), ["20 #2", "20 #3", "#2"], lengths=[1, 6, 4])
    expected = torch.zeros(3, 6)
    expected[0, 0] = 1.0
    expected[2, 3] = 1.0
    assert scores.dtype == torch.float32 and torch.equal(scores, expected)
    assert extras["acc"].tolist() == extras["score"].tolist() == [1.0, 0.0, 1.0]
    assert extras["pred"].tolist() == ["2", "3", "2"]
    assert metrics == failures()


def test_a_mask_with_gaps_still_carries_the_score_at_its_last_token():
    mask = torch.tensor([[True, False, True, False], [True, True, True, True]])
    assert at_last_token(torch.tensor([2.0, -1.0]), mask).tolist() == [[0, 0, 2, 0], [0, 0, 0, -1]]
    with pytest.raises(ValueError, match="row 1 has no response token"):
        at_last_token(torch.tensor([1.0, 1.0]), torch.tensor([[True], [False]]))


def test_custom_function_gets_its_arguments_and_keywords(tmp_path):
    body = "return len(solution_str) * kwargs['weight'] + (ground_truth == '2') + (data_source == 'arithmetic')"
    scores, extras, _ = score(custom(tmp_path, body, reward_kwargs={"weight": 10}), ["a", "bcd"])
    assert scores.sum(dim=1).tolist() == [12.0, 32.0]
    assert extras["pred"].tolist() == ["a", "bcd"]


def test_async_functions_run_concurrently_and_keep_their_order(tmp_path):
    body = (
        "import asyncio\nseen = []\n"
        "async def compute_score(data_source, solution_str, ground_truth, extra_info=None):\n"
        "    seen.append(solution_str)\n    while len(seen) < 3:\n        await asyncio.sleep(0)\n"
        "    if solution_str == 'bad': raise KeyError('x')\n    return float(solution_str)\n"
    )
    config = custom(tmp_path, body)
    scores, _, metrics = score(config, ["3", "bad", "1"])
    assert scores.sum(dim=1).tolist() == [3.0, 0.0, 1.0]
    assert metrics["reward/exceptions"] == 1.0

    async def in_a_running_loop():
        return score(config, ["5", "6"])[0].sum(dim=1).tolist()

    assert asyncio.run(in_a_running_loop()) == [5.0, 6.0]


def test_other_fields_of_a_dict_become_extras_and_metrics(tmp_path):
    body = "return {'score': -1, 'acc': True, 'format': len(solution_str), 'note': 'n'} if solution_str else -1.0"
    _, extras, metrics = score(custom(tmp_path, body), ["ab", "", "abcd"])
    assert extras["acc"].tolist() == [1.0, -1.0, 1.0] and extras["acc"].dtype == np.float64
    assert extras["reward_extra/format"].tolist() == [2, None, 4]
    assert extras["reward_extra/note"].tolist() == ["n", None, "n"]
    assert metrics["reward_extra/format/mean"] == 3.0 and "reward_extra/note/mean" not in metrics


def test_raising_and_non_finite_calls_score_zero_are_counted_and_logged_once(tmp_path, caplog):
    body = (
        "import math\n" + HEAD + "    if solution_str == 'nan': return math.nan\n"
        "    if solution_str == 'inf': return {'score': math.inf}\n    if solution_str == 'text': return 'one'\n"
        "    if solution_str == 'none': return {'acc': 1}\n    return 1 / int(solution_str)\n"
    )
    manager = manager_of(custom(tmp_path, body))
    responses = ["2", "0", "0", "nan", "inf", "text", "none"]
    with caplog.at_level(logging.WARNING):
        scores, extras, metrics = manager(batch(["x"] * 7, ["2"] * 7, [3] * 7), responses)
        manager(batch(["x"], ["2"], [3]), ["0"])
    assert scores.sum(dim=1).tolist() == [0.5, 0, 0, 0, 0, 0, 0]
    assert extras["pred"].tolist() == ["2", None, None, None, None, None, None]
    assert metrics == failures(exceptions=4.0, non_finite=2.0)
    assert sum("ZeroDivisionError: division by zero" in r.getMessage() for r in caplog.records) == 1
    assert len(caplog.records) == 5


def test_endlessly_different_messages_are_not_all_logged(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        _, _, metrics = score(custom(tmp_path, "raise ValueError(solution_str)"), [str(i) for i in range(80)])
    assert metrics["reward/exceptions"] == metrics["reward/responses"] == 80.0
    assert len(caplog.records) == 51 and "further messages" in caplog.records[-1].getMessage()


def test_a_failure_is_logged_with_the_data_source_and_index_of_its_question(tmp_path, caplog):
    data = batch(["good", "bad", "worse"], ["2"] * 3, [3] * 3)
    data = data.with_columns(extra_info=object_array([{"index": 6}, {"index": 7}, {}]))
    body = "if data_source != 'good': raise KeyError(data_source)\n    return 1.0"
    with caplog.at_level(logging.WARNING):
        manager_of(custom(tmp_path, body))(data, ["1", "2", "3"])
    first, second = (record.getMessage() for record in caplog.records)
    assert "scores.py failed on a response to data_source 'bad', extra_info.index 7, which scores as" in first
    assert "failed on a response to data_source 'worse', which scores as a wrong one: KeyError: 'worse'" in second


def test_reward_function_travels_to_another_process_by_name(tmp_path):
    reward = pickle.loads(pickle.dumps(load_reward(custom(tmp_path, "return 0.25"))))
    assert RewardManager(reward, RewardModelConfig())(batch(["x"], ["2"], [1]), ["?"])[0].sum() == 0.25


def test_dry_run_passes_a_function_that_scores(tmp_path):
    check_dry(load_reward(PPOConfig()), [dataset(tmp_path, "arithmetic")])
    check_dry(load_reward(custom(tmp_path, "return 1.0")), [dataset(tmp_path, "anything", "else")])


@pytest.mark.parametrize(
    ("body", "problem"),
    [
        ("raise KeyError('x')", "KeyError: 'x'"),
        ("return 1.0 if data_source == 'a' else 'good'", "not a number"),
        ("return {'acc': 1.0}", "no 'score'"),
        ("return float('nan')", "its score is nan"),
    ],
)
def test_dry_run_names_function_file_and_row(tmp_path, body, problem):
    reward = load_reward(custom(tmp_path, body))
    with pytest.raises(ValueError) as caught:
        check_dry(reward, [dataset(tmp_path, "a", "a", "b")])
    message = str(caught.value)
    assert problem in message and "\n" not in message
    assert "compute_score" in message and "scores.py" in message and "data.jsonl, row" in message


def test_unknown_data_source_is_refused_before_training(tmp_path):
    with pytest.raises(ValueError, match="data.jsonl, row 1: no reward is known for data_source 'geometry'; there are"):
        check_dry(load_reward(PPOConfig()), [dataset(tmp_path, "arithmetic", "geometry")])


def test_functions_that_cannot_be_loaded_are_refused_by_key(tmp_path):
    def refusal(config):
        with pytest.raises(ValueError) as caught:
            load_reward(config)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "there is no file" in refusal(PPOConfig(custom_reward_function=CustomRewardConfig(path="/no/such.py")))
    named = custom(tmp_path, "return 1", name="grade")
    assert "no function 'grade'; it has compute_score" in refusal(named)
    (tmp_path / "b").mkdir()
    assert "importing" in refusal(custom(tmp_path / "b", "def compute_score(:"))
    (tmp_path / "c").mkdir()
    narrow = custom(tmp_path / "c", "def compute_score(solution_str, ground_truth): return 1")
    message = refusal(narrow)
    assert "does not take the arguments of reward_model.reward_manager=naive" in message
    assert "its form is compute_score(data_source, solution_str, ground_truth, extra_info, **kwargs)" in message
    keywords = CustomRewardConfig(reward_kwargs={"a": 1})
    assert "need custom_reward_function.path" in refusal(PPOConfig(custom_reward_function=keywords))


def test_calls_that_hang_and_die_are_counted_apart(tmp_path):
    body = """
import os, time
def compute_score(data_source, solution_str, ground_truth, extra_info=None):
    if solution_str == "hang":
        time.sleep(60)
    if solution_str == "die":
        os._exit(1)
    if solution_str == "raise":
        raise KeyError("boxed")
    return 1.0
"""
    reward = load_reward(custom(tmp_path, body))
    responses = ["good", "hang", "die", "raise", "hang", "good"]
    data = batch(["any"] * 6, ["2"] * 6, [3] * 6)
    with ScoringPool(reward, num_workers=2, timeout_s=1.0) as pool:
        scores, _, metrics = RewardManager(reward, RewardModelConfig(), pool)(data, responses)
    assert scores.sum(1).tolist() == [1, 0, 0, 0, 0, 1]
    assert metrics == failures(exceptions=1.0, timeouts=2.0, crashes=1.0)


def test_failing_pays_no_more_than_being_wrong(monkeypatch):
    manager = RewardManager(load_reward(PPOConfig()), RewardModelConfig())
    responses, truths = [r"\boxed{3}", r"\boxed{4}", "x"], ["3", "3", "3"]
    scores, extras, _ = manager(batch(["math_dapo"] * 3, truths, [3] * 3), responses)
    assert scores.sum(dim=1).tolist() == [1, -1, -1]
    monkeypatch.setattr(manager, "evaluate", lambda requests: [ValueError("it fails")] * len(requests))
    scores, extras, metrics = manager(batch(["math_dapo", "openai/gsm8k", "math_dapo"], truths, [3] * 3), responses)
    assert scores.sum(dim=1).tolist() == [-1, 0, -1]
    assert extras["acc"].tolist() == [0, 0, 0] and metrics["reward/acc"] == 0
