"""FLOPs of a step against torch's own count of a real model, and the peak of known devices."""

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from verl.utils.flops import matrix_parameters, peak_flops, training_flops


def test_flops_equal_torchs_count_with_attention_over_all_pairs(tiny_model):
    """torch counts the whole square of pairs, here counted are those that causal attention needs."""
    model = AutoModelForCausalLM.from_pretrained(tiny_model, attn_implementation="eager")
    ids = torch.arange(40).reshape(2, 20)
    with FlopCounterMode(display=False) as counter:
        model(ids, use_cache=False).logits.sum().backward()
    config = model.config
    s, heads = 20, config.num_attention_heads
    square = 2 * 12 * config.num_hidden_layers * heads * config.hidden_size // heads * s * s
    causal = 2 * 6 * config.num_hidden_layers * config.hidden_size * s * (s + 1)
    rest = counter.get_total_flops() - square
    assert training_flops(config, matrix_parameters(config), np.array([s, s])).sum() == rest + causal


def test_parameters_of_the_matrices_are_those_of_a_real_model(tiny_model):
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    matrices = sum(p.numel() for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name)
    assert matrix_parameters(model.config) == matrices + model.lm_head.weight.numel()


def test_a_cpu_has_no_known_peak():
    assert peak_flops(torch.device("cpu")) is None
