"""The registries of advantage estimators, policy losses and reward managers, and what an estimator is.

`verl.trainer.ppo.core_algos` imports every estimator and loss that is registered, `verl.trainer.ppo.reward` every
reward manager; look names up through them.
"""

import difflib
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from verl.protocol import DataProto
from verl.trainer.config.schema import AlgorithmConfig


@contextmanager
def one_thread() -> Iterator[None]:
    """Run torch on one thread: estimators make many small steps, which threads spend waiting for each other.

    On two busy cores that made a batch of 5,000 rows forty times slower.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@dataclass(frozen=True)
class AdvantageOutput:
    """advantages, returns: (N, T) float32, 0 at masked tokens; metrics: name -> value of this step."""

    advantages: torch.Tensor
    returns: torch.Tensor
    metrics: dict[str, float] = field(default_factory=dict)


class AdvantageEstimator:
    """Turns the rewards of a batch into advantages; may carry state from step to step.

    `needs_bundles`: the trainer calls `assign_bundles` before rows are repeated. `needs_critic`: the batch must hold
    `values` (N, T). `needs_greedy_baseline`: the batch must hold `reward_baselines` (N,), the reward of the greedy
    response to the row's question. `needs_old_log_probs`: the batch must hold `old_log_probs` (N, T), which the trainer
    otherwise leaves to the update where they cannot differ from what that computes. `own_parameters`: the names that
    `algorithm.estimator_kwargs` may hold; ValueError for another one.
    """

    needs_bundles: bool = False
    needs_critic: bool = False
    needs_greedy_baseline: bool = False
    needs_old_log_probs: bool = False
    own_parameters: frozenset[str] = frozenset()

    def __init__(self, config: AlgorithmConfig, rollout_n: int, seed: int) -> None:
        unknown = sorted(config.estimator_kwargs.keys() - self.own_parameters)
        if unknown:
            accepted = f"takes {', '.join(sorted(self.own_parameters))}" if self.own_parameters else "takes none"
            raise ValueError(
                f"algorithm.estimator_kwargs.{unknown[0]}: algorithm.adv_estimator={config.adv_estimator} {accepted}"
            )
        self.config = config
        self.rollout_n = rollout_n
        self.seed = seed

    def __call__(self, batch: DataProto) -> AdvantageOutput:
        raise NotImplementedError

    def check_num_questions(self, num_questions: int) -> None:
        """At start-up: ValueError if steps of `num_questions` questions cannot be handled."""

    def assign_bundles(self, uid: np.ndarray, question_id: np.ndarray, step: int) -> np.ndarray:
        """Bundle id (Q,) of each question of a step; "" marks a question that is left out of the step."""
        raise NotImplementedError(f"{type(self).__name__} does not bundle questions")

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state:
            raise ValueError(f"{type(self).__name__} has no state, the checkpoint holds {sorted(state)} for it")


# What a plain function is handed beside the rewards, where the batch holds it.
OPTIONAL_COLUMNS = (
    "bundle_uid",
    "sample_index",
    "question_id",
    "old_log_probs",
    "ref_log_prob",
    "entropy",
    "values",
    "reward_baselines",
)


class FunctionEstimator(AdvantageEstimator):
    """An estimator without state made of `fn(token_level_rewards, response_mask, config, index=..., **columns)`.

    `fn` returns (advantages, returns), both (N, T). It is handed the optional columns that its signature names, or all
    of them if it takes `**kwargs`. Its keyword-only parameters are set by `algorithm.estimator_kwargs`. It is called
    once at start-up, on made-up rewards of two questions, so that what cannot work fails before anything is sampled.
    """

    fn: Callable[..., tuple[torch.Tensor, torch.Tensor]]

    def __init__(self, config: AlgorithmConfig, rollout_n: int, seed: int) -> None:
        super().__init__(config, rollout_n, seed)
        self(_trial_batch(rollout_n))

    def __call__(self, batch: DataProto) -> AdvantageOutput:
        parameters = inspect.signature(type(self).fn).parameters.values()
        takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters)
        accepted = {p.name for p in parameters}
        columns = {c: batch[c] for c in OPTIONAL_COLUMNS if c in batch and (takes_all or c in accepted)}
        mask = batch["response_mask"]
        with one_thread():
            advantages, returns = type(self).fn(
                batch["token_level_rewards"],
                mask,
                self.config,
                index=batch["uid"],
                **columns,
                **self.config.estimator_kwargs,
            )
        for name, tensor in (("advantages", advantages), ("returns", returns)):
            if tensor.shape != mask.shape:
                raise ValueError(
                    f"algorithm.adv_estimator={self.config.adv_estimator} gives {name} of shape {tuple(tensor.shape)} "
                    f"for rewards of shape {tuple(mask.shape)}: one is needed for each token"
                )
        return AdvantageOutput(advantages.float() * mask, returns.float() * mask)


def _trial_batch(rollout_n: int) -> DataProto:
    """Two questions with `rollout_n` responses each, of two tokens, and every optional column."""
    rows = 2 * rollout_n
    names = np.array(["a", "b"], dtype=object).repeat(rollout_n)
    zeros = torch.zeros(rows, 2)
    return DataProto.from_dict(
        {
            "token_level_rewards": torch.stack([torch.zeros(rows), torch.arange(rows) % 2], dim=1),
            "response_mask": torch.ones(rows, 2, dtype=torch.bool),
            "uid": names,
            "bundle_uid": np.array(["bundle"] * rows, dtype=object),
            "sample_index": torch.arange(rows) % rollout_n,
            "question_id": names,
            "reward_baselines": torch.zeros(rows),
            **dict.fromkeys(("old_log_probs", "ref_log_prob", "entropy", "values"), zeros),
        }
    )


ADV_ESTIMATORS: dict[str, type[AdvantageEstimator]] = {}
POLICY_LOSSES: dict[str, Callable[..., tuple[torch.Tensor, dict[str, torch.Tensor]]]] = {}
TOKEN_SELECTIONS: dict[str, Callable[..., torch.Tensor]] = {}
REWARD_MANAGERS: dict[str, Any] = {}


def register_adv_est(
    name: str, *, min_responses: int = 1, needs_critic: bool = False, needs_greedy_baseline: bool = False
) -> Callable[[Any], Any]:
    """Register an `AdvantageEstimator` subclass, or a plain function (see `FunctionEstimator`), under `name`.

    The keywords describe a plain function, whose own keyword-only parameters `algorithm.estimator_kwargs` sets;
    `min_responses` is the least `rollout.n` that gives it a baseline.
    """

    def register(target: Any) -> Any:
        if name in ADV_ESTIMATORS:
            raise ValueError(f"advantage estimator {name!r} is registered already; choose another name")
        if isinstance(target, type):
            if not issubclass(target, AdvantageEstimator):
                raise ValueError(f"advantage estimator {name!r} must be a function or an AdvantageEstimator")
            ADV_ESTIMATORS[name] = target
        else:
            ADV_ESTIMATORS[name] = _estimator_class(name, target, min_responses, needs_critic, needs_greedy_baseline)
        return target

    return register


def _estimator_class(
    name: str, function: Callable, least: int, critic: bool, greedy_baseline: bool
) -> type[AdvantageEstimator]:
    parameters = inspect.signature(function).parameters.values()

    class Estimator(FunctionEstimator):
        needs_critic = critic
        needs_greedy_baseline = greedy_baseline
        own_parameters = frozenset(p.name for p in parameters if p.kind is p.KEYWORD_ONLY) - set(OPTIONAL_COLUMNS)
        fn = staticmethod(function)

        def __init__(self, config: AlgorithmConfig, rollout_n: int, seed: int) -> None:
            if rollout_n < least:
                raise ValueError(
                    f"algorithm.adv_estimator={name} compares responses to one question: "
                    f"actor_rollout_ref.rollout.n must be at least {least}, not {rollout_n}"
                )
            super().__init__(config, rollout_n, seed)

    Estimator.__name__ = Estimator.__qualname__ = f"FunctionEstimator[{name}]"
    return Estimator


def get_adv_estimator(name: str, config: AlgorithmConfig, rollout_n: int, seed: int) -> AdvantageEstimator:
    """A new estimator; ValueError for an unknown name or a configuration it cannot work with."""
    return _lookup(ADV_ESTIMATORS, name, "algorithm.adv_estimator")(config, rollout_n, seed)


def register_policy_loss(name: str) -> Callable[[Any], Any]:
    """Register a policy loss `(old_log_prob, log_prob, advantages, response_mask, config)` under `name`.

    All tensors are (R, T), a micro-batch. It returns the loss of each token (R, T), not aggregated, and metrics that
    the engine averages over tokens (R, T). Where `register_token_selection` has the same name, the loss also takes
    `selected` (R, T) bool, its rows of the selection made over the whole mini-batch.
    """

    def register(function: Any) -> Any:
        if name in POLICY_LOSSES:
            raise ValueError(f"policy loss {name!r} is registered already; choose another name")
        POLICY_LOSSES[name] = function
        return function

    return register


def register_token_selection(name: str) -> Callable[[Any], Any]:
    """Register for the policy loss `name` the choice of tokens it makes over a whole mini-batch on all workers.

    The function takes `(log_prob, advantages, response_mask, config, generator)`, all tensors (R, T) of the mini-batch,
    and returns (R, T) bool.
    """

    def register(function: Any) -> Any:
        TOKEN_SELECTIONS[name] = function
        return function

    return register


def get_policy_loss(name: str) -> Callable[..., tuple[torch.Tensor, dict[str, torch.Tensor]]]:
    return _lookup(POLICY_LOSSES, name, "actor_rollout_ref.actor.policy_loss.loss_mode")


def get_token_selection(name: str) -> Callable[..., torch.Tensor] | None:
    """The mini-batch token selection of the policy loss `name`, None for the losses that need none."""
    return TOKEN_SELECTIONS.get(name)


def register_reward_manager(name: str) -> Callable[[Any], Any]:
    """Register a subclass of `verl.trainer.ppo.reward.RewardManager` under `name`."""

    def register(cls: Any) -> Any:
        if name in REWARD_MANAGERS:
            raise ValueError(f"reward manager {name!r} is registered already; choose another name")
        REWARD_MANAGERS[name] = cls
        return cls

    return register


def get_reward_manager(name: str) -> Any:
    return _lookup(REWARD_MANAGERS, name, "reward_model.reward_manager")


def _lookup(registry: dict[str, Any], name: str, key: str) -> Any:
    if name not in registry:
        near = difflib.get_close_matches(name, registry, n=3, cutoff=0.4) or sorted(registry)
        raise ValueError(f"{key}={name} is not registered; did you mean {', '.join(near)}?")
    return registry[name]
