"""PPO with a critic on a tiny model: the critic learns what can be learnt, warms up, is saved, resumed and refused."""

import itertools
import json
import shutil

import pandas as pd
import pytest
import torch
from transformers import AutoModelForCausalLM

from data_processing import make_tiny_model
from tests.e2e.runs import config, logged, train
from verl.trainer.main_ppo import build, run
from verl.trainer.ppo.core_algos import ADV_ESTIMATORS

GAE = ["algorithm.adv_estimator=gae", "critic.optim.lr=3e-3", "trainer.val_before_train=False"]
SHORT = ["data.max_response_length=4", "actor_rollout_ref.rollout.n=2"]
EPOCHS = "actor_rollout_ref.actor.ppo_epochs"


@pytest.fixture(scope="module")
def files(arithmetic_data, tiny_model):
    return arithmetic_data, tiny_model


def reward(folder, expression: str) -> str:
    """Override for a reward that is `expression` of its arguments."""
    file = folder / "reward.py"
    head = "def compute_score(data_source, solution_str, ground_truth, extra_info=None):"
    file.write_text(f"{head}\n    return float({expression})\n")
    return f"custom_reward_function.path={file}"


def weights(run_dir, step: int) -> dict[str, torch.Tensor]:
    folder = run_dir / "checkpoints" / f"global_step_{step}" / "huggingface"
    return dict(AutoModelForCausalLM.from_pretrained(folder).named_parameters())


def same(one: dict, other: dict) -> bool:
    return all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def test_the_values_reach_a_constant_reward(files, tmp_path):
    """Every return is 1, and a new critic says 0. No update is clipped where the range is wide."""
    options = [*GAE, *SHORT, f"{EPOCHS}=2", "critic.cliprange_value=100", "trainer.total_training_steps=7"]
    steps = train(config(*files, tmp_path / "run", *options, reward(tmp_path, "1.0")))
    assert steps[0]["critic/values/max"] == steps[0]["critic/values/min"] == 0
    assert steps[0]["critic/vf_loss"] > 0.2 and steps[-1]["critic/vf_loss"] < 0.005
    assert steps[-1]["critic/values/mean"] == pytest.approx(1, abs=0.1)
    assert all(step["critic/lr"] == 3e-3 and step["critic/grad_norm"] > 0 for step in steps)
    assert all(step["critic/vf_clipfrac"] == 0 for step in steps)
    assert all("critic/vf_explained_var" not in step for step in steps)  # there is no variance
    timed = json.loads((tmp_path / "run/metrics.jsonl").read_text().splitlines()[-1])
    assert timed["timing_s/values"] > 0 and timed["timing_s/update_critic"] > 0 and timed["timing_s/update_actor"] > 0


def test_values_explain_returns_that_the_question_tells(files, tmp_path):
    """Twelve questions, asked again at every step, and a reward of 1 for those with three digits."""
    rows = pd.read_parquet(files[0] / "train.parquet")
    rows.groupby(rows["extra_info"].map(lambda info: info["level"])).head(4).to_parquet(tmp_path / "few.parquet")
    options = [*GAE, *SHORT, f"{EPOCHS}=4", f"data.train_files={tmp_path}/few.parquet"]
    options += [reward(tmp_path, "extra_info['level'] == 3"), "trainer.total_training_steps=4"]
    explained = [step["critic/vf_explained_var"] for step in train(config(*files, tmp_path / "run", *options))]
    assert explained[0] == 0  # every value is 0
    assert explained[1] > 0.3 and explained[-1] > 0.8


def test_the_policy_earns_more_step_by_step(files, tmp_path):
    """PPO with GAE: a reward for every 7 of four tokens, which a random model writes one time in hundreds."""
    options = [*GAE, "data.max_response_length=4", "actor_rollout_ref.rollout.n=8", "trainer.total_training_steps=8"]
    options += ["actor_rollout_ref.actor.optim.lr=5e-3", reward(tmp_path, "solution_str.count('7') / 4")]
    earned = [step["critic/score/mean"] for step in train(config(*files, tmp_path / "run", *options))]
    assert earned[0] < 0.1 and earned[-1] > 0.4


def test_the_policy_stands_still_while_the_critic_warms_up(files, tmp_path, varied_reward):
    """With another model under the critic; a decaying rate shows which optimizer steps were taken."""
    critic = tmp_path / "critic_model"
    make_tiny_model.main(["--output-dir", str(critic), "--hidden-size", "48", "--layers", "1", "--heads", "2"])
    options = [*GAE, *SHORT, *varied_reward, "trainer.critic_warmup=2", "trainer.save_freq=1"]
    options += [f"critic.model.path={critic}", "actor_rollout_ref.actor.optim.lr_scheduler_type=linear"]
    steps = train(config(*files, tmp_path / "run", *options))
    initial = dict(AutoModelForCausalLM.from_pretrained(files[1]).named_parameters())
    assert same(initial, weights(tmp_path / "run", 1)) and same(initial, weights(tmp_path / "run", 2))
    assert not same(initial, weights(tmp_path / "run", 3))
    assert ["actor/pg_loss" in step for step in steps] == [False, False, True]
    # Two optimizer steps per step, six for the critic and two for the policy, both down to 0: means of each step.
    assert [step["critic/lr"] for step in steps] == pytest.approx([3e-3 * 11 / 12, 3e-3 * 7 / 12, 3e-3 * 3 / 12])
    assert steps[2]["actor/lr"] == pytest.approx(1e-3 * 3 / 4)


@pytest.mark.slow  # two whole runs
def test_a_run_stopped_and_resumed_equals_one_never_stopped(files, tmp_path, varied_reward, monkeypatch):
    options = [*GAE, *SHORT, *varied_reward, "trainer.total_training_steps=4", "trainer.save_freq=2"]
    options += [
        "trainer.critic_warmup=1",
        "algorithm.gamma=0.99",
        "algorithm.lam=0.95",
        "algorithm.use_kl_in_reward=True",
    ]
    whole = train(config(*files, tmp_path / "whole", *options))

    stopped = config(*files, tmp_path / "stopped", *options)
    trainer = build(stopped)
    step, calls = trainer.train_step, itertools.count(1)

    def interrupted(*args):
        if next(calls) == 4:  # after the checkpoint of step 2 and one more step
            raise KeyboardInterrupt
        return step(*args)

    monkeypatch.setattr(trainer, "train_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(trainer)
    assert [line["step"] for line in logged(tmp_path / "stopped")] == [1, 2, 3]
    assert train(stopped) == whole
    assert same(weights(tmp_path / "whole", 4), weights(tmp_path / "stopped", 4))


def test_a_checkpoint_without_a_critic_is_refused(files, tmp_path, varied_reward, monkeypatch):
    """Another estimator's, or the same one's from before it asked for a critic."""
    options = [*SHORT, *varied_reward, "trainer.save_freq=1", "trainer.total_training_steps=1"]
    without = config(*files, tmp_path, *options, "algorithm.adv_estimator=grpo")
    train(without)
    with pytest.raises(ValueError, match="adv_estimator is gae, in checkpoint .* it is grpo: restore it, set another"):
        build(config(*files, tmp_path, *options, *GAE))
    monkeypatch.setattr(ADV_ESTIMATORS["grpo"], "needs_critic", True)
    with pytest.raises(ValueError, match="global_step_1 has no critic, .* start anew with trainer.resume_mode=disable"):
        build(without)


def test_a_critic_of_another_vocabulary_is_refused(files, tmp_path, varied_reward):
    model = tmp_path / "model"
    shutil.copytree(files[1], model)
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    vocab = tokenizer["model"]["vocab"]
    vocab["1"], vocab["2"] = vocab["2"], vocab["1"]
    (model / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(ValueError, match="critic.model.path=.*model has another vocabulary than actor_rollout_ref"):
        build(config(*files, tmp_path / "run", *GAE, *varied_reward, f"critic.model.path={model}"))
    with pytest.raises(ValueError, match="critic.model.path=/nowhere: there is no such folder"):
        build(config(*files, tmp_path / "run", *GAE, *varied_reward, "critic.model.path=/nowhere"))


@pytest.mark.slow  # starts Ray workers
def test_two_ray_workers_equal_one_to_rounding(ray_cluster, files, tmp_path, varied_reward):
    options = [*GAE, *SHORT, *varied_reward, "trainer.total_training_steps=1"]
    one = train(config(*files, tmp_path / "one", *options))
    ray = ["trainer.worker_group=ray", "trainer.n_gpus_per_node=2", "trainer.save_freq=1"]
    two = train(config(*files, tmp_path / "two", *options, *ray))
    for name, value in one[0].items():
        if name.startswith(("actor/", "critic/")):
            assert two[0][name] == pytest.approx(value, rel=1e-3, abs=1e-6), name
    # Saved by two, taken up by one.
    more = train(config(*files, tmp_path / "two", *options, "trainer.total_training_steps=2"))
    assert [step["step"] for step in more] == [1, 2]
    assert more[1]["critic/values/mean"] != 0
