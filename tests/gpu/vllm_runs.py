"""What the modules of this folder share: a trainer with vLLM engines on GPUs, and what must hold of any."""

import contextlib
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.e2e import runs
from tests.workers.rollout.engine_agreement import NEW_TOKENS, engine_output, prompts_of, train_steps
from verl.trainer.main_ppo import build
from verl.trainer.ppo.generation import expand
from verl.trainer.ppo.ray_trainer import RayPPOTrainer
from verl.utils.checksum import mismatches
from verl.workers.rollout import engine_rollout
from verl.workers.rollout.base import GenerationOutput, SamplingParams, ignore
from verl.workers.rollout.weight_check import THRESHOLDS, TOLERANCES

GREEDY = SamplingParams(NEW_TOKENS, greedy=True)
CACHE_BYTES = 2**30
LIMIT = THRESHOLDS[torch.bfloat16]
KEYS = [
    f"custom_reward_function.path={Path(runs.__file__)}",
    "custom_reward_function.name=digit_share",
    "trainer.device=cuda",
    "actor_rollout_ref.rollout.name=vllm",
    "actor_rollout_ref.rollout.max_model_len=512",
    f"actor_rollout_ref.rollout.kv_cache_memory_bytes={CACHE_BYTES}",
]


@contextlib.contextmanager
def running(data: Path, model: Path, run_dir: Path, *keys: str) -> Iterator[RayPPOTrainer]:
    """A started trainer; its workers and engines end with the block."""
    trainer = build(runs.config(data, model, run_dir, *KEYS, *keys))
    try:
        trainer.start()
        yield trainer
    finally:
        trainer.rollout.shutdown()
        trainer.actor.shutdown()


def differences(trainer: RayPPOTrainer, output: GenerationOutput) -> torch.Tensor:
    """Absolute differences of engine's and trainer's log-probs of greedy responses to `prompts_of(len(output))`."""
    questions = prompts_of(len(output.lengths)).select(["prompts", "prompt_length"])
    batch = questions.with_columns(**output.columns())
    batch.meta_info = {"temperature": 1.0}
    ours = trainer.actor.compute_log_prob(batch)["old_log_probs"]
    assert output.log_probs is not None
    return (output.log_probs - ours).abs()[batch["response_mask"]]


def assert_engines_follow_the_trainer(trainer: RayPPOTrainer) -> None:
    """Ten updates: the weights move, and every engine computes with those of now, by log-probs and by checksums."""
    before = engine_output(trainer, prompts_of(200), GREEDY)
    assert float(differences(trainer, before).mean()) < LIMIT
    metrics = train_steps(trainer, 10)
    assert [i + 1 for i, step in enumerate(metrics) if "rollout/weight_check_diff" in step] == [1, 10]
    assert max(step["training/rollout_probs_diff_mean"] for step in metrics) < 0.01
    after = engine_output(trainer, prompts_of(200), GREEDY)
    assert float(differences(trainer, after).mean()) < LIMIT < float(differences(trainer, before).mean())
    assert trainer._update_weights(check=True)["rollout/weight_check_diff"] < LIMIT
    ours = trainer.actor.weight_checksums(torch.bfloat16)
    for sums, fused in trainer.rollout.pool.call_all("checksums"):
        assert len(sums) > 10
        assert [entry for entry in mismatches(sums, ours, fused) if entry[1] > TOLERANCES[torch.bfloat16]] == []


def assert_a_lost_engine_is_replaced(trainer: RayPPOTrainer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed in the middle of a batch: every row gets one response, and the new engine has the weights of now."""
    monkeypatch.setattr(engine_rollout, "SLICE_S", 0.0)
    slot, told = trainer.rollout.pool.slots[0], []
    _, pid = slot.process

    def destroy(rows, output):
        if not told:
            os.kill(pid, signal.SIGKILL)
        told.extend(rows.tolist())

    output, metrics = trainer.rollout.generate(expand(prompts_of(200), 4, seed=1, step=0), GREEDY, 4, destroy)
    assert sorted(told) == list(range(800)) and (output.lengths > 0).all()
    assert metrics["rollout/engine_restarts"] == 1 and slot.process[1] != pid
    monkeypatch.undo()
    assert trainer._update_weights(check=True)["rollout/weight_check_diff"] < LIMIT
    trainer.rollout.generate(expand(prompts_of(20), 4, seed=1, step=1), GREEDY, 4, ignore)
