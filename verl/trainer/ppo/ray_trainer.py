"""The PPO trainer: `RayPPOTrainer.fit` is the whole training loop, `RayPPOTrainer.train_step` the whole step.

The driver holds ids, tokens, rewards and advantages; models live in the workers.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from verl.protocol import DataProto
from verl.single_controller.worker_group import WorkerGroup, nothing
from verl.trainer.config.schema import PPOConfig
from verl.trainer.ppo.checkpointing import Checkpointing
from verl.trainer.ppo.collect import COUNTS, Collector
from verl.trainer.ppo.core_algos import ADV_ESTIMATORS, AdvantageEstimator, get_adv_estimator
from verl.trainer.ppo.kl import apply_kl_penalty, get_kl_controller
from verl.trainer.ppo.metrics import compute_timing_metrics, describe_batch
from verl.trainer.ppo.policy_losses import select_tokens
from verl.trainer.ppo.registry import get_token_selection
from verl.trainer.ppo.reward import RewardManager
from verl.trainer.ppo.rollout_correction import rollout_correction
from verl.trainer.ppo.update_plan import UpdatePlan
from verl.trainer.ppo.validation import Validator
from verl.utils.dataset.loader import StatefulLoader
from verl.utils.flops import matrix_parameters, training_flops
from verl.utils.generators import seed_generators
from verl.utils.run_folder import RunLock
from verl.utils.timer import Timer
from verl.utils.tracking import Tracking
from verl.workers.rollout.base import Rollout
from verl.workers.rollout.engine_rollout import EngineRollout
from verl.workers.rollout.weight_check import WeightCheck

# The columns from which a model computes log-probabilities.
TOKENS = ["prompts", "prompt_length", "responses", "response_mask"]
MAX_SAMPLE_ROWS = 256  # of a step, written to samples/
CHECK_QUESTIONS = 16  # whose responses the weight check compares
WEIGHT_CHECK_FREQ = 10  # steps from one weight check to the next


class RayPPOTrainer:
    """Trains the policy of `actor` on the questions of `loader`.

    Args:
        config: the checked configuration.
        actor: worker group of ActorRolloutRefWorker (with a critic: ActorCriticWorker), its model not yet loaded.
        rollout: the engines that sample, not yet started.
        loader: batches of questions, resumable.
        reward: scores responses.
        validator: measures the policy on the validation questions.
        tokenizer: decodes responses.
        tracking: where metrics and samples go.
        lock: of the run's folder, released by whoever ends the run.
    """

    def __init__(
        self,
        config: PPOConfig,
        actor: WorkerGroup,
        rollout: Rollout,
        loader: StatefulLoader,
        reward: RewardManager,
        validator: Validator,
        tokenizer: Any,
        tracking: Tracking,
        lock: RunLock,
    ) -> None:
        self.config = config
        self.actor = actor
        self.rollout = rollout
        self.reward = reward
        self.loader = loader
        self.validator = validator
        self.tracking = tracking
        self.lock = lock
        algorithm = config.algorithm
        self.estimator = get_adv_estimator(
            algorithm.adv_estimator, algorithm, config.actor_rollout_ref.rollout.n, config.trainer.seed
        )
        self.collect = Collector(config, rollout, loader, self.estimator, reward, tokenizer)
        self.kl_controller = get_kl_controller(algorithm.kl_ctrl)
        self.with_reference = needs_reference(config)
        self.with_critic = needs_critic(config)
        self.checkpoints = Checkpointing(
            config, actor, {"loader": loader, "estimator": self.estimator, "kl_controller": self.kl_controller}
        )
        self.total_steps = total_training_steps(config, len(loader))
        self.step = 0

    # ------------------------------------------------------------------------------------------------- the loop
    def fit(self) -> None:
        """Train from the newest checkpoint, or from the start, to the last step."""
        trainer = self.config.trainer
        self.start()
        self.tracking.start(self.step, self.total_steps)
        if self.step == 0 and trainer.val_before_train:
            self.tracking.log(self.validator(step=0), step=0)
        while self.step < self.total_steps:
            self.step += 1
            timer = Timer()
            with timer("step"):
                with self._profiled():
                    batch, metrics = self.train_step(timer)
                if self._is_due(trainer.test_freq):
                    with timer("testing"):
                        metrics |= self.validator(self.step)
                if trainer.save_freq > 0 and self._is_due(trainer.save_freq):
                    with timer("save_checkpoint"):
                        self._write_checkpoint()
            metrics |= compute_timing_metrics(timer.seconds, metrics["perf/total_num_tokens"], self.actor.world_size)
            self.tracking.log(metrics, self.step)
            self.tracking.log_samples(self.step, sample_rows(batch), "train")
            # Only now may a checkpoint count: what a run resumed from it has logged is what it has done.
            self.checkpoints.commit()
        self.checkpoints.commit(wait=True)

    def start(self) -> None:
        """Load the model, start the engines, take up the newest checkpoint, and bring its weights to the engines."""
        seed_generators(self.config.trainer.seed, "driver")
        self.actor.seed_generators(self.config.trainer.seed)
        self.actor.init_model()
        self.peak_flops = self.actor.locate()[0].peak_flops
        self.model_config = AutoConfig.from_pretrained(self.config.actor_rollout_ref.model.path).get_text_config()
        self.rollout.start()
        self.weight_check = self._prepare_weight_check()
        self.rollout.pause()  # until the weights come: a checkpoint is loaded into the memory of the training GPUs
        self._resume()
        self._update_weights(check=True)

    def train_step(self, timer: Timer) -> tuple[DataProto, dict[str, float]]:
        """One step: sample, score, advantages, update. Returns the N = questions * n rows and the metrics."""
        batch, metrics = self.collect(self.step, timer)
        if self.estimator.needs_greedy_baseline:
            with timer("gen_max"):
                baselines, greedy_metrics = self.collect.greedy_rewards(batch)
            batch = batch.with_columns(reward_baselines=baselines)
            metrics |= {name: metrics[name] + greedy_metrics[name] for name in COUNTS if name in metrics}
        metrics |= self.rollout.pause()
        plan = UpdatePlan.make(batch, self.config, self.actor.world_size, self.model_config)
        batch = batch.with_columns(mini_batch=plan.mini_batch)
        batch.meta_info["n_mini_batches"] = plan.n_mini_batches
        with timer("old_log_prob"):
            batch = self._old_log_probs(batch, plan, metrics)
        if self.with_reference:
            with timer("ref"):
                batch = batch.union(self.actor.compute_ref_log_prob(batch.select(TOKENS), rows=plan.rows))
        if self.with_critic:
            with timer("values"):
                batch = batch.union(self.actor.compute_values(batch.select(TOKENS), rows=plan.rows))
        with timer("adv"):
            batch = self._token_rewards(batch, metrics)
            output = self.estimator(batch)
            batch = batch.with_columns(advantages=output.advantages, returns=output.returns)
        update_metrics: dict[str, float] = {}
        if self.with_critic:
            with timer("update_critic"):
                update_metrics |= self.actor.update_critic(critic_inputs(batch), rows=plan.rows)[0]
        described: dict[str, float] = {}
        if self.step > self.config.trainer.critic_warmup:
            with timer("update_actor"):
                # Metrics of a large batch take seconds; without the old log-probs they have to wait for the update.
                describe = partial(describe_batch, batch, self.config, described) if "entropy" in batch else nothing
                result = self.actor.update_actor(self._update_inputs(batch), rows=plan.rows, meanwhile=describe)
                if isinstance(result, tuple):
                    seen, result = result
                    batch = batch.with_columns(**seen.columns())
                update_metrics |= result[0]
        with timer("update_weights"):
            metrics |= self._update_weights(check=self._weight_check_is_due())
        metrics |= (
            (described or describe_batch(batch, self.config, described))
            | output.metrics
            | update_metrics
            | plan.metrics()
            | self._utilisation(plan, timer)
        )
        metrics |= {"training/global_step": self.step, "training/epoch": self.loader.epoch}
        return batch, metrics

    # -- stages of a step
    def _old_log_probs(self, batch: DataProto, plan: UpdatePlan, metrics: dict[str, float]) -> DataProto:
        """`old_log_probs` of the policy before the update, or (bypass_mode) the engine's own; with the correction for
        the difference between the two, where that is configured."""
        correction = self.config.algorithm.rollout_correction
        if correction.bypass_mode:
            return batch.with_columns(old_log_probs=batch["rollout_log_probs"])
        if self.step > self.config.trainer.critic_warmup and not old_log_probs_differ(self.config, self.estimator):
            return batch  # the update sees them
        inputs = batch.select(TOKENS)
        inputs.meta_info["temperature"] = self.config.actor_rollout_ref.rollout.temperature
        batch = batch.with_columns(**self.actor.compute_log_prob(inputs, rows=plan.rows).columns())
        if correction.rollout_is is None and correction.rollout_rs is None:
            return batch
        mask = batch["response_mask"]
        corrected = rollout_correction(batch["old_log_probs"], batch["rollout_log_probs"], mask, correction)
        if corrected.weights is not None:
            batch = batch.with_columns(rollout_is_weights=corrected.weights)
        if correction.rollout_rs is not None:
            batch = batch.with_columns(loss_mask=mask & corrected.keep[:, None])
        return batch

    def _token_rewards(self, batch: DataProto, metrics: dict[str, float]) -> DataProto:
        """Token rewards: the scores, less the KL penalty if it is in the reward."""
        algorithm = self.config.algorithm
        rewards = batch["token_level_scores"]
        if algorithm.use_kl_in_reward:
            coef = self.kl_controller.value
            rewards, mean_kl = apply_kl_penalty(
                rewards,
                batch["old_log_probs"],
                batch["ref_log_prob"],
                batch["response_mask"],
                coef,
                algorithm.kl_penalty,
            )
            metrics |= {"actor/reward_kl_penalty": mean_kl, "actor/reward_kl_penalty_coeff": coef}
            self.kl_controller.update(mean_kl, len(batch))
        return batch.with_columns(token_level_rewards=rewards)

    def _update_inputs(self, batch: DataProto) -> DataProto:
        """The columns that the policy update reads."""
        actor = self.config.actor_rollout_ref.actor
        optional = ("old_log_probs", "ref_log_prob", "rollout_is_weights", "loss_mask")
        update = batch.select([*TOKENS, "advantages", "mini_batch", *(name for name in optional if name in batch)])
        if get_token_selection(actor.policy_loss.loss_mode) is not None:
            selected = select_tokens(
                actor.policy_loss.loss_mode,
                batch["old_log_probs"],
                batch["advantages"],
                batch["response_mask"],
                batch["mini_batch"],
                actor,
                self.config.trainer.seed,
                self.step,
            )
            update = update.with_columns(selected=selected)
        update.meta_info["with_entropy"] = "entropy" not in batch
        return update

    def _utilisation(self, plan: UpdatePlan, timer: Timer) -> dict[str, float]:
        """Model FLOP utilisation of the policy update, on devices whose peak is known."""
        seconds = timer.seconds.get("update_actor")
        if self.peak_flops is None or seconds is None:
            return {}
        flops = float(training_flops(self.model_config, matrix_parameters(self.model_config), plan.lengths).sum())
        flops *= self.config.actor_rollout_ref.actor.ppo_epochs
        return {"perf/mfu/actor": flops / (seconds * self.actor.world_size * self.peak_flops)}

    # ---------------------------------------------------------------------------------------------------- engines
    def _prepare_weight_check(self) -> WeightCheck | None:
        """For engines that hold weights of their own, measured now that both sides have loaded the same ones."""
        if not isinstance(self.rollout, EngineRollout):
            return None
        check = WeightCheck(self.rollout, self.actor, self.config.trainer.seed, self.config.data.max_response_length)
        check.prepare(self.loader.dataset.batch(range(min(CHECK_QUESTIONS, len(self.loader.dataset)))))
        return check

    def _is_due(self, freq: int) -> bool:
        """Every `freq` steps and at the end."""
        return self.step == self.total_steps or (freq > 0 and self.step % freq == 0)

    def _weight_check_is_due(self) -> bool:
        return self.step == 1 or self.step % WEIGHT_CHECK_FREQ == 0

    def _update_weights(self, check: bool) -> dict[str, float]:
        metrics = self.rollout.update_weights()
        return metrics | self.weight_check() if check and self.weight_check else metrics

    @contextmanager
    def _profiled(self) -> Iterator[None]:
        """Worker 0 records the steps of `trainer.profile_steps`."""
        trainer = self.config.trainer
        if self.step not in trainer.profile_steps:
            yield
            return
        path = Path(trainer.default_local_dir) / "profile" / f"step_{self.step}"
        self.actor.start_profile()
        yield
        self.actor.stop_profile(str(path))
        print(f"profile of step {self.step}: {path}.json.gz (trace) and {path}.txt (table)")

    # ---------------------------------------------------------------------------------------------- checkpoints
    def _write_checkpoint(self) -> None:
        """Write one. What waits in the CPU's memory comes to the GPUs for it, so the engines there have to leave."""
        fsdp = self.config.actor_rollout_ref.actor.fsdp_config
        paused = self.rollout.pause() if fsdp.param_offload or fsdp.optimizer_offload else {}
        self.checkpoints.write(self.step)
        if paused:
            self._update_weights(check=False)

    def _resume(self) -> None:
        self.step = self.checkpoints.resume()
        if self.step >= self.total_steps:
            print(
                f"all {self.total_steps} steps are done already: raise trainer.total_training_steps, or start anew "
                "with another trainer.experiment_name or trainer.resume_mode=disable"
            )


def total_training_steps(config: PPOConfig, steps_per_epoch: int) -> int:
    """`trainer.total_training_steps`, or the steps of `trainer.total_epochs`."""
    steps = config.trainer.total_training_steps
    return steps if steps is not None else config.trainer.total_epochs * steps_per_epoch


def needs_reference(config: PPOConfig) -> bool:
    """Whether a KL term, in the reward or in the loss, needs the reference policy."""
    return config.algorithm.use_kl_in_reward or config.actor_rollout_ref.actor.use_kl_loss


def needs_critic(config: PPOConfig) -> bool:
    """Whether the advantage estimator needs the values of a critic."""
    return ADV_ESTIMATORS[config.algorithm.adv_estimator].needs_critic


def critic_inputs(batch: DataProto) -> DataProto:
    """The columns that the critic's update reads."""
    return batch.select([*TOKENS, "values", "returns", "mini_batch", *(["loss_mask"] if "loss_mask" in batch else [])])


def old_log_probs_differ(config: PPOConfig, estimator: AdvantageEstimator) -> bool:
    """Whether a pass before the update can tell anything that the update's own first pass does not: there is a second
    update of the step, or something needs the log-probs before."""
    actor, correction = config.actor_rollout_ref.actor, config.algorithm.rollout_correction
    one_update = actor.ppo_epochs == 1 and actor.ppo_mini_batch_size == config.data.train_batch_size
    return (
        not one_update
        or estimator.needs_old_log_probs
        or config.algorithm.use_kl_in_reward
        or correction.rollout_is is not None
        or correction.rollout_rs is not None
        or get_token_selection(actor.policy_loss.loss_mode) is not None
    )


def sample_rows(batch: DataProto) -> list[dict[str, Any]]:
    """What `samples/` keeps of a training batch: a dict for each of the first rows."""
    batch = batch.select_rows(range(min(len(batch), MAX_SAMPLE_ROWS)))
    bundles = batch["bundle_uid"] if "bundle_uid" in batch else [None] * len(batch)
    rewards = batch["token_level_scores"].sum(1).tolist()
    advantages = batch["advantages"][:, 0].tolist()
    return [
        {"prompt": prompt, "response": response, "reward": reward, "bundle": bundle, "advantage": advantage}
        for prompt, response, reward, bundle, advantage in zip(
            batch["prompt_text"], batch["response_text"], rewards, bundles, advantages, strict=True
        )
    ]
