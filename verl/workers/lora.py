"""Low-rank adapters (LoRA) by peft: on every linear layer but the head, merged whenever weights leave the engine."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

ADAPTER = "default"  # peft's name of the one adapter


def add_adapters(lm: PreTrainedModel, rank: int, alpha: int) -> None:
    """Add adapters of `rank`, scaled by alpha / rank, in place. At first they add nothing: B is 0, and A random, equal
    on all workers."""
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules="all-linear", task_type="CAUSAL_LM")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        inject_adapter_in_model(config, lm, adapter_name=ADAPTER)


def is_adapter(name: str) -> bool:
    return ".lora_A." in name or ".lora_B." in name


@contextmanager
def without_adapters(lm: nn.Module) -> Iterator[None]:
    """The model as it was before training: the reference policy, without weights of its own."""
    layers = [module for module in lm.modules() if isinstance(module, LoraLayer)]
    scalings = [layer.scaling[ADAPTER] for layer in layers]
    for layer in layers:
        layer.scaling[ADAPTER] = 0.0
    try:
        yield
    finally:
        for layer, scaling in zip(layers, scalings, strict=True):
            layer.scaling[ADAPTER] = scaling


def merged_parameters(lm: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Hugging Face name and whole tensor of each parameter, one at a time, adapters merged into their layer's weight;
    tied weights come once. Collective where the model is sharded."""
    layers = {name: module for name, module in lm.named_modules() if isinstance(module, LoraLayer)}
    for name, parameter in lm.named_parameters():
        if is_adapter(name):
            continue
        tensor = whole(parameter)
        owner, _, last = name.rpartition(".base_layer.")
        if last == "weight":
            layer = layers[owner]
            a, b = (whole(adapter[ADAPTER].get_parameter("weight")) for adapter in (layer.lora_A, layer.lora_B))
            tensor = tensor + layer.scaling[ADAPTER] * (b @ a)
        yield hub_name(name), tensor


def hub_name(name: str) -> str:
    """A parameter's name in the model without adapters."""
    return name.replace(".base_layer.", ".")


def whole(parameter: torch.Tensor) -> torch.Tensor:
    """The whole tensor of a sharded one."""
    tensor = parameter.detach()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
