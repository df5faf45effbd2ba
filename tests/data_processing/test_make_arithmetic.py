import json

import numpy as np
import pyarrow.parquet as pq
import pytest

from data_processing import make_arithmetic
from verl.utils.reward_score import compute_score

SIZES = ["--train-size", "60", "--val-size", "12", "--sft-size", "400", "--levels", "1", "2", "3"]
SLIPS = ["--slip-rate", "0.1", "0.1", "0.1"]


def make(folder, *options):
    make_arithmetic.main(["--output-dir", str(folder), *SIZES, *SLIPS, *options])
    return {split: pq.read_table(folder / f"{split}.parquet").to_pylist() for split in ("train", "val", "sft")}


def question(row):
    return row["prompt"][0]["content"]


def test_rows_have_the_fields_schema_and_the_right_answer(tmp_path):
    rows = make(tmp_path)
    for split, table in rows.items():
        for row in table:
            a, b = question(row).removesuffix("=").split("+")
            assert row["reward_model"] == {"style": "rule", "ground_truth": str(int(a) + int(b))}
            assert row["data_source"] == "arithmetic" and row["ability"] == "math"
            assert [m["role"] for m in row["prompt"]] == ["user"]
            assert row["extra_info"]["split"] == split
            assert len(a) == len(b) == row["extra_info"]["level"]


def test_every_level_has_its_share_and_one_prompt_length(tmp_path):
    rows = make(tmp_path)
    for table, per_level in ((rows["train"], 20), (rows["val"], 4)):
        levels = [row["extra_info"]["level"] for row in table]
        assert [levels.count(d) for d in (1, 2, 3)] == [per_level] * 3
    for level in (1, 2, 3):
        lengths = {len(question(row)) for row in rows["train"] if row["extra_info"]["level"] == level}
        assert len(lengths) == 1


def test_no_validation_question_is_in_training_or_demonstrations(tmp_path):
    rows = make(tmp_path)
    val = {question(row) for row in rows["val"]}
    assert len(val) == len(rows["val"])
    assert not val & {question(row) for row in rows["train"] + rows["sft"]}


def test_small_level_keeps_half_of_its_questions_for_training():
    rng = np.random.default_rng(0)
    drawn = make_arithmetic.draw(1, 200, 90, 50, rng)
    assert len(drawn["val"]) == 50 and len(set(drawn["val"])) == 50
    assert len(drawn["train"]) == 200 and len(set(drawn["train"])) == 50


def test_working_without_slips_is_column_addition():
    rng = np.random.default_rng(0)
    assert make_arithmetic.working(47, 85, 2, 0.0, rng) == "75012 48113 #132"
    assert make_arithmetic.working(5, 3, 1, 0.0, rng) == "53008 #8"
    for _ in range(200):
        a, b = (int(x) for x in rng.integers(100, 1000, size=2))
        assert make_arithmetic.working(a, b, 3, 0.0, rng).split("#") == [
            " ".join(columns(a, b, 3)) + " ",
            str(a + b),
        ]


def columns(a, b, digits):
    """Column addition written with strings, digit by digit."""
    carry, out = 0, []
    for x, y in zip(reversed(str(a).zfill(digits)), reversed(str(b).zfill(digits)), strict=True):
        total = str(int(x) + int(y) + carry).zfill(2)
        out.append(x + y + str(carry) + total)
        carry = int(total[0])
    return out


def test_slips_have_the_stated_rate_and_carry_on_into_the_answer(tmp_path):
    rows = make(tmp_path, "--slip-rate", "0.2", "0.2", "0.2", "--sft-size", "3000")["sft"]
    slips = digits = 0
    for row in rows:
        a, b = question(row).removesuffix("=").split("+")
        written, answer = row["response"].split(" #")
        carry, read_off = 0, 0
        for position, (x, y, column) in enumerate(zip(a[::-1], b[::-1], written.split(), strict=True)):
            assert column[:3] == f"{x}{y}{carry}"
            slips += int(column[3:]) != int(x) + int(y) + carry
            digits += 1
            carry = int(column[3])
            read_off += int(column[4]) * 10**position
        assert int(answer) == read_off + carry * 10 ** len(a)
    assert abs(slips / digits - 0.2) < 4 * np.sqrt(0.2 * 0.8 / digits)


def test_demonstrations_without_slips_score_one(tmp_path):
    for row in make(tmp_path, "--slip-rate", "0", "0", "0")["sft"]:
        assert compute_score("arithmetic", row["response"], row["reward_model"]["ground_truth"])["score"] == 1.0


def test_equal_arguments_give_equal_rows_and_are_not_made_again(tmp_path, capsys):
    first = make(tmp_path / "a")
    assert make(tmp_path / "b") == first
    assert make(tmp_path / "c", "--seed", "2") != first
    written = (tmp_path / "a" / "train.parquet").stat().st_mtime_ns
    capsys.readouterr()
    make(tmp_path / "a")
    assert "already made" in capsys.readouterr().out
    assert (tmp_path / "a" / "train.parquet").stat().st_mtime_ns == written


def test_other_arguments_or_a_damaged_file_are_made_again(tmp_path):
    first = make(tmp_path)
    (tmp_path / "val.parquet").write_bytes(b"cut off")
    assert make(tmp_path) == first
    assert make(tmp_path, "--seed", "5") != first
    assert json.loads((tmp_path / "manifest.json").read_text())["arguments"]["seed"] == 5


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--levels", "1", "1"], "--levels"),
        (["--levels", "12"], "--levels"),
        (["--train-size", "2"], "--train-size"),
        (["--slip-rate", "1.5", "0", "0"], "--slip-rate"),
        (["--slip-rate", "0.1"], "--slip-rate"),
        (["--seed", "-1"], "--seed"),
    ],
)
def test_bad_arguments_are_refused_by_name(tmp_path, options, named):
    with pytest.raises(ValueError, match=f"^{named} is .*: give"):
        make(tmp_path, *options)
