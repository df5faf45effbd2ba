"""What the driver costs: whole training steps whose workers do nothing; the result is JSON.

    python benchmarks/driver.py [--batches ROWSxTOKENS ...] [--steps N] [--output FILE]

The trainer is the real one, through Ray with two workers: loading and naming questions, sending batches to workers and
collecting them, scoring (a reward that costs nothing, in the driver), RiskPO's advantages, metrics, logging. Workers
answer at once with responses of random lengths up to TOKENS. What a step takes, less the time in which the driver waits
for them (`waiting`), is the driver's work (`own`). Some of it (`meanwhile`, metrics of the batch) it does while they
update; the rest (`delay`) they wait for, and is set against a real step of the quickstart's size. Medians of the steps
after the first.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

import ray
import torch
from datasets import Dataset

sys.path.append(str(Path(__file__).resolve().parents[1]))  # run as a script, it finds only its own folder

from benchmarks.report import machine, write_report
from verl.protocol import DataProto
from verl.single_controller.dispatch import Dispatch, register
from verl.trainer import main_ppo
from verl.trainer.config import PPOConfig, load_config
from verl.trainer.ppo import ray_trainer
from verl.trainer.ppo.ray_trainer import RayPPOTrainer, sample_rows
from verl.utils.timer import Timer
from verl.utils.tokenizer import load_tokenizer
from verl.workers.actor_rollout_ref import ActorRolloutRefWorker

ROOT = Path(__file__).resolve().parents[1]
BATCHES = ("1024x64", "10240x64", "102400x64", "5120x4096")
QUICKSTART = (480, 48)
RESPONSES = 8  # of a question
RAY_WAIT = ray.wait
REWARD = (
    "def compute_score(data_source, solution_str, ground_truth, extra_info=None):\n    return len(solution_str) % 2\n"
)


class IdleWorker(ActorRolloutRefWorker):
    """Answers without a model."""

    @register(Dispatch.ALL)
    def init_model(self) -> None:
        self.tokenizer = load_tokenizer(self.config.model.path)

    @register(Dispatch.ALL)
    def update_weights(self) -> None:
        pass

    @register(Dispatch.ROWS)
    def generate_sequences(self, data: DataProto) -> DataProto:
        rows, tokens = len(data), data.meta_info["sampling"].max_tokens
        lengths = torch.randint(1, tokens + 1, (rows, 1))
        return DataProto.from_dict(
            {
                "responses": torch.full((rows, tokens), self.tokenizer.encode("7")[0]),
                "response_mask": torch.arange(tokens) < lengths,
                "rollout_log_probs": torch.zeros(rows, tokens),
            }
        )

    @register(Dispatch.ROWS)
    def compute_log_prob(self, data: DataProto) -> DataProto:
        zeros = torch.zeros(data["responses"].shape)
        return DataProto.from_dict({"old_log_probs": zeros, "entropy": zeros})

    @register(Dispatch.ROWS)
    def update_actor(self, data: DataProto) -> dict[str, float]:
        return {"actor/pg_loss": 0.0}


# ------------------------------------------------------------------------------------------------------- measuring
def configuration(folder: Path, rows: int, tokens: int) -> PPOConfig:
    """A step of `rows` responses in four mini-batches (at the quickstart's size: its two), old log-probs computed."""
    questions = rows // RESPONSES
    mini_batches = 2 if (rows, tokens) == QUICKSTART else 4
    budget = max(2048, tokens + 64)
    return load_config(
        [
            f"data.train_files={folder}/questions.parquet",
            f"data.val_files={folder}/data/val.parquet",
            f"data.train_batch_size={questions}",
            f"data.max_response_length={tokens}",
            f"actor_rollout_ref.model.path={folder}/model",
            f"actor_rollout_ref.actor.ppo_mini_batch_size={questions // mini_batches}",
            f"actor_rollout_ref.actor.ppo_max_token_len_per_gpu={budget}",
            f"actor_rollout_ref.rollout.n={RESPONSES}",
            "algorithm.risk.bundle_remainder=short",
            f"custom_reward_function.path={folder}/reward.py",
            "reward_model.num_workers=0",
            "trainer.logger=[jsonl]",
            f"trainer.default_local_dir={folder}/{rows}x{tokens}-{time.monotonic_ns()}",
        ],
        preset="quickstart",
    )


def make_files(folder: Path, questions: int) -> None:
    """Model, questions and the reward function. The idle workers never load the model: its context is made long."""
    scripts = ROOT / "data_processing"
    subprocess.run([sys.executable, scripts / "make_arithmetic.py", "--output-dir", folder / "data"], check=True)
    subprocess.run([sys.executable, scripts / "make_tiny_model.py", "--output-dir", folder / "model"], check=True)
    (folder / "reward.py").write_text(REWARD)
    rows = Dataset.from_parquet(str(folder / "data" / "train.parquet"))
    rows.select([i % len(rows) for i in range(questions)]).to_parquet(str(folder / "questions.parquet"))
    config_file = folder / "model" / "config.json"
    config = json.loads(config_file.read_text())
    config_file.write_text(json.dumps(config | {"max_position_embeddings": 2**16}))


@contextmanager
def training(config: PPOConfig, worker: type[ActorRolloutRefWorker]) -> Iterator[RayPPOTrainer]:
    with patch.object(main_ppo, "ActorRolloutRefWorker", worker):
        trainer = main_ppo.build(config)
    try:
        yield trainer
    finally:
        trainer.tracking.finish()
        trainer.reward.close()
        trainer.actor.shutdown()


def time_steps(config: PPOConfig, worker: type[ActorRolloutRefWorker], steps: int) -> list[dict[str, float]]:
    """Seconds of each step after the first, whole (`step`) and by phase; `log`: what is written after it."""
    found = []
    waiting, describe = Timer(), ray_trainer.describe_batch

    def wait(*args: Any, **kwargs: Any) -> Any:
        with waiting("waiting"):
            return RAY_WAIT(*args, **kwargs)

    def describe_meanwhile(*args: Any) -> Any:
        with waiting("meanwhile"):
            return describe(*args)

    patches = patch.object(ray, "wait", wait), patch.object(ray_trainer, "describe_batch", describe_meanwhile)
    with patches[0], patches[1], training(config, worker) as trainer:
        trainer.start()
        trainer.tracking.start(0, steps + 1)
        for step in range(1, steps + 2):
            trainer.step, timer = step, Timer()
            waiting.seconds.clear()
            with timer("step"):
                batch, metrics = trainer.train_step(timer)
                with timer("log"):
                    trainer.tracking.log(metrics, step)
                    trainer.tracking.log_samples(step, sample_rows(batch), "train")
            seconds = dict(timer.seconds) | dict(waiting.seconds)
            own = seconds["step"] - seconds["waiting"]
            found.append(seconds | {"own": own, "delay": own - seconds["meanwhile"]})
    return found[1:]


def summary(steps: list[dict[str, float]]) -> dict[str, float]:
    """Median seconds of each phase."""
    return {phase: round(median(step[phase] for step in steps), 5) for phase in steps[0]}


def measure(batches: list[tuple[int, int]], steps: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_files(folder, max(rows for rows, _ in [*batches, QUICKSTART]) // RESPONSES)
        entries = []
        for rows, tokens in batches:
            phases = summary(time_steps(configuration(folder, rows, tokens), IdleWorker, steps))
            entries.append(
                {"rows": rows, "tokens": tokens, "us_per_row": round(1e6 * phases["own"] / rows, 1), "seconds": phases}
            )
        idle = summary(time_steps(configuration(folder, *QUICKSTART), IdleWorker, steps))
        real = summary(time_steps(configuration(folder, *QUICKSTART), ActorRolloutRefWorker, steps))
    return {
        "machine": machine(),
        "batches": entries,
        "quickstart": {
            "rows": QUICKSTART[0],
            "tokens": QUICKSTART[1],
            "idle_s": idle,
            "real_s": real,
            "driver_share": round(idle["delay"] / real["step"], 4),
        },
    }


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", nargs="+", default=list(BATCHES), help="ROWSxTOKENS, rows a multiple of 32")
    parser.add_argument("--steps", type=int, default=9, help="steps that are timed")
    parser.add_argument("--output", type=Path, help="a file for the JSON, which is printed otherwise")
    options = parser.parse_args(arguments)
    batches = [(int(rows), int(tokens)) for rows, tokens in (text.split("x") for text in options.batches)]
    for rows, _ in batches:
        if rows % (4 * RESPONSES):
            parser.error(f"--batches {rows}: not a multiple of {4 * RESPONSES} rows")
    write_report(measure(batches, options.steps), options.output)


if __name__ == "__main__":
    main()
