"""Attention over packed rows against attention written out one query at a time."""

import sys
from types import SimpleNamespace

import pytest
import torch

from verl.workers import packing
from verl.workers.packing import Buckets, Placement, VarLen, check_kernel, flash_varlen, torch_varlen, varlen_kernel

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


@pytest.mark.parametrize("plain_scores", [0, 1 << 22])  # torch's attention, and all scores at once
@pytest.mark.parametrize("make", [lambda w: Buckets(w, CPU), lambda w: VarLen(w, CPU, slow_kernel)])
@pytest.mark.parametrize(("scale", "window"), [(None, None), (0.2, 2), (None, 100)])
def test_each_token_attends_to_its_own_sequence(monkeypatch, plain_scores, make, scale, window):
    monkeypatch.setattr(packing, "PLAIN_SCORES", plain_scores)
    tensors = [random_tokens(4), random_tokens(2), random_tokens(1).expand(-1, 2, -1)]
    expected = one_at_a_time(placement(), *tensors, scale, window)
    found = make(placement()).attend(*tensors, scale, window)
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


def test_a_kernel_is_called_as_its_library_wants(monkeypatch):
    def window_of(size):
        assert size[1] == 0  # nothing to the right: causal
        return None if size[0] == -1 else size[0] + 1

    def torch_2_11(q, k, v, starts_q, starts_k, max_q, max_k, *, return_aux=None, scale=None, window_size=(-1, -1)):
        assert q.shape[1] == k.shape[1] == v.shape[1]
        return slow_kernel(q, k, v, starts_q, starts_k, max_q, max_k, scale, window_of(window_size))

    def torch_2_13(q, k, v, *arguments, scale=None, window_size=(-1, -1), enable_gqa=False):
        assert enable_gqa
        return slow_kernel(q, k, v, *arguments, scale, window_of(window_size))

    def flash(q, k, v, *arguments, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1)):
        assert causal
        return slow_kernel(q, k, v, *arguments, softmax_scale, window_of(window_size))

    for varlen_attn in (torch_2_11, torch_2_13):
        monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", varlen_attn)
        check_kernel(torch_varlen, CPU)
    monkeypatch.setitem(sys.modules, "flash_attn", SimpleNamespace(flash_attn_varlen_func=flash))
    check_kernel(flash_varlen, CPU)


def test_a_cpu_has_no_such_kernel():
    assert varlen_kernel(CPU) is None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_kernels_gradients_are_those_of_the_buckets():
    device = torch.device("cuda")
    kernel = varlen_kernel(device)
    for window in (None, 2):
        results = []
        for way in (Buckets(placement(), device), VarLen(placement(), device, kernel)):
            tensors = [random_tokens(n).detach().to(device, torch.bfloat16).requires_grad_() for n in (4, 2, 2)]
            output = way.attend(*tensors, None, window)
            results.append([output, *torch.autograd.grad(output.square().sum(), tensors)])
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b, rtol=0.05, atol=0.05)
