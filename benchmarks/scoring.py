"""How fast mathematics is scored, in a pool of processes and in one; and what calls that hang or crash cost.

    python benchmarks/scoring.py [--calls N] [--workers W] [--rounds R] [--output FILE]

Each number is the median of R rounds. A round has new processes, which have scored an answer but none of those that
count, so that nothing is remembered from an earlier round. In the batch that is disturbed, 1 % of the responses are
replaced by ones that sleep for ever and 1 % by ones that end their process; its pool is of the size that runs have by
default, which is for calls that take long.
"""

import argparse
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for `benchmarks`, when run as a script

from verl.utils.reward_score import compute_score
from verl.workers.reward.function import RewardFunction, RewardRequest
from verl.workers.reward.outcomes import ScorerDied, ScoringTimeout
from verl.workers.reward.pool import ScoringPool

PAIRS = Path(__file__).parents[1] / "tests" / "utils" / "reward_score" / "labelled_pairs.jsonl"
TIMEOUT_S = 1.0
LONG_S = 60.0  # for batches in which nothing hangs
EVERY = 100  # one of so many responses hangs, and one crashes
HANG, CRASH = "hang", "crash"
WORKING = "Let us work this out step by step, and check what we have before we go on with the next one.\n" * 10
REWARD = RewardFunction(str(Path(__file__).resolve()), "score")


def score(data_source: str, solution_str: str, ground_truth: Any, extra_info: dict[str, Any] | None = None) -> Any:
    """The verifier's score, except for responses that say to hang or to crash."""
    if solution_str == HANG:
        time.sleep(1e6)
    if solution_str == CRASH:
        os._exit(3)
    return compute_score(data_source, solution_str, ground_truth, extra_info)


# ------------------------------------------------------------------------------------------------------ workloads
def labelled_pairs(calls: int) -> list[RewardRequest]:
    """The labelled pairs of the tests, all different, without any working before the answer; `calls` at most."""
    pairs = [json.loads(line) for line in PAIRS.read_text().splitlines()]
    return [RewardRequest("lighteval/MATH", pair["response"], pair["ground_truth"], {}) for pair in pairs[:calls]]


def gsm8k_answers(calls: int) -> list[RewardRequest]:
    """A thousand characters of working and a number, in a box or after ####; every second one is wrong."""
    requests = []
    for i in range(calls):
        answer = f"\\boxed{{{1000 + i:,}}}" if i % 4 < 2 else f"#### {1000 + i:,}"
        requests.append(RewardRequest("openai/gsm8k", WORKING + answer, str(1000 + i + i % 2), {}))
    return requests


def boxed_fractions(calls: int) -> list[RewardRequest]:
    """A thousand characters of working and a boxed fraction that is not reduced; every second one is wrong."""
    rng = np.random.default_rng(0)
    requests = []
    for i, (a, b) in enumerate(rng.integers(2, 10_000, (calls, 2)).tolist()):
        answer = f"The answer is $\\boxed{{\\frac{{{2 * a}}}{{{2 * b}}}}}$."
        requests.append(RewardRequest("lighteval/MATH", WORKING + answer, f"\\frac{{{a + i % 2}}}{{{b}}}", {}))
    return requests


WORKLOADS: dict[str, Callable[[int], list[RewardRequest]]] = {
    "labelled pairs of the tests": labelled_pairs,
    "GSM8K answers": gsm8k_answers,
    "boxed fractions": boxed_fractions,
}
WARM_UP = RewardRequest("lighteval/MATH", "\\boxed{\\frac{x}{7}}", "\\frac{x}{7}", {})


# ---------------------------------------------------------------------------------------------------- measurements
def in_this_process(name: str, calls: int) -> float:
    """Seconds of a workload without a pool, in a process that has scored nothing of it before."""
    requests = WORKLOADS[name](calls)
    REWARD.call(WARM_UP)
    start = time.perf_counter()
    REWARD.evaluate(requests)
    return time.perf_counter() - start


def in_a_pool(requests: list[RewardRequest], workers: int, timeout_s: float) -> tuple[float, list[Any], int]:
    """Seconds of a batch in a new pool whose processes have started, its results, and the processes started meanwhile
    in place of others."""
    with ScoringPool(REWARD, workers, timeout_s) as pool:
        pool.evaluate([WARM_UP] * 20 * workers)
        before = pool.counts.started
        start = time.perf_counter()
        results = pool.evaluate(requests)
        return time.perf_counter() - start, results, pool.counts.started - before


def throughput(name: str, calls: int, workers: int, rounds: int) -> dict[str, Any]:
    """Calls per second of a workload, and how many of its answers were right."""
    requests = WORKLOADS[name](calls)
    one, pool = [], []
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context, max_tasks_per_child=1) as new_process:
        for _ in range(rounds):
            one.append(new_process.submit(in_this_process, name, calls).result())
            seconds, results, _ = in_a_pool(requests, workers, LONG_S)
            pool.append(seconds)
    return {
        "calls": len(requests),
        "right": sum(result["acc"] == 1 for result in results),
        "per_s_in_one_process": round(len(requests) / median(one), 1),
        "per_s_in_the_pool": round(len(requests) / median(pool), 1),
    }


def disturbed(requests: list[RewardRequest], first: str, second: str) -> list[RewardRequest]:
    """The same batch, of which 1 % say `first` and 1 % `second`: to hang or to crash."""
    replaced = {EVERY // 2: first, EVERY - 1: second}
    return [
        RewardRequest(r.data_source, replaced.get(i % EVERY, r.solution_str), r.ground_truth, r.extra_info)
        for i, r in enumerate(requests)
    ]


def outcomes(results: list[Any], good: list[Any], requests: list[RewardRequest]) -> tuple[dict[str, int], bool]:
    """How many calls ended how, and whether each as it should: `good` are the results of the undisturbed batch."""
    kinds = {HANG: ScoringTimeout, CRASH: ScorerDied}
    wanted = [kinds.get(request.solution_str, result) for request, result in zip(requests, good, strict=True)]
    got = [type(result) if isinstance(result, Exception) else result for result in results]
    counts = {"timeouts": got.count(ScoringTimeout), "deaths": got.count(ScorerDied)}
    return counts | {"scored": len(got) - sum(counts.values())}, got == wanted


def disturbance(calls: int, workers: int, rounds: int) -> dict[str, Any]:
    """With `workers` processes: seconds of a batch of good calls; of the same with 2 % that crash, which says what new
    processes cost; and with 1 % that hang and 1 % that crash. `bound_s` is the second plus the time-out."""
    good = boxed_fractions(calls)
    crashing, both = disturbed(good, CRASH, CRASH), disturbed(good, HANG, CRASH)
    seconds: dict[str, list[float]] = {"good_s": [], "crashing_s": [], "hanging_and_crashing_s": [], "bound_s": []}
    as_expected = True
    for _ in range(rounds):
        good_s, scores, _ = in_a_pool(good, workers, TIMEOUT_S)
        crashing_s, _, _ = in_a_pool(crashing, workers, TIMEOUT_S)
        both_s, results, started = in_a_pool(both, workers, TIMEOUT_S)
        for times, value in zip(seconds.values(), (good_s, crashing_s, both_s, crashing_s + TIMEOUT_S), strict=True):
            times.append(value)
        counts, right = outcomes(results, scores, both)
        as_expected &= right
    return {
        "calls": calls,
        "workers": workers,
        "timeout_s": TIMEOUT_S,
        **{name: round(median(times), 3) for name, times in seconds.items()},
        "processes_started_meanwhile": started,
        **counts,
        "every_outcome_is_the_expected_one": as_expected,
    }


def measure(calls: int, workers: int, rounds: int) -> dict[str, Any]:
    from benchmarks.report import (  # here: scoring processes import this file, and do without torch
        machine,
    )
    from verl.trainer.config.schema import RewardModelConfig

    return {
        "machine": machine(),
        "workers": workers,
        "rounds": rounds,
        "throughput": {name: throughput(name, calls, workers, rounds) for name in WORKLOADS},
        "hanging and crashing calls": disturbance(calls, RewardModelConfig().num_workers, rounds),
    }


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, default=5120, help="calls of a batch (of the labelled pairs: at most)")
    cores = len(os.sched_getaffinity(0))
    parser.add_argument("--workers", type=int, default=cores, help="processes that score at full speed, one per core")
    parser.add_argument("--rounds", type=int, default=3, help="rounds that are timed")
    parser.add_argument("--output", type=Path, help="a file for the JSON, which is printed otherwise")
    options = parser.parse_args(arguments)
    for name, least in (("calls", EVERY), ("workers", 1), ("rounds", 1)):
        if getattr(options, name) < least:
            parser.error(f"--{name} {getattr(options, name)} must be at least {least}")
    from benchmarks.report import write_report  # as in `measure`

    write_report(measure(options.calls, options.workers, options.rounds), options.output)


if __name__ == "__main__":
    main()
