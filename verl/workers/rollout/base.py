"""What every rollout engine takes and gives, and how the trainer sees one."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from verl.protocol import DataProto
from verl.single_controller.worker_group import WorkerGroup
from verl.utils.seqlen_balancing import contiguous_partition


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

    responses: (N, T) int64, right-padded. lengths: (N,) int64 tokens, the end-of-sequence token included.
    log_probs: (N, T) float32 of the distribution sampled from, 0 in the padding; None: not asked for.
    """

    responses: torch.Tensor
    log_probs: torch.Tensor | None
    lengths: torch.Tensor

    @classmethod
    def empty(cls, n_rows: int, max_tokens: int, pad_token_id: int, log_probs: bool = True) -> "GenerationOutput":
        return cls(
            torch.full((n_rows, max_tokens), pad_token_id),
            torch.zeros(n_rows, max_tokens) if log_probs else None,
            torch.zeros(n_rows, dtype=torch.int64),
        )

    def put(self, rows: torch.Tensor, tokens: torch.Tensor, log_probs: torch.Tensor, lengths: torch.Tensor) -> None:
        """Fill the given rows."""
        self.responses[rows] = tokens.cpu()
        self.lengths[rows] = lengths.cpu()
        if self.log_probs is not None:
            self.log_probs[rows] = log_probs.cpu()

    def columns(self) -> dict[str, torch.Tensor]:
        """`responses`, `response_mask` and, where there are log-probs, `rollout_log_probs`, each (N, T)."""
        mask = torch.arange(self.responses.shape[1]) < self.lengths[:, None]
        columns = {"responses": self.responses, "response_mask": mask}
        return columns if self.log_probs is None else columns | {"rollout_log_probs": self.log_probs}


# Called with the rows (R,) that are finished now, and the output as far as it is filled.
OnFinished = Callable[[np.ndarray, GenerationOutput], None]


def ignore(rows: np.ndarray, output: GenerationOutput) -> None:
    """An OnFinished that waits for the end."""


class Rollout(Protocol):
    """The engines, as the driver sees them. Between `pause` and `update_weights` they may not be asked to generate."""

    def start(self) -> None:
        """Called once, when the training workers have their model."""
        ...

    def generate(
        self, batch: DataProto, params: SamplingParams, n: int, on_finished: OnFinished
    ) -> tuple[GenerationOutput, dict[str, float]]:
        """One response to each row, and metrics. The N rows, a question's `n` neighbours, have `prompts` (N, P)
        left-padded, `prompt_length` (N,), `uid` and `question_id` (N,), and `row_key` (N,) int64, that of their random
        draws."""
        ...

    def pause(self) -> dict[str, float]:
        """Make room for training. Returns metrics."""
        ...

    def update_weights(self) -> dict[str, float]:
        """Bring the trained weights to the engines. Returns metrics."""
        ...

    def shutdown(self) -> None: ...


class WorkerRollout:
    """Rollout by the training workers themselves (`hf`)."""

    def __init__(self, actor: WorkerGroup, log_probs: bool) -> None:
        self.actor = actor
        self.log_probs = log_probs

    def start(self) -> None:
        pass

    def generate(
        self, batch: DataProto, params: SamplingParams, n: int, on_finished: OnFinished
    ) -> tuple[GenerationOutput, dict[str, float]]:
        inputs = batch.select(["prompts", "prompt_length", "uid", "row_key"])
        inputs.meta_info = {"sampling": params}
        row_of = np.arange(len(batch)).reshape(-1, n)
        questions = contiguous_partition(len(row_of), self.actor.world_size)
        columns = self.actor.generate_sequences(inputs, rows=[row_of[part].ravel() for part in questions])
        log_probs = columns["rollout_log_probs"] if self.log_probs else None
        output = GenerationOutput(columns["responses"], log_probs, columns["response_mask"].sum(1))
        on_finished(np.arange(len(batch)), output)
        return output, {}

    def pause(self) -> dict[str, float]:
        return {}

    def update_weights(self) -> dict[str, float]:
        self.actor.update_weights()
        return {}

    def shutdown(self) -> None:
        pass
