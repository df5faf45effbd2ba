"""The configuration: typed, with every default and every description in this one place.

A key here is read by the code (tests/trainer/config/test_schema.py proves it) and listed in docs/config.md
(`python -m verl.trainer.config.document` regenerates it). Keys follow the names that launch scripts of this field
use. `II(path)` marks a key that follows another one unless it is set itself.

Units: `data.train_batch_size` and `ppo_mini_batch_size` count prompts (questions); micro-batches count rows
(responses); `n_gpus_per_node` counts training workers per node, on any device.
"""

from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any

from omegaconf import II, MISSING


def key(default: Any, help: str) -> Any:
    """A documented configuration key."""
    if isinstance(default, list | dict):
        return field(default_factory=lambda: type(default)(default), metadata={"help": help})
    return field(default=default, metadata={"help": help})


def section(cls: type) -> Any:
    return field(default_factory=cls)


# ---------------------------------------------------------------------------------------------------------- data
@dataclass
class CustomClassConfig:
    path: str | None = key(None, "Python file with a data set class of your own, derived from `RLHFDataset`.")
    name: str | None = key(None, "Its name in that file.")


@dataclass
class DataConfig:
    train_files: Any = key(MISSING, "Training rows: one parquet or JSONL file, or a list of them.")
    val_files: Any = key(MISSING, "Validation rows: one parquet or JSONL file, or a list of them.")
    train_weights: list[float] | None = key(
        None, "Share of each training file in every epoch and batch; null: every row once per epoch."
    )
    train_batch_size: int = key(1024, "Questions per training step.")
    gen_batch_size: int | None = key(
        None, "Questions sampled at a time under `algorithm.filter_groups`; null: `train_batch_size`."
    )
    max_prompt_length: int = key(512, "Longest prompt, in tokens.")
    max_response_length: int = key(512, "Longest response, in tokens.")
    truncation: str = key("error", "What happens to a longer prompt: `error`, `left` or `right` (which end is cut).")
    filter_overlong_prompts: bool = key(False, "Drop longer prompts instead; the number dropped is printed.")
    prompt_key: str = key("prompt", "Column that holds the chat messages.")
    shuffle: bool = key(True, "Draw the training questions in a new order each epoch.")
    seed: int = key(II("trainer.seed"), "Seed of the order of questions; follows `trainer.seed`.")
    custom_cls: CustomClassConfig = section(CustomClassConfig)


# --------------------------------------------------------------------------------------------- actor, rollout, ref
@dataclass
class ModelConfig:
    path: str = key(MISSING, "Hugging Face folder (or hub name) of the model and its tokenizer.")
    enable_gradient_checkpointing: bool = key(True, "Recompute each layer in the backward pass to save memory.")
    use_remove_padding: bool = key(
        True, "Compute packed rows, a prompt once for all its responses; false: right-padded rows. Results are equal."
    )
    use_fused_kernels: bool = key(False, "Liger's kernels for normalisation, MLP and rotary embedding; needs a GPU.")
    lora_rank: int = key(0, "Train low-rank adapters of this rank on every linear layer; 0: all weights.")
    lora_alpha: int = key(16, "Adapters are scaled by this / `lora_rank`.")


@dataclass
class OptimConfig:
    lr: float = key(1e-6, "Peak learning rate of AdamW.")
    weight_decay: float = key(0.01, "Decoupled weight decay.")
    lr_warmup_steps: int = key(-1, "Optimizer steps of linear warm-up; -1: none.")
    lr_scheduler_type: str = key("constant", "After warm-up: `constant`, `linear` or `cosine` (both decay to 0).")


@dataclass
class PolicyLossConfig:
    loss_mode: str = key("vanilla", "Policy loss by its registered name: `vanilla` (token-level PPO clip), `gspo`, ...")
    cov_fraction: float = key(
        2e-4, "clip_cov, kl_cov: share of a mini-batch's tokens that is detached, or KL-penalised."
    )


@dataclass
class FSDPConfig:
    fsdp_size: int = key(-1, "Workers that hold one copy of the model together (hybrid sharding); -1: all.")
    param_offload: bool = key(False, "Weights wait in the CPU's memory while they are not used.")
    optimizer_offload: bool = key(False, "So does the optimizer's state.")
    reduce_per_mini_batch: bool = key(
        False,
        "Sum gradients over workers once per mini-batch, not per micro-batch: faster, but whole on each GPU.",
    )


@dataclass
class RefFSDPConfig:
    param_offload: bool = key(False, "The reference policy's weights wait in the CPU's memory while not used.")


@dataclass
class ActorConfig:
    strategy: str = key("fsdp2", "Training engine; `fsdp2` is the one there is.")
    ppo_mini_batch_size: int = key(256, "Questions per optimizer step.")
    ppo_micro_batch_size_per_gpu: int | None = key(
        None,
        "Rows per forward and backward pass of a worker, any number; null: filled up to `ppo_max_token_len_per_gpu`.",
    )
    use_dynamic_bsz: bool = key(False, "Fill micro-batches to a token budget even if a fixed size is given.")
    ppo_max_token_len_per_gpu: int = key(16384, "Token budget of a micro-batch (prompt and response).")
    ulysses_sequence_parallel_size: int = key(
        1, "Workers that share a packed row and its attention heads; the budget above is then each worker's."
    )
    use_torch_compile: bool = key(False, "Compile the decoder layers; no effect on a CPU.")
    ppo_epochs: int = key(1, "Passes over the batch per step.")
    clip_ratio_low: float = key(0.2, "The ratio is clipped below at 1 - this.")
    clip_ratio_high: float = key(0.2, "The ratio is clipped above at 1 + this.")
    clip_ratio_c: float = key(3.0, "Dual clip: bound of ratio * advantage for negative advantages; > 1.")
    loss_agg_mode: str = key(
        "token-mean",
        "How token losses become one number: `token-mean`, `seq-mean-token-sum`, `seq-mean-token-mean` or "
        "`seq-mean-token-sum-norm`; always over the whole mini-batch on all workers.",
    )
    entropy_coeff: float = key(0.0, "Weight of the entropy bonus in the loss.")
    use_kl_loss: bool = key(False, "Add the KL divergence from the reference policy to the loss.")
    kl_loss_coef: float = key(0.001, "Weight of that KL term.")
    kl_loss_type: str = key("low_var_kl", "Its estimator: `kl`, `abs`, `mse` or `low_var_kl`.")
    grad_clip: float = key(1.0, "Largest global norm of the gradient.")
    policy_loss: PolicyLossConfig = section(PolicyLossConfig)
    optim: OptimConfig = section(OptimConfig)
    fsdp_config: FSDPConfig = section(FSDPConfig)


@dataclass
class ValSamplingConfig:
    n: int = key(1, "Responses per validation question.")
    do_sample: bool = key(False, "Sample; false: greedy, whatever the temperature.")
    temperature: float = key(0.0, "Temperature of validation samples; 0: greedy.")
    top_p: float = key(1.0, "Nucleus of validation samples.")
    top_k: int = key(-1, "Top-k of validation samples; -1: all.")


@dataclass
class RolloutConfig:
    name: str = key("hf", "Rollout engine: `vllm`, or `hf` (transformers, in the training process).")
    mode: str = key("async", "Score a response when it is finished (`async`), or all at the end (`sync`).")
    n: int = key(1, "Responses per training question.")
    temperature: float = key(1.0, "Sampling temperature; the trainer divides its logits by it as well.")
    top_p: float = key(1.0, "Nucleus sampling; 1: off.")
    top_k: int = key(-1, "Top-k sampling; -1: off.")
    max_num_seqs: int = key(256, "Most sequences decoded together by one engine.")
    calculate_log_probs: bool = key(True, "Take the engine's log-probs along, to compare and to correct with.")
    nnodes: int = key(0, "vllm: nodes with GPUs for the engines alone; 0: engines share the training GPUs.")
    n_gpus_per_node: int = key(8, "vllm: engine GPUs on each of those nodes (on a CPU: engines).")
    tensor_model_parallel_size: int = key(1, "vllm: GPUs of one engine.")
    max_model_len: int | None = key(None, "vllm: longest sequence; null: longest prompt and longest response.")
    max_num_batched_tokens: int = key(8192, "vllm: most tokens computed in one step of an engine.")
    gpu_memory_utilization: float = key(0.5, "vllm: share of a GPU's memory for an engine.")
    kv_cache_memory_bytes: int | None = key(
        None, "vllm: key-value cache of an engine; null: what `gpu_memory_utilization` leaves, on a CPU 1 GiB."
    )
    enforce_eager: bool = key(False, "vllm: neither compile nor capture graphs: starts faster, decodes slower.")
    enable_chunked_prefill: bool = key(True, "vllm: split long prompts over steps. Always off on a CPU.")
    free_cache_engine: bool = key(True, "vllm on the training GPUs: give their memory back while training.")
    engine_timeout_s: int = key(300, "vllm: an engine that does not answer for so long is replaced.")
    log_prob_micro_batch_size_per_gpu: int | None = key(
        II("actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu"), "Rows per log-prob pass; follows the actor's."
    )
    log_prob_use_dynamic_bsz: bool = key(
        II("actor_rollout_ref.actor.use_dynamic_bsz"), "Token budget for log-prob passes; follows the actor's."
    )
    log_prob_max_token_len_per_gpu: int = key(
        II("actor_rollout_ref.actor.ppo_max_token_len_per_gpu"), "That budget; follows the actor's."
    )
    val_kwargs: ValSamplingConfig = section(ValSamplingConfig)


@dataclass
class RefConfig:
    fsdp_config: RefFSDPConfig = section(RefFSDPConfig)
    log_prob_micro_batch_size_per_gpu: int | None = key(
        II("actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu"), "Rows per reference pass; follows the actor's."
    )
    log_prob_use_dynamic_bsz: bool = key(
        II("actor_rollout_ref.actor.use_dynamic_bsz"), "Token budget for reference passes; follows the actor's."
    )
    log_prob_max_token_len_per_gpu: int = key(
        II("actor_rollout_ref.actor.ppo_max_token_len_per_gpu"), "That budget; follows the actor's."
    )


@dataclass
class ActorRolloutRefConfig:
    model: ModelConfig = section(ModelConfig)
    actor: ActorConfig = section(ActorConfig)
    rollout: RolloutConfig = section(RolloutConfig)
    ref: RefConfig = section(RefConfig)


# -------------------------------------------------------------------------------------------------------- critic
@dataclass
class CriticModelConfig:
    path: str | None = key(None, "Model under the critic's value head, with the actor's tokenizer; null: the actor's.")


@dataclass
class CriticOptimConfig:
    lr: float = key(1e-5, "Peak learning rate of the critic; everything else is the actor's.")


@dataclass
class CriticConfig:
    model: CriticModelConfig = section(CriticModelConfig)
    optim: CriticOptimConfig = section(CriticOptimConfig)
    cliprange_value: float = key(0.5, "In the value loss, values move at most so far from those before the update.")


# ----------------------------------------------------------------------------------------------------- algorithm
@dataclass
class RiskConfig:
    alpha: float = key(0.2, "Lower quantile level: outcomes below it weigh 1 + omega.")
    beta: float = key(0.8, "Upper quantile level: outcomes above it weigh nothing.")
    omega: float = key(0.5, "Extra weight of the lower tail (the paper's omega).")
    region_weights: list[float] | None = key(
        None, "Weights of [0, alpha], [alpha, beta], [beta, 1]; null: MVaR's (1 + omega, 1, 0)."
    )
    bundling: str = key("random", "Which questions form a bundle: `random`, `same_question` or `difficulty`.")
    bundle_remainder: str | None = key(
        None,
        "Questions left over by the bundle size: `error`, `drop` (left out) or `short` (a smaller bundle); null: "
        "`error`, and `short` under the published estimator.",
    )
    pairing: str = key("exact", "Which responses meet: `exact` (expectation over all), `permute` or `aligned`.")
    num_pairings: int = key(1, "Independent pairings averaged by `permute`.")
    baseline: str = key("leave_one_out", "Subtracted from the credit: `leave_one_out` or `none`.")
    adv_norm: str = key("none", "`none`, or `batch`: divide by the batch's standard deviation of advantages.")
    quantile_source: str = key("tracked", "Quantiles used: `tracked`, `batch` or `mixed` (their mean).")
    tracker: str = key("sgd", "`sgd` (the paper's) or `ema`, a moving average of the score distribution.")
    update_order: str = key("after", "The tracker moves `after` a batch's advantages are computed, or `before`.")


@dataclass
class KLCtrlConfig:
    type: str = key("fixed", "`fixed` or `adaptive` coefficient of the KL penalty in the reward.")
    kl_coef: float = key(0.001, "Coefficient (the first one, if adaptive).")
    horizon: int = key(10000, "Adaptive: responses over which the coefficient moves.")
    target_kl: float = key(0.1, "Adaptive: KL aimed at.")


@dataclass
class FilterGroupsConfig:
    enable: bool = key(False, "DAPO's dynamic sampling: drop questions (bundles) whose responses score the same.")
    metric: str = key("acc", "What must differ: `acc`, `score`, or `seq_reward` (with the overlong penalty).")
    max_num_gen_batches: int = key(0, "Most batches sampled to fill one step; 0: no limit.")


@dataclass
class RolloutCorrectionConfig:
    rollout_is: str | None = key(None, "Importance weights old policy / engine: `token`, `sequence`; null: none.")
    rollout_is_threshold: float = key(2.0, "They are cut off above this.")
    rollout_rs: str | None = key(
        None, "Leave out responses whose ratio is out of range: `sequence` (product), `geometric` (mean); null: none."
    )
    rollout_rs_threshold: float | None = key(None, "Largest ratio that stays; the smallest is 1 / this.")
    bypass_mode: bool = key(False, "Take the engine's log-probs as the old policy's: no pass to compute those.")


@dataclass
class AlgorithmConfig:
    adv_estimator: str = key("riskpo", "Advantage estimator by its registered name.")
    gamma: float = key(1.0, "Discount per token.")
    lam: float = key(1.0, "gae: lambda.")
    estimator_kwargs: dict[str, Any] = key(
        {}, "An estimator's own parameters, handed to it by name; docs/algorithm.md lists them."
    )
    norm_adv_by_std_in_grpo: bool = key(True, "GRPO: divide by the group's standard deviation.")
    use_kl_in_reward: bool = key(False, "Subtract the KL divergence from the reference policy from the rewards.")
    kl_penalty: str = key("kl", "Its estimator: `kl`, `abs`, `mse` or `low_var_kl`.")
    kl_ctrl: KLCtrlConfig = section(KLCtrlConfig)
    filter_groups: FilterGroupsConfig = section(FilterGroupsConfig)
    rollout_correction: RolloutCorrectionConfig = section(RolloutCorrectionConfig)
    bundle_size: int = key(5, "Questions per bundle.")
    lr_q: float = key(
        0.1,
        "Step size of the quantile tracker, relative to the range of bundle scores (published estimator: absolute).",
    )
    lr_q_power: float = key(0.0, "The k-th step is divided by (1 + k) to this power: 0, or in (0.5, 1].")
    risk: RiskConfig = section(RiskConfig)
    # Keys of the published estimator, grpo_bundle_RVaR_quantile_tracking; `risk` above is riskpo's.
    quantile_down: float = key(0.1, "Published: lower quantile level.")
    quantile_up: float = key(0.9, "Published: upper quantile level.")
    quantile_tracking: bool = key(True, "Published: track quantiles from step to step.")
    use_q_track_mode: str = key(
        "mix", "Published: quantiles used, `track`, `batch` (the bundle's) or `mix` (their mean)."
    )
    credit_assign_mode: str = key(
        "uniform", "Published: shares of a response, `uniform`, `score`, `std` or `sum-mean`."
    )
    use_mixing_risk_measure: bool = key(False, "Published: add the lower tail to the range value at risk.")
    w_mix: float = key(
        1.5, "Published: weight of that lower tail; (1 + omega) * alpha / (beta - alpha) is the paper's."
    )
    risk_seeking_upper_tail: bool = key(False, "Published: add the upper tail instead (the counter-example).")
    upper_weight: float = key(1.5, "Published: weight of that upper tail.")
    use_mean_as_baseline: bool = key(False, "Published: subtract the mean of the tracked score advantages.")
    natural_baseline_adv: bool = key(True, "Published: shift the score advantage by q_down - q_up.")
    natural_baseline_base: bool = key(True, "Published: shift that mean by q_down - q_up as well.")


# -------------------------------------------------------------------------------------------------------- reward
@dataclass
class CustomRewardConfig:
    path: str | None = key(None, "Python file with a reward function of your own.")
    name: str = key("compute_score", "Its name in that file.")
    reward_kwargs: dict[str, Any] = key({}, "Keyword arguments handed to it.")


@dataclass
class OverlongBufferConfig:
    enable: bool = key(False, "DAPO's overlong penalty on the score of responses that end close to the limit.")
    len: int = key(0, "Tokens before `data.max_response_length` over which the penalty grows to its full size.")
    penalty_factor: float = key(1.0, "Its full size, subtracted from the score.")


@dataclass
class RewardKwargsConfig:
    overlong_buffer_cfg: OverlongBufferConfig = section(OverlongBufferConfig)


@dataclass
class ScoringConfig:
    reward_manager: str = key(
        "naive",
        "How responses are scored: `naive` (one per call), `dapo` (and the overlong penalty), `batch` (lists of them).",
    )
    num_workers: int = key(4, "Processes that score; 0: the driver itself, for a debugger (no time-out then).")
    timeout_s: float = key(30.0, "A call that takes longer is killed with its process, scores as wrong and is counted.")


@dataclass
class RewardModelConfig(ScoringConfig):
    reward_kwargs: RewardKwargsConfig = section(RewardKwargsConfig)


# ------------------------------------------------------------------------------------------------------- trainer
@dataclass
class TrainerConfig:
    project_name: str = key("riskpo", "First folder of the run, and the wandb project.")
    experiment_name: str = key("default", "Second folder of the run, and the wandb name.")
    default_local_dir: str = key("outputs/${trainer.project_name}/${trainer.experiment_name}", "Folder of the run.")
    logger: list[str] = key(["console", "jsonl", "wandb"], "Of `console`, `jsonl`, `tensorboard`, `wandb`.")
    nnodes: int = key(1, "Nodes.")
    n_gpus_per_node: int = key(8, "Training workers per node, on any device.")
    device: str = key("auto", "`cuda`, `cpu`, or `auto`: cuda where there is one.")
    worker_group: str = key("ray", "`ray`, or `local`: the one worker in this process.")
    start_timeout_s: int = key(300, "Longest wait for workers to be placed and to start, in seconds.")
    total_epochs: int = key(30, "Passes over the training questions (a step counts as one batch of the loader).")
    total_training_steps: int | None = key(None, "Stop after this many steps; null: after `total_epochs`.")
    seed: int = key(1, "The one seed: order of questions, sampling, bundles, pairings.")
    balance_batch: bool = key(
        True, "Give workers equal work, in operations of a pass, rather than equal numbers of rows."
    )
    critic_warmup: int = key(0, "First steps, in which only the critic is updated.")
    val_before_train: bool = key(True, "Validate before the first step.")
    test_freq: int = key(-1, "Validate every so many steps; -1: at the end only.")
    save_freq: int = key(-1, "Save a checkpoint every so many steps; -1: never.")
    async_save: bool = key(False, "Write checkpoints while training goes on, from a copy in the CPU's memory.")
    max_actor_ckpt_to_keep: int | None = key(None, "Complete checkpoints that are kept, the newest; null: all.")
    resume_mode: str = key("auto", "`auto`: go on from the newest complete checkpoint; `disable`: start anew.")
    plugins: list[str] = key([], "Python files imported by driver and workers, with estimators or losses of your own.")
    profile_steps: list[int] = key(
        [], "Steps that worker 0 traces with torch's profiler, to profile/ in the run's folder."
    )
    log_val_generations: int = key(0, "Validation samples shown in the tracker.")


@dataclass
class PPOConfig:
    """Root of the configuration of `python -m verl.trainer.main_ppo`."""

    data: DataConfig = section(DataConfig)
    actor_rollout_ref: ActorRolloutRefConfig = section(ActorRolloutRefConfig)
    critic: CriticConfig = section(CriticConfig)
    algorithm: AlgorithmConfig = section(AlgorithmConfig)
    reward_model: RewardModelConfig = section(RewardModelConfig)
    custom_reward_function: CustomRewardConfig = section(CustomRewardConfig)
    trainer: TrainerConfig = section(TrainerConfig)


def leaf_keys(cls: type, prefix: str = "") -> dict[str, Any]:
    """Dotted key -> dataclass field, for every leaf below `cls`."""
    found: dict[str, Any] = {}
    for f in fields(cls):
        path = prefix + f.name
        if isinstance(f.type, type) and is_dataclass(f.type):
            found.update(leaf_keys(f.type, path + "."))
        else:
            found[path] = f
    return found
