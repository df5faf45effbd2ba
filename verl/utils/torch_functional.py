"""Tensor functions of the model's outputs: log-probabilities and entropy, masked means."""

from typing import Any

import torch

from verl.utils.device import head_chunk_tokens

# Logits held at once, in elements: chunks that stay in a CPU's cache; but of so many tokens (`head_chunk_tokens`) that
# the head, which every chunk reads whole, and its gradient are gone through seldom enough.
CHUNK_ELEMENTS = 1 << 18
KEPT_ELEMENTS = 1 << 22  # so few are kept for the backward pass (16 MiB); more are computed again


class _LogProbEntropy(torch.autograd.Function):
    """log softmax(h W^T / temperature) at the labels, and its entropy, a chunk of tokens at a time.

    Neither pass holds more than one chunk of logits; the backward pass computes them again, unless they are few. With p
    the softmax, d logp / d logits = onehot - p and d entropy / d logits = -p (log p + entropy).
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, temperature: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.set_materialize_grads(False)  # where no entropy is asked for, its gradient is None, not zeros
        log_prob = torch.empty(len(labels), dtype=torch.float32, device=hidden.device)
        entropy = torch.empty_like(log_prob)
        keep = any(ctx.needs_input_grad) and len(labels) * weight.shape[0] <= KEPT_ELEMENTS
        kept = []
        for rows in _chunks(labels, weight.shape[0]):
            log_p = _log_softmax(hidden[rows], weight, temperature)
            log_prob[rows] = log_p.gather(1, labels[rows, None]).squeeze(1)
            entropy[rows] = -(log_p.exp() * log_p).sum(1)
            if keep:
                kept.append(log_p)
            del log_p  # before the next chunk is made
        ctx.save_for_backward(hidden, weight, labels, *kept)
        ctx.temperature = temperature
        return log_prob, entropy

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None, None, None]:
        grad_log_prob, grad_entropy = grads
        hidden, weight, labels, *kept = ctx.saved_tensors
        grad_hidden = torch.empty_like(hidden)
        trained = ctx.needs_input_grad[1]  # not under adapters
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if trained else None
        for number, rows in enumerate(_chunks(labels, weight.shape[0])):
            log_p = kept[number] if kept else _log_softmax(hidden[rows], weight, ctx.temperature)
            p = log_p.exp()
            factor = torch.zeros(len(p), 1, device=p.device)
            if grad_log_prob is not None:
                factor = factor + grad_log_prob[rows, None]
            if grad_entropy is not None:
                entropy = -(p * log_p).sum(1, keepdim=True)
                factor = factor + grad_entropy[rows, None] * (log_p + entropy)
            grad = p.mul_(-factor)
            if grad_log_prob is not None:
                grad.scatter_add_(1, labels[rows, None], grad_log_prob[rows, None])
            grad = (grad if ctx.temperature == 1.0 else grad / ctx.temperature).to(hidden.dtype)
            grad_hidden[rows] = grad @ weight
            if grad_weight is not None:
                grad_weight += grad.T @ hidden[rows]
            del log_p, p, grad  # before the next chunk is made
        return grad_hidden, None if grad_weight is None else grad_weight.to(weight.dtype), None, None


def _chunks(labels: torch.Tensor, vocabulary: int) -> list[slice]:
    size = max(head_chunk_tokens(labels.device), CHUNK_ELEMENTS // vocabulary)
    return [slice(start, min(start + size, len(labels))) for start in range(0, len(labels), size)]


def _log_softmax(hidden: torch.Tensor, weight: torch.Tensor, temperature: float) -> torch.Tensor:
    logits = (hidden @ weight.T).float()
    return torch.log_softmax(logits if temperature == 1.0 else logits.div_(temperature), dim=-1)


def log_prob_and_entropy(
    hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, temperature: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probability of each label and entropy of each distribution, without the (M, V) logits in memory.

    Args:
        hidden: (M, H) last hidden states, in the compute dtype.
        weight: (V, H) of the language-model head.
        labels: (M,) int64.
        temperature: logits are divided by it, > 0.

    Returns:
        log_prob and entropy, (M,) float32 each, in nats; both are differentiable.
    """
    return _LogProbEntropy.apply(hidden, weight, labels, temperature)


def masked_mean(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mean of `values` where `mask` is true, 0 where nothing is. Same shapes."""
    return torch.where(mask, values, 0).sum() / mask.sum().clamp(min=1)


def response_lengths(response_mask: torch.Tensor) -> torch.Tensor:
    """(N,) int64: position of the last true entry of each row of (N, T), plus one; 0 where there is none."""
    positions = torch.arange(1, response_mask.shape[1] + 1, device=response_mask.device)
    return (response_mask * positions).amax(dim=1) if response_mask.shape[1] else response_mask.sum(1)
