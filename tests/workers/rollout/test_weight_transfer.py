"""Trained weights on their way to engines through a file in memory, with a small receiver in an engine's place."""

import shutil
import tempfile
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2ForCausalLM

from verl.single_controller.dispatch import Dispatch, register
from verl.single_controller.worker import Worker
from verl.single_controller.worker_group import LocalWorkerGroup
from verl.workers.fsdp_engine import FSDPEngine
from verl.workers.model import ScoringModel, load_language_model
from verl.workers.rollout import weight_transfer
from verl.workers.rollout.weight_transfer import (
    SHARED_MEMORY,
    Bucket,
    EngineClient,
    PolicyWeights,
    SharedMemorySender,
    TensorMeta,
    TransferPlan,
    make_sender,
)


class Receiver:
    """Takes the calls of a sender as an engine does: opens the file, copies what a bucket holds."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.weights: dict[str, torch.Tensor] = {}
        self.bucket_sizes: list[int] = []

    def submit(self, method: str, *args: Any) -> Future:
        self.calls.append(method)
        future: Future = Future()
        try:
            future.set_result(getattr(self, method)(*args))
        except OSError as error:
            future.set_exception(error)
        return future

    def init_weight_transfer_engine(self, info: dict[str, Any]) -> None:
        self.size = info["size"]
        self.memory = torch.from_file(info["path"], shared=True, size=self.size, dtype=torch.uint8)

    def start_weight_update(self) -> None:
        self.weights = {}

    def update_weights(self, info: dict[str, Bucket]) -> None:
        bucket = info["bucket"]
        self.bucket_sizes.append(
            sum(dtype.itemsize * torch.Size(shape).numel() for _, dtype, shape, _ in bucket.entries)
        )
        for name, tensor in bucket.tensors(self.memory):
            assert name not in self.weights and tensor.data_ptr() % 64 == 0
            self.weights[name] = tensor.clone()

    def finish_weight_update(self) -> None:
        pass


class Weights:
    """A source of given tensors, in the form of PolicyWeights."""

    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        self.tensors = tensors
        self.passes = 0

    def metadata(self) -> list[TensorMeta]:
        return [TensorMeta(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in self.tensors.items()]

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        self.passes += 1
        return iter(self.tensors.items())


def some_weights(dtype: torch.dtype = torch.float32, seed: int = 0) -> dict[str, torch.Tensor]:
    """Sizes that are no multiples of the alignment, a scalar, and one that lies transposed in memory."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(5, 7), (3,), (), (40, 11), (1, 1, 9), (64,), (129,)]
    tensors = {f"w{i}": torch.randn(shape, generator=generator).to(dtype) for i, shape in enumerate(shapes)}
    return tensors | {"transposed": torch.randn(6, 4, generator=generator).to(dtype).T}


def assert_equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert list(a) == list(b)
    for name, tensor in a.items():
        assert tensor.dtype == b[name].dtype and torch.equal(tensor, b[name]), name


@pytest.fixture
def memory_folder(monkeypatch) -> Iterator[Path]:
    """A folder of this test alone in the memory that the files are in."""
    in_memory = weight_transfer.MEMORY_FOLDER.is_dir()
    folder = Path(tempfile.mkdtemp(prefix="riskpo-test-", dir=weight_transfer.MEMORY_FOLDER if in_memory else None))
    monkeypatch.setattr(weight_transfer, "MEMORY_FOLDER", folder)
    yield folder
    shutil.rmtree(folder)


def send(source: Any, *receivers: Receiver, timeout_s: float = 5.0) -> SharedMemorySender:
    sender = SharedMemorySender(EngineClient(list(receivers), 1, timeout_s), source)
    sender.send_weights()
    return sender


# ---------------------------------------------------------------------------------------------------------- bucket
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_bucket_gives_back_what_was_put_in(dtype):
    memory, bucket, tensors = torch.zeros(4096, dtype=torch.uint8), Bucket(), some_weights(dtype)
    for name, tensor in tensors.items():
        bucket.add(name, tensor, memory)
    assert_equal(dict(bucket.tensors(memory)), tensors)
    offsets = [offset for *_, offset in bucket.entries]
    assert all(offset % 64 == 0 for offset in [*offsets, bucket.size]) and offsets == sorted(set(offsets))


def test_a_buckets_tensors_are_views_of_the_memory():
    memory, bucket = torch.zeros(64, dtype=torch.uint8), Bucket()
    bucket.add("w", torch.ones(4), memory)
    (_, view), memory[:] = next(bucket.tensors(memory)), 0
    assert view.tolist() == [0, 0, 0, 0]


# ------------------------------------------------------------------------------------------------- shared memory
@pytest.mark.parametrize("bucket_bytes", [1, 300, 1000, 10**6])
def test_weights_arrive_bit_for_bit_whatever_the_bucket(memory_folder, monkeypatch, bucket_bytes):
    """With 1 byte every bucket holds one tensor; with 300 the largest tensor (1,760 bytes) is larger than a bucket."""
    monkeypatch.setattr(weight_transfer, "BUCKET_BYTES", bucket_bytes)
    receiver, tensors = Receiver(), some_weights()
    send(Weights(tensors), receiver)
    assert_equal(receiver.weights, tensors)
    assert receiver.size <= max(bucket_bytes, 4 * 40 * 11, 64 * len(tensors) + sum(t.nbytes for t in tensors.values()))
    assert all(size <= receiver.size for size in receiver.bucket_sizes)
    buckets = receiver.calls.count("update_weights")
    assert buckets == 1 if bucket_bytes == 10**6 else buckets > 1
    assert receiver.calls == ["init_weight_transfer_engine", "start_weight_update"] + ["update_weights"] * buckets + [
        "finish_weight_update"
    ]


def test_every_update_goes_through_the_same_file(memory_folder):
    receiver, source = Receiver(), Weights(some_weights(seed=0))
    sender = send(source, receiver)
    source.tensors = some_weights(seed=1)
    sender.send_weights()
    assert_equal(receiver.weights, source.tensors)
    assert receiver.calls.count("init_weight_transfer_engine") == 1


def test_all_engines_of_a_node_read_one_file(memory_folder):
    receivers, source = [Receiver(), Receiver()], Weights(some_weights())
    send(source, *receivers)
    for receiver in receivers:
        assert_equal(receiver.weights, source.tensors)
    assert source.passes == 1


def test_nothing_is_left_in_memory(memory_folder):
    """The file has no name any more as soon as the engines have it open, even if a transfer breaks off later."""
    sender = send(Weights(some_weights()), Receiver())
    assert list(memory_folder.iterdir()) == []
    sender.shutdown()
    assert sender.memory is None


def test_nothing_is_left_in_memory_when_an_engine_cannot_open_the_file(memory_folder):
    receiver = Receiver()
    receiver.init_weight_transfer_engine = lambda info: (_ for _ in ()).throw(OSError("no such file"))
    with pytest.raises(OSError, match="no such file"):
        send(Weights(some_weights()), receiver)
    assert list(memory_folder.iterdir()) == []


def test_a_worker_without_engines_gathers_with_the_others(memory_folder):
    source = Weights(some_weights())
    send(source)
    assert source.passes == 1 and list(memory_folder.iterdir()) == []


def test_an_engine_that_does_not_answer_ends_the_transfer(memory_folder):
    receiver = Receiver()
    receiver.submit = lambda method, *args: Future()
    with pytest.raises(TimeoutError):
        send(Weights(some_weights()), receiver, timeout_s=0.1)


def test_a_worker_talks_to_its_own_nodes_engines():
    first, second = Receiver(), Receiver()
    plan = TransferPlan(SHARED_MEMORY, torch.float32, {0: [first], 2: [second]}, 1, 5.0)
    senders = [make_sender(plan, rank, Weights({})) for rank in range(3)]
    assert [sender.client.engines for sender in senders] == [[first], [], [second]]


# ------------------------------------------------------------------------------------------------------ the client
def test_engines_take_their_nccl_ranks_one_after_the_other():
    """Rank 0 is the trainer's; three engines of two GPUs each have ranks 1-2, 3-4, 5-6."""

    class Noting(Receiver):
        def init_weight_transfer_engine(self, info: dict[str, Any]) -> None:
            self.info = info

    engines = [Noting(), Noting(), Noting()]
    info = {"master_address": "10.0.0.1", "rank_offset": 1, "world_size": 7}
    EngineClient(engines, engine_world_size=2, timeout_s=5.0).init_weight_transfer_engine(info)
    assert [engine.info["rank_offset"] for engine in engines] == [1, 3, 5] and info["rank_offset"] == 1
    assert all(engine.info | {"rank_offset": 1} == info for engine in engines)


def test_a_call_is_under_way_in_all_engines_before_one_is_waited_for():
    """An engine's update waits for the others': called one after the other they would wait for ever."""
    started: list[Future] = []

    class Waiting:
        def submit(self, method: str, *args: Any) -> Future:
            started.append(Future())
            if len(started) == 2:
                for future in started:
                    future.set_result(None)
            return started[-1]

    EngineClient([Waiting(), Waiting()], 1, timeout_s=1.0).start_weight_update()


# ---------------------------------------------------------------------------------------------------- the policy
class PolicyWorker(Worker):
    @register(Dispatch.ALL)
    def build(self, model_path: str, dtype: torch.dtype) -> None:
        self.source = PolicyWeights(FSDPEngine(ScoringModel(load_language_model(model_path)), self.device), dtype)

    @register(Dispatch.RANK_ZERO)
    def weights(self) -> dict[str, torch.Tensor]:
        return {name: tensor.clone() for name, tensor in self.source}

    @register(Dispatch.RANK_ZERO)
    def metadata(self) -> list[TensorMeta]:
        return self.source.metadata()

    @register(Dispatch.ALL)
    def send(self, plan: TransferPlan) -> None:
        make_sender(plan, self.rank, self.source).send_weights()


@pytest.fixture(scope="module")
def untied_model(tiny_model, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("untied")
    model = Qwen2ForCausalLM.from_pretrained(tiny_model)
    model.config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(torch.randn(model.lm_head.weight.shape))
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(folder)
    return folder


@pytest.fixture(params=["tied", "untied"])
def model_path(request, tiny_model, untied_model) -> Path:
    return {"tied": tiny_model, "untied": untied_model}[request.param]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_policys_weights_are_those_of_the_model_in_the_engines_dtype(model_path, dtype):
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)
    with LocalWorkerGroup(PolicyWorker, device="cpu") as group:
        group.build(str(model_path), dtype)
        weights, metadata = group.weights(), group.metadata()
    # A tied head comes once, as the input embedding.
    assert_equal(weights, {name: p.detach().to(dtype) for name, p in model.named_parameters()})
    assert ("lm_head.weight" in weights) == (not model.config.tie_word_embeddings)
    assert metadata == [TensorMeta(name, w.dtype, tuple(w.shape)) for name, w in weights.items()]


def test_the_policys_weights_come_to_an_engine(model_path, memory_folder, monkeypatch):
    monkeypatch.setattr(weight_transfer, "BUCKET_BYTES", 20_000)  # the embedding has 67,584 bytes
    receiver = Receiver()
    with LocalWorkerGroup(PolicyWorker, device="cpu") as group:
        group.build(str(model_path), torch.float32)
        group.send(TransferPlan(SHARED_MEMORY, torch.float32, {0: [receiver]}, 1, 5.0))
        assert_equal(receiver.weights, group.weights())
    assert receiver.calls.count("update_weights") > 2 and list(memory_folder.iterdir()) == []
