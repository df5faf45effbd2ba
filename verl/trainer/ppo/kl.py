"""The KL divergence from the reference policy: its estimators, its use in the reward, and its coefficient."""

from typing import Any

import torch

from verl.trainer.config.schema import KLCtrlConfig

KL_KINDS = ("kl", "abs", "mse", "low_var_kl")
MAX_LOG_RATIO = 20.0


def kl_penalty(log_prob: torch.Tensor, ref_log_prob: torch.Tensor, kind: str) -> torch.Tensor:
    """Per-token estimate of KL(pi || ref) from a token drawn from pi, of any shape. With d = log pi - log ref:

    - `kl`: d, unbiased;
    - `abs`: |d|;
    - `mse`: d^2 / 2, whose gradient in log pi is unbiased for the gradient of the KL;
    - `low_var_kl`: exp(-d) + d - 1, unbiased and never negative (d limited to +-20).
    """
    difference = log_prob - ref_log_prob
    if kind == "kl":
        return difference
    if kind == "abs":
        return difference.abs()
    if kind == "mse":
        return 0.5 * difference.square()
    if kind == "low_var_kl":
        difference = difference.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
        return torch.expm1(-difference) + difference
    raise ValueError(f"KL estimator {kind!r} is unknown; use one of {', '.join(KL_KINDS)}")


def apply_kl_penalty(
    token_level_scores: torch.Tensor,
    log_prob: torch.Tensor,
    ref_log_prob: torch.Tensor,
    response_mask: torch.Tensor,
    coef: float,
    kind: str,
) -> tuple[torch.Tensor, float]:
    """Rewards = scores - coef * KL at each response token, (N, T), and the KL's mean over those tokens."""
    divergence = torch.where(response_mask.bool(), kl_penalty(log_prob, ref_log_prob, kind), 0.0)
    mean = divergence.double().sum() / response_mask.sum().clamp(min=1)
    return token_level_scores - coef * divergence, float(mean)


class FixedKLController:
    """A constant coefficient."""

    def __init__(self, kl_coef: float) -> None:
        self.value = kl_coef

    def update(self, current_kl: float, num_responses: int) -> None:
        """Nothing moves."""

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing is taken over: the coefficient is the configuration's."""


class AdaptiveKLController(FixedKLController):
    """The coefficient follows the divergence to a target (arXiv 1909.08593, section 2.2).

    value *= 1 + clip(kl / target - 1, -0.2, 0.2) * responses / horizon
    """

    def __init__(self, kl_coef: float, target_kl: float, horizon: int) -> None:
        if target_kl <= 0:
            raise ValueError(f"algorithm.kl_ctrl.target_kl={target_kl} must be positive")
        if horizon <= 0:
            raise ValueError(f"algorithm.kl_ctrl.horizon={horizon} must be positive")
        super().__init__(kl_coef)
        self.target_kl = target_kl
        self.horizon = horizon

    def update(self, current_kl: float, num_responses: int) -> None:
        error = min(max(current_kl / self.target_kl - 1, -0.2), 0.2)
        self.value *= 1 + error * num_responses / self.horizon

    def state_dict(self) -> dict[str, Any]:
        return {"value": self.value}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from the value that was reached; from the configured one, after a run with a fixed coefficient."""
        self.value = float(state.get("value", self.value))


def get_kl_controller(config: KLCtrlConfig) -> FixedKLController:
    if config.type == "fixed":
        return FixedKLController(config.kl_coef)
    if config.type == "adaptive":
        return AdaptiveKLController(config.kl_coef, config.target_kl, config.horizon)
    raise ValueError(f"algorithm.kl_ctrl.type={config.type} is unknown; use fixed or adaptive")
