"""What all download scripts share: where they read from, what they say, when they do nothing."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset, DatasetDict
from datasets.exceptions import DatasetGenerationError
from huggingface_hub.utils import httpx

from data_processing import (
    download_dapomath,
    download_easymath,
    download_geometry3k,
    download_livecodebench,
    outputs,
    sources,
)
from data_processing.sources import UnavailableError
from tests.data_processing import copies

ROOT = Path(__file__).parents[2]
DAPO = ["--sets", "dapo-math-17k"]
SCRIPTS = [download_dapomath, download_easymath, download_geometry3k, download_livecodebench]


def make(out, source, *options):
    download_dapomath.main(["--output-dir", str(out), "--source", str(source), *options])
    return copies.read(out / "dapo-math-17k.parquet")


def test_parquet_jsonl_and_saved_datasets_give_equal_rows(tmp_path):
    rows = [copies.ready_row(f"What is {i}+1?", str(i + 1), str(i)) for i in range(3)]
    copies.write(tmp_path / "parquet" / "DAPO-Math-17k" / "train.parquet", rows)
    copies.write(tmp_path / "jsonl" / "DAPO-Math-17k" / "data" / "train.jsonl", rows)
    Dataset.from_list(rows).save_to_disk(tmp_path / "saved" / "DAPO-Math-17k")
    splits = DatasetDict({"train": Dataset.from_list(rows), "test": Dataset.from_list(rows[:1])})
    splits.save_to_disk(tmp_path / "splits" / "DAPO-Math-17k")
    made = [make(tmp_path / "out" / kind, tmp_path / kind, *DAPO) for kind in ("parquet", "jsonl", "saved", "splits")]
    assert made[0] == made[1] == made[2] == made[3]
    assert [row["reward_model"]["ground_truth"] for row in made[0]] == ["1", "2", "3"]


def test_source_may_be_the_folder_of_the_repository_itself(tmp_path):
    copies.dapo_math(tmp_path)
    assert len(make(tmp_path / "out", tmp_path / "DAPO-Math-17k", *DAPO)) == 3


def test_index_counts_on_over_the_files_of_a_split(tmp_path):
    rows = [copies.ready_row(f"What is {i}+1?", str(i + 1), str(i)) for i in range(4)]
    copies.write(tmp_path / "DAPO-Math-17k" / "data" / "train-00000-of-00002.parquet", rows[:2])
    second = copies.write(tmp_path / "DAPO-Math-17k" / "data" / "train-00001-of-00002.parquet", rows[2:])
    assert [row["extra_info"]["index"] for row in make(tmp_path / "out", tmp_path, *DAPO)] == [0, 1, 2, 3]
    del rows[3]["reward_model"]
    copies.write(second, rows[3:])
    with pytest.raises(ValueError, match=rf"^{second}, row 0: there is no column 'reward_model'; it has data_source, "):
        make(tmp_path / "out", tmp_path, *DAPO)


def test_equal_sources_are_not_made_again_and_changed_ones_are(tmp_path, capsys):
    path = copies.dapo_math(tmp_path)
    out = tmp_path / "out"
    first = make(out, tmp_path, *DAPO)
    capsys.readouterr()
    written = (out / "dapo-math-17k.parquet").stat().st_mtime_ns
    assert make(out, tmp_path, *DAPO) == first
    assert capsys.readouterr().out == f"{out}: already made from these arguments\n"
    assert (out / "dapo-math-17k.parquet").stat().st_mtime_ns == written
    (out / "dapo-math-17k.parquet").write_bytes(b"cut off")
    assert make(out, tmp_path, *DAPO) == first
    assert len(make(out, tmp_path, *DAPO, "--keep-duplicates")) == 12
    copies.dapo_math(tmp_path, [copies.ready_row("What is 9+9?", "18", "a")])
    os.utime(path, ns=(0, 0))
    assert len(make(out, tmp_path, *DAPO)) == 1


def test_summary_has_prompt_lengths_in_characters_or_tokens(tmp_path, tiny_model, capsys):
    copies.dapo_math(tmp_path)
    rows = make(tmp_path / "out", tmp_path, *DAPO)
    characters = [len(row["prompt"][0]["content"]) for row in rows]
    expected = {"min": min(characters), "mean": round(np.mean(characters), 1), "max": max(characters)}
    expected |= {"unit": "characters", "p99": max(characters)}
    assert copies.summary(tmp_path / "out")["dapo-math-17k.parquet"]["prompt_length"] == expected
    line = capsys.readouterr().out
    assert line.startswith("dapo-math-17k.parquet: 3 rows; 9 duplicates dropped (1 with another answer); prompts of ")
    make(tmp_path / "out", tmp_path, *DAPO, "--tokenizer", str(tiny_model))
    lengths = copies.summary(tmp_path / "out")["dapo-math-17k.parquet"]["prompt_length"]
    assert lengths["unit"] == "tokens"
    assert lengths["max"] == max(characters) + 2  # one token per byte, and the two role tokens of the template


def test_without_a_terminal_progress_is_told_in_lines(tmp_path, monkeypatch, capsys):
    copies.dapo_math(tmp_path)
    make(tmp_path / "out", tmp_path, *DAPO)
    assert capsys.readouterr().err == ""  # it was quick
    monkeypatch.setattr(outputs, "TELL_S", 0.0)
    make(tmp_path / "again", tmp_path, *DAPO)
    lines = capsys.readouterr().err.splitlines()
    assert lines == [f"dapo-math-17k.parquet: {n} rows read of 12" for n in range(12)]


def test_missing_copies_are_named_with_what_to_fetch(tmp_path):
    copies.dapo_math(tmp_path)
    with pytest.raises(UnavailableError) as error:
        make(tmp_path / "out", tmp_path, "--sets", "dapo-math-17k", "minerva")
    message = str(error.value)
    assert message.startswith(f"there is no {tmp_path / 'minervamath'}; ")
    assert "run `hf download --repo-type dataset math-ai/minervamath --local-dir DIR/minervamath`; then" in message
    assert not (tmp_path / "out").exists()


def test_copy_without_the_split_says_which_it_has(tmp_path):
    copies.write(tmp_path / "minervamath" / "train.jsonl", [{"question": "a", "answer": "b"}])
    with pytest.raises(ValueError, match="no parquet or JSONL file of split 'test'; splits found: train"):
        make(tmp_path / "out", tmp_path, "--sets", "minerva")


@pytest.mark.parametrize(
    ("text", "problem"),
    [('{"prompt": 1}\nnot json\n', "row 0: there is no column 'reward_model'"), ("not json", "row 0 is not JSON")],
)
def test_unreadable_rows_are_named(tmp_path, text, problem):
    path = tmp_path / "DAPO-Math-17k" / "train.jsonl"
    path.parent.mkdir()
    path.write_text(text)
    with pytest.raises(ValueError, match=f"^{path}, {problem}"):
        make(tmp_path / "out", tmp_path, *DAPO)


def test_file_that_is_no_parquet_is_named(tmp_path):
    path = tmp_path / "DAPO-Math-17k" / "train.parquet"
    path.parent.mkdir()
    path.write_text("no parquet")
    with pytest.raises(ValueError, match=f"^{path} cannot be read as parquet"):
        make(tmp_path / "out", tmp_path, *DAPO)


def test_hub_is_asked_for_the_published_repositories(tmp_path, monkeypatch):
    """With the hub replaced by copies: which repository, configuration and split each script asks for."""
    asked = []

    def load_dataset(repo, config, split):
        asked.append((repo, config, split))
        (table,) = sources.open_source(sources.Source(repo, split, config), tmp_path / "hub")
        return Dataset.from_list(list(table.rows))

    def hf_hub_download(repo, file, repo_type):
        asked.append((repo, repo_type, file))
        return copies.write(tmp_path / "hub" / file, [copies.code_row(file)])

    monkeypatch.setattr(sources, "load_dataset", load_dataset)
    monkeypatch.setattr(sources, "hf_hub_download", hf_hub_download)
    for copy in (copies.dapo_math, copies.aime_2024, copies.hard_sets, copies.math, copies.gsm8k, copies.geometry3k):
        copy(tmp_path / "hub")
    for script in SCRIPTS:
        script.main(["--output-dir", str(tmp_path / script.__name__)])
    math, gsm8k, geometry = "DigitalLearningGmbH/MATH-lighteval", "openai/gsm8k", "hiyouga/geometry3k"
    assert asked == [
        ("BytedTsinghua-SIA/DAPO-Math-17k", None, "train"),
        ("BytedTsinghua-SIA/AIME-2024", None, "train"),
        ("math-ai/aime25", None, "test"),
        ("math-ai/amc23", None, "test"),
        ("HuggingFaceH4/MATH-500", None, "test"),
        ("math-ai/minervamath", None, "test"),
        ("math-ai/olympiadbench", None, "test"),
        *((repo, config, s) for s in ("train", "test") for repo, config in ((math, None), (gsm8k, "main"))),
        *((geometry, None, split) for split in ("train", "validation", "test")),
        *(("livecodebench/code_generation_lite", "dataset", f"test{n}.jsonl") for n in ("", 2, 3, 4, 5, 6)),
    ]
    places = copies.summary(tmp_path / download_easymath.__name__)["math_train.parquet"]["left_out"]
    assert places["without an answer"]["first"] == [f"{math} (train), row 3"]


@pytest.mark.parametrize("script", SCRIPTS)
def test_script_without_the_hub_says_what_to_fetch_and_where_to_put_it(tmp_path, monkeypatch, script):
    def unreachable(*args, **kwargs):
        raise ConnectionError("no network\nat all")

    monkeypatch.setattr(sources, "load_dataset", unreachable)
    monkeypatch.setattr(sources, "hf_hub_download", unreachable)
    with pytest.raises(UnavailableError) as error:
        script.main(["--output-dir", str(tmp_path / "out")])
    message = str(error.value)
    assert "\n" not in message and "from the hub (ConnectionError: no network at all)" in message
    assert "`hf download --repo-type dataset " in message and message.endswith("then give --source DIR here")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "error",
    [
        httpx.ProxyError("407 Proxy Authentication Required"),
        httpx.ReadError("connection reset"),
        httpx.RemoteProtocolError("peer closed connection"),
        RuntimeError("Data processing error: error sending request"),
        DatasetGenerationError("An error occurred while generating the dataset"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_errors_of_the_hubs_client_are_the_cause_in_the_same_message(tmp_path, monkeypatch, error):
    def broken(*args, **kwargs):
        raise error

    monkeypatch.setattr(sources, "load_dataset", broken)
    with pytest.raises(UnavailableError, match=r"`hf download .*; then give --source DIR here$") as raised:
        download_easymath.main(["--output-dir", str(tmp_path / "out")])
    assert f"from the hub ({type(error).__name__}: {error}); " in str(raised.value)
    assert raised.value.__cause__ is error


@pytest.mark.slow  # a process of its own imports torch and transformers
def test_script_in_offline_mode_ends_with_one_line_and_status_2(tmp_path):
    command = [sys.executable, str(ROOT / "data_processing" / "download_easymath.py"), "--output-dir", "out"]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf")}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith(
        "error: cannot load DigitalLearningGmbH/MATH-lighteval from the hub (ConnectionError: "
    )
