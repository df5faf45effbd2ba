"""What every rollout engine takes and gives."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class SamplingParams:
    """How responses are sampled. `top_k=-1` and `top_p=1` switch truncation off; `greedy` ignores all three."""

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = -1
    greedy: bool = False


@dataclass
class GenerationOutput:
    """N responses of at most T tokens, on the CPU.

    responses: (N, T) int64, right-padded. log_probs: (N, T) float32 of the distribution sampled from, 0 in the padding.
    lengths: (N,) int64 tokens, the end-of-sequence token included.
    """

    responses: torch.Tensor
    log_probs: torch.Tensor
    lengths: torch.Tensor

    @classmethod
    def empty(cls, n_rows: int, max_tokens: int, pad_token_id: int) -> "GenerationOutput":
        return cls(
            torch.full((n_rows, max_tokens), pad_token_id),
            torch.zeros(n_rows, max_tokens),
            torch.zeros(n_rows, dtype=torch.int64),
        )

    def put(self, rows: torch.Tensor, tokens: torch.Tensor, log_probs: torch.Tensor, lengths: torch.Tensor) -> None:
        """Fill the given rows."""
        self.responses[rows] = tokens.cpu()
        self.log_probs[rows] = log_probs.cpu()
        self.lengths[rows] = lengths.cpu()
