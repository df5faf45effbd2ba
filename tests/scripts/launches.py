"""Launches of the scripts in scripts/ on small local copies, for the tests."""

import contextlib
import io
import json
import os
import sys
from pathlib import Path

from data_processing import download_dapomath, download_easymath
from tests.data_processing import copies
from tests.e2e.runs import digit_share
from verl.utils.reward_score import compute_score

SCRIPTS = Path(__file__).parents[2] / "scripts"
# Hydra overrides after a script that make its run small: what the hardware is for, and the sizes.
SMALL = [
    "data.max_prompt_length=512",
    "data.max_response_length=12",
    "actor_rollout_ref.actor.ulysses_sequence_parallel_size=1",
    "actor_rollout_ref.actor.ppo_max_token_len_per_gpu=1024",
    "actor_rollout_ref.rollout.name=hf",
    f"custom_reward_function.path={Path(__file__)}",
    "custom_reward_function.name=score",
    "reward_model.num_workers=0",
    "trainer.device=cpu",
    "trainer.logger=[jsonl]",
    "trainer.total_training_steps=2",
    "trainer.val_before_train=False",
]


def score(data_source, solution_str, ground_truth, extra_info=None) -> float:
    """The verifier's score, and a share that even a random model sometimes gets."""
    verdict = compute_score(data_source, solution_str, ground_truth, extra_info)
    return (verdict["score"] if isinstance(verdict, dict) else verdict) + digit_share(data_source, solution_str, "")


def make_data(folder: Path) -> Path:
    """`easymath` (4 training questions) and `dapomath` (10), made by the data scripts from copies in the published
    schema."""
    source = folder / "copies"
    copies.math(source)
    copies.gsm8k(source)
    copies.dapo_math(source, [copies.ready_row(f"What is {i}+{i}?", str(2 * i), f"id-{i}") for i in range(10)])
    copies.aime_2024(source)
    with contextlib.redirect_stdout(io.StringIO()):
        download_easymath.main(["--output-dir", str(folder / "easymath"), "--source", str(source)])
        sets = ["--sets", "dapo-math-17k", "aime-2024"]
        download_dapomath.main(["--output-dir", str(folder / "dapomath"), "--source", str(source), *sets])
    return folder


def sizes(data_set: str) -> list[str]:
    """Overrides for a step of all questions in two mini-batches."""
    questions, bundle = {"easymath": (4, 2), "dapomath": (10, 5)}[data_set]
    return [
        f"data.train_batch_size={questions}",
        f"actor_rollout_ref.actor.ppo_mini_batch_size={questions // 2}",
        f"algorithm.bundle_size={bundle}",
    ]


def environment(**variables: str) -> dict[str, str]:
    """This process's environment without a Ray cluster, `python` being its own."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    repository = str(SCRIPTS.parent)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return kept | {"PATH": path, "PYTHONPATH": repository, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"} | variables


def steps(run_dir: Path) -> list[dict]:
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "actor/grad_norm" in line]
