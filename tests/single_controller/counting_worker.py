"""The worker class of the tests: each method shows one thing a worker can do to its driver."""

import os
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from verl.protocol import DataProto
from verl.single_controller import Dispatch, Worker, register


class TwoPartError(Exception):
    """Cannot be rebuilt from its message alone, as pickle tries to."""

    def __init__(self, part: str, other: str) -> None:
        super().__init__(f"{part} and {other}")


class CountingWorker(Worker):
    def __init__(self, offset: float = 0.0) -> None:
        self.offset = offset

    @register(Dispatch.ALL)
    def wait_for(self, path: str) -> bool:
        """Whether a file appears within 20 s."""
        deadline = time.monotonic() + 20
        while not Path(path).exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        return Path(path).exists()

    @register(Dispatch.ALL)
    def describe(self, suffix: str = "") -> str:
        return f"{self.rank}/{self.world_size} {self.device}{suffix}"

    @register(Dispatch.ALL)
    def threads(self) -> tuple[int, str]:
        return torch.get_num_threads(), os.environ["OMP_NUM_THREADS"]

    @register(Dispatch.RANK_ZERO)
    def sum_of_ranks(self) -> float:
        total = torch.tensor(float(self.rank + 1))
        dist.all_reduce(total)
        return total.item()

    @register(Dispatch.ROWS)
    def square(self, batch: DataProto, scale: float = 1.0) -> DataProto:
        x = batch["x"].float()
        rank = np.full(len(batch), self.rank)
        return DataProto.from_dict({"y": scale * x * x + self.offset, "uid": batch["uid"], "rank": rank}, {"of": "y"})

    @register(Dispatch.ROWS)
    def square_with_metrics(self, batch: DataProto) -> tuple[DataProto, dict[str, float]]:
        return self.square(batch), {"rows": float(len(batch)), "total": self._total(batch)}

    @register(Dispatch.ROWS)
    def metrics_only(self, batch: DataProto) -> dict[str, float]:
        return {"rows": float(len(batch)), "total": self._total(batch)}

    def _total(self, batch: DataProto) -> float:
        total = batch["x"].float().sum()
        dist.all_reduce(total)
        return total.item()

    @register(Dispatch.ROWS)
    def longest(self, batch: DataProto) -> DataProto:
        """Rows as wide as the largest x: a rank without rows makes them of width 0."""
        width = int(batch["x"].max()) if len(batch) else 0
        return DataProto.from_dict({"wide": torch.zeros(len(batch), width)})

    @register(Dispatch.ROWS)
    def lose_a_row(self, batch: DataProto) -> DataProto:
        return batch.select_rows(range(len(batch) - 1))

    @register(Dispatch.ROWS)
    def overwrite_rows(self, batch: DataProto) -> DataProto:
        batch["x"].zero_()
        batch["number"][:] = 0
        return batch

    @register(Dispatch.ALL)
    def overwrite_all(self, batch: DataProto) -> None:
        batch["x"].zero_()
        batch["number"][:] = 0
        dist.barrier()

    @register(Dispatch.ALL)
    def raise_on(self, rank: int) -> None:
        if self.rank == rank:
            raise ValueError(f"row 7 is broken\nby {rank}")
        dist.barrier()

    @register(Dispatch.ALL)
    def raise_unpicklable(self) -> None:
        raise TwoPartError("this", "that")

    @register(Dispatch.ALL)
    def exit_on(self, rank: int) -> None:
        if self.rank == rank:
            os._exit(1)
        dist.barrier()

    @register(Dispatch.ALL)
    def sleep(self, seconds: float) -> None:
        time.sleep(seconds)

    def not_registered(self) -> None: ...


class UnbuildableWorker(Worker):
    def __init__(self, path: str) -> None:
        raise FileNotFoundError(f"no model at {path}")


class SlowToStartWorker(Worker):
    def __init__(self) -> None:
        time.sleep(60)
