"""An engine on a GPU of its own: weights by NCCL."""

from collections.abc import Iterator

import pytest

from tests.gpu.vllm_runs import assert_a_lost_engine_is_replaced, assert_engines_follow_the_trainer, running
from verl.trainer.ppo.ray_trainer import RayPPOTrainer

pytestmark = [pytest.mark.gpu(2), pytest.mark.slow]  # starts engines

KEYS = [
    "trainer.worker_group=ray",
    "actor_rollout_ref.rollout.nnodes=1",
    "actor_rollout_ref.rollout.n_gpus_per_node=1",
    "actor_rollout_ref.rollout.enforce_eager=True",
]


@pytest.fixture(scope="module")
def trainer(ray_cluster, arithmetic_data, tiny_model, tmp_path_factory) -> Iterator[RayPPOTrainer]:
    with running(arithmetic_data, tiny_model, tmp_path_factory.mktemp("run"), *KEYS) as trainer:
        yield trainer


def test_the_engine_computes_with_the_trained_weights(trainer):
    assert trainer.rollout.pool.spec.transfer_backend == "nccl"
    assert_engines_follow_the_trainer(trainer)


def test_it_stays_awake_while_the_worker_trains(trainer):
    assert trainer.rollout.pause() == {}


def test_a_lost_engine_is_replaced(trainer, monkeypatch):
    """The process group with the lost one is given up, a new one made."""
    assert_a_lost_engine_is_replaced(trainer, monkeypatch)
