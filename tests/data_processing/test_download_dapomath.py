import pytest

from data_processing import download_dapomath
from data_processing.make_tiny_model import build_tokenizer
from tests.data_processing import copies
from verl.utils.reward_score.instructions import BOXED

ALL = ["dapo-math-17k", "aime-2024", "aime-2025", "amc", "math-500", "minerva", "olympiadbench"]


def make(tmp_path, *options):
    out = tmp_path / "out"
    download_dapomath.main(["--output-dir", str(out), "--source", str(tmp_path / "copies"), *options])
    return out


def content(row):
    (message,) = row["prompt"]
    assert message["role"] == "user"
    return message["content"]


def test_every_set_is_written_with_its_data_source_and_can_be_trained_on(tmp_path):
    copies.dapo_math(tmp_path / "copies")
    copies.aime_2024(tmp_path / "copies")
    copies.hard_sets(tmp_path / "copies")
    out = make(tmp_path)
    sources = ["math_dapo", "aime2024", "aime2025", "amc", "HuggingFaceH4/MATH-500", "minerva", "olympiadbench"]
    for name, source in zip(ALL, sources, strict=True):
        rows = copies.read(out / f"{name}.parquet")
        assert {row["data_source"] for row in rows} == {source}
        assert {row["extra_info"]["split"] for row in rows} == {"train" if name == "dapo-math-17k" else "test"}
        data = copies.trainable(out / f"{name}.parquet", build_tokenizer())
        assert [data[i]["ground_truth"] for i in range(len(data))] == [r["reward_model"]["ground_truth"] for r in rows]
        assert content(rows[0]) in data[0]["prompt_text"]


def test_repeated_questions_are_dropped_and_counted_and_the_first_answer_stays(tmp_path):
    copies.dapo_math(tmp_path / "copies")
    out = make(tmp_path, "--sets", "dapo-math-17k")
    rows = copies.read(out / "dapo-math-17k.parquet")
    assert [row["reward_model"]["ground_truth"] for row in rows] == ["2", "4", "6"]
    assert [row["extra_info"] for row in rows] == [{"split": "train", "index": i, "id": f"id-{i}"} for i in range(3)]
    summary = copies.summary(out)["dapo-math-17k.parquet"]
    assert (summary["rows"], summary["duplicates"], summary["duplicates_with_another_answer"]) == (3, 9, 1)
    assert summary["duplicates_are"] == "dropped"


def test_repeated_questions_are_kept_on_request(tmp_path):
    copies.aime_2024(tmp_path / "copies")
    out = make(tmp_path, "--sets", "aime-2024", "--keep-duplicates")
    assert len(copies.read(out / "aime-2024.parquet")) == 3
    assert copies.summary(out)["aime-2024.parquet"]["duplicates_are"] == "kept"


def test_published_prompt_is_kept_word_for_word(tmp_path):
    copies.dapo_math(tmp_path / "copies")
    rows = copies.read(make(tmp_path, "--sets", "dapo-math-17k") / "dapo-math-17k.parquet")
    assert rows[0]["prompt"] == copies.ready_row("What is 1+1?", "2", "")["prompt"]


def test_prompt_that_asks_for_another_form_is_refused_by_its_row(tmp_path):
    rows = [copies.ready_row("What is 1+1?", "2", "a"), copies.ready_row("What is 2+2?", "4", "b")]
    rows[1]["prompt"][0]["content"] = "What is 2+2? Write #### before the answer."
    path = copies.dapo_math(tmp_path / "copies", rows)
    with pytest.raises(ValueError, match=rf"^{path}, row 1, column 'prompt': it asks for none of the forms"):
        make(tmp_path, "--sets", "dapo-math-17k")


def test_row_without_an_answer_is_left_out_and_named(tmp_path):
    rows = [copies.ready_row("What is 1+1?", "2", "a"), copies.ready_row("What is 2+2?", None, "b")]
    path = copies.dapo_math(tmp_path / "copies", rows)
    out = make(tmp_path, "--sets", "dapo-math-17k")
    assert len(copies.read(out / "dapo-math-17k.parquet")) == 1
    left_out = {"without an answer": {"rows": 1, "first": [f"{path}, row 1"]}}
    assert copies.summary(out)["dapo-math-17k.parquet"]["left_out"] == left_out


def test_test_sets_ask_for_a_box_after_the_question(tmp_path):
    copies.hard_sets(tmp_path / "copies")
    out = make(tmp_path, "--sets", *ALL[2:])
    for name in ALL[2:]:
        assert all(content(row).endswith("\n\n" + BOXED) for row in copies.read(out / f"{name}.parquet"))
    assert content(copies.read(out / "aime-2025.parquet")[0]) == f"Find the sum of all bases.\n\n{BOXED}"


def test_answers_and_facts_of_the_test_sets_are_as_published(tmp_path):
    copies.hard_sets(tmp_path / "copies")
    out = make(tmp_path, "--sets", *ALL[2:])
    answers = {
        "aime-2025": ["70"],
        "amc": ["27"],  # published as 27.0; the other row has none
        "math-500": ["\\left( 3, \\frac{\\pi}{2} \\right)"],
        "minerva": ["3.8e33"],
        "olympiadbench": ["\\sqrt{2}, -\\sqrt{2}", "7"],
    }
    for name, expected in answers.items():
        assert [r["reward_model"]["ground_truth"] for r in copies.read(out / f"{name}.parquet")] == expected
    extra = {"id": "test/precalculus/807.json", "level": "2", "subject": "Precalculus"}
    assert copies.read(out / "math-500.parquet")[0]["extra_info"] == {"split": "test", "index": 0, **extra}
    assert content(copies.read(out / "olympiadbench.parquet")[1]).startswith("Let $T=7$.\n\nFind $T$.\n\n")
    for name in ("amc", "olympiadbench"):
        assert copies.summary(out)[f"{name}.parquet"]["left_out"]["without an answer"]["rows"] == 1
