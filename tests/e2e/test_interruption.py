"""Processes killed in the middle of a step, and their runs taken up again: the same as one that was never stopped.

Reward, estimator and loss draw from the global generators of Python, numpy and torch, as a user's may.
"""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.e2e.runs import config, overrides, train
from verl import export

REWARD = """
import random


def compute_score(data_source, solution_str, ground_truth, extra_info=None):
    return sum(c.isdigit() for c in solution_str) / max(1, len(solution_str)) + 0.1 * random.random()
"""
PLUGIN = '''
import itertools, os, signal, threading

import numpy as np
import torch

from verl.trainer.ppo import ray_trainer
from verl.trainer.ppo.core_algos import (
    AdvantageEstimator, AdvantageOutput, get_policy_loss, register_adv_est, register_policy_loss
)
from verl.workers import fsdp_engine
from verl.workers.rollout import hf


@register_adv_est("noisy")
class Noisy(AdvantageEstimator):
    def __call__(self, batch):
        rewards = batch["token_level_rewards"].sum(1)
        noise = torch.from_numpy(np.random.randn(len(rewards))).float() + torch.randn(len(rewards))
        advantages = (rewards - rewards.mean() + 0.1 * noise)[:, None] * batch["response_mask"]
        return AdvantageOutput(advantages, advantages, {"noise": float(noise.sum())})


@register_policy_loss("noisy")
def noisy(old_log_prob, log_prob, advantages, response_mask, config):
    loss, metrics = get_policy_loss("vanilla")(old_log_prob, log_prob, advantages, response_mask, config)
    return loss * (1 + 0.1 * torch.rand(loss.shape)), metrics


# ------------------------------------------------------------- the moment of step 4 at which the process is killed
STEP = 4
AT = os.environ.get("KILL_AT")


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def in_step(owner, name, step, number, action, thread=""):
    """`action` takes the place of the `number`-th call of owner.name within a step, by a thread of that name."""
    original, calls = getattr(owner, name), itertools.count(1)

    def wrapped(*args, **kwargs):
        if now == step and thread in threading.current_thread().name and next(calls) == number:
            return action(*args, **kwargs)
        return original(*args, **kwargs)

    setattr(owner, name, wrapped)


now, train_step = 0, ray_trainer.RayPPOTrainer.train_step


def counted(self, timer):
    global now
    now = self.step
    return train_step(self, timer)


if AT:
    ray_trainer.RayPPOTrainer.train_step = counted
if AT == "rollout":
    in_step(hf, "sample", STEP, 5, lambda *args: die())
elif AT == "update":  # the first of two mini-batches has moved the weights
    in_step(fsdp_engine.FSDPEngine, "step", STEP, 2, lambda *args, **kwargs: die())
elif AT == "save":  # the shards are written, the rest is not
    in_step(os, "fsync", STEP, 1, lambda descriptor: die())
elif AT == "background":  # while step 5 trains beside the write
    in_step(os, "fsync", STEP, 1, lambda descriptor: threading.Event().wait(60), thread="checkpoint")
    in_step(fsdp_engine.FSDPEngine, "step", STEP + 1, 2, lambda *args, **kwargs: die())
'''


@pytest.fixture(scope="module")
def options(arithmetic_data, tiny_model, tmp_path_factory) -> tuple:
    """What all runs share: five steps, saves after 2, 4 and 5, and the plugin."""
    folder = tmp_path_factory.mktemp("plugin")
    (folder / "noisy.py").write_text(PLUGIN)
    (folder / "reward.py").write_text(REWARD)
    return arithmetic_data, tiny_model, [
        f"trainer.plugins=[{folder}/noisy.py]",
        f"custom_reward_function.path={folder}/reward.py",
        "algorithm.adv_estimator=noisy",
        "actor_rollout_ref.actor.policy_loss.loss_mode=noisy",
        "actor_rollout_ref.actor.optim.lr_scheduler_type=cosine",
        "trainer.total_training_steps=5",
        "trainer.test_freq=2",
        "trainer.save_freq=2",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def uninterrupted(options, tmp_path_factory) -> tuple[list[dict], dict[str, torch.Tensor]]:
    data, model, keys = options
    run_dir = tmp_path_factory.mktemp("uninterrupted")
    return train(config(data, model, run_dir, *keys)), exported(run_dir)


def exported(run_dir: Path) -> dict[str, torch.Tensor]:
    assert export.main([str(run_dir), str(run_dir / "exported")]) == 0
    return load_file(run_dir / "exported" / "model.safetensors")


@pytest.mark.slow  # each run is killed in a process of its own
@pytest.mark.parametrize("moment", ["rollout", "update", "save", "background"])
def test_a_run_killed_and_resumed_equals_one_never_stopped(options, uninterrupted, tmp_path, capsys, moment):
    data, model, keys = options
    keys = [*keys, f"trainer.async_save={moment == 'background'}"]
    command = [sys.executable, "-m", "verl.trainer.main_ppo", *overrides(data, model, tmp_path, *keys)]
    environment = os.environ | {"KILL_AT": moment, "PYTHONPATH": str(Path(__file__).parents[2])}
    killed = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    left = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    unfinished = ["global_step_4.incomplete"] if moment in ("save", "background") else []
    assert left == ["global_step_2", *unfinished]

    steps, weights = uninterrupted
    assert train(config(data, model, tmp_path, *keys)) == steps
    said = capsys.readouterr().out
    assert f"resuming from {tmp_path}/checkpoints/global_step_2" in said
    assert ("global_step_4.incomplete is not complete" in said) == bool(unfinished)
    resumed = exported(tmp_path)
    assert resumed.keys() == weights.keys()
    for name, tensor in resumed.items():
        assert torch.equal(tensor, weights[name]), name


@pytest.mark.slow  # two whole runs
def test_the_draws_do_matter(options, uninterrupted, tmp_path):
    """Without restoring the generators, the resumed run is another: what the tests above compare depends on them."""
    data, model, keys = options
    first = [*keys, "trainer.total_training_steps=2", "actor_rollout_ref.actor.optim.lr_scheduler_type=constant"]
    train(config(data, model, tmp_path, *first))
    with pytest.MonkeyPatch.context() as patch:
        for module in ("verl.trainer.ppo.checkpointing", "verl.workers.checkpointed_worker"):
            patch.setattr(f"{module}.restore_generators", lambda states: None)
        assert train(config(data, model, tmp_path, *keys)) != uninterrupted[0]
