"""A trace of what a worker computes, by torch's profiler."""

from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

TABLE_ROWS = 40


class Profiler:
    """Between `start` and `stop` everything this process computes is recorded, on the CPU and on its GPU."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device.type == "cuda" else [])
        self._profile = profile(activities=activities)

    def start(self) -> None:
        self._profile.start()

    def stop(self, path: Path) -> None:
        """Write `path`.json.gz, for chrome://tracing or ui.perfetto.dev, and `path`.txt, a table of the operators that
        took most time themselves."""
        self._profile.stop()
        path.parent.mkdir(parents=True, exist_ok=True)
        self._profile.export_chrome_trace(f"{path}.json.gz")
        table = self._profile.key_averages().table(
            sort_by=f"self_{self.device.type}_time_total", row_limit=TABLE_ROWS, max_name_column_width=60
        )
        path.with_name(f"{path.name}.txt").write_text(table)
