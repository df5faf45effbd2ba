"""What an evaluation found: as JSON, and as a table for the console."""

from dataclasses import asdict, dataclass, field
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

from verl.trainer.evaluation.statistics import CONFIDENCE, Estimate

Estimates = dict[str, Estimate]
LOG_WIDTH = 140  # where the console is a file, so that lines are not folded
MAX_WIDTH = 1000
KINDS = ("mean", "maj", "pass")


@dataclass
class SourceReport:
    """Of one data source. `failures`: calls of the reward function, by what happened; `levels`: questions and measures
    of each level."""

    questions: int
    n: int
    measures: Estimates
    levels: dict[str, tuple[int, Estimates]] = field(default_factory=dict)
    failures: dict[str, int] = field(default_factory=dict)
    finished: float = 1.0  # share of responses that ended by themselves
    response_length: float = 0.0  # mean, in tokens


@dataclass
class Report:
    """`average`: over data sources with equal weight, if there are several. `settings`: of each file's generation."""

    sources: dict[str, SourceReport]
    average: Estimates | None
    bootstrap: dict[str, Any]
    settings: dict[str, Any]

    def as_json(self) -> dict[str, Any]:
        return {
            "data_sources": {name: _source_json(source) for name, source in self.sources.items()},
            "average": None if self.average is None else _estimates_json(self.average),
            "bootstrap": self.bootstrap | {"confidence": CONFIDENCE},
            "generation": self.settings,
        }

    def print(self, console: Console | None = None) -> None:
        """One table, or two below each other on a console that is too narrow for one; then the failures."""
        console = console or Console(highlight=False)
        if not console.is_terminal:
            console.width = max(console.width, LOG_WIDTH)
        curve = [name for name in self._names() if name.startswith("pass@")]
        rest = [name for name in self._names() if name not in curve]
        whole = self._table([*rest[:1], *curve, *rest[1:]], facts=True)
        fits = Measurement.get(console, console.options.update(width=MAX_WIDTH), whole).maximum <= console.width
        for table in [whole] if fits else [self._table(rest, facts=True), self._table(curve, facts=False)]:
            console.print(table)
        for name, source in self.sources.items():
            failed = ", ".join(f"{count} {kind}" for kind, count in source.failures.items() if count)
            if failed:
                console.print(f"[bold]{name}[/bold]: calls of the reward function that failed: {failed}")

    def _names(self) -> list[str]:
        """Measures that are shown: mean@n, maj@n, pass@k by k. best@n is left to the JSON: where a response is right or
        wrong it is pass@n."""
        names = {name for source in self.sources.values() for name in source.measures}
        parts = [name.partition("@") for name in names]
        shown = sorted((KINDS.index(kind), int(k)) for kind, _, k in parts if kind in KINDS)
        return [f"{KINDS[kind]}@{k}" for kind, k in shown]

    def _table(self, names: list[str], facts: bool) -> Table:
        """Percentages by data source and level; `facts`: with numbers of questions, shares finished, and lengths."""
        table = Table(
            title=f"accuracy in percent [{100 * CONFIDENCE:.0f} % confidence interval]" if facts else None,
            title_justify="left",
            box=SIMPLE_HEAD,
            padding=(0, 1, 0, 0),
        )
        table.add_column("data source")
        for header in [*(["questions"] if facts else []), *names, *(["finished", "tokens"] if facts else [])]:
            table.add_column(header, justify="right", no_wrap=True)

        def add(label: str, questions: str, measures: Estimates, end: tuple[str, ...] = (), style: str = "") -> None:
            cells = _cells(names, measures)
            table.add_row(label, *([questions, *cells, *end] if facts else cells), style=style)

        for name, source in self.sources.items():
            end = (f"{100 * source.finished:.1f}", f"{source.response_length:.0f}")
            add(name, str(source.questions), source.measures, end)
            for level, (questions, measures) in source.levels.items():
                add(f"  level {level}", str(questions), measures, style="dim")
        if self.average is not None:
            table.add_section()
            add("average", "", self.average, style="bold")
        return table


def _cells(names: list[str], measures: Estimates) -> list[str]:
    cells = []
    for name in names:
        estimate = measures.get(name)
        cell = "" if estimate is None else f"{100 * estimate.value:.1f}"
        if estimate is not None and name.startswith("mean@") and estimate.low is not None and estimate.high is not None:
            cell += f" [{100 * estimate.low:.1f}, {100 * estimate.high:.1f}]"
        cells.append(cell)
    return cells


def _estimates_json(estimates: Estimates) -> dict[str, Any]:
    return {name: asdict(estimate) for name, estimate in estimates.items()}


def _source_json(source: SourceReport) -> dict[str, Any]:
    return {
        "questions": source.questions,
        "n": source.n,
        "finished": source.finished,
        "response_length": source.response_length,
        "failures": source.failures,
        "measures": _estimates_json(source.measures),
        "levels": {
            level: {"questions": questions, "measures": _estimates_json(measures)}
            for level, (questions, measures) in source.levels.items()
        },
    }
