"""Quantiles of the bundle score, followed from step to step.

Two trackers share one interface: `QuantileTracker` moves each quantile by stochastic gradient steps,
`ScoreDistributionAverage` averages the distributions themselves. `scores` (n,) are the scores of one batch and
`weights` (n,) their masses up to a factor (default: equal), so a batch may be an exact distribution.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from verl.trainer.ppo.risk import LEVEL_TOLERANCE, quantile

# Two scores closer than this, relative to the largest, are the same lattice point reached by different float sums.
SAME_SCORE = 1e-9
LEVEL_GRID = tuple(round(0.05 * i, 2) for i in range(1, 20))


class ScoreDistribution:
    """A discrete distribution: `support` (n,) ascending and distinct, `cdf` (n,) float64."""

    def __init__(self, scores: torch.Tensor, weights: torch.Tensor | None = None) -> None:
        scores = scores.detach().double().flatten()
        if scores.numel() == 0:
            raise ValueError("a quantile tracker cannot be updated with no scores; give at least one score")
        if not scores.isfinite().all():
            raise ValueError(f"score {scores[~scores.isfinite()][0].item()} is not finite; scores must be finite")
        weights = torch.ones_like(scores) if weights is None else weights.detach().double().flatten()
        scores, order = scores.sort()
        self.tolerance = SAME_SCORE * float(scores.abs().max())
        new = scores.diff(prepend=scores[:1] - 1 - 2 * self.tolerance) > self.tolerance
        atom = new.cumsum(0) - 1
        mass = torch.zeros(int(atom[-1]) + 1, dtype=torch.float64).index_add_(0, atom, weights[order])
        # A point without mass is no score: no quantile may be snapped to it.
        self.support = scores[new][mass > 0]
        self.mass = mass[mass > 0] / mass.sum()
        self.cdf = self.mass.cumsum(0)

    def below(self, q: torch.Tensor) -> torch.Tensor:
        """F(q-), the mass strictly below each q, of q's shape."""
        return self._cdf_before(torch.searchsorted(self.support, q - self.tolerance))

    def up_to(self, q: torch.Tensor) -> torch.Tensor:
        """F(q), of q's shape."""
        return self._cdf_before(torch.searchsorted(self.support, q + self.tolerance, right=True))

    def snap(self, q: torch.Tensor) -> torch.Tensor:
        """The point of the support nearest to each q, of q's shape."""
        right = torch.searchsorted(self.support, q).clamp(max=len(self.support) - 1)
        left = (right - 1).clamp(min=0)
        nearer_left = (q - self.support[left]).abs() <= (self.support[right] - q).abs()
        return self.support[torch.where(nearer_left, left, right)]

    def quantile(self, levels: torch.Tensor) -> torch.Tensor:
        """F^-1 at each level, (L,)."""
        return quantile(self.support, levels, self.mass)

    def _cdf_before(self, position: torch.Tensor) -> torch.Tensor:
        return torch.cat([torch.zeros(1, dtype=torch.float64), self.cdf])[position]


class ScoreTracker(nn.Module):
    """What both trackers share: the grid of levels and how it is read."""

    levels: torch.Tensor
    started: torch.Tensor

    def __init__(self, levels: Sequence[float]) -> None:
        super().__init__()
        grid = torch.tensor(sorted(levels), dtype=torch.float64)
        if len(grid) == 0 or grid[0] <= 0 or grid[-1] >= 1:
            raise ValueError(f"quantile levels {list(levels)} must lie inside (0, 1)")
        self.register_buffer("levels", grid[grid.diff(prepend=grid[:1] - 1) > LEVEL_TOLERANCE], persistent=False)
        self.register_buffer("started", torch.tensor(False))

    def update(self, scores: torch.Tensor, weights: torch.Tensor | None = None) -> None:
        raise NotImplementedError

    def values(self) -> torch.Tensor:
        """The quantile at each level, (L,) float64, ascending."""
        raise NotImplementedError

    def value(self, level: float) -> float:
        """The quantile at one of the levels."""
        at = (self.levels - level).abs().argmin()
        if (self.levels[at] - level).abs() > LEVEL_TOLERANCE:
            raise ValueError(f"level {level} is not tracked; the levels are {self.levels.tolist()}")
        return float(self.values()[at])

    def calibration(self, scores: torch.Tensor, weights: torch.Tensor | None = None) -> torch.Tensor:
        """How far each tracked quantile is from being one of these scores' quantiles, in probability, (L,) float64.

        max(0, F(q-) - s, s - F(q)) at level s, with q moved to the nearest score: 0 exactly where it is a quantile.
        """
        batch = ScoreDistribution(scores, weights)
        q = batch.snap(self.values())
        return torch.maximum(batch.below(q) - self.levels, self.levels - batch.up_to(q)).clamp(min=0)

    def _require_start(self) -> None:
        if not self.started:
            raise ValueError("the quantile tracker has seen no scores; call update first")

    def get_extra_state(self) -> dict[str, Any]:
        return {"levels": self.levels.clone()}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        if not torch.equal(state["levels"], self.levels):
            raise ValueError(
                f"the checkpoint tracks quantile levels {state['levels'].tolist()}, this run {self.levels.tolist()}; "
                "keep the levels of algorithm.risk (or quantile_down, quantile_up) when resuming"
            )


class QuantileTracker(ScoreTracker):
    """Quantiles moved by SGD: q <- q + lr_k * (s - Fhat(q)) at each level s, Fhat(q) the batch's mass below q.

    lr_k = lr * score_range / (1 + k)^power after k steps. The first update sets q to the batch's quantiles and takes no
    step. The raw state may cross; what is read is sorted (sorting the state itself would bias it on lattices). The
    state is levels, quantiles, the number of steps and the score range, all in `state_dict`.
    """

    steps: torch.Tensor
    score_range: torch.Tensor

    def __init__(self, levels: Sequence[float], lr: float, power: float = 0.0, score_range: float = 1.0) -> None:
        super().__init__(levels)
        if not lr > 0:
            raise ValueError(f"algorithm.lr_q={lr} must be positive")
        if power != 0 and not 0.5 < power <= 1:
            raise ValueError(f"algorithm.lr_q_power={power} must be 0 or in (0.5, 1], else the steps do not converge")
        self.lr = lr
        self.power = power
        self.quantiles = nn.Parameter(torch.zeros_like(self.levels))
        self.register_buffer("steps", torch.tensor(0))
        self.register_buffer("score_range", torch.tensor(float(score_range), dtype=torch.float64))
        self._optimizer = torch.optim.SGD([self.quantiles], lr=lr)

    @torch.no_grad()
    def update(self, scores: torch.Tensor, weights: torch.Tensor | None = None) -> None:
        """Start at these scores' quantiles, or take one step towards them."""
        batch = ScoreDistribution(scores, weights)
        if not self.started:
            self.quantiles.copy_(batch.quantile(self.levels))
            self.started.fill_(True)
            return
        self._optimizer.param_groups[0]["lr"] = self.lr * float(self.score_range) / (1 + int(self.steps)) ** self.power
        self.quantiles.grad = batch.below(self.quantiles) - self.levels
        self._optimizer.step()
        self.quantiles.grad = None
        self.steps += 1

    def values(self) -> torch.Tensor:
        self._require_start()
        return self.quantiles.detach().sort().values


class ScoreDistributionAverage(ScoreTracker):
    """Quantiles of an exponential moving average of the batches' score distributions.

    After each batch, average <- decay * average + (1 - decay) * batch; the first batch is taken whole. An average with
    more than `max_atoms` points is replaced by as many equally likely ones.
    """

    def __init__(self, levels: Sequence[float], decay: float = 0.8, max_atoms: int = 8192) -> None:
        super().__init__(levels)
        if not 0 <= decay < 1:
            raise ValueError(f"decay {decay} of the score distribution average must be in [0, 1)")
        self.decay = decay
        self.max_atoms = max_atoms
        self.support = torch.zeros(0, dtype=torch.float64)
        self.mass = torch.zeros(0, dtype=torch.float64)

    @torch.no_grad()
    def update(self, scores: torch.Tensor, weights: torch.Tensor | None = None) -> None:
        """Start with this distribution, or move the average towards it."""
        batch = ScoreDistribution(scores, weights)
        if self.started:
            batch = ScoreDistribution(
                torch.cat([self.support, batch.support]),
                torch.cat([self.decay * self.mass, (1 - self.decay) * batch.mass]),
            )
        self.started.fill_(True)
        self.support, self.mass = batch.support, batch.mass
        if len(self.support) > self.max_atoms:
            middle = (torch.arange(self.max_atoms, dtype=torch.float64) + 0.5) / self.max_atoms
            even = ScoreDistribution(batch.quantile(middle))
            self.support, self.mass = even.support, even.mass

    def values(self) -> torch.Tensor:
        self._require_start()
        return quantile(self.support, self.levels, self.mass)

    def get_extra_state(self) -> dict[str, Any]:
        # The number of atoms varies, which buffers of a module cannot.
        return super().get_extra_state() | {"support": self.support.clone(), "mass": self.mass.clone()}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        super().set_extra_state(state)
        self.support, self.mass = state["support"].clone(), state["mass"].clone()
