"""An engine on the training worker's GPU: weights by CUDA IPC, asleep while the worker trains, in both worker groups.

Under `local` the worker is in this process and vLLM's core in a child of it. CUDA graphs are captured: they must
outlive sleep.
"""

from collections.abc import Iterator

import pytest
import torch

from tests.gpu.vllm_runs import (
    CACHE_BYTES,
    GREEDY,
    LIMIT,
    assert_a_lost_engine_is_replaced,
    assert_engines_follow_the_trainer,
    running,
)
from tests.workers.rollout.engine_agreement import engine_output, prompts_of, train_steps
from verl.trainer.ppo.ray_trainer import RayPPOTrainer
from verl.workers.rollout.weight_check import StaleWeights

pytestmark = [pytest.mark.gpu, pytest.mark.slow]  # starts engines and captures graphs


@pytest.fixture(scope="module", params=["ray", "local"])
def trainer(request, arithmetic_data, tiny_model, tmp_path_factory) -> Iterator[RayPPOTrainer]:
    if request.param == "ray":
        request.getfixturevalue("ray_cluster")
    folder = tmp_path_factory.mktemp("run")
    with running(arithmetic_data, tiny_model, folder, f"trainer.worker_group={request.param}") as trainer:
        yield trainer


def free_bytes() -> int:
    """Of all GPUs: those that worker and engine do not use stay as they are."""
    return sum(torch.cuda.mem_get_info(gpu)[0] for gpu in range(torch.cuda.device_count()))


def test_the_engine_computes_with_the_trained_weights(trainer):
    assert trainer.rollout.pool.spec.transfer_backend == "ipc"
    assert_engines_follow_the_trainer(trainer)


def test_a_sleeping_engine_frees_its_memory_and_wakes_as_it_was(trainer):
    before = engine_output(trainer, prompts_of(50), GREEDY)
    awake = free_bytes()
    metrics = trainer.rollout.pause()
    freed = free_bytes() - awake
    assert freed > 0.9 * CACHE_BYTES
    assert metrics["rollout/freed_gb"] == pytest.approx(freed / 2**30, abs=0.1)
    assert trainer._update_weights(check=True)["rollout/weight_check_diff"] < LIMIT
    after = engine_output(trainer, prompts_of(50), GREEDY)
    assert torch.equal(after.responses, before.responses) and torch.equal(after.lengths, before.lengths)


def test_each_step_frees_the_cache(trainer):
    assert train_steps(trainer, 1)[0]["rollout/freed_gb"] > 0.9 * CACHE_BYTES / 2**30


def test_an_engine_that_wakes_without_weights_is_caught(trainer, monkeypatch):
    """Asleep it forgot them: what it computes until new ones come is no policy's."""
    trainer.rollout.pause()
    monkeypatch.setattr(trainer.actor, "update_weights", lambda: None, raising=False)
    with pytest.raises(StaleWeights, match="does not compute with the trained weights"):
        trainer._update_weights(check=True)
    monkeypatch.undo()
    assert trainer._update_weights(check=True)["rollout/weight_check_diff"] < LIMIT


def test_a_lost_engine_is_replaced(trainer, monkeypatch):
    if trainer.config.trainer.worker_group == "local":
        pytest.skip("an engine in this process is not replaced")
    assert_a_lost_engine_is_replaced(trainer, monkeypatch)
