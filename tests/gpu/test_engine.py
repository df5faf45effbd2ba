"""The training engine on a GPU, in bfloat16, against the same model in float32 on the CPU."""

from collections.abc import Iterator
from importlib.util import find_spec

import pytest
import torch

from tests.workers.test_policy_update import UpdateWorker, batch, grouped  # noqa: F401 (fixtures)
from verl.protocol import DataProto
from verl.single_controller.dispatch import Dispatch, register
from verl.single_controller.worker_group import LocalWorkerGroup, WorkerGroup
from verl.trainer.config.schema import ActorConfig, ActorRolloutRefConfig
from verl.workers.fsdp_engine import EngineSettings, FSDPEngine
from verl.workers.kernels import use_kernels
from verl.workers.model import ScoringModel, load_language_model

pytestmark = [pytest.mark.gpu(vllm=False), pytest.mark.slow]  # loads kernels, compiles


class KernelWorker(UpdateWorker):
    @register(Dispatch.ALL)
    def build(self, compiled: bool = False, fused: bool = False, **settings) -> None:
        config = ActorRolloutRefConfig()
        config.actor.use_torch_compile, config.model.use_fused_kernels = compiled, fused
        engine_settings = EngineSettings(grad_clip=1e9, **settings)
        lm = load_language_model(self.model_path, engine_settings.packed)
        use_kernels(lm, config, self.device)
        self.engine = FSDPEngine(ScoringModel(lm), self.device, ActorConfig().optim, settings=engine_settings)

    @register(Dispatch.ROWS)
    def gradient(self, data: DataProto, config: ActorConfig, temperature: float) -> dict:
        with self.engine.resident(optimizer=True):
            return super().gradient(data, config, temperature)


@pytest.fixture(scope="module")
def expected(tiny_model, grouped) -> dict[str, torch.Tensor]:  # noqa: F811
    with LocalWorkerGroup(UpdateWorker, (str(tiny_model),), device="cpu") as group:
        group.build()
        return group.gradient(grouped, ActorConfig(), 1.0)[0]["gradients"]


@pytest.fixture
def group(tiny_model) -> Iterator[WorkerGroup]:
    with LocalWorkerGroup(KernelWorker, (str(tiny_model),), device="cuda") as workers:
        yield workers


def assert_close(group: WorkerGroup, data: DataProto, expected: dict[str, torch.Tensor]) -> None:
    """As directions and sizes: bfloat16 has three digits."""
    found = group.gradient(data, ActorConfig(ppo_max_token_len_per_gpu=36), 1.0)[0]["gradients"]
    ours, theirs = (torch.cat([g[name].cpu().double().flatten() for name in expected]) for g in (found, expected))
    assert torch.cosine_similarity(ours, theirs, dim=0) > 0.99
    assert float(ours.norm() / theirs.norm()) == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"gradient_checkpointing": True},
        {"param_offload": True, "optimizer_offload": True},
        {"reduce_per_mini_batch": True},
        {"compiled": True},
        {"compiled": True, "gradient_checkpointing": True},
    ],
)
def test_the_gradient_is_that_of_float32(group, grouped, expected, packed, settings):  # noqa: F811
    group.build(packed=packed, **settings)
    assert_close(group, grouped, expected)


@pytest.mark.skipif(find_spec("liger_kernel") is None, reason="needs liger-kernel")
@pytest.mark.parametrize("packed", [False, True])
def test_ligers_kernels_give_the_gradient_of_float32(group, grouped, expected, packed):  # noqa: F811
    group.build(packed=packed, fused=True)
    assert_close(group, grouped, expected)


def test_masters_are_float32_and_offloaded_ones_come_back(group, grouped):  # noqa: F811
    group.build(packed=True, param_offload=True, optimizer_offload=True)
    engine = group.worker.engine
    assert {p.dtype for p in engine.model.parameters()} == {torch.float32}
    assert {p.device.type for p in engine.model.parameters()} == {"cpu"}
    with engine.resident(optimizer=True):
        assert {p.device.type for p in engine.model.parameters()} == {"cuda"}
    assert {p.device.type for p in engine.model.parameters()} == {"cpu"}


@pytest.mark.gpu(2, vllm=False)
def test_two_gpus_give_the_gradient_of_float32(ray_cluster, tiny_model, grouped, expected):  # noqa: F811
    """Weights scattered by NCCL, gradients reduced by it, packed rows shared by both GPUs."""
    from verl.single_controller.ray_worker_group import RayWorkerGroup

    layouts = [{}, {"fsdp_size": 1}, {"packed": True}, {"packed": True, "sequence_parallel_size": 2}]
    with RayWorkerGroup(KernelWorker, (str(tiny_model),), n_workers_per_node=2, device="cuda") as group:
        for settings in layouts:
            group.build(**settings)
            assert_close(group, grouped, expected)
