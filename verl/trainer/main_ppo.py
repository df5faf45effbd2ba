"""`python -m verl.trainer.main_ppo [--config-name=PRESET] [--config-dir=DIR] key=value ...`: train with PPO."""

import sys
from contextlib import ExitStack
from pathlib import Path

from transformers import AutoConfig, PreTrainedTokenizerBase

from verl.single_controller.worker_group import WorkerGroup, create_worker_group
from verl.trainer.cli import run_cli
from verl.trainer.config.schema import PPOConfig
from verl.trainer.config.validate import validate
from verl.trainer.ppo.checkpointing import check_resumable, check_shared
from verl.trainer.ppo.ray_trainer import (
    RayPPOTrainer,
    needs_critic,
    needs_reference,
    total_training_steps,
)
from verl.trainer.ppo.reward import check_reward, load_reward, make_reward_manager
from verl.trainer.ppo.validation import Validator
from verl.utils.dataset.custom import dataset_class
from verl.utils.dataset.loader import StatefulLoader
from verl.utils.device import resolve_device
from verl.utils.plugins import load_plugins
from verl.utils.report import print_report
from verl.utils.run_folder import LOCK, RunLock
from verl.utils.tokenizer import load_tokenizer
from verl.utils.tracking import Tracking
from verl.workers.actor_rollout_ref import ActorRolloutRefWorker
from verl.workers.critic import ActorCriticWorker
from verl.workers.rollout.base import Rollout, WorkerRollout
from verl.workers.rollout.engine_rollout import EngineRollout
from verl.workers.rollout.vllm_checks import check_vllm, unused_keys
from verl.workers.ulysses import check_size


def build(config: PPOConfig) -> RayPPOTrainer:
    """Everything up to the first step, cheap checks first. Raises ValueError for what the user can mend."""
    load_plugins(config.trainer.plugins)
    validate(config)
    resolve_paths(config)
    tokenizer = load_tokenizer(config.actor_rollout_ref.model.path)
    check_context_length(config, config.actor_rollout_ref.model.path)
    check_sequence_parallel(config)
    check_critic_model(config, tokenizer)
    if config.actor_rollout_ref.rollout.name == "vllm":
        check_vllm(config, cluster_device(config))
    dataset = dataset_class(config.data.custom_cls)
    train = dataset(config.data.train_files, tokenizer, config.data, "data.train_files")
    val = dataset(config.data.val_files, tokenizer, config.data, "data.val_files")
    batch_size = config.data.gen_batch_size or config.data.train_batch_size
    batch_key = "gen_batch_size" if config.data.gen_batch_size else "train_batch_size"
    weights = config.data.train_weights
    loader = StatefulLoader(train, batch_size, config.data.seed, config.data.shuffle, batch_key, weights)
    check_profile_steps(config, total_training_steps(config, len(loader)))
    reward_function = load_reward(config)
    run_dir = config.trainer.default_local_dir
    with ExitStack() as on_failure:
        setting, otherwise = f"trainer.default_local_dir={run_dir}", "set another trainer.experiment_name"
        lock = RunLock(Path(run_dir) / LOCK, setting, otherwise)
        on_failure.callback(lock.release)
        reward = make_reward_manager(reward_function, config.reward_model)
        on_failure.callback(reward.close)
        check_reward(reward_function, reward.evaluate, [train, val])
        check_resumable(config, loader)
        tracking = Tracking.from_config(config)
        if config.actor_rollout_ref.actor.use_torch_compile and cluster_device(config) == "cpu":
            print("on a CPU without effect: actor_rollout_ref.actor.use_torch_compile")
        actor = start_actor(config, total_training_steps(config, len(loader)))
        on_failure.callback(actor.shutdown)
        check_shared(config, actor)
        rollout = make_rollout(config, actor, tokenizer.pad_token_id)
        validator = Validator(config, rollout, val, reward, tracking)
        trainer = RayPPOTrainer(config, actor, rollout, loader, reward, validator, tokenizer, tracking, lock)
        on_failure.pop_all()
        return trainer


def resolve_paths(config: PPOConfig) -> None:
    """Make local paths absolute: workers may have another working directory than the driver."""
    config.trainer.default_local_dir = str(Path(config.trainer.default_local_dir).resolve())
    config.trainer.plugins = [str(Path(file).resolve()) for file in config.trainer.plugins]
    model = Path(config.actor_rollout_ref.model.path)
    if model.is_dir():
        config.actor_rollout_ref.model.path = str(model.resolve())
    critic = config.critic.model.path
    if critic is not None and Path(critic).is_dir():
        config.critic.model.path = str(Path(critic).resolve())


def check_critic_model(config: PPOConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a critic model that reads other tokens than the policy writes, or fewer of them."""
    path = config.critic.model.path
    if path is None or not needs_critic(config):
        return
    if load_tokenizer(path, "critic.model.path").get_vocab() != tokenizer.get_vocab():
        raise ValueError(
            f"critic.model.path={path} has another vocabulary than actor_rollout_ref.model.path="
            f"{config.actor_rollout_ref.model.path}: use a model with the same tokenizer"
        )
    check_context_length(config, path)


def check_context_length(config: PPOConfig, path: str) -> None:
    """Refuse sequences that are longer than the positions of the model at `path`."""
    positions = getattr(AutoConfig.from_pretrained(path).get_text_config(), "max_position_embeddings", None)
    longest = config.data.max_prompt_length + config.data.max_response_length
    if positions is not None and longest > positions:
        raise ValueError(
            f"data.max_prompt_length + data.max_response_length is {longest}, the model at {path} has {positions} "
            "positions: lower one of them"
        )


def check_sequence_parallel(config: PPOConfig) -> None:
    """Refuse a number of workers per packed row that the attention heads or the workers cannot be divided by."""
    model, size = config.actor_rollout_ref.model, config.actor_rollout_ref.actor.ulysses_sequence_parallel_size
    check_size(AutoConfig.from_pretrained(model.path), size, config.trainer.nnodes * config.trainer.n_gpus_per_node)


def check_profile_steps(config: PPOConfig, training_steps: int) -> None:
    for step in config.trainer.profile_steps:
        if not 1 <= step <= training_steps:
            raise ValueError(
                f"trainer.profile_steps={config.trainer.profile_steps}: there is no step {step}, the run has "
                f"{training_steps}"
            )


def start_actor(config: PPOConfig, training_steps: int) -> WorkerGroup:
    """The workers that hold the policy, the reference policy where a KL term needs it, and the critic where there is
    one."""
    actor = config.actor_rollout_ref.actor
    updates = actor.ppo_epochs * (config.data.train_batch_size // actor.ppo_mini_batch_size)  # per step
    policy = (
        config.actor_rollout_ref,
        max(0, training_steps - config.trainer.critic_warmup) * updates,
        needs_reference(config),
        config.trainer.plugins,
    )
    if needs_critic(config):
        return create_worker_group(config.trainer, ActorCriticWorker, *policy, config.critic, training_steps * updates)
    return create_worker_group(config.trainer, ActorRolloutRefWorker, *policy)


def cluster_device(config: PPOConfig) -> str:
    """The device of the workers: that of this machine, or of the Ray cluster."""
    if config.trainer.worker_group == "local":
        return resolve_device(config.trainer.device)
    from verl.single_controller.ray_worker_group import ensure_ray, ray_device

    ensure_ray(config.trainer.nnodes)
    return ray_device(config.trainer.device)


def make_rollout(config: PPOConfig, actor: WorkerGroup, pad_token_id: int) -> Rollout:
    """What samples: the workers themselves, or engines beside them."""
    rollout = config.actor_rollout_ref.rollout
    if rollout.name == "hf":
        return WorkerRollout(actor, rollout.calculate_log_probs)
    for line in unused_keys(config, cluster_device(config)):
        print(line)
    return EngineRollout(config, actor, pad_token_id)


def run(trainer: RayPPOTrainer) -> None:
    """Train and report; workers and trackers are closed whatever happens."""
    try:
        trainer.fit()
    finally:
        trainer.tracking.finish()
        trainer.reward.close()
        trainer.rollout.shutdown()
        trainer.actor.shutdown()
        trainer.lock.release()
    print_report(Path(trainer.config.trainer.default_local_dir))


def where_stopped(trainer: RayPPOTrainer) -> str:
    return f"interrupted at step {trainer.step}; {trainer.checkpoints.prospect()}"


if __name__ == "__main__":
    sys.exit(run_cli(build, run, PPOConfig, "ppo_trainer", interrupted=where_stopped))
