"""Which device the workers compute on. Nothing outside this file asks.

A device is `cpu` or `cuda`. Each has its collective backend; on a GPU a gloo group stands beside nccl, for tensors that
stay on the CPU (object collectives, asynchronous checkpoints).
"""

import os
import resource
import sys
from pathlib import Path

import torch

BACKENDS = {"cpu": "gloo", "cuda": "cpu:gloo,cuda:nccl"}
CPU_QUOTA = Path("/sys/fs/cgroup/cpu.max")  # of a container: microseconds of CPU time per period, or `max`


def resolve_device(name: str, has_gpu: bool | None = None) -> str:
    """`trainer.device` as `cpu` or `cuda`. `has_gpu`: what a cluster said of its nodes; None: ask this machine."""
    if name not in ("auto", *BACKENDS):
        raise ValueError(f"trainer.device={name} is not a device; set it to auto, cuda or cpu")
    if has_gpu is None:
        has_gpu = torch.cuda.is_available()
    if name == "cuda" and not has_gpu:
        raise ValueError("trainer.device=cuda, but there is no usable GPU; set trainer.device=cpu")
    return name if name != "auto" else "cuda" if has_gpu else "cpu"


def bind_device(device: str, local_rank: int) -> torch.device:
    """Make this process use the device of its rank on this node. Ray shows a worker only its own GPU: index 0 then."""
    if device == "cpu":
        return torch.device("cpu")
    torch.cuda.set_device(local_rank % torch.cuda.device_count())
    return torch.device("cuda", torch.cuda.current_device())


def available_cores() -> int:
    """CPU cores this process may use: its affinity, and the container's quota where there is one."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if CPU_QUOTA.exists():
        quota, period = CPU_QUOTA.read_text(encoding="ascii").split()
        if quota != "max":
            cores = min(cores, int(quota) // int(period))
    return max(1, cores)


def share_cores(workers_on_node: int) -> int:
    """Give this process its share of the cores; returns the number of threads.

    OMP_NUM_THREADS is overwritten, since neither the driver's nor Ray's value knows how many workers there are.
    """
    threads = max(1, available_cores() // workers_on_node)
    set_threads(threads)
    return threads


def set_threads(threads: int) -> None:
    """Let this process compute with so many CPU threads."""
    os.environ["OMP_NUM_THREADS"] = str(threads)
    torch.set_num_threads(threads)


def memory_metrics(device: torch.device) -> dict[str, float]:
    """Peak memory of this process since its start, in GiB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS, KiB elsewhere
    metrics = {"perf/max_cpu_memory_gb": peak / (2**30 if sys.platform == "darwin" else 2**20)}
    if device.type == "cuda":
        metrics["perf/max_memory_allocated_gb"] = torch.cuda.max_memory_allocated(device) / 2**30
        metrics["perf/max_memory_reserved_gb"] = torch.cuda.max_memory_reserved(device) / 2**30
    return metrics


def release_memory() -> None:
    """Give what torch's allocator keeps in reserve back to the GPU."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def head_chunk_tokens(device: torch.device) -> int:
    """Least tokens whose logits are computed together.

    A chunk's backward pass adds to the head's whole gradient, V H numbers in float32. On an H200 that traffic takes as
    long as the products of some 300 tokens (arithmetic, not measured): 1024 leave it a quarter of the head's time.
    """
    return 1024 if device.type == "cuda" else 256


def compute_dtype(device: torch.device) -> torch.dtype:
    """What models compute in: bfloat16 on a GPU (weights stay float32 in the optimizer), float32 on a CPU."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32
