"""From a padded batch to what the model computes: rows of real tokens, split into micro-batches."""

from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist

from verl.protocol import DataProto
from verl.utils.seqlen_balancing import split_by_rows, split_by_tokens
from verl.utils.torch_functional import response_lengths


@dataclass(frozen=True)
class MicroBatchSpec:
    """How rows become micro-batches: `rows` of them each, or (rows is None) as many as `max_tokens` allows."""

    rows: int | None
    max_tokens: int

    @classmethod
    def from_config(cls, rows: int | None, dynamic: bool, max_tokens: int) -> "MicroBatchSpec":
        return cls(None if dynamic else rows, max_tokens)

    def split(self, lengths: np.ndarray) -> list[np.ndarray]:
        if self.rows is None:
            return split_by_tokens(lengths, self.max_tokens)
        return split_by_rows(lengths, self.rows)


@dataclass
class Sequences:
    """R rows of prompt and response without the padding between them: L is the longest row.

    input_ids: (R, L) int64, right-padded. Causal attention never looks right, so no mask is needed.
    token_rows, token_steps: (M,) row and response position of each response token.
    hidden_positions: (M,) where in its row the token is predicted. labels: (M,) the tokens.
    """

    input_ids: torch.Tensor
    token_rows: torch.Tensor
    token_steps: torch.Tensor
    hidden_positions: torch.Tensor
    labels: torch.Tensor
    response_shape: tuple[int, int]

    @classmethod
    def from_batch(cls, data: DataProto, device: torch.device) -> "Sequences":
        """`data` has prompts (R, P) left-padded, prompt_length (R,), responses (R, T), response_mask (R, T)."""
        prompts, responses, mask = data["prompts"], data["responses"], data["response_mask"]
        prompt_length, response_length = data["prompt_length"], response_lengths(mask)
        longest = int((prompt_length + response_length).max())
        # The real tokens of a row are neighbours in [prompt | response]: shift each row left by its prompt padding.
        columns = (prompts.shape[1] - prompt_length)[:, None] + torch.arange(longest)
        both = torch.cat([prompts, responses], dim=1)
        input_ids = both.gather(1, columns.clamp(max=both.shape[1] - 1))
        within = torch.arange(responses.shape[1]) < response_length[:, None]
        rows, steps = within.nonzero(as_tuple=True)
        return cls(
            input_ids.to(device),
            rows.to(device),
            steps.to(device),
            (prompt_length[rows] + steps - 1).to(device),
            responses[rows, steps].to(device),
            (responses.shape[0], responses.shape[1]),
        )

    def to_rows(self, values: torch.Tensor) -> torch.Tensor:
        """(M,) values of response tokens as (R, T), 0 elsewhere; differentiable."""
        out = values.new_zeros(self.response_shape)
        return out.index_put((self.token_rows, self.token_steps), values)


def sequence_lengths(data: DataProto) -> np.ndarray:
    """(N,) int64 tokens of each row, prompt and response."""
    return (data["prompt_length"] + response_lengths(data["response_mask"])).numpy()


def micro_batches(data: DataProto, spec: MicroBatchSpec) -> list[np.ndarray]:
    """Row indices of the micro-batches of this worker's rows, the same NUMBER of them on every worker.

    Every forward and backward pass is a collective of the sharded model; a worker with fewer micro-batches than
    another gets empty ones at the end, which the engine fills with a dummy row of weight 0.
    """
    parts = spec.split(sequence_lengths(data)) if len(data) else []
    if dist.get_world_size() > 1:
        count = torch.tensor(len(parts))
        dist.all_reduce(count, op=dist.ReduceOp.MAX)
        parts += [np.empty(0, dtype=np.int64)] * (int(count) - len(parts))
    return parts


def dummy_row(data: DataProto) -> DataProto:
    """One row of two tokens and no response mask, with the columns of `data` filled with zeros."""
    columns = {
        name: torch.zeros(1, *value.shape[1:], dtype=value.dtype)
        for name, value in data.columns().items()
        if isinstance(value, torch.Tensor)
    }
    columns["prompt_length"] = torch.ones(1, dtype=torch.int64)
    columns["response_mask"] = torch.zeros_like(columns["response_mask"])
    columns["response_mask"][:, :1] = 1
    return DataProto.from_dict(columns, data.meta_info)
