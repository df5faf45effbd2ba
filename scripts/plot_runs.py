"""Draw runs side by side: training reward, validation accuracy, and entropy against reward.

    python scripts/plot_runs.py outputs/quickstart/* --output runs.png

Entropy falls as reward rises, under any objective: the third panel compares it at equal reward.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

SMOOTHING = 5  # steps of the running mean


def read(run_dir: Path) -> list[dict[str, Any]]:
    """The steps of a run's metrics.jsonl. Of a run that goes on, or was killed, the last line may be half written: it
    is left out, with a message. ValueError for another line that is no step, and if there is none."""
    path = run_dir / "metrics.jsonl"
    steps: list[dict[str, Any]] = []
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    for number, line in enumerate(lines, start=1):
        try:
            step = json.loads(line)
        except json.JSONDecodeError:
            step = None
        if isinstance(step, dict) and "step" in step:
            steps.append(step)
        elif number < len(lines):
            raise ValueError(f"{path}, line {number} is not an object with a step: mend or remove it")
        else:
            print(f"{path}: left out line {number}, the last one, which is not whole", file=sys.stderr)
    if not steps:
        raise ValueError(f"{path} has no steps yet")
    return steps


def series(steps: list[dict[str, Any]], name: str) -> tuple[np.ndarray, np.ndarray]:
    """Step numbers and values of a metric, where it was logged."""
    points = [(step["step"], step[name]) for step in steps if step.get(name) is not None]
    return np.array([p[0] for p in points]), np.array([p[1] for p in points], dtype=float)


def smooth(values: np.ndarray) -> np.ndarray:
    """Mean over each step and the ones before it, `SMOOTHING` in all."""
    return np.array([values[max(0, i + 1 - SMOOTHING) : i + 1].mean() for i in range(len(values))])


def validation_name(steps: list[dict[str, Any]]) -> str | None:
    names = [n for step in steps for n in step if n.startswith("val-core/") and "/acc/mean@" in n]
    return next((n for n in names if not n.endswith("_se")), None)


def plot(runs: list[tuple[str, list[dict[str, Any]]]], output: Path) -> None:
    """Draw the steps of each run under its name."""
    figure, (reward, validation, entropy) = plt.subplots(1, 3, figsize=(11, 3.4), layout="constrained")
    for label, steps in runs:
        x, y = series(steps, "critic/score/mean")
        (line,) = reward.plot(x, smooth(y), label=label)
        if name := validation_name(steps):
            x_val, y_val = series(steps, name)
            _, error = series(steps, f"{name}_se")
            validation.errorbar(x_val, y_val, yerr=error if len(error) else None, marker="o", ms=4, capsize=3,
                                color=line.get_color(), label=label)  # fmt: skip
            validation.set_ylabel(name.split("/")[-1])
        entropy.plot(smooth(y), smooth(series(steps, "actor/entropy")[1]), color=line.get_color(), label=label)
    reward.set(title=f"training reward (mean of {SMOOTHING} steps)", xlabel="step")
    validation.set(title="validation accuracy ± standard error", xlabel="step")
    entropy.set(title="entropy at equal reward", xlabel="training reward", ylabel="entropy, nats per token")
    for axes in (reward, validation, entropy):
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    reward.legend(frameon=False)
    figure.savefig(output, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw the metrics of runs side by side.")
    parser.add_argument("run_dirs", type=Path, nargs="+", help="folders with a metrics.jsonl")
    parser.add_argument("--output", type=Path, default=Path("runs.png"))
    arguments = parser.parse_args()
    for run_dir in arguments.run_dirs:
        if not (run_dir / "metrics.jsonl").is_file():
            parser.error(f"{run_dir} has no metrics.jsonl; give run folders")
    try:
        runs = [(run_dir.name, read(run_dir)) for run_dir in arguments.run_dirs]
    except ValueError as error:
        parser.error(str(error))
    plot(runs, arguments.output)
    print(arguments.output)


if __name__ == "__main__":
    main()
