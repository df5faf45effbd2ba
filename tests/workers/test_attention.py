"""Which models can be packed."""

import pytest
import torch
from transformers import AutoModelForCausalLM, BloomConfig, Gemma2Config, LlamaConfig, MambaConfig, MistralConfig

from verl.workers.attention import use_packed_attention

SIZES = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 32, "vocab_size": 64,
}  # fmt: skip


@pytest.mark.parametrize("config", [LlamaConfig(**SIZES), MistralConfig(**SIZES, sliding_window=3)])
def test_a_model_that_can_be_packed_keeps_its_configuration(config):
    lm = AutoModelForCausalLM.from_config(config).eval()
    use_packed_attention(lm, "model")
    assert lm.config._attn_implementation == "sdpa"
    assert AutoModelForCausalLM.from_config(lm.config).get_decoder().config._attn_implementation == "sdpa"
    with pytest.raises(RuntimeError, match="without `packing`"):
        lm(torch.arange(4)[None])


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (BloomConfig(hidden_size=32, n_layer=2, n_head=4, vocab_size=64), "0 of 2 layers"),
        (MambaConfig(hidden_size=32, num_hidden_layers=2, vocab_size=64), "0 of 2 layers"),
        (Gemma2Config(**SIZES, head_dim=8), "wants `softcap`"),
    ],
)
def test_a_model_that_cannot_be_packed_is_refused(config, reason):
    lm = AutoModelForCausalLM.from_config(config).eval()
    with pytest.raises(ValueError, match=f"path=somewhere: .* cannot be packed .*{reason}.*use_remove_padding=False"):
        use_packed_attention(lm, "somewhere")


def test_a_model_whose_windows_are_only_in_its_masks_is_refused():
    lm = AutoModelForCausalLM.from_config(LlamaConfig(**SIZES)).eval()
    lm.config.layer_types = ["full_attention", "chunked_attention"]
    with pytest.raises(ValueError, match="how far they look back"):
        use_packed_attention(lm, "model")
