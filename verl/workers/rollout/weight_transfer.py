"""How trained weights come to the engines. Every training worker takes part: gathering a sharded tensor is collective.

- `shared_memory` (CPU): one worker per node writes buckets into a file in memory, from which its node's engines load.
- `ipc` (GPU, engines on the training GPUs) and `nccl` (GPU, engines on GPUs of their own): vLLM's own.

Tensors are gathered one at a time and packed into buckets of bounded size; no rank ever holds the whole model.
"""

import os
import socket
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import ray
import torch

if TYPE_CHECKING:
    from verl.workers.fsdp_engine import FSDPEngine

SHARED_MEMORY = "shared_memory"
BUCKET_BYTES = 256 * 2**20
MEMORY_FOLDER = Path("/dev/shm")


@dataclass(frozen=True)
class TensorMeta:
    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]


class PolicyWeights:
    """Whole tensors of the trained policy by Hugging Face name, in the engines' dtype; going through them is
    collective. It has the form that vLLM asks of its senders' source."""

    def __init__(self, policy: "FSDPEngine", dtype: torch.dtype) -> None:
        self.policy = policy
        self.dtype = dtype

    def metadata(self) -> list[TensorMeta]:
        return [TensorMeta(name, self.dtype, tuple(shape)) for name, shape in self.policy.parameter_shapes().items()]

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        return ((name, tensor.to(self.dtype)) for name, tensor in self.policy.full_parameters())


class Engine(Protocol):
    """An engine that takes calls: see `engine_pool`."""

    def submit(self, method: str, *args: Any) -> Future: ...


def tensor_bytes(source: PolicyWeights) -> list[int]:
    """Size of each tensor."""
    return [torch.Size(meta.shape).numel() * meta.dtype.itemsize for meta in source.metadata()]


@dataclass(frozen=True)
class TransferPlan:
    """Which way, to whom. `feeds`: by rank, the engines that this rank's worker talks to."""

    backend: str
    dtype: torch.dtype
    feeds: dict[int, list[Engine]]
    engine_world_size: int  # tensor-parallel ranks of one engine
    timeout_s: float


@dataclass
class Bucket:
    """Tensors in one buffer of bytes: name, dtype, shape and offset of each."""

    entries: list[tuple[str, torch.dtype, tuple[int, ...], int]] = field(default_factory=list)
    size: int = 0

    def add(self, name: str, tensor: torch.Tensor, memory: torch.Tensor) -> None:
        raw = tensor.contiguous().view(-1).view(torch.uint8)
        memory[self.size : self.size + len(raw)].copy_(raw)
        self.entries.append((name, tensor.dtype, tuple(tensor.shape), self.size))
        self.size += -(-len(raw) // 64) * 64  # aligned

    def tensors(self, memory: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
        """(name, view into `memory`)."""
        for name, dtype, shape, offset in self.entries:
            count = dtype.itemsize * torch.Size(shape).numel()
            yield name, memory[offset : offset + count].view(dtype).view(shape)


class EngineClient:
    """One call to several engines at once. The four methods are those that vLLM's senders call."""

    def __init__(self, engines: list[Engine], engine_world_size: int, timeout_s: float) -> None:
        self.engines = engines
        self.engine_world_size = engine_world_size
        self.timeout_s = timeout_s

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        infos = [dict(init_info) for _ in self.engines]
        if "rank_offset" in init_info:  # nccl: engines take their ranks one after the other
            for number, info in enumerate(infos):
                info["rank_offset"] += number * self.engine_world_size
        self._call("init_weight_transfer_engine", lambda number: (infos[number],))

    def close_weight_transfer_engine(self) -> None:
        """Let the engines end what an earlier sender had opened."""
        self._call("shutdown_weight_transfer_engine")

    def start_weight_update(self) -> None:
        self._call("start_weight_update")

    def update_weights(self, update_info: Any) -> None:
        self._call("update_weights", lambda _: (update_info,))

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        self._call("finish_weight_update")

    def _call(self, method: str, args: Callable[[int], tuple[Any, ...]] = lambda _: ()) -> None:
        futures = [engine.submit(method, *args(number)) for number, engine in enumerate(self.engines)]
        for future in futures:
            future.result(timeout=self.timeout_s)


class SharedMemorySender:
    """Feeds the engines of this node through one file in memory; a rank without engines only takes part."""

    def __init__(self, client: EngineClient, source: PolicyWeights) -> None:
        self.client = client
        self.source = source
        self.memory: torch.Tensor | None = None

    def send_weights(self) -> None:
        if not self.client.engines:
            for _ in self.source:
                pass
            return
        if self.memory is None:
            self._open()
        assert self.memory is not None
        self.client.start_weight_update()
        bucket = Bucket()
        for name, tensor in self.source:
            if bucket.entries and bucket.size + tensor.nbytes > len(self.memory):
                self.client.update_weights({"bucket": bucket})
                bucket = Bucket()
            bucket.add(name, tensor, self.memory)
        self.client.update_weights({"bucket": bucket})
        self.client.finish_weight_update()

    def _open(self) -> None:
        """Make the file, which a bucket or, if larger, the largest tensor fits into. Its name goes when all have it
        open, so that nothing is left behind however the run ends."""
        sizes = tensor_bytes(self.source)
        size = max(*sizes, min(BUCKET_BYTES, sum(sizes) + 64 * len(sizes)))
        folder = MEMORY_FOLDER if MEMORY_FOLDER.is_dir() else Path(tempfile.gettempdir())
        with tempfile.NamedTemporaryFile(prefix="riskpo-weights-", dir=folder) as file:
            try:
                os.posix_fallocate(file.fileno(), 0, size)  # a sparse file would end the process when it is written to
            except OSError as error:
                raise RuntimeError(
                    f"no room for {size / 2**20:.0f} MiB in {folder}, through which weights go to the engines "
                    f"({error.strerror}): make it larger, in Docker by --shm-size"
                ) from error
            self.memory = torch.from_file(file.name, shared=True, size=size, dtype=torch.uint8)
            self.client.init_weight_transfer_engine({"path": file.name, "size": size})

    def shutdown(self) -> None:
        self.memory = None


def make_sender(plan: TransferPlan, rank: int, source: PolicyWeights) -> Any:
    """The sender of this training worker: `send_weights()`, collective, and `shutdown()`."""
    client = EngineClient(plan.feeds.get(rank, []), plan.engine_world_size, plan.timeout_s)
    if plan.backend == SHARED_MEMORY:
        return SharedMemorySender(client, source)
    from vllm.distributed.weight_transfer import WeightTransferTrainerFactory

    bucket_bytes = max(BUCKET_BYTES, *tensor_bytes(source))  # vLLM refuses a tensor that is larger than its buffer
    info = _vllm_init_info(plan, rank, bucket_bytes)
    if plan.backend == "nccl":
        client.close_weight_transfer_engine()
    return WeightTransferTrainerFactory.trainer_init(info, client=client, source=source)


def _vllm_init_info(plan: TransferPlan, rank: int, bucket_bytes: int) -> Any:
    from vllm.distributed.weight_transfer.ipc_engine import IPCTrainerInitInfo
    from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo

    if plan.backend == "ipc":
        return IPCTrainerInitInfo(rank=rank, packed=True, packed_buffer_size_bytes=bucket_bytes)
    engines = len(plan.feeds[0])
    return NCCLTrainerInitInfo(
        master_address=ray.util.get_node_ip_address(),
        master_port=_free_port(),
        world_size=1 + engines * plan.engine_world_size,
        rank=rank,
        packed_buffer_size_bytes=bucket_bytes,
    )


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("", 0))
        return int(listener.getsockname()[1])
