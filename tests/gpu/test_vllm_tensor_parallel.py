"""An engine split over the GPUs of two training workers, which it shares: each rank opens its own worker's memory."""

from collections.abc import Iterator

import pytest
import torch

from data_processing import make_tiny_model
from tests.gpu.vllm_runs import CACHE_BYTES, GREEDY, assert_engines_follow_the_trainer, running
from tests.workers.rollout.engine_agreement import engine_output, prompts_of
from verl.trainer.ppo.ray_trainer import RayPPOTrainer

pytestmark = [pytest.mark.gpu(2), pytest.mark.slow]  # starts engines

KEYS = [
    "trainer.worker_group=ray",
    "trainer.n_gpus_per_node=2",
    "actor_rollout_ref.rollout.tensor_model_parallel_size=2",
    "actor_rollout_ref.rollout.enforce_eager=True",
]


@pytest.fixture(scope="module")
def trainer(ray_cluster, arithmetic_data, tmp_path_factory) -> Iterator[RayPPOTrainer]:
    """A model with two heads for keys, one for each rank."""
    model = tmp_path_factory.mktemp("model")
    make_tiny_model.main(["--output-dir", str(model), "--hidden-size", "128", "--heads", "4", "--kv-heads", "2"])
    with running(arithmetic_data, model, tmp_path_factory.mktemp("run"), *KEYS) as trainer:
        yield trainer


def test_one_engine_has_both_workers_gpus_and_claims_none(trainer):
    (place,) = trainer.rollout.places
    assert place.gpus.split(",") == [worker.gpus for worker in trainer.rollout.locations] and place.claimed_gpus == 0


def test_the_engine_computes_with_the_trained_weights(trainer):
    assert_engines_follow_the_trainer(trainer)


def test_both_ranks_sleep_and_wake(trainer):
    before = engine_output(trainer, prompts_of(50), GREEDY)
    assert trainer.rollout.pause()["rollout/freed_gb"] > 0.9 * 2 * CACHE_BYTES / 2**30
    trainer.rollout.update_weights()
    assert torch.equal(engine_output(trainer, prompts_of(50), GREEDY).responses, before.responses)
