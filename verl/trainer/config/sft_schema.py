"""The configuration of `python -m verl.trainer.main_sft`."""

from dataclasses import dataclass
from typing import Any

from omegaconf import MISSING

from verl.trainer.config.schema import OptimConfig, key, section


@dataclass
class SFTModelConfig:
    path: str = key(MISSING, "Hugging Face folder (or hub name) of the model and its tokenizer.")
    enable_gradient_checkpointing: bool = key(True, "Recompute each layer in the backward pass to save memory.")
    use_remove_padding: bool = key(True, "Compute packed rows; false: right-padded rows. Results are equal.")


@dataclass
class SFTDataConfig:
    train_files: Any = key(MISSING, "Demonstrations with columns `prompt` and `response`: a file, or a list of them.")
    train_batch_size: int = key(128, "Demonstrations per optimizer step.")
    max_prompt_length: int = key(512, "Longest prompt, in tokens; a longer one is refused.")
    max_response_length: int = key(512, "Longest response with its end, in tokens; a longer one is refused.")
    max_token_len_per_gpu: int = key(16384, "Token budget of a micro-batch.")


@dataclass
class SFTTrainerConfig:
    default_local_dir: str = key("outputs/sft", "Where the Hugging Face folder is written.")
    total_training_steps: int = key(1000, "Optimizer steps; the data are gone through as often as that takes.")
    log_freq: int = key(50, "Steps between two lines of progress.")
    seed: int = key(1, "Seed of the order of demonstrations.")
    nnodes: int = key(1, "Nodes.")
    n_gpus_per_node: int = key(1, "Training workers per node, on any device.")
    device: str = key("auto", "`cuda`, `cpu`, or `auto`: cuda where there is one.")
    worker_group: str = key("local", "`ray`, or `local`: the one worker in this process.")
    start_timeout_s: int = key(300, "Longest wait for workers to be placed and to start, in seconds.")


@dataclass
class SFTConfig:
    model: SFTModelConfig = section(SFTModelConfig)
    data: SFTDataConfig = section(SFTDataConfig)
    optim: OptimConfig = section(OptimConfig)
    grad_clip: float = key(1.0, "Largest global norm of the gradient.")
    trainer: SFTTrainerConfig = section(SFTTrainerConfig)
