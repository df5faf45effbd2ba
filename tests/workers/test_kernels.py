import sys
from importlib.machinery import ModuleSpec
from types import ModuleType

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tests.workers.test_sequences import answers
from verl.trainer.config.schema import ActorRolloutRefConfig
from verl.workers.attention import use_packed_attention
from verl.workers.kernels import apply_fused_kernels, compile_layers, use_kernels
from verl.workers.model import decode
from verl.workers.sequences import Layout, Sequences

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def lm() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=16, vocab_size=64
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture
def liger(monkeypatch) -> ModuleType:
    """A stand-in for the package, which needs a GPU: `applied` holds the keywords of each call."""
    package, module = ModuleType("liger_kernel"), ModuleType("liger_kernel.transformers")
    package.__spec__ = ModuleSpec("liger_kernel", None)
    module.applied = []
    module.apply_liger_kernel_to_llama = lambda **keywords: module.applied.append(keywords)
    monkeypatch.setitem(sys.modules, "liger_kernel", package)
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", module)
    return module


def test_fused_kernels_go_into_the_loaded_model_and_leave_the_head(liger, lm):
    apply_fused_kernels(lm, GPU)
    assert liger.applied == [{"model": lm, "cross_entropy": False, "fused_linear_cross_entropy": False}]


def test_fused_kernels_that_cannot_be_had_are_refused(liger, lm, monkeypatch):
    with pytest.raises(ValueError, match="use_fused_kernels=True needs a GPU: set it to False"):
        apply_fused_kernels(lm, CPU)
    lm.config.model_type = "newest"
    with pytest.raises(ValueError, match="no kernels for `newest` models"):
        apply_fused_kernels(lm, GPU)
    monkeypatch.setitem(sys.modules, "liger_kernel", None)
    with pytest.raises(ValueError, match="needs liger-kernel: install it with"):
        apply_fused_kernels(lm, GPU)


def test_only_what_is_asked_for_is_used_and_nothing_is_compiled_on_a_cpu(liger, lm):
    forward = [layer.forward for layer in lm.model.layers]
    use_kernels(lm, configured(), GPU)
    use_kernels(lm, configured(compiled=True), CPU)
    assert [layer.forward for layer in lm.model.layers] == forward and liger.applied == []
    use_kernels(lm, configured(compiled=True), GPU)
    assert all(layer.forward != before for layer, before in zip(lm.model.layers, forward, strict=True))
    use_kernels(lm, configured(fused=True), GPU)
    assert len(liger.applied) == 1


def configured(fused: bool = False, compiled: bool = False) -> ActorRolloutRefConfig:
    config = ActorRolloutRefConfig()
    config.model.use_fused_kernels, config.actor.use_torch_compile = fused, compiled
    return config


@pytest.mark.parametrize("packed", [False, True])
def test_compiled_layers_are_shared_and_take_any_number_of_tokens(lm, monkeypatch, packed):
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    if packed:
        use_packed_attention(lm, "model")
    layout = Layout(packed)
    batches = [answers([0, 1, 0], lengths) for lengths in ([9, 3, 4], [5, 6, 7], [2, 20, 11], [12, 12, 2])]
    expected = [decode(lm, Sequences.from_batch(data, CPU, layout)) for data in batches]
    names = [name for name, _ in lm.named_parameters()]
    compile_backend = torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda function, dynamic: compile_backend(function, backend=count, dynamic=dynamic)
    )
    torch._dynamo.reset()
    compile_layers(lm)
    found = []
    for data in batches:
        found.append(decode(lm, Sequences.from_batch(data, CPU, layout)))
        if len(found) == 2:
            after_two = len(graphs)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)
    assert 0 < len(graphs) == after_two <= 6
    assert [name for name, _ in lm.named_parameters()] == names
