"""Peak memory of log-probs and entropies at a large vocabulary, against the plain way; the result is JSON.

    python benchmarks/log_prob_memory.py [--tokens N] [--vocabulary V] [--hidden H] [--output FILE]

`plain` computes all logits, their log-softmax, and from it both; `chunked` is what training calls. Each is measured in
a process of its own: the growth of resident memory (on a GPU: of allocated memory) over the inputs, forward alone and
with the backward pass, whose results (two gradients) are not counted. Then both are compared; and timed, forward and
backward on one thread, at a small vocabulary, where all logits at once would do.
"""

import argparse
import multiprocessing
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch

sys.path.append(str(Path(__file__).resolve().parents[1]))  # run as a script, it finds only its own folder

from benchmarks.report import machine, memory_peak, write_report
from verl.trainer.ppo.registry import one_thread
from verl.utils.device import compute_dtype, head_chunk_tokens
from verl.utils.torch_functional import log_prob_and_entropy

TEMPERATURE = 0.8


def plain(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """log_prob and entropy (M,) by way of all logits."""
    log_p = torch.log_softmax((hidden @ weight.T).float() / TEMPERATURE, dim=-1)
    return log_p.gather(1, labels[:, None]).squeeze(1), -(log_p.exp() * log_p).sum(1)


def chunked(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return log_prob_and_entropy(hidden, weight, labels, TEMPERATURE)


WAYS: dict[str, Callable[..., tuple[torch.Tensor, torch.Tensor]]] = {"plain": plain, "chunked": chunked}


DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def inputs(
    tokens: int, vocabulary: int, hidden_size: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens, hidden_size, generator=generator).to(DEVICE, dtype)
    weight = (torch.randn(vocabulary, hidden_size, generator=generator) / hidden_size**0.5).to(DEVICE, dtype)
    return hidden, weight, torch.randint(vocabulary, (tokens,), generator=generator).to(DEVICE)


def peak_mib(way: str, backward: bool, tokens: int, vocabulary: int, hidden_size: int) -> float:
    """Of one pass, over the inputs; in a new process, so that nothing has been freed before."""
    hidden, weight, labels = inputs(tokens, vocabulary, hidden_size, compute_dtype(DEVICE))
    results = 0
    if backward:
        hidden.requires_grad_(), weight.requires_grad_()
        results = hidden.nbytes + weight.nbytes

    def compute() -> None:
        with torch.set_grad_enabled(backward):
            log_prob, entropy = WAYS[way](hidden, weight, labels)
        if backward:
            (log_prob + entropy).sum().backward()

    return memory_peak(compute, hidden.device) - results / 2**20


def differences(tokens: int, vocabulary: int, hidden_size: int) -> dict[str, float]:
    """In float32: largest absolute differences of the results, and of the gradients relative to the largest one."""
    found: dict[str, list[torch.Tensor]] = {}
    for name, way in WAYS.items():
        hidden, weight, labels = (
            tensor.requires_grad_(tensor.is_floating_point())
            for tensor in inputs(tokens, vocabulary, hidden_size, torch.float32)
        )
        log_prob, entropy = way(hidden, weight, labels)
        (log_prob + entropy).sum().backward()
        assert hidden.grad is not None and weight.grad is not None
        found[name] = [log_prob.detach(), entropy.detach(), hidden.grad.float(), weight.grad.float()]
    names, report = ("log_prob", "entropy", "hidden_gradient", "weight_gradient"), {}
    for name, ours, theirs in zip(names, found["chunked"], found["plain"], strict=True):
        scale = float(theirs.abs().max()) if name.endswith("gradient") else 1.0
        report[name] = float((ours - theirs).abs().max()) / scale
    return report


@one_thread()
def times_at_a_small_vocabulary(tokens: int, vocabulary: int, hidden_size: int) -> dict[str, float]:
    """Milliseconds of log-probs alone, forward and backward: the best of 20 rounds, in turn."""
    best = dict.fromkeys(WAYS, float("inf"))
    for _ in range(20):
        for name, way in WAYS.items():
            hidden, weight, labels = inputs(tokens, vocabulary, hidden_size, compute_dtype(DEVICE))
            hidden.requires_grad_()
            start = time.perf_counter()
            way(hidden, weight.requires_grad_(), labels)[0].sum().backward()
            best[name] = min(best[name], 1e3 * (time.perf_counter() - start))
    return {name: round(value, 2) for name, value in best.items()}


def measure(tokens: int, vocabulary: int, hidden_size: int) -> dict[str, Any]:
    shape = (tokens, vocabulary, hidden_size)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max_workers=1, mp_context=context, max_tasks_per_child=1) as pool:
        peaks = {
            name: {way: round(pool.submit(peak_mib, way, backward, *shape).result(), 1) for way in WAYS}
            for name, backward in (("forward", False), ("forward and backward", True))
        }
        compared = pool.submit(differences, *shape).result()
    return {
        "machine": machine(),
        "tokens": tokens,
        "vocabulary": vocabulary,
        "hidden": hidden_size,
        "peak_mib": peaks,
        "chunked / plain": {name: round(peak["chunked"] / peak["plain"], 4) for name, peak in peaks.items()},
        "largest difference": compared,
        "ms at 4096 tokens x 264 ids": times_at_a_small_vocabulary(4096, 264, 128),
    }


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=8 * head_chunk_tokens(DEVICE), help="eight chunks by default")
    parser.add_argument("--vocabulary", type=int, default=151_936)
    parser.add_argument("--hidden", type=int, default=256, help="hidden size; the logits do not depend on it")
    parser.add_argument("--output", type=Path, help="a file for the JSON, which is printed otherwise")
    options = parser.parse_args(arguments)
    write_report(measure(options.tokens, options.vocabulary, options.hidden), options.output)


if __name__ == "__main__":
    main()
