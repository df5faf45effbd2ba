"""Statistics over the responses of each question, by id and therefore in any row order."""

import numpy as np
import torch


def encode_ids(ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The distinct ids, sorted, and for each row the position of its id among them, (N,) int64."""
    ids = np.asarray(ids)
    # A question's rows are neighbours as a rule: only the first of each run of equal ids is looked up.
    first = np.flatnonzero(np.concatenate([np.ones(min(len(ids), 1), dtype=bool), ids[1:] != ids[:-1]]))
    listed = ids[first].tolist()
    distinct = sorted(set(listed))
    # A dictionary is several times faster here than sorting a million Python strings.
    position = {value: i for i, value in enumerate(distinct)}
    codes = np.fromiter(map(position.__getitem__, listed), dtype=np.int64, count=len(listed))
    return np.asarray(distinct), codes.repeat(np.diff(first, append=len(ids)))


class Groups:
    """Rows grouped by id: `index` (N,) is each row's group 0..Q-1, `count` (Q,) float64 the rows of each group."""

    def __init__(self, ids: np.ndarray) -> None:
        self.ids, codes = encode_ids(ids)
        self.index = torch.from_numpy(codes)
        self.num_groups = len(self.ids)
        self.count = torch.bincount(self.index, minlength=self.num_groups).double()

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """(N,) -> (Q,)"""
        return torch.zeros(self.num_groups, dtype=torch.float64).index_add_(0, self.index, values.double())

    def mean(self, values: torch.Tensor) -> torch.Tensor:
        """(N,) -> (Q,)"""
        return self.sum(values) / self.count

    def std(self, values: torch.Tensor) -> torch.Tensor:
        """Unbiased standard deviation, (N,) -> (Q,); 0 for a group of one."""
        centred = values.double() - self.spread(self.mean(values))
        return (self.sum(centred**2) / (self.count - 1).clamp(min=1)).sqrt()

    def max(self, values: torch.Tensor) -> torch.Tensor:
        """(N,) -> (Q,)"""
        start = torch.full((self.num_groups,), -torch.inf, dtype=torch.float64)
        return start.scatter_reduce_(0, self.index, values.double(), "amax")

    def min(self, values: torch.Tensor) -> torch.Tensor:
        """(N,) -> (Q,)"""
        return -self.max(-values)

    def mean_of_others(self, values: torch.Tensor) -> torch.Tensor:
        """Mean over the other rows of the row's group, (N,) -> (N,); 0 for a group of one."""
        others = self.spread(self.count) - 1
        return (self.spread(self.sum(values)) - values.double()) / others.clamp(min=1) * (others > 0)

    def spread(self, per_group: torch.Tensor) -> torch.Tensor:
        """(Q,) -> (N,): each row gets its group's value."""
        return per_group[self.index]

    def ascending(self, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows ordered by group and value, (N,), and where each group starts in that order, (Q,)."""
        order = torch.from_numpy(np.lexsort((values.double().numpy(), self.index.numpy())))
        return order, self.count.long().cumsum(0) - self.count.long()
