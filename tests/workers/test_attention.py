"""Packed attention against attention written out one query at a time, and which models can be packed."""

import pytest
import torch
from transformers import AutoModelForCausalLM, BloomConfig, Gemma2Config, LlamaConfig, MambaConfig, MistralConfig

from verl.workers import attention
from verl.workers.attention import Buckets, Placement, VarLen, check_kernel, use_packed_attention

CPU = torch.device("cpu")


def placement() -> Placement:
    """Sequences of 6, 5, 1 and 2 tokens; the second borrows the first one's first three, the last two the third."""
    slots = torch.tensor([[0, 1, 2, 3, 4, 5], [0, 1, 2, 6, 7, 0], [8, 0, 0, 0, 0, 0], [9, 10, 0, 0, 0, 0]])
    return Placement(slots, torch.tensor([6, 5, 1, 2]), torch.tensor([0, 3, 0, 0]))


def random_tokens(heads: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(heads)
    return torch.randn(11, heads, 8, generator=generator, dtype=torch.float64).requires_grad_()


def one_at_a_time(where, query, key, value, scale=None, window=None) -> torch.Tensor:
    """softmax(q k^T / sqrt(D)) v of every token over those of its own sequence that it sees."""
    outputs = {}
    groups = query.shape[1] // key.shape[1]
    for slots, length, borrowed in zip(where.slots, where.lengths, where.borrowed, strict=True):
        for position in range(int(borrowed), int(length)):
            first = 0 if window is None else max(0, position + 1 - window)
            seen = slots[first : position + 1]
            for head in range(query.shape[1]):
                q, k, v = query[slots[position], head], key[seen, head // groups], value[seen, head // groups]
                weights = torch.softmax(k @ q * (8**-0.5 if scale is None else scale), dim=0)
                outputs[int(slots[position]), head] = weights @ v
    return torch.stack([outputs[slot, head] for slot, head in sorted(outputs)]).view(query.shape)


def slow_kernel(query, key, value, query_starts, key_starts, longest_query, longest_key, scale, window, late=True):
    """What the GPU's kernels compute; their causal mask ends at the last query and the last key (`late`)."""
    outputs = []
    bounds = zip(query_starts[:-1], query_starts[1:], key_starts[:-1], key_starts[1:], strict=True)
    for first_q, end_q, first_k, end_k in bounds:
        n, m = int(end_q - first_q), int(end_k - first_k)
        assert 0 < n <= longest_query and 0 < m <= longest_key
        position = torch.arange(n) + (m - n if late else 0)
        distance = position[:, None] - torch.arange(m)
        mask = (distance >= 0) & (distance < (window or m))
        q, k, v = (t.transpose(0, 1) for t in (query[first_q:end_q], key[first_k:end_k], value[first_k:end_k]))
        output = torch.nn.functional.scaled_dot_product_attention(q, k, v, mask, scale=scale, enable_gqa=True)
        outputs.append(output.transpose(0, 1))
    return torch.cat(outputs)


@pytest.mark.parametrize("packing", [lambda w: Buckets(w, CPU), lambda w: VarLen(w, CPU, slow_kernel)])
@pytest.mark.parametrize(("scale", "window"), [(None, None), (0.2, 2), (None, 100)])
def test_each_token_attends_to_its_own_sequence(packing, scale, window):
    tensors = [random_tokens(4), random_tokens(2), random_tokens(1).expand(-1, 2, -1)]
    expected = one_at_a_time(placement(), *tensors, scale, window)
    found = packing(placement()).attend(*tensors, scale, window)
    torch.testing.assert_close(found, expected)
    weights = torch.randn(expected.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(9))
    for a, b in zip(
        torch.autograd.grad((found * weights).sum(), tensors),
        torch.autograd.grad((expected * weights).sum(), tensors),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


def test_a_kernel_that_aligns_the_mask_elsewhere_is_refused():
    check_kernel(slow_kernel, CPU)
    with pytest.raises(RuntimeError, match="wrong by .* set actor_rollout_ref.model.use_remove_padding=False"):
        check_kernel(lambda *arguments: slow_kernel(*arguments, late=False), CPU)


def test_a_cpu_has_no_such_kernel():
    assert attention.varlen_kernel(CPU) is None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_kernels_gradients_are_those_of_the_buckets():
    device = torch.device("cuda")
    kernel = attention.varlen_kernel(device)
    for window in (None, 2):
        results = []
        for packing in (Buckets(placement(), device), VarLen(placement(), device, kernel)):
            tensors = [random_tokens(n).detach().to(device, torch.bfloat16).requires_grad_() for n in (4, 2, 2)]
            output = packing.attend(*tensors, None, window)
            results.append([output, *torch.autograd.grad(output.square().sum(), tensors)])
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b, rtol=0.05, atol=0.05)


# ------------------------------------------------------------------------------------------------------------ models
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
