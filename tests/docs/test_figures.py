"""The script of the figures runs, and the figures shown are the ones it makes."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[2] / "docs"


@pytest.mark.slow  # simulates and draws
def test_a_figure_is_drawn_and_its_numbers_are_printed(tmp_path):
    command = [sys.executable, str(DOCS / "figures" / "make_figures.py"), "advantage", "--output-dir", str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    # A(z) = -(4 - z)^+ - 0.5 (2 - z)^+
    assert "MVaR (RiskPO) at z = 0..5: [-5.0, -3.5, -2.0, -1.0, 0.0, 0.0]" in result.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["advantage.svg"]
    assert (tmp_path / "advantage.svg").read_text().rstrip().endswith("</svg>")


def test_every_figure_is_shown_and_small():
    shown = re.findall(r"\]\(figures/(\w+)\.svg\)", (DOCS / "algorithm.md").read_text())
    assert sorted(shown) == sorted(path.stem for path in (DOCS / "figures").glob("*.svg"))
    assert sorted(shown) == ["advantage", "difficulty", "tracker", "variance"]
    assert all((DOCS / "figures" / f"{name}.svg").stat().st_size <= 100_000 for name in shown)
