"""What a user gets wrong ends in one line that says what to change, with exit status 2, before workers are started."""

import json
import re

import pytest

from tests.e2e.runs import overrides
from verl.single_controller import worker_group
from verl.trainer.cli import run_cli
from verl.trainer.config import PPOConfig
from verl.trainer.main_ppo import build, run

ROW = {
    "data_source": "arithmetic",
    "prompt": [{"role": "user", "content": "1+1="}],
    "reward_model": {"ground_truth": "2"},
}


@pytest.fixture
def start(arithmetic_data, tiny_model, tmp_path, capsys, monkeypatch):
    """Run the command line; returns its exit status and its error line. Starting a worker fails the test."""

    def refuse(*args, **kwargs):
        raise AssertionError("workers were started before the input was checked")

    monkeypatch.setattr(worker_group, "LocalWorkerGroup", refuse)

    def main(*extra: str) -> tuple[int, str]:
        argv = overrides(arithmetic_data, tiny_model, tmp_path / "run", *extra)
        status = run_cli(build, run, PPOConfig, "ppo_trainer", argv)
        return status, capsys.readouterr().err

    return main


def jsonl(path, rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def without(column: str) -> dict:
    return {name: value for name, value in ROW.items() if name != column}


LONG = {**ROW, "prompt": [{"role": "user", "content": "1" * 40}]}
UNKNOWN = {**ROW, "data_source": "poetry"}


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (None, "data.train_files: there is no file .*train.jsonl"),
        ([], "data.train_files: .*train.jsonl .*no rows"),
        ([without("prompt")] * 20, "train.jsonl has no column 'prompt'; it has data_source, reward_model"),
        ([without("reward_model")] * 20, "train.jsonl has no column 'reward_model'"),
        ([ROW] * 19 + [LONG], "train.jsonl, row 19, column 'prompt': .* has 42 tokens, data.max_prompt_length is 16"),
        ([ROW] * 5, "data.train_batch_size is 12, the training data have 5 questions: set it to 1..5"),
        ([UNKNOWN] * 20, "train.jsonl, row 0: no reward is known for data_source 'poetry'"),
    ],
)
def test_bad_data(start, tmp_path, rows, message):
    path = tmp_path / "train.jsonl"
    if rows is not None:
        jsonl(path, rows)
    check(start(f"data.train_files={path}"), message)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("raise RuntimeError('no such judge')", "rewards.py.* fails on .*row .*: RuntimeError: no such judge"),
        ("return 'good'", "not a number"),
        ("return {'points': 1}", "no 'score'"),
    ],
)
def test_a_reward_function_that_fails(start, tmp_path, body, message):
    file = tmp_path / "rewards.py"
    file.write_text(f"def compute_score(data_source, solution_str, ground_truth, extra_info=None):\n    {body}\n")
    check(start(f"custom_reward_function.path={file}"), message)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("trainer.nodes=2", "unknown key trainer.nodes; did you mean trainer.nnodes"),
        ("data.train_batch_size=twelve", "data.train_batch_size: Value 'twelve'"),
        (
            "algorithm.bundle_size=5",
            "data.train_batch_size=12 is not a multiple of algorithm.bundle_size=5; use 10 or 15",
        ),
        (
            "actor_rollout_ref.model.path=/nowhere/model",
            "actor_rollout_ref.model.path=/nowhere/model: there is no such",
        ),
        ("actor_rollout_ref.model.path=./nowhere", "actor_rollout_ref.model.path=./nowhere: there is no such folder"),
        ("custom_reward_function.path=/nowhere.py", "custom_reward_function.path: there is no file /nowhere.py"),
        ("trainer.plugins=[/nowhere.py]", "trainer.plugins: /nowhere.py is not a Python file"),
        ("trainer.profile_steps=[0]", r"trainer.profile_steps=\[0\]: there is no step 0, the run has"),
        ("trainer.profile_steps=[99]", r"trainer.profile_steps=\[99\]: there is no step 99, the run has"),
        (
            "trainer.default_local_dir=/proc/foo",
            r"trainer.default_local_dir=/proc/foo: /proc/foo cannot be written \(No ",
        ),
        (
            f"trainer.default_local_dir={__file__}",
            r"test_bad_input.py cannot be written \(it is a file\): name another",
        ),
        ("trainer.n_gpus_per_node=3", "trainer.worker_group=local has one worker, not trainer.n_gpus_per_node=3"),
    ],
)
def test_bad_configuration(start, override, message):
    check(start(override), message)


def test_sequences_longer_than_the_models_positions(start):
    longer = ["data.max_response_length=2000", "actor_rollout_ref.actor.ppo_max_token_len_per_gpu=4000"]
    check(start(*longer), "is 2016, the model at .* has 1024 positions: lower one of them")


@pytest.mark.slow  # starts Ray
def test_more_workers_than_cores(ray_cluster, start):
    check(
        start("trainer.worker_group=ray", "trainer.n_gpus_per_node=64", "actor_rollout_ref.rollout.n=16"),
        "trainer.n_gpus_per_node=64 asks for 64 workers, one CPU core each, but this node has 4",
    )


def check(result: tuple[int, str], message: str) -> None:

    status, error = result
    assert status == 2
    assert re.search(message, error), error
    assert error.startswith("error: ") and error.count("\n") == 1
