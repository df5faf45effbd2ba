"""The figure of runs, and what it makes of metrics that are not whole."""

import json

import pytest

from scripts import plot_runs

STEPS = [{"step": k, "critic/score/mean": k / 4, "actor/entropy": 1.0} for k in range(1, 4)]


@pytest.fixture
def draw(tmp_path, monkeypatch):
    """Draw one run with this metrics.jsonl; the figure."""

    def call(text: str):
        (tmp_path / "metrics.jsonl").write_text(text)
        monkeypatch.setattr("sys.argv", ["plot_runs", str(tmp_path), "--output", str(tmp_path / "runs.png")])
        plot_runs.main()
        return tmp_path / "runs.png"

    return call


def lines(*rows: dict) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def test_a_half_written_last_line_is_left_out(draw, tmp_path, capsys):
    assert draw(lines(*STEPS) + '{"step": 4, "cri').stat().st_size > 0
    assert f"{tmp_path}/metrics.jsonl: left out line 4" in capsys.readouterr().err
    assert plot_runs.read(tmp_path) == STEPS


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            lines(STEPS[0]) + '{"step": 2, "cri\n' + lines(STEPS[2]),
            "metrics.jsonl, line 2 is not an object with a step",
        ),
        ("", "metrics.jsonl has no steps yet"),
        ('{"step": 0, "cri', "metrics.jsonl has no steps yet"),
    ],
)
def test_metrics_that_cannot_be_drawn_are_an_error(draw, tmp_path, capsys, text, message):
    with pytest.raises(SystemExit) as ended:
        draw(text)
    assert ended.value.code == 2 and message in capsys.readouterr().err
    assert not (tmp_path / "runs.png").exists()
