"""Responses for a batch of questions: ids and keys of the rows, the call to the rollout engines, and the texts."""

from typing import Any

import numpy as np
import torch

from verl.protocol import DataProto
from verl.utils.random import row_keys


def expand(questions: DataProto, n: int, seed: int, step: int) -> DataProto:
    """Each of Q questions (with a `uid`) `n` times, with `sample_index` (N,) and `row_key` (N,) int64 of its draws.

    A question's rows are neighbours.
    """
    batch = questions.repeat(n)
    sample_index = np.tile(np.arange(n), len(questions))
    keys = row_keys(seed, step, batch["uid"].tolist(), sample_index.tolist())
    batch = batch.with_columns(sample_index=sample_index, row_key=torch.from_numpy(keys))
    batch.meta_info |= {"step": step, "seed": seed}
    return batch


def concat_prompts(parts: list[DataProto]) -> DataProto:
    """The rows of all parts, in order; prompts are padded on the left to the longest of all."""
    longest = max(part["prompts"].shape[1] for part in parts)
    padded = []
    for part in parts:
        prompts = part["prompts"]
        # What stands in the padding is never read.
        prompts = torch.nn.functional.pad(prompts, (longest - prompts.shape[1], 0))
        padded.append(part.with_columns(prompts=prompts))
    return DataProto.concat(padded)


def decode_responses(tokenizer: Any, responses: torch.Tensor, response_mask: torch.Tensor) -> list[str]:
    """The text of each response, special tokens left out. responses, response_mask: (R, T)."""
    # Arrays, not lists: transformers looks at every single element of a list.
    rows = [ids[mask] for ids, mask in zip(responses.numpy(), response_mask.numpy(), strict=True)]
    return tokenizer.batch_decode(rows, skip_special_tokens=True)
