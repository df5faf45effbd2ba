"""A worker's part of a checkpoint: whole, on any number of workers, and written while training goes on."""

import random
import threading

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from verl.export import export
from verl.protocol import DataProto
from verl.single_controller.dispatch import Dispatch, register
from verl.single_controller.worker_group import LocalWorkerGroup, WorkerError
from verl.trainer.config.schema import OptimConfig
from verl.utils.checkpoint import CheckpointFolder
from verl.utils.tokenizer import load_tokenizer
from verl.workers import engine_checkpoint
from verl.workers.checkpointed_worker import CheckpointedWorker
from verl.workers.fsdp_engine import EngineSettings, FSDPEngine
from verl.workers.lora import add_adapters
from verl.workers.model import ScoringModel, load_language_model


class SavedWorker(CheckpointedWorker):
    """A policy, and a second engine beside it as a critic is."""

    @register(Dispatch.ALL)
    def build(self, model_path: str, settings: EngineSettings | None = None, lora_rank: int = 0) -> None:
        self.tokenizer = load_tokenizer(model_path)
        optim = OptimConfig(lr=1e-2, lr_scheduler_type="linear")
        for name in ("actor", "critic"):
            lm = load_language_model(model_path)
            if lora_rank:
                add_adapters(lm, lora_rank, alpha=2)
            setattr(self, name, FSDPEngine(ScoringModel(lm), self.device, optim, 10, settings))

    @register(Dispatch.ALL)
    def step(self, seed: int) -> None:
        """One optimizer step of each engine on random gradients, the same on every worker."""
        generator = torch.Generator().manual_seed(seed)
        for engine in (self.actor, self.critic):
            loss = torch.zeros(())
            for parameter in filter(lambda parameter: parameter.requires_grad, engine.model.parameters()):
                full = parameter.full_tensor()
                loss = loss + (full * torch.randn(full.shape, generator=generator)).sum()
            engine.backward(loss / self.world_size)
            engine.step()

    @register(Dispatch.RANK_ZERO)
    def state(self) -> dict[str, torch.Tensor]:
        """Weights and the optimizer's moments of both engines."""
        found = {}
        for engine_name, engine in (("actor", self.actor), ("critic", self.critic)):
            for name, parameter in engine.model.named_parameters():
                found[f"{engine_name}.{name}"] = parameter.detach().full_tensor().clone()
                for moment, value in engine.optimizer.state.get(parameter, {}).items():
                    whole = value.full_tensor() if hasattr(value, "full_tensor") else value
                    found[f"{engine_name}.{name}.{moment}"] = whole.clone()
        return found

    @register(Dispatch.ROWS)
    def loss_and_gradients(self, data: DataProto) -> dict:
        """The negative mean log-prob of the response tokens of all workers, and its gradient; moves nothing."""
        mask = data["response_mask"]
        tokens = float(self.actor.sum_over_workers(mask.sum().double()))
        loss = -(self.actor.forward(data, 1.0)[0] * mask).sum() / tokens
        self.actor.backward(loss)
        gradients = {name: p.grad.full_tensor().clone() for name, p in self.actor.model.named_parameters()}
        self.actor.optimizer.zero_grad()
        return {"loss": float(self.actor.sum_over_workers(loss.detach().double())), "gradients": gradients}

    @register(Dispatch.ALL)
    def draw(self) -> tuple[float, float, float]:
        """A number of each global generator."""
        return random.random(), float(np.random.rand()), float(torch.rand(()))  # noqa: NPY002


@pytest.fixture
def start(tiny_model):
    groups = []

    def local(**options) -> LocalWorkerGroup:
        groups.append(LocalWorkerGroup(SavedWorker, device="cpu"))
        groups[-1].build(str(tiny_model), **options)
        return groups[-1]

    yield local
    for group in groups:
        group.shutdown()


def save(group, root, step: int = 1, in_background: bool = False):
    """A whole checkpoint of the group, without the driver's part; returns its folder."""
    folder = CheckpointFolder(root)
    group.write_checkpoint(str(folder.begin(step)), in_background)
    files = {}
    for part in group.checkpoint_files(True):
        files |= part
    return folder.commit(step, files)


def assert_equal(a: dict, b: dict) -> None:
    assert a.keys() == b.keys()
    for name, tensor in a.items():
        assert torch.equal(tensor, b[name]), name


@pytest.mark.parametrize("lora_rank", [0, 2])
def test_every_engine_continues_bit_for_bit(start, tmp_path, lora_rank):
    one = start(lora_rank=lora_rank)
    one.step(1)
    one.worker.critic.skipped_in_a_row = 3
    path = save(one, tmp_path)
    one.step(2)
    other = start(lora_rank=lora_rank)
    other.load_checkpoint(str(path))
    assert other.worker.critic.skipped_in_a_row == 3
    other.step(2)
    assert_equal(other.state(), one.state())


@pytest.mark.parametrize("in_background", [False, True])
def test_every_file_is_recorded(start, tmp_path, in_background):
    group = start()
    path = save(group, tmp_path, in_background=in_background)
    files = {str(file.relative_to(path)) for file in path.rglob("*") if file.is_file()}
    assert {"actor/.metadata", "critic/.metadata", "huggingface/config.json", "generators/rank_0.pt"} < files
    for name in files - {"manifest.json"}:
        assert group.find_checkpoint_fault(str(path)) == [None]
        whole = (path / name).read_bytes()
        (path / name).write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        assert group.find_checkpoint_fault(str(path)) == [f"{name} is not what was written (its checksum differs)"]
        (path / name).write_bytes(whole)


def test_a_users_draws_continue_too(start, tmp_path):
    group = start()
    group.seed_generators(7)
    first = group.draw()
    path = save(group, tmp_path)
    expected = group.draw()
    assert expected != first
    group.load_checkpoint(str(path))
    assert group.draw() == expected
    group.seed_generators(7)
    assert group.draw() == first


def test_what_is_written_in_the_background_is_the_state_at_the_call(start, tmp_path, monkeypatch):
    """The write is held back until two more steps are done."""
    group, go_on = start(), threading.Event()
    group.step(1)
    at_once = save(group, tmp_path / "at_once")
    write = engine_checkpoint.write
    monkeypatch.setattr(engine_checkpoint, "write", lambda *args: (go_on.wait(60), write(*args)))
    folder = tmp_path / "background"
    folder.mkdir()
    group.write_checkpoint(str(folder), True)
    group.step(2)
    assert group.checkpoint_files(False) == [None]
    group.step(3)
    go_on.set()
    files = group.checkpoint_files(True)[0]
    for name, entry in files.items():
        if not name.endswith(".metadata"):  # it has a random id
            assert (folder / name).read_bytes() == (at_once / name).read_bytes(), name
            assert entry.size == (folder / name).stat().st_size


def test_a_write_that_fails_in_the_background_is_an_error_that_names_the_checkpoint(start, tmp_path):
    group = start()
    (tmp_path / "global_step_4.incomplete").mkdir()
    (tmp_path / "global_step_4.incomplete" / "critic").write_text("where a folder should be")
    group.write_checkpoint(str(tmp_path / "global_step_4.incomplete"), True)
    with pytest.raises(RuntimeError, match=r"checkpoint .*global_step_4.*critic was not written: .*FileExistsError"):
        group.checkpoint_files(True)


@pytest.fixture(scope="module")
def batch() -> DataProto:
    n, p, t = 6, 4, 7
    generator = torch.Generator().manual_seed(0)
    return DataProto.from_dict(
        {
            "prompts": torch.randint(5, 60, (n, p), generator=generator),
            "prompt_length": torch.full((n,), p),
            "responses": torch.randint(5, 60, (n, t), generator=generator),
            "response_mask": torch.arange(t) < torch.randint(1, t + 1, (n, 1), generator=generator),
        }
    )


@pytest.fixture(scope="module")
def two(ray_cluster, tiny_model):
    from verl.single_controller.ray_worker_group import RayWorkerGroup

    with RayWorkerGroup(SavedWorker, n_workers_per_node=2, device="cpu") as group:
        group.build(str(tiny_model))
        yield group


def assert_same_to_rounding(one: dict, other: dict) -> None:
    assert one["loss"] == pytest.approx(other["loss"], rel=1e-5)
    for name, gradient in one["gradients"].items():
        torch.testing.assert_close(other["gradients"][name], gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.slow  # starts two Ray workers
def test_on_another_number_of_workers_losses_and_gradients_agree(two, start, batch, tmp_path):
    one = start()
    one.step(1)
    two.load_checkpoint(str(save(one, tmp_path / "of_one")))
    assert_equal(two.state(), one.state())
    before = one.loss_and_gradients(batch)[0]
    assert_same_to_rounding(before, two.loss_and_gradients(batch)[0])

    two.step(2)
    one.load_checkpoint(str(save(two, tmp_path / "of_two")))
    assert_equal(one.state(), two.state())
    after = one.loss_and_gradients(batch)[0]
    assert_same_to_rounding(after, two.loss_and_gradients(batch)[0])
    assert abs(after["loss"] - before["loss"]) > 1e-3  # the step did move it


@pytest.mark.slow  # starts two Ray workers
def test_two_copies_of_a_model_are_written_once_and_load_anywhere(two, start, tiny_model, tmp_path):
    two.build(str(tiny_model), settings=EngineSettings(fsdp_size=1))
    two.step(1)
    one = start()
    path = save(two, tmp_path / "of_two")
    one.load_checkpoint(str(path))
    assert_equal(one.state(), two.state())
    alone = save(one, tmp_path / "of_one")
    written, single = (sum(file.stat().st_size for file in p.glob("actor/*.distcp")) for p in (path, alone))
    assert written == pytest.approx(single, rel=0.01)
    one.step(2)
    two.load_checkpoint(str(save(one, tmp_path / "of_one", step=2)))
    assert_equal(two.state(), one.state())
    two.build(str(tiny_model))


@pytest.mark.slow  # starts two Ray workers
def test_what_two_workers_wrote_is_exported_by_one_process(two, tmp_path):
    export(save(two, tmp_path), tmp_path / "out")
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    for name, tensor in exported.named_parameters():
        assert torch.equal(tensor, two.state()[f"actor.lm.{name}"]), name


@pytest.mark.slow  # starts two Ray workers
def test_two_workers_write_while_they_train_and_each_gets_its_draws_back(two, tmp_path):
    two.seed_generators(1)
    expected = two.state()
    folder = CheckpointFolder(tmp_path)
    two.write_checkpoint(str(folder.begin(1)), True)
    draws = two.draw()
    assert draws[0] != draws[1]
    for seed in range(3, 8):  # collectives beside those of the write
        two.step(seed)
    files = {}
    for part in two.checkpoint_files(True):
        files |= part
    assert {"generators/rank_0.pt", "generators/rank_1.pt"} < files.keys()
    path = folder.commit(1, files)
    assert two.find_checkpoint_fault(str(path)) == [None, None]
    two.load_checkpoint(str(path))
    assert_equal(two.state(), expected)
    assert two.draw() == draws


@pytest.mark.slow  # starts two Ray workers
def test_a_fault_is_found_by_the_worker_that_reads_the_file(two, tmp_path):
    path = save(two, tmp_path)
    shard = path / "actor" / "__1_0.distcp"
    whole = bytearray(shard.read_bytes())
    whole[len(whole) // 2] ^= 1
    shard.write_bytes(whole)
    faults = two.find_checkpoint_fault(str(path))
    assert [fault for fault in faults if fault] == ["actor/__1_0.distcp is not what was written (its checksum differs)"]


@pytest.mark.slow  # starts two Ray workers
def test_a_write_that_fails_names_rank_and_checkpoint(two, tmp_path):
    """The last test of the group, which the error ends."""
    folder = tmp_path / "global_step_4.incomplete"
    folder.mkdir()
    (folder / "actor").write_text("where a folder should be")
    two.write_checkpoint(str(folder), True)
    with pytest.raises(WorkerError, match=r"rank \d .*global_step_4.*actor was not written: .*rank 0: FileExists"):
        two.checkpoint_files(True)
