"""Floating-point operations of a training step, and what a GPU could do: their ratio is the model FLOP utilisation."""

from typing import Any

import numpy as np
import torch

# Dense bf16 FLOP/s by a part of the device's name, from the makers' datasheets.
PEAKS = {
    "B200": 2250e12,
    "H200": 989e12,
    "H100": 989e12,
    "H800": 989e12,
    "GH200": 989e12,
    "A100": 312e12,
    "A800": 312e12,
    "H20": 148e12,
    "L40S": 362e12,
}


def peak_flops(device: torch.device) -> float | None:
    """Dense bf16 FLOP/s of the device; None where it is not known, as of a CPU."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    words = name.replace("-", " ").split()
    return next((peak for part, peak in PEAKS.items() if part in words), None)


def training_flops(config: Any, matrix_parameters: int, lengths: np.ndarray) -> np.ndarray:
    """(N,) float64: of a forward and a backward pass over each sequence; recomputation is not counted.

    A token takes 6 operations for each parameter it is multiplied with (the layers' matrices and the head's), and
    causal attention 6 h (s + 1) per layer in a sequence of s tokens, h the heads times their size: two products of
    s (s + 1) / 2 pairs, 2 operations each, three times.

    Args:
        config: the language model's (text) configuration.
        matrix_parameters: of its layers and its head, embeddings left out.
        lengths: (N,) tokens of each sequence, prompt and response.
    """
    s = lengths.astype(np.float64)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 6 * matrix_parameters * s + 6 * config.num_hidden_layers * config.num_attention_heads * head_dim * s * (
        s + 1
    )


def matrix_parameters(config: Any) -> int:
    """Parameters of the matrices that a token is multiplied with, in a dense decoder with gated layers: attention, MLP,
    head. A configuration without the MLP's width is taken for four times the model's."""
    hidden = config.hidden_size
    head_dim = getattr(config, "head_dim", None) or hidden // config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    attention = hidden * head_dim * (2 * config.num_attention_heads + 2 * kv_heads)
    mlp = 3 * hidden * getattr(config, "intermediate_size", 4 * hidden)
    return config.num_hidden_layers * (attention + mlp) + config.vocab_size * hidden
