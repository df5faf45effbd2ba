"""What runs inside vLLM's worker processes: weights from shared memory, and checksums of what the engine computes with.

vLLM imports this module there because `VLLMEngine` names `WorkerExtension` as its worker extension.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    LinearBase,
    QKVParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
)
from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload
from vllm.platforms import current_platform

from verl.utils.checksum import probe
from verl.workers.rollout.weight_transfer import SHARED_MEMORY, Bucket


@dataclass
class SharedMemoryInitInfo(WeightTransferInitInfo):
    """The file in memory through which every bucket comes, and its size in bytes."""

    path: str
    size: int


@dataclass
class SharedMemoryUpdateInfo(WeightTransferUpdateInfo):
    """What the file holds now."""

    bucket: Bucket


class SharedMemoryReceiver(WeightTransferEngine[SharedMemoryInitInfo, SharedMemoryUpdateInfo]):
    """Takes weights from a file in memory, in vLLM's layer-by-layer reload; for engines on a CPU."""

    init_info_cls = SharedMemoryInitInfo
    update_info_cls = SharedMemoryUpdateInfo

    memory: torch.Tensor | None = None

    def init_transfer_engine(self, init_info: SharedMemoryInitInfo) -> None:
        self.memory = torch.from_file(init_info.path, shared=True, size=init_info.size, dtype=torch.uint8)

    def start_weight_update(self) -> None:
        initialize_layerwise_reload(self.model)

    def update_weights(self, update_info: dict[str, Bucket]) -> None:
        self.receive_weights(self.parse_update_info(update_info))

    def receive_weights(self, update_info: SharedMemoryUpdateInfo) -> None:
        # Copied: a layer is loaded when its last weight has come, the next bucket may overwrite the first by then.
        assert self.memory is not None, "no init_transfer_engine before"
        weights = [(name, tensor.clone()) for name, tensor in update_info.bucket.tensors(self.memory)]
        self.model.load_weights(weights)

    def finish_weight_update(self) -> None:
        finalize_layerwise_reload(self.model, self.model_config)
        repack_embeddings(self.model)

    def shutdown(self) -> None:
        self.memory = None


WeightTransferEngineFactory.register_engine(SHARED_MEMORY, SharedMemoryReceiver)


def repack_embeddings(model: nn.Module) -> None:
    """On a CPU the head computes with a packed copy of its weight. With tied embeddings vLLM's reload brings new values
    to the weight, through the input embedding, but leaves that copy as it was."""
    if not current_platform.is_cpu():
        return
    for module in model.modules():
        if isinstance(module, VocabParallelEmbedding) and hasattr(module, "cpu_linear"):
            dispatch_cpu_unquantized_gemm(module, remove_weight=False)


class WorkerExtension:
    """Methods added to vLLM's worker. Names carry a prefix, since vLLM refuses one that its worker has."""

    def riskpo_free_bytes(self) -> int:
        """Free memory of this worker's GPU; 0 on a CPU."""
        return torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else 0

    @torch.inference_mode()
    def riskpo_checksums(self) -> tuple[dict[str, float], dict[str, list[str]]]:
        """This worker's share of the checksum of each weight, by vLLM's name; and which weights vLLM fuses into which.

        The shares of all tensor-parallel ranks add up to `verl.utils.checksum.checksum` of the whole weight. Layers are
        asked for their product with the probe, not for their weight: what counts is what they compute with.
        """
        model = self.model_runner.get_model()  # type: ignore[attr-defined]
        rank = self.rank  # type: ignore[attr-defined]
        sums: dict[str, float] = {}
        for module_name, module in model.named_modules():
            for name, parameter in module.named_parameters(recurse=False):
                value = _share(module, name, parameter, rank)
                if value is not None:
                    sums[f"{module_name}.{name}"] = value
        return sums, dict(getattr(model, "packed_modules_mapping", {}))


def _share(module: nn.Module, name: str, parameter: torch.Tensor, rank: int) -> float | None:
    if isinstance(module, QKVParallelLinear) and module.num_kv_head_replicas > 1:
        return None  # ranks hold copies of the key and value heads: their sum is not that of the weight
    counted = rank == 0 or not isinstance(module, ReplicatedLinear)
    if name == "weight" and isinstance(module, LinearBase | VocabParallelEmbedding):
        return _product(module, parameter) if counted else 0.0
    if parameter.ndim != 1:
        return None
    sharded = isinstance(module, ColumnParallelLinear)
    return float(parameter.double().sum()) if counted and (sharded or rank == 0) else 0.0


def _product(module: Any, weight: torch.Tensor) -> float:
    """Sum of the layer's outputs, without bias, for the probe as input."""
    if isinstance(module, RowParallelLinear):
        size = module.input_size_per_partition
        x = probe(module.input_size)[module.tp_rank * size : (module.tp_rank + 1) * size]
    elif isinstance(module, LinearBase):
        x = probe(module.input_size)
    else:
        x = probe(module.embedding_dim)
    dtype = weight.dtype
    x = x.to(weight.device, dtype)[None]
    is_head = hasattr(module, "cpu_linear") or type(module) is not VocabParallelEmbedding
    y = module.quant_method.apply(module, x, bias=None) if is_head else nn.functional.linear(x, weight)
    return float(y.double().sum())
