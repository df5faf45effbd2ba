import pytest

from data_processing import download_easymath
from data_processing.make_tiny_model import build_tokenizer
from tests.data_processing import copies
from verl.utils.reward_score.instructions import BOXED


def make(tmp_path):
    copies.math(tmp_path / "copies")
    copies.gsm8k(tmp_path / "copies")
    out = tmp_path / "out"
    download_easymath.main(["--output-dir", str(out), "--source", str(tmp_path / "copies")])
    return out


def test_ground_truth_of_math_is_the_last_box_with_its_braces(tmp_path):
    out = make(tmp_path)
    rows = copies.read(out / "math_train.parquet")
    answers = [row["reward_model"]["ground_truth"] for row in rows]
    assert answers == ["\\frac{1}{\\sqrt{2}}", "\\{1, {2}\\}", "7"]
    assert copies.read(out / "math_test.parquet")[0]["reward_model"]["ground_truth"] == "5"
    facts = {"split": "train", "index": 0, "level": "5", "subject": "Algebra"}
    assert rows[0]["extra_info"] == facts and rows[0]["data_source"] == "DigitalLearningGmbH/MATH-lighteval"


@pytest.mark.parametrize(
    ("solution", "answer"),
    [
        ("\\boxed{a\\}b}", "a\\}b"),
        ("\\boxed {x}", "x"),
        ("\\boxed{1} and \\boxed{2", ""),  # cut off
        ("$\\boxed{\n3\n}$", "3"),
        ("\\boxed", ""),
        ("no box", ""),
        ("so $x$ is $\\boxed{-2}$ or $\\boxed{5}$.", "-2, 5"),
        ("first \\boxed{1}, so finally \\boxed{2}", "2"),
    ],
)
def test_last_box(solution, answer):
    assert download_easymath.last_boxed(solution) == answer


def test_answer_of_gsm8k_follows_the_four_hashes_without_commas(tmp_path):
    rows = copies.read(make(tmp_path) / "gsm8k_test.parquet")
    (row,) = rows
    assert row["reward_model"] == {"style": "rule", "ground_truth": "1000"}
    assert row["data_source"] == "openai/gsm8k" and row["ability"] == "math"
    assert row["prompt"] == [{"role": "user", "content": f"How much does she earn?\n\n{BOXED}"}]


def test_rows_without_an_answer_are_counted_and_other_configurations_are_not_read(tmp_path):
    summary = copies.summary(make(tmp_path))
    counts = {
        name: (s["rows"], s["left_out"].get("without an answer", {"rows": 0})["rows"]) for name, s in summary.items()
    }
    assert counts == {
        "math_train.parquet": (3, 1),
        "math_test.parquet": (1, 0),
        "gsm8k_train.parquet": (1, 1),
        "gsm8k_test.parquet": (1, 1),
    }


def test_both_train_files_can_be_trained_on_by_level(tmp_path):
    out = make(tmp_path)
    for name in ("math_train", "gsm8k_train"):
        data = copies.trainable(out / f"{name}.parquet", build_tokenizer())
        assert BOXED in data[0]["prompt_text"]
        assert data[0]["level"] == ("5" if name == "math_train" else "")
