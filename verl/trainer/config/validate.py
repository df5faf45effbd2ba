"""Checks between keys, made before anything is loaded or started. Each is one line that says what to change."""

from collections.abc import Callable
from typing import Any

from verl.trainer.config.compose import ConfigError
from verl.trainer.config.schema import PPOConfig
from verl.trainer.ppo.core_algos import get_adv_estimator
from verl.trainer.ppo.kl import KL_KINDS, get_kl_controller
from verl.trainer.ppo.policy_losses import LOSS_AGG_MODES
from verl.trainer.ppo.registry import check_policy_loss
from verl.trainer.ppo.reward import get_reward_manager
from verl.trainer.ppo.rollout_correction import check_rollout_correction
from verl.utils.dataset.mixture import check_weights
from verl.utils.text import counted
from verl.utils.tracking import check_loggers

CHOICES = {
    "data.truncation": ("error", "left", "right"),
    "actor_rollout_ref.actor.strategy": ("fsdp2",),
    "actor_rollout_ref.actor.loss_agg_mode": LOSS_AGG_MODES,
    "actor_rollout_ref.actor.kl_loss_type": KL_KINDS,
    "actor_rollout_ref.actor.optim.lr_scheduler_type": ("constant", "linear", "cosine"),
    "actor_rollout_ref.rollout.name": ("hf", "vllm"),
    "actor_rollout_ref.rollout.mode": ("async", "sync"),
    "algorithm.kl_penalty": KL_KINDS,
    "algorithm.filter_groups.metric": ("acc", "score", "seq_reward"),
    "trainer.resume_mode": ("auto", "disable"),
}
POSITIVE = (
    "data.train_batch_size",
    "data.gen_batch_size",
    "data.max_prompt_length",
    "data.max_response_length",
    "actor_rollout_ref.actor.ppo_mini_batch_size",
    "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu",
    "actor_rollout_ref.actor.ppo_max_token_len_per_gpu",
    "actor_rollout_ref.actor.ulysses_sequence_parallel_size",
    "actor_rollout_ref.actor.ppo_epochs",
    "actor_rollout_ref.actor.grad_clip",
    "actor_rollout_ref.actor.optim.lr",
    "actor_rollout_ref.rollout.n",
    "actor_rollout_ref.rollout.temperature",
    "actor_rollout_ref.rollout.max_num_seqs",
    "actor_rollout_ref.rollout.tensor_model_parallel_size",
    "actor_rollout_ref.rollout.n_gpus_per_node",
    "actor_rollout_ref.rollout.max_model_len",
    "actor_rollout_ref.rollout.max_num_batched_tokens",
    "actor_rollout_ref.rollout.kv_cache_memory_bytes",
    "actor_rollout_ref.rollout.engine_timeout_s",
    "actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu",
    "actor_rollout_ref.rollout.log_prob_max_token_len_per_gpu",
    "actor_rollout_ref.rollout.val_kwargs.n",
    "actor_rollout_ref.ref.log_prob_micro_batch_size_per_gpu",
    "actor_rollout_ref.ref.log_prob_max_token_len_per_gpu",
    "critic.optim.lr",
    "critic.cliprange_value",
    "trainer.nnodes",
    "trainer.n_gpus_per_node",
    "trainer.start_timeout_s",
    "trainer.total_epochs",
    "trainer.total_training_steps",
    "trainer.max_actor_ckpt_to_keep",
)
RANGES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "actor_rollout_ref.actor.optim.weight_decay": (lambda v: v >= 0, "0 or more"),
    "actor_rollout_ref.actor.clip_ratio_low": (lambda v: v >= 0, "0 or more"),
    "actor_rollout_ref.actor.clip_ratio_high": (lambda v: v >= 0, "0 or more"),
    "actor_rollout_ref.actor.clip_ratio_c": (lambda v: v > 1, "greater than 1"),
    "actor_rollout_ref.actor.policy_loss.cov_fraction": (lambda v: 0 < v <= 1, "in (0, 1]"),
    "actor_rollout_ref.rollout.val_kwargs.temperature": (lambda v: v >= 0, "0 or more"),
    "actor_rollout_ref.rollout.nnodes": (lambda v: v >= 0, "0 or more"),
    "actor_rollout_ref.rollout.gpu_memory_utilization": (lambda v: 0 < v <= 1, "in (0, 1]"),
    "reward_model.num_workers": (lambda v: v >= 0, "0 or more"),
    "reward_model.timeout_s": (lambda v: v > 0, "greater than 0"),
    "algorithm.filter_groups.max_num_gen_batches": (lambda v: v >= 0, "0 or more"),
    "trainer.critic_warmup": (lambda v: v >= 0, "0 or more"),
    "trainer.save_freq": (lambda v: v == -1 or v >= 1, "-1 or 1 or more"),
    "trainer.test_freq": (lambda v: v == -1 or v >= 1, "-1 or 1 or more"),
}


def value_of(config: PPOConfig, key: str) -> Any:
    value: Any = config
    for name in key.split("."):
        value = getattr(value, name)
    return value


def validate(config: PPOConfig) -> None:
    """Raise ConfigError for the first thing that cannot work."""
    for key, choices in CHOICES.items():
        if value_of(config, key) not in choices:
            raise ConfigError(f"{key}={value_of(config, key)}: use one of {', '.join(choices)}")
    for key in POSITIVE:
        value = value_of(config, key)
        if value is not None and not value > 0:
            raise ConfigError(f"{key}={value} must be greater than 0")
    files, weights = config.data.train_files, config.data.train_weights
    try:
        check_loggers(config.trainer.logger)
        if weights is not None:
            check_weights(weights, 1 if isinstance(files, str) else len(files))
    except ValueError as error:
        raise ConfigError(str(error)) from error
    _check_ranges(config)
    _check_sampling(config)
    _check_batches(config)
    _check_token_budgets(config)
    _check_filters(config)
    _check_reward(config)
    _check_algorithm(config)


def _check_ranges(config: PPOConfig) -> None:
    for key, (allowed, text) in RANGES.items():
        value = value_of(config, key)
        if not allowed(value):
            raise ConfigError(f"{key}={value} must be {text}")


def check_truncated_sampling(section: str, sampling: Any) -> None:
    """ConfigError for a `top_p` or `top_k` of this section of the configuration that leaves nothing to sample."""
    if not 0 < sampling.top_p <= 1:
        raise ConfigError(f"{section}.top_p={sampling.top_p} must be in (0, 1]")
    if sampling.top_k != -1 and sampling.top_k < 1:
        raise ConfigError(f"{section}.top_k={sampling.top_k}: use -1 (all) or at least 1")


def _check_sampling(config: PPOConfig) -> None:
    rollout = config.actor_rollout_ref.rollout
    check_truncated_sampling("actor_rollout_ref.rollout", rollout)
    check_truncated_sampling("actor_rollout_ref.rollout.val_kwargs", rollout.val_kwargs)
    if rollout.val_kwargs.n > 1 and (not rollout.val_kwargs.do_sample or rollout.val_kwargs.temperature == 0):
        raise ConfigError(
            f"actor_rollout_ref.rollout.val_kwargs.n={rollout.val_kwargs.n} greedy responses are all the same: "
            "add actor_rollout_ref.rollout.val_kwargs.do_sample=True and a temperature above 0, or set n=1"
        )


def _check_batches(config: PPOConfig) -> None:
    questions = config.data.train_batch_size
    mini = config.actor_rollout_ref.actor.ppo_mini_batch_size
    if questions % mini:
        near = _nearest([d for d in range(1, questions + 1) if questions % d == 0], mini)
        raise ConfigError(
            f"actor_rollout_ref.actor.ppo_mini_batch_size={mini} does not divide data.train_batch_size={questions}: "
            f"use {near}"
        )
    rows, workers = mini * config.actor_rollout_ref.rollout.n, config.trainer.nnodes * config.trainer.n_gpus_per_node
    if rows < workers:
        raise ConfigError(
            f"a mini-batch has {counted(rows, 'row')} (actor_rollout_ref.actor.ppo_mini_batch_size x rollout.n) for "
            f"{workers} training workers: raise ppo_mini_batch_size, or lower trainer.n_gpus_per_node"
        )


def _nearest(candidates: list[int], value: int) -> str:
    below = [c for c in candidates if c < value][-1:]
    above = [c for c in candidates if c > value][:1]
    return " or ".join(map(str, below + above))


def _check_token_budgets(config: PPOConfig) -> None:
    longest = config.data.max_prompt_length + config.data.max_response_length
    model = config.actor_rollout_ref
    workers = model.actor.ulysses_sequence_parallel_size  # that share a packed row
    if workers > 1 and not model.model.use_remove_padding:
        raise ConfigError(
            f"actor_rollout_ref.actor.ulysses_sequence_parallel_size={workers} needs "
            "actor_rollout_ref.model.use_remove_padding=True"
        )
    for key, fixed, dynamic, budget in (
        (
            "actor.ppo_max_token_len_per_gpu",
            model.actor.ppo_micro_batch_size_per_gpu,
            model.actor.use_dynamic_bsz,
            model.actor.ppo_max_token_len_per_gpu,
        ),
        (
            "rollout.log_prob_max_token_len_per_gpu",
            model.rollout.log_prob_micro_batch_size_per_gpu,
            model.rollout.log_prob_use_dynamic_bsz,
            model.rollout.log_prob_max_token_len_per_gpu,
        ),
        (
            "ref.log_prob_max_token_len_per_gpu",
            model.ref.log_prob_micro_batch_size_per_gpu,
            model.ref.log_prob_use_dynamic_bsz,
            model.ref.log_prob_max_token_len_per_gpu,
        ),
    ):
        if (dynamic or fixed is None) and budget * workers < longest:
            sharing = f" on each of {workers} workers (actor.ulysses_sequence_parallel_size)" if workers > 1 else ""
            raise ConfigError(
                f"actor_rollout_ref.{key}={budget}{sharing} is less than one sequence of {longest} tokens "
                "(data.max_prompt_length + data.max_response_length): raise it"
            )


def _check_filters(config: PPOConfig) -> None:
    filters, gen_batch_size = config.algorithm.filter_groups, config.data.gen_batch_size
    if gen_batch_size is not None and not filters.enable and gen_batch_size != config.data.train_batch_size:
        raise ConfigError(
            f"data.gen_batch_size={gen_batch_size} has a meaning under algorithm.filter_groups.enable=True alone: "
            "set that, or leave it out"
        )


def _check_reward(config: PPOConfig) -> None:
    name = config.reward_model.reward_manager
    try:
        manager = get_reward_manager(name)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    overlong, longest = config.reward_model.reward_kwargs.overlong_buffer_cfg, config.data.max_response_length
    if overlong.enable and not manager.shapes_overlong:
        raise ConfigError(
            f"reward_model.reward_kwargs.overlong_buffer_cfg.enable=True has no effect under reward_model."
            f"reward_manager={name}: set reward_model.reward_manager=dapo, or leave it out"
        )
    if overlong.enable and not 0 < overlong.len <= longest:
        raise ConfigError(
            f"reward_model.reward_kwargs.overlong_buffer_cfg.len={overlong.len} must be in "
            f"1..data.max_response_length={longest}"
        )


def _check_algorithm(config: PPOConfig) -> None:
    algorithm, actor = config.algorithm, config.actor_rollout_ref.actor
    try:
        estimator = get_adv_estimator(
            algorithm.adv_estimator, algorithm, config.actor_rollout_ref.rollout.n, config.trainer.seed
        )
        if config.trainer.critic_warmup and not estimator.needs_critic:
            raise ConfigError(
                f"trainer.critic_warmup={config.trainer.critic_warmup}: algorithm.adv_estimator="
                f"{algorithm.adv_estimator} has no critic; set it to 0, or algorithm.adv_estimator=gae"
            )
        if config.trainer.critic_warmup and algorithm.rollout_correction.bypass_mode:
            raise ConfigError(
                f"trainer.critic_warmup={config.trainer.critic_warmup} with algorithm.rollout_correction."
                "bypass_mode=True: in those steps nothing would compute the policy's entropy; set one of them to 0 or "
                "False"
            )
        for questions in {config.data.train_batch_size, config.data.gen_batch_size or config.data.train_batch_size}:
            estimator.check_num_questions(questions)
        check_policy_loss(actor)
        get_kl_controller(algorithm.kl_ctrl)
        check_rollout_correction(algorithm.rollout_correction, config.actor_rollout_ref.rollout)
    except ValueError as error:
        raise ConfigError(str(error)) from error
