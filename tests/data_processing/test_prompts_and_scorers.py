"""What a script's prompt asks for, the scorer of its data source reads. Programs and the ladder: in their own tests."""

import pytest

from data_processing import download_dapomath, download_easymath, download_geometry3k
from data_processing.download_dapomath import SETS
from tests.data_processing import copies
from verl.utils.reward_score import compute_score
from verl.utils.reward_score.instructions import BOXED, THINK_BOXED

ANSWER_LINE = 'Remember to put your answer on its own line after "Answer:".'  # the published sets' own instruction


def in_the_asked_form(prompt: str, answer: str) -> str:
    """A response as the end of the prompt asks for it."""
    if prompt.endswith(THINK_BOXED):
        return f"<think>Let us see.</think> It is \\boxed{{{answer}}}."
    if prompt.endswith(BOXED):
        return f"Let us see. It is $\\boxed{{{answer}}}$."
    assert prompt.endswith(ANSWER_LINE), prompt
    return f"Let us see.\n\nAnswer: {answer}"


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> list[dict]:
    """All rows that the scripts of mathematics make from the copies."""
    folder = tmp_path_factory.mktemp("made")
    for copy in (copies.dapo_math, copies.aime_2024, copies.hard_sets, copies.math, copies.gsm8k, copies.geometry3k):
        copy(folder / "copies")
    made = []
    for script in (download_dapomath, download_easymath, download_geometry3k):
        out = folder / script.__name__
        script.main(["--output-dir", str(out), "--source", str(folder / "copies")])
        for path in sorted(out.glob("*.parquet")):
            made += copies.read(path)
    return made


def test_the_ground_truth_in_the_asked_form_is_right_and_another_answer_wrong(rows):
    for row in rows:
        source, truth = row["data_source"], row["reward_model"]["ground_truth"]
        prompt = row["prompt"][-1]["content"]
        right = compute_score(source, in_the_asked_form(prompt, truth), truth, row["extra_info"])
        assert right["score"] == right["acc"] == 1, row
        assert compute_score(source, in_the_asked_form(prompt, "123456"), truth, row["extra_info"])["acc"] == 0, row


def test_every_data_source_of_the_scripts_is_among_them(rows):
    others = {download_easymath.MATH, download_easymath.GSM8K, download_geometry3k.REPO}
    assert {row["data_source"] for row in rows} == {output.data_source for output in SETS.values()} | others
