"""The order in which questions are trained on: seeded, and resumable at any step."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from verl.protocol import DataProto
from verl.utils.dataset.mixture import Mixture
from verl.utils.dataset.rl_dataset import RLHFDataset
from verl.utils.text import counted


class StatefulLoader:
    """An endless iterator over batches of `batch_size` questions. The order of an epoch depends on (seed, epoch) alone;
    what is left of an epoch that is smaller than a batch is not used. With `weights`, one per file, an epoch is as many
    batches drawn from a `Mixture`.

    `epoch` and `position` (questions taken from that epoch) describe the next batch. `len()` is the steps of an epoch.
    """

    def __init__(
        self,
        dataset: RLHFDataset,
        batch_size: int,
        seed: int,
        shuffle: bool = True,
        key: str = "train_batch_size",
        weights: Sequence[float] | None = None,
    ):
        if batch_size < 1 or batch_size > len(dataset):
            raise ValueError(
                f"data.{key} is {batch_size}, the training data have {counted(len(dataset), 'question')}: "
                f"set it to {'1' if len(dataset) == 1 else f'1..{len(dataset)}'}"
            )
        if seed < 0:
            raise ValueError(f"data.seed is {seed}: give a number from 0 up")
        self.dataset = dataset
        self.batch_size = batch_size
        self.seed = seed
        self.shuffle = shuffle
        self.mixture: Mixture | None = None
        if weights is not None:
            draws = len(self) * batch_size
            self.mixture = Mixture(dataset.questions_of_files(), weights, draws, seed, shuffle)
        self.epoch = 0
        self.position = 0
        self._order = self._order_of(0)

    def __len__(self) -> int:
        return len(self.dataset) // self.batch_size

    def __iter__(self) -> Iterator[DataProto]:
        return self

    def __next__(self) -> DataProto:
        if self.position + self.batch_size > len(self._order):
            self._move_to(self.epoch + 1, 0)
        indices = self._order[self.position : self.position + self.batch_size]
        self.position += self.batch_size
        return self.dataset.batch(indices)

    def state_dict(self) -> dict[str, Any]:
        return {
            "epoch": self.epoch,
            "position": self.position,
            "questions": len(self.dataset),
            "seed": self.seed,
            "shuffle": self.shuffle,
            "draws": None if self.mixture is None else self.mixture.counts.tolist(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on after the last batch of the loader that `state` came from: same questions, same order."""
        own = self.state_dict()
        names = {
            "questions": "the number of questions in data.train_files",
            "seed": "data.seed",
            "shuffle": "data.shuffle",
            "draws": "the draws per epoch from each of data.train_files (data.train_weights, data.train_batch_size)",
        }
        for field, name in names.items():
            if state.get(field) != own[field]:
                raise ValueError(
                    f"{name} is {own[field]}, in the checkpoint it is {state.get(field)}: restore it, "
                    "or start anew with trainer.resume_mode=disable"
                )
        self._move_to(state["epoch"], state["position"])

    def _move_to(self, epoch: int, position: int) -> None:
        self.epoch, self.position = epoch, position
        self._order = self._order_of(epoch)

    def _order_of(self, epoch: int) -> np.ndarray:
        if self.mixture is not None:
            return self.mixture.order(epoch)
        n = len(self.dataset)
        return np.random.default_rng([self.seed, epoch]).permutation(n) if self.shuffle else np.arange(n)


def in_order(dataset: RLHFDataset, batch_size: int) -> Iterator[DataProto]:
    """Every question once, in the order of the files; the last batch may be smaller."""
    for start in range(0, len(dataset), batch_size):
        yield dataset.batch(range(start, min(start + batch_size, len(dataset))))
