"""What a run has learnt, as a table of its first and last validation."""

import json
import re
from pathlib import Path

from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

MEAN = re.compile(r"val-(?:core|aux)/(?P<what>.+)/acc/mean@(?P<n>\d+)")


def validations(run_dir: Path) -> list[dict[str, float]]:
    """The steps of metrics.jsonl that have validation metrics, in order."""
    with (run_dir / "metrics.jsonl").open(encoding="utf-8") as file:
        steps = [json.loads(line) for line in file]
    return [step for step in steps if any(MEAN.fullmatch(name) for name in step)]


def validation_table(run_dir: Path) -> Group | None:
    """Mean accuracy (with its standard error) and pass@k per data source and level, under a title; None without a
    validation."""
    steps = validations(run_dir)
    if not steps:
        return None
    first, last = steps[0], steps[-1]
    names = {m["what"]: m["n"] for name in last if (m := MEAN.fullmatch(name)) and name in first}
    if not names:  # the first validation measured something else: show the last one
        first, names = last, {m["what"]: m["n"] for name in last if (m := MEAN.fullmatch(name))}
    counts = sorted({*names.values()}, key=int)
    shown = [first] if first is last else [first, last]
    steps_shown = " → ".join(str(step["step"]) for step in shown)
    title = Text(f"validation accuracy ± standard error, step {steps_shown}", style="italic")
    table = Table()
    for column in ("", *(f"{measure}@{n}" for n in counts for measure in ("mean", "pass"))):
        table.add_column(column, justify="right" if column else "left")
    for what, n in names.items():
        cells = {column.header: "" for column in table.columns[1:]}
        prefix = next(p for p in (f"val-core/{what}/acc", f"val-aux/{what}/acc") if f"{p}/mean@{n}" in last)
        cells[f"mean@{n}"] = " → ".join(_with_error(step, f"{prefix}/mean@{n}") for step in shown)
        cells[f"pass@{n}"] = " → ".join(f"{step[f'{prefix}/pass@{n}']:.3f}" for step in shown)
        table.add_row(what.replace("/", " "), *cells.values())
    return Group(title, table)  # a table's own title is filled up with blanks


def print_report(run_dir: Path) -> None:
    """The table, and where everything is."""
    console = Console(highlight=False)
    if (run_dir / "metrics.jsonl").is_file() and (table := validation_table(run_dir)) is not None:
        console.print(table)
    console.print(f"run folder: {run_dir}", soft_wrap=True)


def _with_error(step: dict[str, float], name: str) -> str:
    error = step.get(f"{name}_se")
    return f"{step[name]:.3f}" + (f" ± {error:.3f}" if error is not None else "")
