"""Runs of the trainer on the small ladder, for the end-to-end tests."""

import json
from pathlib import Path

from verl.trainer.config import PPOConfig, load_config
from verl.trainer.main_ppo import build, run

# Seconds and memory differ from run to run; everything else that a run logs must not.
TIMES = ("timing_s/", "perf/time_per_step", "perf/throughput", "perf/max_")


def overrides(data: Path, model: Path, run_dir: Path, *extra: str) -> list[str]:
    """A run of three steps: 12 questions x 4 responses, two mini-batches, bundles of 3."""
    return [
        f"data.train_files={data}/train.parquet",
        f"data.val_files={data}/val.parquet",
        "data.train_batch_size=12",
        "data.max_prompt_length=16",
        "data.max_response_length=12",
        f"actor_rollout_ref.model.path={model}",
        "actor_rollout_ref.model.enable_gradient_checkpointing=False",
        "actor_rollout_ref.actor.ppo_mini_batch_size=6",
        "actor_rollout_ref.actor.ppo_max_token_len_per_gpu=256",
        "actor_rollout_ref.actor.optim.lr=1e-3",
        "actor_rollout_ref.rollout.n=4",
        "algorithm.bundle_size=3",
        "reward_model.num_workers=0",
        "trainer.worker_group=local",
        "trainer.n_gpus_per_node=1",
        "trainer.device=cpu",
        "trainer.logger=[jsonl]",
        "trainer.total_training_steps=3",
        f"trainer.default_local_dir={run_dir}",
        *extra,
    ]


def config(*args, **kwargs) -> PPOConfig:
    return load_config(overrides(*args, **kwargs))


def train(config: PPOConfig) -> list[dict]:
    """Train and return the logged steps."""
    run(build(config))
    return logged(Path(config.trainer.default_local_dir))


def logged(run_dir: Path) -> list[dict]:
    """The lines of metrics.jsonl without what measures time."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if not k.startswith(TIMES)} for line in lines]


def digit_share(data_source, solution_str, ground_truth, extra_info=None) -> float:
    """A reward that even a random model sometimes gets: the share of digits in the response."""
    return sum(c.isdigit() for c in solution_str) / max(1, len(solution_str))
