"""What `benchmarks/trl_step.py` measures on: a model and its data, and the settings of both sides."""

import dataclasses
import json
import random
import string
from pathlib import Path
from typing import Any

from transformers import GenerationConfig
from transformers.utils.logging import disable_progress_bar

from benchmarks import trl_turns
from data_processing.make_tiny_model import build_model, build_tokenizer

LAYERS = 4
LOGIT_SCALE = 0.1  # of the last norm: the next token is nearly uniform, so lengths do not depend on what was written
STOP_SHARE = 1 / 16  # of the vocabulary, where lengths are skewed
TEMPLATE_TOKENS = 2  # that the chat template adds to a prompt


@dataclasses.dataclass(frozen=True)
class Workload:
    """One step: `questions` prompts of `prompt` tokens, `n` responses each, of at most `max_tokens`; one update.

    skewed: so many ids end a response that its mean length is about 16 tokens; otherwise none can, and all have
    `max_tokens`. our_micro_rows, trl_micro_rows: rows of full length that a forward and backward pass takes; ours is a
    budget of tokens, so it takes more of shorter ones.
    """

    questions: int
    n: int
    prompt: int
    max_tokens: int
    skewed: bool
    our_micro_rows: int
    trl_micro_rows: int
    lr: float = 1e-6

    @property
    def name(self) -> str:
        return "skewed lengths" if self.skewed else "full length"

    @property
    def rows(self) -> int:
        return self.questions * self.n


def make_model(folder: Path, skewed: bool) -> Path:
    """A random float32 Qwen2. The end-of-sequence token of its tokenizer is beyond its vocabulary, so that only the ids
    in its generation config end a response: none, or a share STOP_SHARE of all."""
    disable_progress_bar()
    tokenizer = build_tokenizer()
    model = build_model(tokenizer, layers=LAYERS)
    vocabulary = model.config.vocab_size
    model.model.norm.weight.data.fill_(LOGIT_SCALE)
    tokenizer.add_tokens([f"<|unused{i}|>" for i in range(len(tokenizer), vocabulary)])
    tokenizer.add_special_tokens({"eos_token": "<|never|>"})
    stops = range(vocabulary - round(STOP_SHARE * vocabulary), vocabulary) if skewed else range(0)
    model.config.eos_token_id = None
    model.generation_config = GenerationConfig(
        pad_token_id=tokenizer.pad_token_id, eos_token_id=[*stops, tokenizer.eos_token_id], do_sample=True
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def make_data(file: Path, questions: int, prompt: int) -> Path:
    """Questions of random letters that are `prompt` tokens long with the chat template."""
    generator = random.Random(1)
    with file.open("w") as lines:
        for _ in range(questions):
            text = "".join(generator.choices(string.ascii_letters, k=prompt - TEMPLATE_TOKENS))
            row = {"prompt": [{"role": "user", "content": text}], "data_source": "letters"}
            lines.write(json.dumps(row | {"reward_model": {"ground_truth": ""}}) + "\n")
    return file


def our_settings(workload: Workload, model: Path, data: Path, run_dir: Path, workers: int) -> list[str]:
    """Overrides for `workers` training processes; one: in the trainer's own process."""
    micro_tokens = workload.our_micro_rows * (workload.prompt + workload.max_tokens)
    return [
        f"data.train_files={data}",
        f"data.val_files={data}",
        f"data.train_batch_size={workload.questions}",
        f"data.max_prompt_length={workload.prompt}",
        f"data.max_response_length={workload.max_tokens}",
        "data.shuffle=False",
        f"actor_rollout_ref.model.path={model}",
        "actor_rollout_ref.model.enable_gradient_checkpointing=False",
        f"actor_rollout_ref.actor.ppo_mini_batch_size={workload.questions}",
        f"actor_rollout_ref.actor.ppo_max_token_len_per_gpu={micro_tokens}",
        "actor_rollout_ref.actor.loss_agg_mode=seq-mean-token-mean",
        f"actor_rollout_ref.actor.optim.lr={workload.lr}",
        "actor_rollout_ref.actor.optim.weight_decay=0",
        "actor_rollout_ref.rollout.name=hf",
        f"actor_rollout_ref.rollout.n={workload.n}",
        f"actor_rollout_ref.rollout.max_num_seqs={workload.rows}",
        "algorithm.adv_estimator=grpo",
        f"custom_reward_function.path={trl_turns.__file__}",
        "reward_model.num_workers=0",
        f"trainer.worker_group={'local' if workers == 1 else 'ray'}",
        f"trainer.n_gpus_per_node={workers}",
        "trainer.device=cpu",
        "trainer.logger=[]",
        "trainer.total_training_steps=1000000",
        "trainer.val_before_train=False",
        f"trainer.default_local_dir={run_dir}",
    ]


def trl_settings(workload: Workload, run_dir: Path) -> list[str]:
    """Arguments of GRPOConfig for the same step; everything else is TRL's default."""
    settings: dict[str, Any] = {
        "output_dir": str(run_dir),
        "per_device_train_batch_size": workload.trl_micro_rows,
        "gradient_accumulation_steps": workload.rows // workload.trl_micro_rows,
        "num_generations": workload.n,
        "max_completion_length": workload.max_tokens,
        "temperature": 1.0,
        "beta": 0.0,
        "loss_type": "grpo",
        "learning_rate": workload.lr,
        "lr_scheduler_type": "constant",
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "max_steps": 1_000_000,
        "shuffle_dataset": False,
        "gradient_checkpointing": False,
        "bf16": False,
        "use_cpu": True,
        "dataloader_pin_memory": False,
        "logging_strategy": "no",
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }
    return [f"{key}={json.dumps(value)}" for key, value in settings.items()]
