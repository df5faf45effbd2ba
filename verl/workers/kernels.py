"""Faster kernels for a loaded model, before it is sharded: Liger's, and what torch.compile makes."""

import importlib
from importlib.util import find_spec

import torch
from transformers import PreTrainedModel

from verl.trainer.config.schema import ActorRolloutRefConfig

FUSED_KEY = "actor_rollout_ref.model.use_fused_kernels"


def use_kernels(lm: PreTrainedModel, config: ActorRolloutRefConfig, device: torch.device) -> None:
    """What the configuration asks for."""
    if config.model.use_fused_kernels:
        apply_fused_kernels(lm, device)
    if config.actor.use_torch_compile and device.type == "cuda":
        compile_layers(lm)


def apply_fused_kernels(lm: PreTrainedModel, device: torch.device) -> None:
    """Put Liger's normalisation, gated MLP and rotary embedding in the place of the model's own.

    The head stays ours: Liger's fused one gives a loss, neither log-probs nor entropies of tokens. ValueError on a CPU,
    without Liger, and for a model that Liger does not know.
    """
    if device.type != "cuda":
        raise ValueError(f"{FUSED_KEY}=True needs a GPU: set it to False")
    if find_spec("liger_kernel") is None:
        raise ValueError(
            f"{FUSED_KEY}=True needs liger-kernel: install it with `pip install liger-kernel`, or set False"
        )
    model_type = lm.config.model_type
    apply = getattr(importlib.import_module("liger_kernel.transformers"), f"apply_liger_kernel_to_{model_type}", None)
    if apply is None:
        raise ValueError(f"{FUSED_KEY}=True: liger-kernel has no kernels for `{model_type}` models: set it to False")
    apply(model=lm, cross_entropy=False, fused_linear_cross_entropy=False)


def compile_layers(lm: PreTrainedModel) -> None:
    """Compile every decoder layer for any number of tokens; layers that are alike share the result.

    The layers' forward functions are replaced, not the layers: parameters keep their names, and the hooks of FSDP2 and
    activation checkpointing stay outside.
    """
    for layer in lm.get_decoder().layers:
        layer.forward = torch.compile(layer.forward, dynamic=True)
