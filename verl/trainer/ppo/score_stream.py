"""Scoring of a batch that begins while the rest of it is still being generated."""

from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import torch

from verl.protocol import DataProto
from verl.trainer.ppo.generation import decode_responses
from verl.trainer.ppo.reward import Outcome, RewardManager
from verl.workers.rollout.base import GenerationOutput

MAX_PARTS = 256  # that wait at a time


class ScoreStream:
    """Takes finished rows of `batch` (the questions' columns) as they come; `finish` gives the whole batch's scores."""

    def __init__(self, reward: RewardManager, tokenizer: Any, batch: DataProto) -> None:
        self.reward = reward
        self.tokenizer = tokenizer
        self.batch = batch
        self.texts: list[str] = [""] * len(batch)
        self.scored: list[tuple[np.ndarray, Future]] = []
        # Parts are scored beside each other: one that waits for a stuck call must not keep the next from its turn. The
        # pool takes them in order. Without one, this process scores, one part after the other.
        threads = 1 if reward.pool is None else MAX_PARTS
        self.threads = ThreadPoolExecutor(threads, thread_name_prefix="scoring")

    def add(self, rows: np.ndarray, output: GenerationOutput) -> None:
        """Score these rows, now."""
        index = torch.from_numpy(rows)
        mask = torch.arange(output.responses.shape[1]) < output.lengths[index, None]
        texts = decode_responses(self.tokenizer, output.responses[index], mask)
        for row, text in zip(rows.tolist(), texts, strict=True):
            self.texts[row] = text
        requests = self.reward.requests(self.batch.select_rows(rows), texts)
        self.scored.append((rows, self.threads.submit(self.reward.outcomes, requests)))

    def finish(self) -> tuple[list[str], list[Outcome]]:
        """The text and the outcome of every row, in the batch's order; waits for those not yet scored."""
        outcomes: dict[int, Outcome] = {}
        for rows, future in self.scored:
            outcomes |= zip(rows.tolist(), future.result(), strict=True)
        self.threads.shutdown()
        return self.texts, [outcomes[row] for row in range(len(self.batch))]
