"""The registries of advantage estimators, policy losses and reward managers, and what an estimator is.

`verl.trainer.ppo.core_algos` imports every estimator and loss that is registered, `verl.trainer.ppo.reward` every
reward manager; look names up through them.
"""

import difflib
import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from verl.protocol import DataProto
from verl.trainer.config.schema import ActorConfig, AlgorithmConfig
from verl.workers.reward.function import describe


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


@contextmanager
def _trial(choice: str, data: str, form: str) -> Iterator[None]:
    """Whatever a user's function raises on made-up data becomes a one-line ValueError that names its key."""
    try:
        yield
    except Exception as error:
        if isinstance(error, ValueError) and str(error).startswith(("algorithm.", "actor_rollout_ref.")):
            raise  # names its key already
        raise ValueError(f"{choice} fails on made-up {data}: {describe(error)}; its form is {form}") from error


# What a plain function names of these it is handed by name; in the first three places it may call the first three as it
# likes.
CORE_ARGUMENTS = ("token_level_rewards", "response_mask", "config", "index")
ESTIMATOR_FORM = "fn(token_level_rewards, response_mask, config, index=..., ...)"
# And of these, where the batch holds them.
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

    `fn` returns (advantages, returns), both (N, T). It is handed what its signature names, by name and in any order, or
    everything if it takes `**kwargs`: token_level_rewards and response_mask (N, T), config (`AlgorithmConfig`), index
    (N,) the question of each response, and the optional columns. Its other keyword-only parameters are set by
    `algorithm.estimator_kwargs`. It is called once at start-up, on made-up rewards of two questions, so that what
    cannot work fails before anything is sampled.
    """

    fn: Callable[..., tuple[torch.Tensor, torch.Tensor]]

    def __init__(self, config: AlgorithmConfig, rollout_n: int, seed: int) -> None:
        super().__init__(config, rollout_n, seed)
        with _trial(f"algorithm.adv_estimator={config.adv_estimator}", "rewards", ESTIMATOR_FORM):
            self(_trial_batch(rollout_n))

    def __call__(self, batch: DataProto) -> AdvantageOutput:
        mask = batch["response_mask"]
        core = (batch["token_level_rewards"], mask, self.config, batch["uid"])
        offered = dict(zip(CORE_ARGUMENTS, core, strict=True)) | {c: batch[c] for c in OPTIONAL_COLUMNS if c in batch}
        with one_thread():
            advantages, returns = type(self).fn(**_arguments(type(self).fn, offered), **self.config.estimator_kwargs)
        for name, tensor in (("advantages", advantages), ("returns", returns)):
            if tensor.shape != mask.shape:
                raise ValueError(
                    f"algorithm.adv_estimator={self.config.adv_estimator} gives {name} of shape {tuple(tensor.shape)} "
                    f"for rewards of shape {tuple(mask.shape)}: one is needed for each token"
                )
        return AdvantageOutput(advantages.float() * mask, returns.float() * mask)


def _arguments(function: Callable, offered: dict[str, Any]) -> dict[str, Any]:
    """What `function` is called with, of what is offered."""
    signature = inspect.signature(function).parameters
    parameters = signature.values()
    arguments = {p.name: offered[p.name] for p in parameters if p.name in offered}
    plain = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.empty)
    renamed = {
        p.name: name
        for p, name in zip(parameters, CORE_ARGUMENTS[:3], strict=False)
        if p.name not in offered and name not in signature and (p.kind, p.default) == plain
    }
    arguments |= {own: offered[name] for own, name in renamed.items()}
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        arguments |= {name: value for name, value in offered.items() if name not in renamed.values()}
    return arguments


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
LOSS_MODE = "actor_rollout_ref.actor.policy_loss.loss_mode"


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
        own_parameters = frozenset(p.name for p in parameters if p.kind is p.KEYWORD_ONLY) - {
            *CORE_ARGUMENTS,
            *OPTIONAL_COLUMNS,
        }
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
    the engine averages over tokens, a dict of (R, T); anything else is refused. Where `register_token_selection` has
    the same name, the loss also takes `selected` (R, T) bool, its rows of the selection made over the whole mini-batch.
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
    """The policy loss `name`; ValueError for an unknown name, and when it returns anything but values per token, which
    would make the gradient depend on how rows are divided into micro-batches."""
    function = _lookup(POLICY_LOSSES, name, LOSS_MODE)

    @functools.wraps(function)
    def checked(old_log_prob: torch.Tensor, *arguments: Any, **selection: Any) -> Any:
        output = function(old_log_prob, *arguments, **selection)
        wanted = f"(loss, metrics) is wanted, the loss and every metric of shape {tuple(old_log_prob.shape)}, per token"
        if not isinstance(output, tuple) or len(output) != 2:
            found = f"{len(output)} values" if isinstance(output, tuple) else f"a {type(output).__name__}"
            raise ValueError(f"{LOSS_MODE}={name} returns {found}: {wanted}")
        for what, values in {"loss": output[0], **output[1]}.items():
            if getattr(values, "shape", None) != old_log_prob.shape:
                found = f"shape {tuple(values.shape)}" if hasattr(values, "shape") else f"type {type(values).__name__}"
                raise ValueError(f"{LOSS_MODE}={name} returns a {what} of {found}: {wanted}")
        return output

    return checked


def check_policy_loss(config: ActorConfig) -> None:
    """Call the configured loss on made-up rows; ValueError if it cannot work."""
    name = config.policy_loss.loss_mode
    function = get_policy_loss(name)
    log_prob, mask = torch.full((2, 3), -1.0, requires_grad=True), torch.ones(2, 3, dtype=torch.bool)
    advantages = torch.tensor([[1.0], [-1.0]]).expand(2, 3)
    selection = {"selected": mask} if get_token_selection(name) else {}
    with _trial(f"{LOSS_MODE}={name}", "rows", "fn(old_log_prob, log_prob, advantages, response_mask, config)"):
        function(log_prob.detach(), log_prob, advantages, mask, config, **selection)


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
