"""What a run has learnt, as a table of its first and last validation."""

import json
import re
from pathlib import Path

from rich.console import Console
from rich.table import Table

MEAN = re.compile(r"val-(?:core|aux)/(?P<what>.+)/acc/mean@(?P<n>\d+)")


def validations(run_dir: Path) -> list[dict[str, float]]:
    """The steps of metrics.jsonl that have validation metrics, in order."""
    with (run_dir / "metrics.jsonl").open(encoding="utf-8") as file:
        steps = [json.loads(line) for line in file]
    return [step for step in steps if any(MEAN.fullmatch(name) for name in step)]


def validation_table(run_dir: Path) -> Table | None:
    """Mean accuracy (with its standard error) and pass@k per data source and level; None without a validation."""
    steps = validations(run_dir)
    if not steps:
        return None
    first, last = steps[0], steps[-1]
    names = {m["what"]: m["n"] for name in last if (m := MEAN.fullmatch(name))}
    table = Table(title=f"validation, step {first['step']} -> {last['step']}", title_justify="left")
    table.add_column("")
    for measure in ("mean@n", "pass@n"):
        for step in dict.fromkeys((first["step"], last["step"])):
            table.add_column(f"{measure} at step {step}", justify="right")
    for what, n in names.items():
        prefix = _prefix(what, last, n)
        cells = [_with_error(step, f"{prefix}/mean@{n}") for step in _distinct(first, last)]
        cells += [f"{step[f'{prefix}/pass@{n}']:.3f}" for step in _distinct(first, last)]
        table.add_row(what.replace("/", " "), *cells)
    return table


def print_report(run_dir: Path) -> None:
    """The table, and where everything is."""
    console = Console(highlight=False)
    if (run_dir / "metrics.jsonl").is_file() and (table := validation_table(run_dir)) is not None:
        console.print(table)
    console.print(f"run folder: {run_dir}", soft_wrap=True)


def _distinct(first: dict[str, float], last: dict[str, float]) -> list[dict[str, float]]:
    return [first] if first["step"] == last["step"] else [first, last]


def _prefix(what: str, step: dict[str, float], n: str) -> str:
    return next(p for p in (f"val-core/{what}/acc", f"val-aux/{what}/acc") if f"{p}/mean@{n}" in step)


def _with_error(step: dict[str, float], name: str) -> str:
    error = step.get(f"{name}_se")
    return f"{step[name]:.3f}" + (f" ± {error:.3f}" if error is not None else "")
