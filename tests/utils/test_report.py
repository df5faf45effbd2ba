import io
import json

from rich.console import Console

from verl.utils.report import validation_table


def rendered(run_dir) -> str:
    console = Console(width=120, file=io.StringIO())
    console.print(validation_table(run_dir))
    return console.file.getvalue()


def step(number: int, mean: float) -> str:
    prefix, level = "val-core/arithmetic/acc", "val-aux/arithmetic/level_1/acc"
    metrics = {f"{prefix}/mean@2": mean, f"{prefix}/mean@2_se": 0.01, f"{prefix}/pass@2": mean + 0.1}
    metrics |= {f"{level}/mean@2": mean + 0.2, f"{level}/pass@2": 1.0}
    return json.dumps({"step": number, **metrics}) + "\n"


def test_the_table_sets_the_first_validation_against_the_last(tmp_path):
    lines = [step(0, 0.25), json.dumps({"step": 1, "actor/lr": 1.0}) + "\n", step(2, 0.5), step(4, 0.75)]
    (tmp_path / "metrics.jsonl").write_text("".join(lines))
    text = rendered(tmp_path)
    assert text.splitlines()[0] == "validation accuracy ± standard error, step 0 → 4"
    assert "0.250 ± 0.010 → 0.750 ± 0.010" in text and "0.350 → 0.850" in text
    assert "arithmetic level_1" in text and "0.450 → 0.950" in text


def test_a_first_validation_of_something_else_is_left_out(tmp_path):
    other = json.dumps({"step": 0, "val-core/arithmetic/acc/mean@4": 0.1, "val-core/arithmetic/acc/pass@4": 0.1}) + "\n"
    (tmp_path / "metrics.jsonl").write_text(other + step(5, 0.5))
    text = rendered(tmp_path)
    assert "step 5" in text and "0.500 ± 0.010" in text and "→" not in text


def test_one_validation_is_shown_alone_and_none_gives_no_table(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(step(3, 0.5))
    assert "step 3" in rendered(tmp_path) and "→" not in rendered(tmp_path)
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    assert validation_table(tmp_path) is None
