import pytest
import torch

from verl.utils import torch_functional
from verl.utils.torch_functional import log_prob_and_entropy, masked_mean, response_lengths


def naive(hidden, weight, labels, temperature):
    log_p = torch.log_softmax(hidden @ weight.T / temperature, dim=-1)
    return log_p.gather(1, labels[:, None]).squeeze(1), -(log_p.exp() * log_p).sum(1)


@pytest.mark.parametrize("used", [(0, 1), (0,), (1,)])  # log-probs and entropies, one of them alone
@pytest.mark.parametrize("kept_elements", [1 << 24, 0])  # kept for the backward pass, and computed again
@pytest.mark.parametrize("chunk_elements", [1 << 24, 40])  # one chunk, and chunks of 3 of the 10 tokens
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_prob_entropy_and_gradients_equal_the_naive_ones(
    monkeypatch, chunk_elements, kept_elements, used, temperature
):
    monkeypatch.setattr(torch_functional, "CHUNK_ELEMENTS", chunk_elements)
    monkeypatch.setattr(torch_functional, "head_chunk_tokens", lambda device: 1)
    monkeypatch.setattr(torch_functional, "KEPT_ELEMENTS", kept_elements)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(10, 6, generator=generator, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(13, 6, generator=generator, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(13, (10,), generator=generator)
    up = torch.randn(2, 10, generator=generator, dtype=torch.float64)

    expected = naive(hidden, weight, labels, temperature)
    expected_grads = torch.autograd.grad(sum((expected[i] * up[i]).sum() for i in used), (hidden, weight))
    got = log_prob_and_entropy(hidden, weight, labels, temperature)
    grads = torch.autograd.grad(sum((got[i] * up[i]).sum() for i in used), (hidden, weight))
    for a, b in zip([*got, *grads], [*expected, *expected_grads], strict=True):
        torch.testing.assert_close(a.double(), b, rtol=2e-5, atol=2e-6)


def test_masked_mean_and_response_lengths():
    mask = torch.tensor([[True, True, False], [False, False, False], [True, False, True]])
    assert masked_mean(torch.tensor([[1.0, 2.0, 50.0], [9.0, 9.0, 9.0], [3.0, 7.0, 4.0]]), mask) == 2.5
    assert masked_mean(torch.ones(1, 2), torch.zeros(1, 2, dtype=torch.bool)) == 0
    assert response_lengths(mask).tolist() == [2, 0, 3]
