"""Every advantage estimator and policy loss by name: importing this module fills the registries."""

from verl.trainer.ppo import advantages, policy_losses, published_riskpo, riskpo
from verl.trainer.ppo.kl import (
    AdaptiveKLController,
    FixedKLController,
    apply_kl_penalty,
    get_kl_controller,
    kl_penalty,
)
from verl.trainer.ppo.policy_losses import LossTotals, select_tokens, token_weights
from verl.trainer.ppo.published_riskpo import compute_grpo_bundle_rvar_outcome_advantage_quantile_tracking
from verl.trainer.ppo.registry import (
    ADV_ESTIMATORS,
    POLICY_LOSSES,
    AdvantageEstimator,
    AdvantageOutput,
    get_adv_estimator,
    get_policy_loss,
    get_token_selection,
    register_adv_est,
    register_policy_loss,
    register_token_selection,
)
from verl.trainer.ppo.risk_metrics import covariance_metrics

__all__ = [
    "ADV_ESTIMATORS",
    "POLICY_LOSSES",
    "AdaptiveKLController",
    "AdvantageEstimator",
    "AdvantageOutput",
    "FixedKLController",
    "LossTotals",
    "advantages",
    "apply_kl_penalty",
    "compute_grpo_bundle_rvar_outcome_advantage_quantile_tracking",
    "covariance_metrics",
    "get_adv_estimator",
    "get_kl_controller",
    "get_policy_loss",
    "get_token_selection",
    "kl_penalty",
    "policy_losses",
    "published_riskpo",
    "register_adv_est",
    "register_policy_loss",
    "register_token_selection",
    "riskpo",
    "select_tokens",
    "token_weights",
]
