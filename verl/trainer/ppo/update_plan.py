"""How the rows of a batch are divided into mini-batches and among workers."""

import numpy as np
import torch

from verl.protocol import DataProto
from verl.trainer.config.schema import PPOConfig
from verl.utils.seqlen_balancing import balanced_partition, contiguous_partition
from verl.workers.sequences import sequence_lengths


class UpdatePlan:
    """Which mini-batch each row belongs to, and which worker computes it.

    A mini-batch is `ppo_mini_batch_size` questions with all their rows, in batch order. Each one's rows are divided
    among the workers, by tokens if `trainer.balance_batch`; a worker's rows of all mini-batches stay with it.
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
    def make(cls, batch: DataProto, config: PPOConfig, workers: int) -> "UpdatePlan":
        rows_per_mini_batch = config.actor_rollout_ref.actor.ppo_mini_batch_size * config.actor_rollout_ref.rollout.n
        mini_batch = np.arange(len(batch)) // rows_per_mini_batch
        lengths = sequence_lengths(batch)
        rows: list[list[np.ndarray]] = [[] for _ in range(workers)]
        for number in range(mini_batch[-1] + 1):
            index = np.flatnonzero(mini_batch == number)
            balance = config.trainer.balance_batch
            parts = (
                balanced_partition(lengths[index], workers) if balance else contiguous_partition(len(index), workers)
            )
            for worker, part in enumerate(parts):
                rows[worker].append(index[part])
        return cls(torch.from_numpy(mini_batch), [np.concatenate(parts) for parts in rows], lengths)
