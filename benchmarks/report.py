"""What all benchmarks share: the machine they ran on, the memory that something takes, and where the report goes."""

import gc
import json
import os
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def machine() -> dict[str, Any]:
    """What the numbers were measured on, and how busy it was."""
    cpuinfo = Path("/proc/cpuinfo")
    models = [line.split(":")[1].strip() for line in _lines(cpuinfo) if line.startswith("model name")]
    return {
        "cpu": models[0] if models else platform.processor(),
        "cores": os.cpu_count(),
        "threads_used": torch.get_num_threads(),
        "load_average_at_start": round(os.getloadavg()[0], 2),
        "system": platform.platform(terse=True),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def _lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.is_file() else []


def _status_mib(field: str) -> float:
    """`VmRSS` (resident now) or `VmHWM` (its peak) of this process, in MiB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) / 1024
    raise ValueError(f"/proc/self/status has no {field}; memory is measured on Linux only, use --no-memory")


def memory_peak(compute: Callable[[], Any], device: torch.device | None = None) -> float:
    """By how much the peak of memory during `compute()` exceeds what was in use before, in MiB: this process's resident
    memory, or what is allocated on the GPU `device`."""
    gc.collect()
    if device is not None and device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        compute()
        return (torch.cuda.max_memory_allocated(device) - before) / 2**20
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts at the present
    resident = _status_mib("VmRSS")
    compute()
    return _status_mib("VmHWM") - resident


def write_report(report: dict[str, Any], output: Path | None) -> None:
    """As JSON, to a file, or printed."""
    text = json.dumps(report, indent=2)
    if output is None:
        print(text)
    else:
        output.write_text(text + "\n")
