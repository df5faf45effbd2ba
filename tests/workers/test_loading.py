"""Only worker 0 reads a model's weights; the others get theirs from it."""

import shutil

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig

from verl.single_controller.dispatch import Dispatch, register
from verl.single_controller.worker import Worker
from verl.single_controller.worker_group import WorkerError
from verl.workers import model
from verl.workers.fsdp_engine import EngineSettings, FSDPEngine
from verl.workers.model import ScoringModel, load_language_model


class LoadingWorker(Worker):
    @register(Dispatch.ALL)
    def load(self, folder: str, fsdp_size: int) -> dict[str, torch.Tensor]:
        """The whole weights, from a folder of this worker's own."""
        lm = load_language_model(f"{folder}/{self.rank}", packed=True)
        engine = FSDPEngine(ScoringModel(lm), self.device, settings=EngineSettings(fsdp_size=fsdp_size, packed=True))
        return {name: tensor.clone() for name, tensor in engine.full_parameters()}


@pytest.fixture
def folders(tiny_model, tmp_path):
    """The model for each worker, with weights for worker 0 alone."""
    for rank in range(4):
        shutil.copytree(tiny_model, tmp_path / str(rank))
    for rank in range(1, 4):
        (tmp_path / str(rank) / "model.safetensors").unlink()
    return tmp_path


def test_without_weights_it_is_the_same_model(tiny_model, monkeypatch):
    whole = load_language_model(str(tiny_model))
    monkeypatch.setattr(model, "_reads_weights", lambda: False)
    empty = load_language_model(str(tiny_model))
    shapes, same = ({name: p.shape for name, p in lm.named_parameters()} for lm in (whole, empty))
    assert shapes == same and list(shapes) == list(same)
    torch.testing.assert_close(dict(whole.named_buffers()), dict(empty.named_buffers()), rtol=0, atol=0)
    assert whole.config.to_dict() == empty.config.to_dict()
    assert whole.generation_config.to_dict() == empty.generation_config.to_dict()


@pytest.mark.slow  # starts Ray workers
def test_every_worker_has_the_weights_that_worker_0_read(ray_cluster, folders):
    from verl.single_controller.ray_worker_group import RayWorkerGroup

    file = load_file(folders / "0" / "model.safetensors")
    with RayWorkerGroup(LoadingWorker, n_workers_per_node=4, device="cpu") as group:
        for fsdp_size in (-1, 2):
            for weights in group.load(str(folders), fsdp_size):
                torch.testing.assert_close(weights, file, rtol=0, atol=0)


@pytest.mark.slow  # starts Ray workers
def test_a_worker_with_another_model_is_named_instead_of_waited_for(ray_cluster, folders):
    from verl.single_controller.ray_worker_group import RayWorkerGroup

    config = AutoConfig.from_pretrained(folders / "1")
    config.intermediate_size *= 2
    config.save_pretrained(folders / "1")
    refusal = pytest.raises(WorkerError, match="on rank 1 .* worker 0 has another model; what differs: .*mlp")
    with RayWorkerGroup(LoadingWorker, n_workers_per_node=2, device="cpu") as group, refusal:
        group.load(str(folders), -1)
