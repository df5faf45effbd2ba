"""Responses to a batch of questions: ids and keys of the rows, and the texts."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from verl.protocol import DataProto, object_array
from verl.utils.dataset.rl_dataset import RLHFDataset
from verl.utils.random import row_keys
from verl.workers.rollout.base import OnFinished, Rollout, SamplingParams, ignore


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


def sample_to_measure(
    rollout: Rollout,
    dataset: RLHFDataset,
    indices: Sequence[int],
    n: int,
    params: SamplingParams,
    seed: int,
    step: int,
    on_finished: OnFinished = ignore,
) -> tuple[DataProto, list[str], dict[str, float]]:
    """`n` responses to each of these questions, for validation and for `main_generation`: the rows, a question's
    neighbours, with the columns of GenerationOutput; the texts; and the rollout's metrics."""
    questions = dataset.batch(indices)
    questions = questions.with_columns(uid=object_array([f"val-{i}" for i in indices]))
    batch = expand(questions, n, seed, step)
    output, metrics = rollout.generate(batch, params, n, on_finished)
    batch = batch.with_columns(**output.columns())
    return batch, decode_responses(dataset.tokenizer, batch["responses"], batch["response_mask"]), metrics


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
    rows = [ids[mask].tolist() for ids, mask in zip(responses.numpy(), response_mask.numpy(), strict=True)]
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or tokenizer.clean_up_tokenization_spaces:
        return tokenizer.batch_decode(rows, skip_special_tokens=True)
    return backend.decode_batch(rows, skip_special_tokens=True)  # the same, without a look at every id from Python
