"""The console's table: complete, not folded, and with what failed."""

import io

import pytest
from rich.console import Console

from verl.trainer.evaluation.report import Report, SourceReport
from verl.trainer.evaluation.statistics import Estimate

MEASURES = {
    "mean@16": Estimate(0.25, 0.2, 0.3125),
    "best@16": Estimate(0.75, 0.7, 0.8),
    "maj@16": Estimate(0.5, 0.4, 0.6),
    **{f"pass@{k}": Estimate(0.25 + 0.01 * k, None, None) for k in (16, 2, 8, 1, 4)},
}


@pytest.fixture
def report() -> Report:
    sources = {
        "aime2024": SourceReport(30, 16, MEASURES, finished=0.5, response_length=812.4),
        "HuggingFaceH4/MATH-500": SourceReport(500, 16, MEASURES, {"1": (43, MEASURES)}, {"timeouts": 3, "crashes": 0}),
    }
    return Report(sources, MEASURES, {"samples": 10, "seed": 1}, {})


def printed(report: Report, width: int | None) -> list[str]:
    file = io.StringIO()
    report.print(Console(file=file, width=width, force_terminal=width is not None, no_color=True, highlight=False))
    text = file.getvalue().replace("\x1b[0m", "").replace("\x1b[1m", "").replace("\x1b[2m", "").replace("\x1b[3m", "")
    return [" ".join(line.split()) for line in text.splitlines() if line.strip()]


def test_one_table_in_a_file(report):
    lines = printed(report, None)
    assert "data source questions mean@16 pass@1 pass@2 pass@4 pass@8 pass@16 maj@16 finished tokens" in lines
    assert "aime2024 30 25.0 [20.0, 31.2] 26.0 27.0 29.0 33.0 41.0 50.0 50.0 812" in lines
    assert "level 1 43 25.0 [20.0, 31.2] 26.0 27.0 29.0 33.0 41.0 50.0" in lines
    assert "average 25.0 [20.0, 31.2] 26.0 27.0 29.0 33.0 41.0 50.0" in lines
    assert lines[-1] == "HuggingFaceH4/MATH-500: calls of the reward function that failed: 3 timeouts"


def test_two_tables_on_a_narrow_console_with_every_number(report):
    lines = printed(report, 80)
    assert "aime2024 30 25.0 [20.0, 31.2] 50.0 50.0 812" in lines
    assert "aime2024 26.0 27.0 29.0 33.0 41.0" in lines
    assert not any("…" in line and "MATH" not in line for line in lines)


def test_json_has_every_measure_and_the_seed(report):
    content = report.as_json()
    math = content["data_sources"]["HuggingFaceH4/MATH-500"]
    assert math["measures"]["best@16"] == {"value": 0.75, "low": 0.7, "high": 0.8}
    assert math["levels"]["1"]["questions"] == 43 and math["failures"]["timeouts"] == 3
    assert content["bootstrap"] == {"samples": 10, "seed": 1, "confidence": 0.95}
