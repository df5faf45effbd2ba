"""How long advantage estimators take on a batch, and how much memory RiskPO needs beside it; the result is JSON.

    python benchmarks/estimators.py [--sizes N ...] [--repeat R] [--output FILE]

RiskPO (`riskpo` of the default configuration, in its steady state: the tracker has started, all metrics are computed)
is timed at every size, all other estimators and RiskPO's other choices at the first. A time is the best of R calls on
one thread; B = 5 questions per bundle, G = 10 responses per question, 0/1 rewards.
"""

import argparse
import multiprocessing
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.append(str(Path(__file__).resolve().parents[1]))  # run as a script, it finds only its own folder

from benchmarks.report import machine, memory_peak, write_report
from verl.protocol import DataProto, object_array
from verl.trainer.config.schema import AlgorithmConfig, RiskConfig
from verl.trainer.ppo.core_algos import ADV_ESTIMATORS, get_adv_estimator
from verl.trainer.ppo.registry import one_thread

SIZES = (10_200, 102_000, 1_020_000)
BUNDLE_SIZE = 5
RESPONSES = 10
TOKENS = 8  # RiskPO's own work does not depend on it; reading rewards and writing advantages, N x T each, does
LONG_TOKENS = 1024
RISKPO_CHOICES: dict[str, dict[str, Any]] = {
    "riskpo pairing=permute": {"pairing": "permute"},
    "riskpo pairing=aligned": {"pairing": "aligned"},
    "riskpo bundling=same_question": {"bundling": "same_question"},
    "riskpo bundling=difficulty": {"bundling": "difficulty"},
    "riskpo tracker=ema": {"tracker": "ema"},
}


def make_batch(num_responses: int, tokens: int, seed: int = 0) -> DataProto:
    """Responses of random lengths to questions whose success rates are spread evenly over (0, 1); row order as trained.

    Columns of every registered estimator are there. The rewards stand at the first token.
    """
    num_questions = num_responses // RESPONSES
    rng = np.random.default_rng(seed)
    rewards = rng.random((num_questions, RESPONSES)) < rng.random((num_questions, 1))
    token_level_rewards = torch.zeros(num_responses, tokens)
    token_level_rewards[:, 0] = torch.from_numpy(rewards.ravel().astype(np.float32))
    lengths = torch.from_numpy(rng.integers(1, tokens + 1, num_responses))
    columns = {
        "token_level_rewards": token_level_rewards,
        "response_mask": torch.arange(tokens) < lengths[:, None],
        "values": torch.full((num_responses, tokens), 0.5),
        "reward_baselines": torch.zeros(num_responses),
        "uid": object_array([f"1-{q}" for q in range(num_questions)]).repeat(RESPONSES),
        "question_id": object_array([f"row-{q}" for q in range(num_questions)]).repeat(RESPONSES),
        "sample_index": np.tile(np.arange(RESPONSES), num_questions),
    }
    return DataProto.from_dict(columns, {"step": 1})


def make_estimator(name: str, batch: DataProto, risk: dict[str, Any]) -> tuple[Any, DataProto]:
    """An estimator and the batch with its bundles."""
    config = AlgorithmConfig(bundle_size=BUNDLE_SIZE, risk=RiskConfig(**risk))
    estimator = get_adv_estimator(name, config, RESPONSES, seed=1)
    if estimator.needs_bundles:
        bundles = estimator.assign_bundles(batch["uid"][::RESPONSES], batch["question_id"][::RESPONSES], step=1)
        batch = batch.with_columns(bundle_uid=bundles.repeat(RESPONSES))
    return estimator, batch


def time_calls(
    name: str, batch: DataProto, repeat: int, risk: dict[str, Any] | None = None, shuffle: bool = False
) -> dict[str, Any]:
    """Best and median of `repeat` calls after one that is not counted, in milliseconds."""
    estimator, batch = make_estimator(name, batch, risk or {})
    if shuffle:
        batch = batch.select_rows(np.random.default_rng(1).permutation(len(batch)))
    estimator(batch)
    milliseconds = []
    for _ in range(repeat):
        start = time.perf_counter()
        estimator(batch)
        milliseconds.append(1e3 * (time.perf_counter() - start))
    tokens = batch["response_mask"].shape[1]
    return {
        "responses": len(batch),
        "tokens": tokens,
        "best_ms": round(min(milliseconds), 2),
        "median_ms": round(float(np.median(milliseconds)), 2),
    }


# ------------------------------------------------------------------------------------------------------- memory
@one_thread()
def memory_growth(num_responses: int) -> dict[str, float]:
    """Of RiskPO's first call in this process: by how much the peak of resident memory exceeds what was in use, in MiB.

    Run it in a new process: memory that an earlier call has given back to the allocator would hide the growth.
    """
    small, small_batch = make_estimator("riskpo", make_batch(BUNDLE_SIZE * RESPONSES, TOKENS), {})
    small(small_batch)  # loads what is loaded once
    batch = make_batch(num_responses, TOKENS)
    size = sum(t.nbytes for t in batch.columns().values() if isinstance(t, torch.Tensor))
    estimator, batch = make_estimator("riskpo", batch, {})
    growth = memory_peak(lambda: estimator(batch))
    return {
        "responses": num_responses,
        "tensors_of_the_batch_mib": round(size / 2**20, 1),
        "peak_growth_mib": round(growth, 1),
        "peak_growth_bytes_per_response": round(growth * 2**20 / num_responses, 1),
    }


def measure_memory(sizes: list[int]) -> list[dict[str, float]]:
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max_workers=1, mp_context=context, max_tasks_per_child=1) as pool:
        return list(pool.map(memory_growth, sizes))


# --------------------------------------------------------------------------------------------------------- report
@one_thread()
def measure(sizes: list[int], repeat: int, memory: bool) -> dict[str, Any]:
    report: dict[str, Any] = {
        "machine": machine(),
        "bundle_size": BUNDLE_SIZE,
        "responses_per_question": RESPONSES,
        "repeat": repeat,
    }
    report["riskpo"] = [time_calls("riskpo", make_batch(size, TOKENS), repeat) for size in sizes]
    first = make_batch(sizes[0], TOKENS)
    report["riskpo, rows in random order"] = time_calls("riskpo", first, repeat, shuffle=True)
    report["riskpo, long responses"] = time_calls("riskpo", make_batch(sizes[0], LONG_TOKENS), repeat)
    report["riskpo, other choices"] = {
        name: time_calls("riskpo", first, repeat, risk) for name, risk in RISKPO_CHOICES.items()
    }
    others = sorted(set(ADV_ESTIMATORS) - {"riskpo"})
    report["other estimators"] = {name: time_calls(name, first, repeat) for name in others}
    if memory:
        report["riskpo memory"] = measure_memory(sizes)
    return report


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=list(SIZES), help="responses, multiples of 50")
    parser.add_argument("--repeat", type=int, default=9, help="calls that are timed")
    parser.add_argument("--no-memory", action="store_true", help="do not measure memory (which needs Linux)")
    parser.add_argument("--output", type=Path, help="a file for the JSON, which is printed otherwise")
    options = parser.parse_args(arguments)
    for size in options.sizes:
        if size < 1 or size % (BUNDLE_SIZE * RESPONSES):
            parser.error(f"--sizes {size} is not a positive multiple of {BUNDLE_SIZE * RESPONSES}")
    write_report(measure(options.sizes, options.repeat, not options.no_memory), options.output)


if __name__ == "__main__":
    main()
