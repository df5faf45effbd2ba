"""A whole RL step of this project against one of TRL's GRPOTrainer: tokens/s of both, in turn, and the ratio.

    python benchmarks/trl_step.py [--trl-python FILE] [--json FILE] [key=value ...]

TRL lives in an environment of its own, which is made once by

    python3.11 -m venv .venv-trl && .venv-trl/bin/python -m pip install -r benchmarks/requirements-trl.txt

Two processes, one for each side, load the same model and data and then take steps in turn, so that both see the same
noise; the process whose turn it is not sleeps. A step samples, scores, and makes one update; a side's tokens/s count
the sampled tokens and everything between the start of one step and that of the next. Two workloads, all responses at
full length and skewed lengths, are measured with the trainer in one process and through Ray and FSDP2 with a process
for each core. That both did the same work is checked: the tokens of prompts and responses, the distribution of lengths,
and that the first step moved the weights as far as one update does.

`key=value` are configuration overrides of this project's side, `--trl key=value` (values in JSON) of TRL's GRPOConfig.
"""

import argparse
import dataclasses
import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import fmean, median, pvariance
from typing import Any

import torch
from safetensors.torch import load_file

sys.path.append(str(Path(__file__).resolve().parents[1]))  # run as a script, it finds only its own folder

from benchmarks.report import machine, write_report
from benchmarks.rollout import spread
from benchmarks.trl_workload import Workload, make_data, make_model, our_settings, trl_settings

ROOT = Path(__file__).resolve().parents[1]
OURS, TRL = "riskpo", "trl"
DATA_STEPS = 8  # steps until questions come again
WARM_UP_STEPS = 2
SAME_MEAN = 5.0  # standard errors by which the mean lengths of the sides may differ
INSTALL = "python3.11 -m venv .venv-trl && .venv-trl/bin/python -m pip install -r benchmarks/requirements-trl.txt"

Step = dict[str, Any]  # seconds, lengths, prompt_tokens, updates, phases, ...: see the sides' `turns.facts`


# ------------------------------------------------------------------------------------------------------------ sides
class Side:
    """A process that takes a step when it is told to (`trl_turns.Turns`)."""

    def __init__(self, name: str, command: list[str], threads: int, log: Path) -> None:
        self.name = name
        self.log = log
        environment = os.environ | {"OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}
        with log.open("w") as errors:
            self.process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment
            )
        self.ready = self._reply()

    def step(self) -> Step:
        return self._order("go")

    def save(self, folder: Path) -> None:
        self._order(f"save {folder}")

    def close(self) -> None:
        """Let the side end. RuntimeError if it fails to."""
        if self.process.poll() is None:
            self._send("end")
            if self.process.wait(timeout=120) != 0:
                raise RuntimeError(f"{self.name} failed as it ended\n{self._tail()}")

    def kill(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()

    def _order(self, order: str) -> Step:
        self._send(order)
        return self._reply()

    def _send(self, order: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(order + "\n")
        self.process.stdin.flush()

    def _reply(self) -> Step:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.name} ended with status {self.process.wait()}\n{self._tail()}")
        return json.loads(line)

    def _tail(self) -> str:
        return "\n".join(self.log.read_text().splitlines()[-30:])


@contextmanager
def sides(
    workload: Workload, workers: int, threads: int, options: argparse.Namespace, scratch: Path
) -> Iterator[tuple[dict[str, Side], Path]]:
    """Both sides, ready, and the folder of their model."""
    scratch.mkdir()
    model = make_model(scratch / "model", workload.skewed)
    data = make_data(scratch / "data.jsonl", DATA_STEPS * workload.questions, workload.prompt)
    script = ROOT / "benchmarks"
    commands = {
        OURS: [
            *(sys.executable, str(script / "trl_ours.py")),
            *our_settings(workload, model, data, scratch / OURS, workers),
            *options.overrides,
        ],
        TRL: [
            *(str(options.trl_python), str(script / "trl_worker.py"), str(model), str(data), str(threads)),
            *trl_settings(workload, scratch / TRL),
            *options.trl,
        ],
    }
    with ExitStack() as stack:
        found = {}
        for name, command in commands.items():
            found[name] = Side(name, command, threads, scratch / f"{name}.log")
            stack.callback(found[name].kill)
        yield found, model
        for side in found.values():
            side.close()


# ------------------------------------------------------------------------------------------------------------- work
def largest_change(before: Path, after: Path) -> float:
    """By how much the weight that moved most has moved between two Hugging Face folders."""
    old, new = (load_file(folder / "model.safetensors") for folder in (before, after))
    if old.keys() != new.keys():
        raise RuntimeError(f"{after} has other weights than {before}: {sorted(old.keys() ^ new.keys())}")
    return max(float((new[name] - old[name]).abs().max()) for name in old)


def check_first_update(side: Side, workload: Workload, model: Path, folder: Path) -> float:
    """Take the first step. It must move the weights as Adam's first update does: each by the learning rate, or less.
    Returns how far, in learning rates."""
    side.step()
    side.save(folder)
    moved = largest_change(model, folder) / workload.lr
    if not 0.95 < moved < 1.05:
        raise RuntimeError(f"the first step of {side.name} moved a weight by {moved:.3g} learning rates, not by one")
    return moved


def check_step(name: str, step: Step, workload: Workload) -> None:
    """RuntimeError if a step did something else than the workload asks for."""
    lengths = step["lengths"]
    facts = {
        "rows": (len(lengths), workload.rows),
        "prompt tokens": (step["prompt_tokens"], workload.rows * workload.prompt),
        "updates": (step["updates"], 1),
        "tokens beyond the limit": (max(0, max(lengths) - workload.max_tokens), 0),
    }
    if not workload.skewed:
        facts["shortest response"] = (min(lengths), workload.max_tokens)
    for what, (found, expected) in facts.items():
        if found != expected:
            raise RuntimeError(f"{name}, {workload.name}: {what} {found}, not {expected}")


def check_same_lengths(ours: list[Step], trl: list[Step]) -> None:
    """RuntimeError if the sides' mean lengths differ by more than chance makes likely."""
    pooled = [[length for step in steps for length in step["lengths"]] for steps in (ours, trl)]
    error = math.sqrt(sum(pvariance(lengths) / len(lengths) for lengths in pooled))
    means = [fmean(lengths) for lengths in pooled]
    if abs(means[0] - means[1]) > SAME_MEAN * error:
        raise RuntimeError(f"mean lengths of {means[0]:.2f} and {means[1]:.2f} tokens: the sides do different work")


# ------------------------------------------------------------------------------------------------------ measurement
def measure(workload: Workload, workers: int, rounds: int, options: argparse.Namespace, scratch: Path) -> Step:
    """Steps of both sides in turn, after the first ones; what `compare` makes of them, and how they were taken."""
    threads = options.cores
    steps: dict[str, list[Step]] = {OURS: [], TRL: []}
    with sides(workload, workers, threads, options, scratch) as (both, model):
        for name, side in both.items():
            if side.ready.get("threads", threads) != threads:
                raise RuntimeError(f"{name} computes with {side.ready['threads']} threads, not {threads}")
        moved = {n: check_first_update(side, workload, model, scratch / f"{n}-moved") for n, side in both.items()}
        for number in range(WARM_UP_STEPS - 1 + rounds):
            for name in sorted(both, reverse=number % 2 == 0):
                step = both[name].step()
                check_step(name, step, workload)
                if number >= WARM_UP_STEPS - 1:
                    steps[name].append(step)
                print(f"{name} {step['seconds']:.2f} s", file=sys.stderr, flush=True)
    how = {"workload": workload.name, "worker_group": "local" if workers == 1 else "ray", "workers": workers}
    report = how | compare(steps[OURS], steps[TRL])
    for name in steps:
        report[name]["first_update_in_learning_rates"] = round(moved[name], 3)
    return report


def compare(ours: list[Step], trl: list[Step]) -> dict[str, Any]:
    """The sides' `summary`, and the spread of the ratios of tokens/s, ours to TRL's, of each pair of steps."""
    check_same_lengths(ours, trl)
    ratios = [speed(a) / speed(b) for a, b in zip(ours, trl, strict=True)]
    return {OURS: summary(ours), TRL: summary(trl), f"{OURS}_over_{TRL}": spread(ratios)}


def speed(step: Step) -> float:
    """Sampled tokens per second of the whole step."""
    return sum(step["lengths"]) / step["seconds"]


def summary(steps: list[Step]) -> dict[str, Any]:
    """Of one side. `phases`: median seconds; `rest` is what no phase covers."""
    phases = [step["phases"] | {"rest": step["seconds"] - sum(step["phases"].values())} for step in steps]
    return {
        "tokens_per_s": spread([speed(step) for step in steps]),
        "seconds": spread([step["seconds"] for step in steps]),
        "cpu_seconds": spread([step["cpu_seconds"] for step in steps]),
        "phases": {name: float(f"{median(phase[name] for phase in phases):.3g}") for name in phases[0]},
        "mean_length": round(fmean(length for step in steps for length in step["lengths"]), 2),
        "mean_score": round(fmean(step["score"] for step in steps), 3),
        "peak_memory_gib": round(max(step["peak_memory_gib"] for step in steps), 2),
    }


def line(entry: dict[str, Any]) -> str:
    ratio = entry[f"{OURS}_over_{TRL}"]
    speeds = "  ".join(f"{name} {entry[name]['tokens_per_s']['median']:7.0f}/s" for name in (OURS, TRL))
    lengths = " / ".join(f"{entry[name]['mean_length']:.1f}" for name in (OURS, TRL))
    return (
        f"{entry['workload']:14}  {entry['worker_group']:5} x {entry['workers']}  mean length {lengths:11}  {speeds}  "
        f"ratio {ratio['median']:.2f} ({ratio['min']:.2f} to {ratio['max']:.2f})"
    )


# ---------------------------------------------------------------------------------------------------------- command
def workloads(options: argparse.Namespace) -> list[Workload]:
    names = ("questions", "n", "prompt", "max_tokens", "our_micro_rows", "trl_micro_rows")
    sizes = {name: getattr(options, name) for name in names}
    return [Workload(**sizes, skewed=skewed) for skewed in (False, True)]


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trl-python", type=Path, default=ROOT / ".venv-trl/bin/python", help="of TRL's environment")
    parser.add_argument("--questions", type=int, default=128, help="of a step")
    parser.add_argument("--n", type=int, default=8, help="responses of a question")
    parser.add_argument("--prompt", type=int, default=16, help="tokens of a prompt")
    parser.add_argument("--max-tokens", type=int, default=64, help="longest response")
    parser.add_argument("--our-micro-rows", type=int, default=64, help="rows of full length in a micro-batch")
    parser.add_argument("--trl-micro-rows", type=int, default=32, help="rows of TRL's micro-batches")
    parser.add_argument("--cores", type=int, default=2, help="that both may use, and their threads")
    parser.add_argument("--rounds", type=int, default=7, help="measured steps of each side")
    parser.add_argument("--groups", nargs="+", choices=("local", "ray"), default=["local", "ray"], help="worker groups")
    parser.add_argument("--trl", nargs="+", default=[], metavar="key=value", help="arguments of TRL's GRPOConfig")
    parser.add_argument("--json", type=Path, help="a file for the report, which is printed otherwise")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="configuration overrides of this project")
    options = parser.parse_intermixed_args(arguments)
    rows = options.questions * options.n
    if options.trl_micro_rows < 1 or rows % options.trl_micro_rows:
        parser.error(f"--trl-micro-rows {options.trl_micro_rows} does not divide the {rows} rows of a step")
    if not 1 <= options.cores <= len(os.sched_getaffinity(0)):
        parser.error(f"--cores {options.cores}: this process may use {len(os.sched_getaffinity(0))}")
    if not options.trl_python.is_file():
        parser.error(f"--trl-python {options.trl_python}: there is no such file; make it by\n  {INSTALL}")
    return options


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: options.cores])  # of the sides as well
    torch.set_num_threads(options.cores)
    report: dict[str, Any] = {"machine": machine(), "command": arguments or sys.argv[1:], "rounds": options.rounds}
    report["workloads"] = [dataclasses.asdict(workload) for workload in workloads(options)]
    report["steps"] = []
    with tempfile.TemporaryDirectory() as scratch:
        for group in options.groups:
            for workload in workloads(options):
                workers = 1 if group == "local" else options.cores
                folder = Path(scratch, f"{group}-{workload.name.replace(' ', '-')}")
                report["steps"].append(measure(workload, workers, options.rounds, options, folder))
                print(line(report["steps"][-1]), file=sys.stderr, flush=True)
    write_report(report, options.json)


if __name__ == "__main__":
    main()
