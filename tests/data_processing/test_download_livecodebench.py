import base64
import json
import os
import pickle
import zlib

import pytest

from data_processing import download_livecodebench
from data_processing.make_tiny_model import build_tokenizer
from data_processing.sources import UnavailableError
from tests.data_processing import copies
from verl.utils.reward_score import compute_score
from verl.utils.sandbox.run import SandboxUnavailable, check_confinement


def make(tmp_path, *options):
    out = tmp_path / "out"
    download_livecodebench.main(["--output-dir", str(out), "--source", str(tmp_path / "copies"), *options])
    return copies.read(out / "livecodebench.parquet")


def ids(rows):
    return [row["extra_info"]["id"] for row in rows]


def test_ground_truth_has_public_then_hidden_tests(tmp_path):
    copies.livecodebench(tmp_path / "copies")
    rows = make(tmp_path)
    truths = [json.loads(row["reward_model"]["ground_truth"]) for row in rows]
    tests = {"inputs": ["a", "b", "c\u00e9"], "outputs": ["A", "B", "C\u00c9"], "fn_name": None}
    as_json = {"inputs": ['"a"', '"b"', '"c\u00e9"'], "outputs": ['"A"', '"B"', '"C\u00c9"'], "fn_name": "shout"}
    assert truths == [tests, tests, as_json]
    facts = {"split": "test", "index": 2, "id": "3", "level": "easy", "platform": "leetcode", "date": "2025-01-04"}
    assert rows[2]["extra_info"] == facts
    assert rows[2]["data_source"] == "livecodebench" and rows[2]["ability"] == "code"


def test_prompt_says_how_the_program_gets_its_input(tmp_path):
    copies.livecodebench(tmp_path / "copies")
    rows = make(tmp_path)
    texts = [row["prompt"][0]["content"] for row in rows]
    assert "standard input" in texts[0] and "class Solution" not in texts[0]
    assert "```python\nclass Solution:\n    def shout(self, s: str) -> str:\n```" in texts[2]
    assert all(text.startswith("Print the line in capitals.") and "code block" in text for text in texts)
    data = copies.trainable(tmp_path / "out" / "livecodebench.parquet", build_tokenizer())
    assert texts[2] in data[2]["prompt_text"]


# Each program is started in a sandbox.
@pytest.mark.slow
def test_the_scorer_reads_what_the_script_writes(tmp_path):
    copies.livecodebench(tmp_path / "copies")
    try:
        check_confinement()
    except SandboxUnavailable as error:
        pytest.skip(str(error))
    standard_input, _, method = make(tmp_path)
    programs = {
        "print(input().upper())": (standard_input, 1),
        "print(input())": (standard_input, 0),
        "class Solution:\n    def shout(self, s):\n        return s.upper()": (method, 1),
        "class Solution:\n    def shout(self, s):\n        return s": (method, 0),
    }
    for program, (row, right) in programs.items():
        truth = row["reward_model"]["ground_truth"]
        found = compute_score(row["data_source"], f"```python\n{program}\n```", truth, row["extra_info"])
        assert found["acc"] == right, (program, found)


def test_dates_are_kept_inclusively_and_the_others_counted(tmp_path):
    copies.livecodebench(tmp_path / "copies")
    assert ids(make(tmp_path, "--start-date", "2024-09-01")) == ["2", "3"]
    assert ids(make(tmp_path, "--start-date", "2023-05-08", "--end-date", "2024-09-01")) == ["2"]
    left_out = copies.summary(tmp_path / "out")["livecodebench.parquet"]["left_out"]
    assert left_out["outside the dates asked for"]["rows"] == 2
    with pytest.raises(ValueError, match="no row of .* is left .*: 3 outside the dates asked for"):
        make(tmp_path, "--start-date", "2030-01-01")


def test_release_chooses_the_files(tmp_path):
    copies.livecodebench(tmp_path / "copies")
    assert ids(make(tmp_path, "--release", "release_v1")) == ["1", "2"]
    assert ids(make(tmp_path, "--release", "v2")) == ["3"]
    assert ids(make(tmp_path, "--release", "v1_v2")) == ["1", "2", "3"]
    with pytest.raises(UnavailableError, match=r"there is no .*test3.jsonl; .*`hf download .* test3.jsonl --local-dir"):
        make(tmp_path, "--release", "release_v3")


@pytest.mark.parametrize("release", ["release_v7", "v0", "v3_v2", "release_v1_v2", "latest"])
def test_unknown_release_is_refused(tmp_path, release):
    copies.livecodebench(tmp_path / "copies")
    with pytest.raises(ValueError, match=f"--release is '{release}': give release_v1"):
        make(tmp_path, "--release", release)


class Payload:
    """Unpickling this runs a command."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


def test_pickle_that_would_run_code_is_refused_and_does_not_run(tmp_path):
    marker = tmp_path / "ran"
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        data = pickle.dumps(Payload(marker), protocol)
        packed = base64.b64encode(zlib.compress(data)).decode()
        folder = tmp_path / "copies" / "code_generation_lite"
        path = copies.write(folder / "test.jsonl", [copies.code_row("1", private_test_cases=packed)])
        with pytest.raises(ValueError, match=f"^{path}, row 0, column 'private_test_cases': .* refused"):
            make(tmp_path)
    assert not marker.exists()


@pytest.mark.parametrize("text", ["", "short", "x" * 300, "\u00e9\u4e16", "long " * 50_000])
def test_text_of_a_pickle_of_any_protocol_and_size(text):
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        assert download_livecodebench.pickled_text(pickle.dumps(text, protocol)) == text


@pytest.mark.parametrize("value", [["a"], b"a", 1, None, ("a", "b"), {"a": "b"}])
def test_pickle_of_anything_but_text_is_refused(value):
    with pytest.raises(ValueError, match="its pickle holds"):
        download_livecodebench.pickled_text(pickle.dumps(value))


def test_packed_tests_are_bounded(monkeypatch):
    packed = copies.packed([{"input": "a" * 1000}])
    assert download_livecodebench.unpack(packed).startswith('[{"input": "aaa')
    monkeypatch.setattr(download_livecodebench, "MAX_BYTES", 500)
    with pytest.raises(ValueError, match="larger than 500 bytes"):
        download_livecodebench.unpack(packed)


@pytest.mark.parametrize(
    ("columns", "problem"),
    [
        ({"private_test_cases": "!"}, "column 'private_test_cases': cannot be decoded: neither JSON nor packed tests"),
        ({"private_test_cases": copies.packed([1])}, "column 'private_test_cases': a test needs input, output"),
        ({"public_test_cases": '[{"input": "1"}]'}, "column 'public_test_cases': a test needs input, output"),
        ({"contest_date": "soon"}, "column 'contest_date': expected a date"),
    ],
)
def test_bad_row_is_named(tmp_path, columns, problem):
    folder = tmp_path / "copies" / "code_generation_lite"
    path = copies.write(folder / "test.jsonl", [copies.code_row("1"), copies.code_row("2", **columns)])
    with pytest.raises(ValueError, match=f"^{path}, row 1, {problem}"):
        make(tmp_path)


def test_problems_without_usable_tests_are_left_out_and_counted(tmp_path):
    rows = [
        copies.code_row("1"),
        copies.code_row("2", public_test_cases="[]", private_test_cases=""),
        copies.code_row("3", metadata='{"func_name": "shout"}'),  # but its tests go through standard input
    ]
    copies.write(tmp_path / "copies" / "code_generation_lite" / "problems.jsonl", rows)
    assert ids(make(tmp_path)) == ["1"]
    left_out = copies.summary(tmp_path / "out")["livecodebench.parquet"]["left_out"]
    assert {reason: of["rows"] for reason, of in left_out.items()} == {
        "without tests": 1,
        "whose tests are not of the kind that func_name says": 1,
    }
