"""The benchmark against TRL takes turns, checks the work and reports what it says; its times are not judged. TRL is not
in the environment of the tests: the sides that are started here are both ours."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks import trl_step, trl_turns
from benchmarks.trl_step import Side
from benchmarks.trl_workload import Workload, make_data, make_model, our_settings, trl_settings

TINY = Workload(4, 2, 12, 6, False, 4, 4)
SKEWED = Workload(4, 2, 12, 6, True, 4, 4)


def step_of(lengths, seconds, **changes):
    phases = {"gen": 0.25 * seconds, "update_actor": 0.5 * seconds}
    facts = {"lengths": lengths, "seconds": seconds, "cpu_seconds": seconds, "phases": phases, "score": 0.5}
    return facts | {"prompt_tokens": 96, "updates": 1, "peak_memory_gib": 1.0} | changes


# ------------------------------------------------------------------------------------------------------- the report
def test_the_ratio_is_the_median_over_pairs_of_steps():
    ours = [step_of([6] * 8, seconds) for seconds in (1.0, 2.0, 4.0)]
    trl = [step_of([6] * 8, seconds) for seconds in (2.0, 2.0, 12.0)]
    report = trl_step.compare(ours, trl)
    assert report["riskpo_over_trl"] == {"median": 2.0, "min": 1.0, "max": 3.0}
    assert report["riskpo"]["tokens_per_s"] == {"median": 24.0, "min": 12.0, "max": 48.0}
    assert report["trl"]["seconds"] == {"median": 2.0, "min": 2.0, "max": 12.0}
    assert report["riskpo"]["phases"] == {"gen": 0.5, "update_actor": 1.0, "rest": 0.5}
    assert report["trl"]["mean_length"] == 6.0


def test_tokens_are_those_sampled_in_the_same_step():
    report = trl_step.compare([step_of([2, 4], 1.0)], [step_of([1, 4], 2.0)])
    assert report["riskpo_over_trl"]["median"] == pytest.approx(6 / 2.5)


def test_sides_whose_mean_lengths_differ_beyond_chance_are_refused():
    with pytest.raises(RuntimeError, match=r"mean lengths of 2\.50 and 4\.00 tokens: the sides do different work"):
        trl_step.compare([step_of([2, 3] * 50, 1.0)], [step_of([3, 5] * 50, 1.0)])


@pytest.mark.parametrize(
    ("step", "message"),
    [
        (step_of([6] * 7, 1.0), "rows 7, not 8"),
        (step_of([6] * 8, 1.0, prompt_tokens=95), "prompt tokens 95, not 96"),
        (step_of([6] * 8, 1.0, updates=2), "updates 2, not 1"),
        (step_of([7] * 8, 1.0), "tokens beyond the limit 1, not 0"),
        (step_of([6] * 7 + [5], 1.0), "shortest response 5, not 6"),
    ],
)
def test_a_step_that_did_other_work_is_refused(step, message):
    with pytest.raises(RuntimeError, match=f"trl, full length: {message}"):
        trl_step.check_step("trl", step, TINY)
    trl_step.check_step("trl", step_of([6] * 8, 1.0), TINY)
    trl_step.check_step("trl", step_of([1] * 7 + [5], 1.0), SKEWED)


def test_the_largest_change_is_found_in_any_weight(tmp_path):
    for name, weights in (("a", {"x": torch.zeros(3), "y": torch.ones(2)}), ("b", {"x": torch.zeros(3)})):
        (tmp_path / name).mkdir()
        save_file(weights, tmp_path / name / "model.safetensors")
    (tmp_path / "moved").mkdir()
    save_file({"x": torch.zeros(3), "y": torch.tensor([1.0, 0.75])}, tmp_path / "moved" / "model.safetensors")
    assert trl_step.largest_change(tmp_path / "a", tmp_path / "moved") == 0.25
    with pytest.raises(RuntimeError, match=r"has other weights than .*: \['y'\]"):
        trl_step.largest_change(tmp_path / "a", tmp_path / "b")


# -------------------------------------------------------------------------------------------------- model and data
@pytest.mark.parametrize(("skewed", "share"), [(False, 0.0), (True, 1 / 16)])
def test_stop_tokens_have_their_share_of_probability_whatever_was_written(tmp_path, skewed, share):
    folder = make_model(tmp_path / "model", skewed)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    vocabulary = model.config.vocab_size
    assert tokenizer.eos_token_id == len(tokenizer) - 1 == vocabulary
    stops = [i for i in model.generation_config.eos_token_id if i < vocabulary]
    assert len(stops) / vocabulary == pytest.approx(share, abs=0.5 / vocabulary)
    ids = torch.randint(0, vocabulary, (8, 40), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        probability = model(ids).logits.softmax(-1)[..., stops].sum(-1)
    assert float(probability.mean()) == pytest.approx(share, rel=0.1)
    assert float(probability.max()) <= 2 * share


def test_prompts_have_the_asked_length_with_the_chat_template(tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(make_model(tmp_path / "model", False))
    rows = [json.loads(line)["prompt"] for line in make_data(tmp_path / "data.jsonl", 5, 12).read_text().splitlines()]
    texts = [tokenizer.apply_chat_template(row, add_generation_prompt=True, tokenize=False) for row in rows]
    assert [len(ids) for ids in tokenizer(texts)["input_ids"]] == [12] * 5 and len(set(texts)) == 5


def test_both_sides_are_asked_for_the_same_step():
    ours = dict(text.split("=", 1) for text in our_settings(TINY, Path("m"), Path("d"), Path("r"), 1))
    trl = {key: json.loads(value) for key, value in (text.split("=", 1) for text in trl_settings(TINY, Path("r")))}
    rows = int(ours["data.train_batch_size"]) * int(ours["actor_rollout_ref.rollout.n"])
    assert trl["per_device_train_batch_size"] * trl["gradient_accumulation_steps"] == rows == 8
    assert ours["actor_rollout_ref.actor.ppo_mini_batch_size"] == ours["data.train_batch_size"]  # one update
    assert trl["max_completion_length"] == int(ours["data.max_response_length"])
    assert trl["learning_rate"] == float(ours["actor_rollout_ref.actor.optim.lr"])
    assert ours["trainer.worker_group"] == "local"
    assert "trainer.worker_group=ray" in our_settings(TINY, Path("m"), Path("d"), Path("r"), 2)


# ----------------------------------------------------------------------------------------------------------- sides
COUNTS = f"""
import sys
sys.path.append({str(Path(trl_step.__file__).parents[1])!r})
from pathlib import Path
from benchmarks.trl_turns import Turns
turns = Turns(lambda folder: Path(folder).write_text("saved"))
turns.facts["threads"] = 3
for number in range(2):
    if not turns.begin():
        sys.exit()
    print("a library prints")
    turns.facts["number"] = number
raise ValueError("out of steps")
"""


def test_a_side_steps_when_it_is_told_to_saves_and_ends(tmp_path):
    side = Side("counter", [sys.executable, "-c", COUNTS], 1, tmp_path / "log")
    assert side.ready["threads"] == 3
    side.save(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "saved"
    step = side.step()
    assert step["number"] == 0 and step["seconds"] >= 0 and step["peak_memory_gib"] > 0
    side.close()
    assert side.process.returncode == 0
    assert (tmp_path / "log").read_text() == "a library prints\n"


def test_a_side_that_fails_is_reported_with_what_it_printed(tmp_path):
    side = Side("counter", [sys.executable, "-c", COUNTS], 1, tmp_path / "log")
    side.step()
    with pytest.raises(RuntimeError, match=r"(?s)counter ended with status 1.*ValueError: out of steps"):
        side.step()


@pytest.fixture
def own_cores():
    """The measurement keeps this process to a few cores; afterwards it may use all again."""
    cores, threads = os.sched_getaffinity(0), torch.get_num_threads()
    yield
    os.sched_setaffinity(0, cores)
    torch.set_num_threads(threads)


@pytest.mark.slow  # starts two processes with a trainer each
def test_two_sides_in_turn_give_a_report(tmp_path, monkeypatch, own_cores):
    def settings_of_ours(workload, run_dir):
        return our_settings(workload, run_dir.parent / "model", run_dir.parent / "data.jsonl", run_dir, 1)

    # In place of TRL the trainer itself: its command begins with a script, the model, the data and the threads.
    ours = Path(trl_step.__file__).with_name("trl_ours.py")
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nshift 4\nexec {sys.executable} {ours} "$@"\n')
    python.chmod(0o755)
    monkeypatch.setattr(trl_step, "trl_settings", settings_of_ours)
    monkeypatch.setattr(trl_step, "workloads", lambda options: [Workload(8, 4, 8, 12, True, 8, 8)])
    run = ["--rounds=2", "--groups", "local", "--cores=1", f"--trl-python={python}", f"--json={tmp_path}/report.json"]
    trl_step.main(run)
    (entry,) = json.loads((tmp_path / "report.json").read_text())["steps"]
    assert (entry["workload"], entry["worker_group"], entry["workers"]) == ("skewed lengths", "local", 1)
    assert entry["riskpo_over_trl"]["min"] > 0
    for name in ("riskpo", "trl"):
        assert 1 < entry[name]["mean_length"] < 12
        assert entry[name]["first_update_in_learning_rates"] == pytest.approx(1, abs=0.05)


def test_the_side_of_trl_and_what_it_imports_need_nothing_of_this_package():
    folder = Path(trl_step.__file__).parent
    for name in ("trl_worker.py", "trl_turns.py"):
        lines = [
            line.split()[1] for line in (folder / name).read_text().splitlines() if line.startswith(("from", "import"))
        ]
        assert not [module for module in lines if module.startswith("verl")]
    subprocess.run([sys.executable, "-S", "-c", "import benchmarks.trl_turns"], check=True, cwd=folder.parent)


def test_the_reward_counts_a_character():
    assert trl_turns.compute_score("letters", "a77b7", "") == 3.0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--trl-micro-rows", "100"], "--trl-micro-rows 100 does not divide the 1024 rows of a step"),
        (["--cores", "100000"], "--cores 100000: this process may use"),
        (["--trl-python", "nowhere"], "--trl-python nowhere: there is no such file; make it by"),
    ],
)
def test_options_that_cannot_be_are_refused(arguments, message, capsys):
    with pytest.raises(SystemExit):
        trl_step.main(["--cores", "1", *arguments])
    assert message in capsys.readouterr().err
