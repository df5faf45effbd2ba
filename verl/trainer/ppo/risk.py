"""Risk measures of a score distribution, and the advantage of a score under them.

F^-1(u) = inf{x : F(x) >= u} is the quantile function. All measures are integrals of it, so that an atom on the
boundary of a region counts by the fraction of its mass that lies inside; the mean of the scores below a quantile
would jump as the quantile crosses an atom. Scores are (..., n); `weights` (..., n) are their masses up to a factor
(default: equal). Everything is computed in float64 and batched over the leading dimensions.
"""

from collections.abc import Sequence

import torch

# A float sum of ten times 0.1 is 0.7999999999999999 after eight: a distribution function is compared with a level
# after taking this much off the level.
LEVEL_TOLERANCE = 1e-9
RegionWeights = tuple[float, float, float]


def _sorted_with_cdf(scores: torch.Tensor, weights: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores in ascending order and the distribution function after each, (..., n) float64; the last is exactly 1."""
    scores = scores.double()
    if scores.shape[-1] == 0:
        raise ValueError("a risk measure of no scores is undefined; give at least one score")
    if weights is None:
        n = scores.shape[-1]
        cdf = torch.arange(1, n + 1, dtype=torch.float64) / n
        return scores.sort(-1).values, cdf.expand(scores.shape)
    scores, order = scores.sort(-1)
    cumulative = weights.double().expand(scores.shape).gather(-1, order).cumsum(-1)
    return scores, cumulative / cumulative[..., -1:]


def quantile(
    scores: torch.Tensor, levels: Sequence[float] | torch.Tensor, weights: torch.Tensor | None = None
) -> torch.Tensor:
    """F^-1 at each of L levels, (..., L) float64: always one of the scores."""
    scores, cdf = _sorted_with_cdf(scores, weights)
    levels = torch.as_tensor(levels, dtype=torch.float64).expand(*scores.shape[:-1], -1)
    position = torch.searchsorted(cdf.contiguous(), (levels - LEVEL_TOLERANCE).contiguous())
    return scores.gather(-1, position.clamp(max=scores.shape[-1] - 1))


def quantile_integral(scores: torch.Tensor, a: float, b: float, weights: torch.Tensor | None = None) -> torch.Tensor:
    """Integral of F^-1 from a to b, (...) float64; 0 <= a <= b <= 1."""
    if not 0 <= a <= b <= 1:
        raise ValueError(f"levels a={a} and b={b} must satisfy 0 <= a <= b <= 1")
    scores, cdf = _sorted_with_cdf(scores, weights)
    upper = cdf.clamp(a, b)
    start = torch.full_like(upper[..., :1], a)
    return (scores * upper.diff(dim=-1, prepend=start)).sum(-1)


def rvar(scores: torch.Tensor, a: float, b: float, weights: torch.Tensor | None = None) -> torch.Tensor:
    """Range value at risk, the mean of the scores between levels a and b: 1/(b-a) int_a^b F^-1(u) du, (...) float64."""
    if not a < b:
        raise ValueError(f"levels a={a} and b={b} must satisfy a < b")
    return quantile_integral(scores, a, b, weights) / (b - a)


def cvar(scores: torch.Tensor, a: float, weights: torch.Tensor | None = None) -> torch.Tensor:
    """Conditional value at risk of the lower tail, RVaR_{0:a}, (...) float64."""
    return rvar(scores, 0.0, a, weights)


def mvar(
    scores: torch.Tensor, alpha: float, beta: float, omega: float, weights: torch.Tensor | None = None
) -> torch.Tensor:
    """Mixed value at risk (arXiv 2510.00911): (1 + omega) alpha RVaR_{0:alpha} + (beta - alpha) RVaR_{alpha:beta}."""
    lower = quantile_integral(scores, 0.0, alpha, weights)
    return (1 + omega) * lower + quantile_integral(scores, alpha, beta, weights)


def score_advantage(
    z: torch.Tensor, q_alpha: torch.Tensor | float, q_beta: torch.Tensor | float, region_weights: Sequence[float]
) -> torch.Tensor:
    """Advantage of a score under weights (low, mid, high) of the regions [0, alpha], [alpha, beta], [beta, 1].

    low * (min(z, q_alpha) - q_alpha) + mid * (clip(z, q_alpha, q_beta) - q_beta) + high * max(z - q_beta, 0)

    E[A(z) grad log pi] is the gradient of the sum of weight * int F^-1 over the regions, since the gradient of
    int_a^b F^-1 is E[(clip(z, q_a, q_b) - q_b) grad log pi]. MVaR has weights (1 + omega, 1, 0).
    z (...) and the quantiles broadcast; q_alpha <= q_beta. Float64.
    """
    z = z.double()
    q_alpha = torch.as_tensor(q_alpha, dtype=torch.float64)
    q_beta = torch.as_tensor(q_beta, dtype=torch.float64)
    low, mid, high = (float(w) for w in region_weights)
    advantage = torch.zeros(torch.broadcast_shapes(z.shape, q_alpha.shape, q_beta.shape), dtype=torch.float64)
    if low:
        advantage = advantage + low * (torch.minimum(z, q_alpha) - q_alpha)
    if mid:
        advantage = advantage + mid * (torch.minimum(torch.maximum(z, q_alpha), q_beta) - q_beta)
    if high:
        advantage = advantage + high * (z - q_beta).clamp(min=0)
    return advantage
