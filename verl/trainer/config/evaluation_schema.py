"""The configurations of `python -m verl.trainer.main_generation` and `python -m verl.trainer.main_eval`."""

from dataclasses import dataclass
from typing import Any

from omegaconf import MISSING

from verl.trainer.config.schema import CustomRewardConfig, ScoringConfig, key, section


# ---------------------------------------------------------------------------------------------------- generation
@dataclass
class GenerationModelConfig:
    path: str = key(
        MISSING, "Hugging Face folder or hub name, a checkpoint `global_step_k`, or a run's folder (its newest one)."
    )


@dataclass
class GenerationDataConfig:
    path: Any = key(MISSING, "Questions: one parquet or JSONL file, or a list of them.")
    output_path: str = key(MISSING, "Parquet file to write: the questions' columns and their responses.")
    prompt_key: str = key("prompt", "Column that holds the chat messages.")
    n_samples: int = key(1, "Responses per question.")
    batch_size: int = key(128, "Questions sampled together and written as one part; a stopped run goes on after it.")


@dataclass
class GenerationRolloutConfig:
    name: str = key("hf", "Rollout engine: `vllm`, or `hf` (transformers).")
    temperature: float = key(1.0, "Sampling temperature; 0: greedy.")
    top_p: float = key(1.0, "Nucleus sampling; 1: off.")
    top_k: int = key(-1, "Top-k sampling; -1: off.")
    prompt_length: int | None = key(None, "Longest prompt, in tokens: a longer one is refused; null: the longest.")
    response_length: int = key(512, "Longest response, in tokens.")
    max_num_seqs: int = key(256, "Most sequences decoded together by one engine.")
    max_num_batched_tokens: int = key(8192, "vllm: most tokens computed in one step of an engine.")
    tensor_model_parallel_size: int = key(1, "vllm: GPUs of one engine.")
    gpu_memory_utilization: float = key(0.9, "vllm: share of a GPU's memory for an engine.")
    kv_cache_memory_bytes: int | None = key(
        None, "vllm: key-value cache of an engine; null: what `gpu_memory_utilization` leaves, on a CPU 1 GiB."
    )
    engine_timeout_s: int = key(300, "vllm: an engine that does not answer for so long is replaced.")
    enforce_eager: bool = key(False, "vllm: neither compile nor capture graphs: starts faster, decodes slower.")


@dataclass
class GenerationTrainerConfig:
    nnodes: int = key(1, "Nodes.")
    n_gpus_per_node: int = key(8, "GPUs per node (on a CPU: workers).")
    device: str = key("auto", "`cuda`, `cpu`, or `auto`: cuda where there is one.")
    worker_group: str = key("ray", "`ray`, or `local`: one worker in this process.")
    start_timeout_s: int = key(300, "Longest wait for workers and engines to start, in seconds.")
    seed: int = key(1, "Seed of the random draws.")


@dataclass
class GenerationConfig:
    model: GenerationModelConfig = section(GenerationModelConfig)
    data: GenerationDataConfig = section(GenerationDataConfig)
    rollout: GenerationRolloutConfig = section(GenerationRolloutConfig)
    trainer: GenerationTrainerConfig = section(GenerationTrainerConfig)


# ---------------------------------------------------------------------------------------------------- evaluation
@dataclass
class EvalDataConfig:
    path: Any = key(MISSING, "What main_generation wrote: one parquet file, or a list of them.")
    output_path: str | None = key(None, "JSON file to write; null: beside the (first) parquet file.")


@dataclass
class BootstrapConfig:
    samples: int = key(2000, "Resamples of the questions behind the confidence intervals.")
    seed: int = key(1, "Seed of the resampling.")


@dataclass
class EvalConfig:
    data: EvalDataConfig = section(EvalDataConfig)
    reward_model: ScoringConfig = section(ScoringConfig)
    custom_reward_function: CustomRewardConfig = section(CustomRewardConfig)
    bootstrap: BootstrapConfig = section(BootstrapConfig)
