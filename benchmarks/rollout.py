"""Tokens/s of the two rollout engines, `hf` and `vllm`, and how fast trained weights reach vLLM.

    python benchmarks/rollout.py [--model DIR] [--json FILE] [key=value ...]

The engines get the same prompts, in turn, through the call that a training step makes, with the same threads. Then the
transfer of weights (`send_weights`) is timed in its parts and against a plain copy of as many bytes, for the model and
for a larger random one. Without --model a random one of 0.6 M parameters is made. `key=value` are configuration
overrides, such as trainer.worker_group=local, trainer.n_gpus_per_node=2 (workers, and engines beside them) or
actor_rollout_ref.rollout.enforce_eager=False. The table goes to the console, everything to the JSON file.
"""

import argparse
import dataclasses
import json
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from transformers import AutoConfig

sys.path.append(str(Path(__file__).resolve().parents[1]))  # run as a script, it finds only its own folder

from benchmarks.report import machine
from benchmarks.rollout_engines import configuration, engines, make_model, model_sizes, without_stops
from verl.protocol import DataProto, object_array
from verl.single_controller.worker_group import WorkerGroup
from verl.trainer.config import PPOConfig
from verl.trainer.ppo.generation import expand
from verl.workers.rollout.base import GenerationOutput, Rollout, SamplingParams, WorkerRollout, ignore
from verl.workers.rollout.engine_rollout import EngineRollout
from verl.workers.rollout.weight_check import WeightCheck

RESPONSES = 8  # of a question
PROMPT = (16, 16)  # shortest and longest prompt, in tokens
MIXED_PROMPTS = (8, 23)
WARM_UP_TOKENS = 16
SKEW = 5  # with stop tokens, the limit is so many times the mean length, or somewhat less
SEED = 1


# --------------------------------------------------------------------------------------------------------- tokens/s
@dataclasses.dataclass(frozen=True)
class Workload:
    """`prompt`: shortest and longest prompt. `stops`: tokens that end a response; none: all have the full length."""

    name: str
    rows: int
    max_tokens: int
    prompt: tuple[int, int]
    stops: list[int] = dataclasses.field(default_factory=list)


class Contest:
    """Both engines with the same weights; the one compares with the other."""

    def __init__(self, actor: WorkerGroup, vllm: EngineRollout, vocabulary: int) -> None:
        actor.init_hf()
        self.actor = actor
        self.vllm = vllm
        self.vocabulary = vocabulary
        self.rollouts: dict[str, Rollout] = {"hf": WorkerRollout(actor, log_probs=True), "vllm": vllm}

    def set_stops(self, stops: list[int]) -> None:
        self.actor.set_hf_stops(stops)
        pool = self.vllm.pool
        pool.spec = dataclasses.replace(pool.spec, stop_token_ids=tuple(stops))
        pool.call_all("__setattr__", "spec", pool.spec)

    def generate(self, engine: str, workload: Workload, number: int, max_tokens: int) -> tuple[GenerationOutput, float]:
        """The output, and the seconds it took. Equal numbers give equal prompts."""
        batch = expand(questions(workload, self.vocabulary, number), RESPONSES, SEED, number)
        start = time.perf_counter()
        output, metrics = self.rollouts[engine].generate(batch, SamplingParams(max_tokens), RESPONSES, ignore)
        seconds = time.perf_counter() - start
        if metrics.get("rollout/engine_restarts"):
            raise RuntimeError("an engine failed and was replaced: its times say nothing")
        return output, seconds

    def measure(self, workload: Workload, rounds: int) -> dict[str, Any]:
        """Tokens/s of both, in turn, and of each round the ratio."""
        self.set_stops(workload.stops)
        speeds: dict[str, list[float]] = {engine: [] for engine in self.rollouts}
        lengths: dict[str, list[torch.Tensor]] = {engine: [] for engine in self.rollouts}
        for engine in self.rollouts:
            self.generate(engine, workload, 0, min(WARM_UP_TOKENS, workload.max_tokens))
        for number in range(1, rounds + 1):
            for engine in sorted(self.rollouts, reverse=number % 2 == 0):
                output, seconds = self.generate(engine, workload, number, workload.max_tokens)
                if not workload.stops and not (output.lengths == workload.max_tokens).all():
                    raise RuntimeError(f"{engine} ended a response early, although no token can stop it")
                speeds[engine].append(int(output.lengths.sum()) / seconds)
                lengths[engine].append(output.lengths)
        ratios = [vllm / hf for vllm, hf in zip(speeds["vllm"], speeds["hf"], strict=True)]
        report: dict[str, Any] = {"workload": workload.name, "rows": workload.rows, "max_tokens": workload.max_tokens}
        for engine in self.rollouts:
            mean = torch.cat(lengths[engine]).double().mean()
            report[engine] = {"mean_length": round(float(mean), 1), "tokens_per_s": spread(speeds[engine])}
        return report | {"vllm_over_hf": spread(ratios)}

    def choose_stops(self, max_tokens: int) -> list[int]:
        """Tokens that end a response after about max_tokens / SKEW tokens, found in a sample."""
        self.set_stops([])
        length = min(128, max_tokens)
        output, _ = self.generate("hf", Workload("sample", 64, length, PROMPT), 0, length)
        stops = tokens_of_share(output.responses, SKEW / max_tokens)
        if not stops:
            raise ValueError(f"no sampled token is as rare as one in {max_tokens // SKEW}: lower the last of --tokens")
        return stops


def tokens_of_share(responses: torch.Tensor, share: float) -> list[int]:
    """Tokens that together make up at most `share` of all, the most frequent ones that fit first."""
    tokens, counts = responses.unique(return_counts=True)
    left, found = int(share * responses.numel()), []
    for index in counts.argsort(descending=True).tolist():
        if counts[index] <= left:
            found.append(int(tokens[index]))
            left -= int(counts[index])
    return found


def questions(workload: Workload, vocabulary: int, number: int) -> DataProto:
    """Questions with random prompts, rows / RESPONSES of them."""
    generator = torch.Generator().manual_seed(number)
    count, (shortest, longest) = workload.rows // RESPONSES, workload.prompt
    names = object_array([f"{number}-{i}" for i in range(count)])
    columns = {
        "prompts": torch.randint(0, vocabulary, (count, longest), generator=generator),
        "prompt_length": torch.randint(shortest, longest + 1, (count,), generator=generator),
        "uid": names,
        "question_id": names,
    }
    return DataProto.from_dict(columns)


def workloads(rows: list[int], tokens: list[int], stops: list[int]) -> list[Workload]:
    found = [Workload("equal prompts", n, t, PROMPT) for t in tokens for n in rows]
    found += [Workload("mixed prompts", n, tokens[0], MIXED_PROMPTS) for n in rows]
    return found + [Workload("skewed lengths", n, tokens[-1], PROMPT, stops) for n in rows]


# ---------------------------------------------------------------------------------------------------------- weights
def measure_transfer(actor: WorkerGroup, rollout: EngineRollout, rounds: int) -> dict[str, Any]:
    """GB/s of transfers and of plain copies, in turn, after one transfer that also opens the way."""
    start = time.perf_counter()
    rollout.update_weights()
    first = time.perf_counter() - start
    n_bytes = actor.transferred_bytes(rollout.dtype)
    sent, copied = [], []
    for _ in range(rounds):
        sent.append(actor.time_transfer())
        copied.append(actor.time_copy(n_bytes))
    gigabytes = n_bytes / 1e9
    return {
        "bytes": n_bytes,
        "dtype": str(rollout.dtype).removeprefix("torch."),
        "backend": rollout.pool.spec.transfer_backend,
        "first_s": round(first, 4),
        "seconds": {part: spread([parts[part] for parts in sent]) for part in sent[0]},
        "gb_per_s": spread([gigabytes / parts["total"] for parts in sent]),
        "copy_gb_per_s": spread([gigabytes / seconds for seconds in copied]),
        "transfer_over_copy": spread([c / parts["total"] for c, parts in zip(copied, sent, strict=True)]),
    }


def measure_check(actor: WorkerGroup, rollout: EngineRollout, vocabulary: int, rounds: int) -> dict[str, Any]:
    """Seconds of one comparison of the engine's log-probs with the trainer's."""
    check = WeightCheck(rollout, actor, SEED, max_tokens=WARM_UP_TOKENS)
    check.prepare(questions(Workload("check", 64, WARM_UP_TOKENS, PROMPT), vocabulary, 0))
    seconds = []
    for _ in range(rounds):
        start = time.perf_counter()
        check()
        seconds.append(time.perf_counter() - start)
    return {"tokens": sum(len(sequence) - 1 for sequence in check.sequences), "seconds": spread(seconds)}


# ----------------------------------------------------------------------------------------------------------- report
def spread(values: list[float]) -> dict[str, float]:
    """Median, least and most, to four digits."""
    return {
        name: float(f"{value:.4g}")
        for name, value in (("median", median(values)), ("min", min(values)), ("max", max(values)))
    }


def configurations(options: argparse.Namespace, scratch: Path) -> list[PPOConfig]:
    """Of the runs with the model and, where there is one, with the larger model. ValueError for what cannot run."""
    models = [without_stops(options.model or make_model(scratch / "small", {}), scratch / "without_stops")]
    if options.layers:
        models.append(make_model(scratch / "large", model_sizes(options.hidden_size, options.layers)))
    return [configuration(model, MIXED_PROMPTS[1], max(options.tokens), options.overrides) for model in models]


def measure(options: argparse.Namespace, configs: list[PPOConfig]) -> dict[str, Any]:
    report: dict[str, Any] = {"machine": machine(), "command": sys.argv[1:], "rounds": options.rounds}
    vocabulary = AutoConfig.from_pretrained(configs[0].actor_rollout_ref.model.path).get_text_config().vocab_size
    with engines(configs[0]) as (actor, rollout):
        contest = Contest(actor, rollout, vocabulary)
        report["threads"] = {"hf": actor.threads(), "vllm": rollout.pool.spec.threads}
        report["generation"] = []
        for workload in workloads(options.rows, options.tokens, contest.choose_stops(options.tokens[-1])):
            report["generation"].append(contest.measure(workload, options.rounds))
            print(generation_line(report["generation"][-1]), flush=True)
        report["transfer"] = [measure_transfer(actor, rollout, options.rounds)]
        report["weight_check"] = measure_check(actor, rollout, vocabulary, options.rounds)
    for config in configs[1:]:
        with engines(config) as (actor, rollout):
            report["transfer"].append(measure_transfer(actor, rollout, options.rounds))
    for entry in report["transfer"]:
        print(transfer_lines(entry))
    check = report["weight_check"]
    print(f"weight check of {check['tokens']} tokens: {check['seconds']['median']:.3f} s")
    return report


def generation_line(entry: dict[str, Any]) -> str:
    hf, vllm = (entry[engine]["tokens_per_s"]["median"] for engine in ("hf", "vllm"))
    ratio = entry["vllm_over_hf"]
    lengths = f"{entry['hf']['mean_length']:5.1f} / {entry['vllm']['mean_length']:5.1f} of {entry['max_tokens']}"
    return (
        f"{entry['workload']:15} {entry['rows']:4} rows, {lengths:18} tokens:  hf {hf:7.0f}/s  vllm {vllm:7.0f}/s  "
        f"ratio {ratio['median']:.2f} ({ratio['min']:.2f} to {ratio['max']:.2f})"
    )


def transfer_lines(entry: dict[str, Any]) -> str:
    parts = [f"{name} {1e3 * value['median']:.1f}" for name, value in entry["seconds"].items()]
    return (
        f"{entry['backend']}, {entry['bytes'] / 1e6:.1f} MB {entry['dtype']}: {entry['gb_per_s']['median']:.2f} GB/s, "
        f"plain copy {entry['copy_gb_per_s']['median']:.2f} GB/s\n  ms: {', '.join(parts)}"
    )


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a Hugging Face folder (default: a random model)")
    parser.add_argument("--rows", type=int, nargs="+", default=[64, 256, 480], help="batch sizes, multiples of 8")
    parser.add_argument("--tokens", type=int, nargs="+", default=[48, 256], help="lengths, shortest first")
    parser.add_argument("--rounds", type=int, default=3, help="timed calls of each")
    parser.add_argument("--hidden-size", type=int, default=1024, help="of the larger model, a multiple of 64")
    parser.add_argument("--layers", type=int, default=12, help="of the larger model; 0: none")
    parser.add_argument("--json", type=Path, help="a file for the report")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="configuration overrides")
    options = parser.parse_intermixed_args(arguments)
    for rows in options.rows:
        if rows < 1 or rows % RESPONSES:
            parser.error(f"--rows {rows} is not a positive multiple of {RESPONSES}")
    if options.hidden_size % 64:
        parser.error(f"--hidden-size {options.hidden_size} is not a multiple of 64, vLLM's size of a head on a CPU")
    if options.model and not options.model.is_dir():
        parser.error(f"--model {options.model}: there is no such folder")
    with tempfile.TemporaryDirectory() as scratch:
        try:
            configs = configurations(options, Path(scratch))
        except ValueError as error:
            sys.exit(f"error: {error}")
        report = measure(options, configs)
    if options.json:
        options.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
