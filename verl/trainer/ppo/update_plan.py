"""How the rows of a batch are divided into mini-batches and among workers."""

from functools import partial
from typing import Any

import numpy as np
import torch

from verl.protocol import DataProto
from verl.trainer.config.schema import PPOConfig
from verl.trainer.ppo.groups import encode_ids
from verl.utils.flops import matrix_parameters, training_flops
from verl.utils.seqlen_balancing import balanced_partition, contiguous_partition
from verl.workers.sequences import sequence_lengths

QUESTIONS_PER_WORKER = 8  # enough of them balance as well as rows do


def _units(uid: np.ndarray, workers: int) -> list[np.ndarray]:
    """The rows (R,) that stay together: those of a question, or each alone where questions are few."""
    questions, question = encode_ids(uid)
    if len(questions) < QUESTIONS_PER_WORKER * workers:
        return [np.array([row]) for row in range(len(uid))]
    return np.split(np.argsort(question, kind="stable"), np.cumsum(np.bincount(question))[:-1])


def _costs(
    batch: DataProto, config: PPOConfig, lengths: np.ndarray, model_config: Any
) -> tuple[np.ndarray, np.ndarray]:
    """(N,) operations that each row takes, and those of them that a row saves beside another one of its question: its
    prompt's, where rows are packed."""
    flops = partial(training_flops, model_config, matrix_parameters(model_config))
    of_row, of_prompt = flops(lengths), flops(batch["prompt_length"].numpy())
    return of_row, of_prompt if config.actor_rollout_ref.model.use_remove_padding else np.zeros_like(of_prompt)


class UpdatePlan:
    """Which mini-batch each row belongs to, and which worker computes it.

    A mini-batch is `ppo_mini_batch_size` questions with all their rows, in batch order. Each one's rows are divided
    among the workers, by the operations that they take if `trainer.balance_batch`: whole questions where there are
    enough of them, since a worker computes the prompt of its packed rows once. A worker's rows of all mini-batches
    stay with it.
    """

    def __init__(self, mini_batch: torch.Tensor, rows: list[np.ndarray], lengths: np.ndarray) -> None:
        self.mini_batch = mini_batch  # (N,) int64
        self.rows = rows  # one index array per worker
        self.lengths = lengths  # (N,) tokens of each row
        self.n_mini_batches = int(mini_batch.max()) + 1

    def metrics(self) -> dict[str, float]:
        """Tokens of a worker: as the rows come, and as they are divided."""
        as_they_come = [self.lengths[part].sum() for part in contiguous_partition(len(self.lengths), len(self.rows))]
        divided = [self.lengths[part].sum() for part in self.rows]
        return {
            "global_seqlen/mean": float(np.mean(divided)),
            "global_seqlen/min": float(min(as_they_come)),
            "global_seqlen/max": float(max(as_they_come)),
            "global_seqlen/balanced_min": float(min(divided)),
            "global_seqlen/balanced_max": float(max(divided)),
        }

    @classmethod
    def make(cls, batch: DataProto, config: PPOConfig, workers: int, model_config: Any) -> "UpdatePlan":
        """`batch` has N rows with uid, prompt_length and response_mask; `model_config` is the language model's."""
        rows_per_mini_batch = config.actor_rollout_ref.actor.ppo_mini_batch_size * config.actor_rollout_ref.rollout.n
        mini_batch = np.arange(len(batch)) // rows_per_mini_batch
        lengths = sequence_lengths(batch)
        of_row, of_prompt = _costs(batch, config, lengths, model_config)
        rows: list[list[np.ndarray]] = [[] for _ in range(workers)]
        for number in range(mini_batch[-1] + 1):
            index = np.flatnonzero(mini_batch == number)
            units = [index[unit] for unit in _units(batch["uid"][index], workers)]
            if config.trainer.balance_batch:
                parts = balanced_partition([of_row[u].sum() - of_prompt[u[1:]].sum() for u in units], workers)
            else:
                parts = contiguous_partition(len(units), workers)
            for worker, part in enumerate(parts):
                rows[worker].append(np.concatenate([np.empty(0, dtype=np.int64), *(units[i] for i in part)]))
        return cls(torch.from_numpy(mini_batch), [np.concatenate(parts) for parts in rows], lengths)
