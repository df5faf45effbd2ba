"""Evaluation: numbers by hand, failures counted by data source, and the same numbers as validation during training."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.e2e import runs
from verl.trainer import main_eval, main_generation, main_ppo
from verl.trainer.config import load_config
from verl.trainer.config.evaluation_schema import EvalConfig, GenerationConfig
from verl.trainer.evaluation.parts import parts_folder
from verl.trainer.main_eval import build, run


def row(source: str, answer: str, responses: list[str], level: int | None = None) -> dict:
    return {
        "data_source": source,
        "prompt": [{"role": "user", "content": "?"}],
        "reward_model": {"style": "rule", "ground_truth": answer},
        "extra_info": {"level": level},
        "responses": responses,
        "response_lengths": [len(text) for text in responses],
        "finished": [text.startswith("#") for text in responses],
    }


# Right and wrong by question: 2 and 0 of 4, 1 of 4, 4 of 4.
ROWS = [
    row("arithmetic", "5", ["#5", "#5", "#6", "none"], level=1),
    row("arithmetic", "7", ["#8", "#8", "#9", "#1"], level=2),
    row("openai/gsm8k", "3", [r"\boxed{3}", r"\boxed{4}", r"\boxed{4}", r"\boxed{1}"]),
    row("openai/gsm8k", "9", [r"\boxed{9}"] * 4),
]


@pytest.fixture
def evaluate(tmp_path):
    """Score these rows; the JSON that was written."""

    def call(rows: list[dict], *overrides: str) -> dict:
        path = tmp_path / "out.parquet"
        pq.write_table(pa.Table.from_pylist(rows), path)
        defaults = [f"data.path={path}", "reward_model.num_workers=0", "bootstrap.samples=200"]
        run(build(load_config([*defaults, *overrides], EvalConfig, "evaluation")))
        return json.loads((tmp_path / "out.json").read_text())

    return call


def values(measures: dict) -> dict[str, float]:
    return {name: estimate["value"] for name, estimate in measures.items()}


def test_numbers_by_hand(evaluate, capsys):
    report = evaluate(ROWS)
    arithmetic, gsm8k = (report["data_sources"][name] for name in ("arithmetic", "openai/gsm8k"))
    by_hand = {"mean@4": 1 / 4, "best@4": 1 / 2, "maj@4": 1 / 2, "pass@1": 1 / 4, "pass@2": 5 / 12, "pass@4": 1 / 2}
    assert values(arithmetic["measures"]) == pytest.approx(by_hand)
    assert values(gsm8k["measures"]) == pytest.approx(
        {"mean@4": 5 / 8, "best@4": 1, "maj@4": 1 / 2, "pass@1": 5 / 8, "pass@2": 3 / 4, "pass@4": 1}
    )
    assert values(report["average"]) == pytest.approx(
        {"mean@4": 7 / 16, "best@4": 3 / 4, "maj@4": 1 / 2, "pass@1": 7 / 16, "pass@2": 7 / 12, "pass@4": 3 / 4}
    )
    assert {level: part["measures"]["mean@4"]["value"] for level, part in arithmetic["levels"].items()} == {
        "1": 0.5,
        "2": 0.0,
    }
    assert gsm8k["levels"] == {}
    # Of two questions with 0 and 2 of 4: the resampled mean is 0, 1/4 or 1/2.
    assert arithmetic["measures"]["mean@4"] == {"value": 0.25, "low": 0.0, "high": 0.5}
    assert arithmetic["finished"] == 7 / 8 and arithmetic["response_length"] == pytest.approx(18 / 8)
    assert (arithmetic["questions"], arithmetic["n"], sum(arithmetic["failures"].values())) == (2, 4, 0)
    printed = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert "arithmetic 2 25.0 [0.0, 50.0] 25.0 41.7 50.0 50.0 87.5 2" in printed


def test_failures_are_counted_by_data_source(evaluate, tmp_path, capsys):
    """In the killable processes: one call raises, one hangs, one dies; each scores 0, the others are as they are."""
    (tmp_path / "scorer.py").write_text("""
import os, time

def compute_score(data_source, solution_str, ground_truth, extra_info=None):
    if solution_str == "raise":
        raise KeyError("no such thing")
    if solution_str == "hang":
        time.sleep(600)
    if solution_str == "die":
        os._exit(1)
    return float(solution_str == ground_truth)
""")
    rows = [row("one", "a", ["a", "raise"]), row("one", "b", ["hang", "b"]), row("two", "c", ["die", "nan"])]
    report = evaluate(
        rows,
        f"custom_reward_function.path={tmp_path}/scorer.py",
        "reward_model.num_workers=2",
        "reward_model.timeout_s=1",
    )
    failures = {name: source["failures"] for name, source in report["data_sources"].items()}
    assert failures == {
        "one": {"exceptions": 1, "timeouts": 1, "crashes": 0, "non_finite": 0},
        "two": {"exceptions": 0, "timeouts": 0, "crashes": 1, "non_finite": 0},
    }
    assert report["data_sources"]["one"]["measures"]["mean@2"]["value"] == 0.5
    printed = capsys.readouterr().out
    assert "one: calls of the reward function that failed: 1 exceptions, 1 timeouts" in printed


@pytest.mark.parametrize(("calls", "part_bytes", "expected"), [(1024, 3000, [2, 1, 2]), (5, 1 << 26, [2, 2, 1])])
def test_parts_are_bounded_by_responses_and_by_bytes(evaluate, monkeypatch, calls, part_bytes, expected):
    monkeypatch.setattr(main_eval, "CALLS", calls)
    monkeypatch.setattr(main_eval, "PART_BYTES", part_bytes)
    sizes, as_batch = [], main_eval.as_batch
    monkeypatch.setattr(main_eval, "as_batch", lambda rows: sizes.append(len(rows)) or as_batch(rows))
    rows = [row("arithmetic", "5" * length, ["#5", "#6"]) for length in (1000, 1000, 9000, 1000, 1)]
    assert evaluate(rows)["data_sources"]["arithmetic"]["questions"] == 5
    assert sizes == expected


def test_data_sources_may_have_different_numbers_of_responses(evaluate):
    report = evaluate([ROWS[0], row("openai/gsm8k", "3", [r"\boxed{3}"])])
    assert values(report["average"]) == {"pass@1": 0.75}
    assert report["average"]["pass@1"]["low"] is None  # single questions
    assert set(report["data_sources"]["openai/gsm8k"]["measures"]) == {"mean@1", "best@1", "maj@1", "pass@1"}


def test_without_answers_there_is_no_majority(evaluate, tmp_path):
    """A scorer that reads no answers, as that of programs: pass@k, but nothing to vote on."""
    (tmp_path / "scorer.py").write_text("""
def compute_score(data_source, solution_str, ground_truth, extra_info=None):
    return {"score": 1.0, "pred": None}
""")
    report = evaluate([row("code", "", ["a", "b"])] * 2, f"custom_reward_function.path={tmp_path}/scorer.py")
    assert set(report["data_sources"]["code"]["measures"]) == {"mean@2", "best@2", "pass@1", "pass@2"}
    unread = evaluate([row("arithmetic", "5", ["5", "6"])] * 2)  # no answer in the form that is read: wrong
    assert unread["data_sources"]["arithmetic"]["measures"]["maj@2"]["value"] == 0.0


def test_what_cannot_be_scored_is_refused(evaluate, tmp_path):
    with pytest.raises(ValueError, match=r"out.parquet, row 1, column 'data_source': no reward is known for .*'what'"):
        evaluate([ROWS[0], row("what", "1", ["1"])])
    with pytest.raises(ValueError, match=r"row 1, column 'responses': 1 responses, earlier questions have 4"):
        evaluate([ROWS[0], row("arithmetic", "1", ["#1"])])
    with pytest.raises(ValueError, match=r"data.path: .*out.parquet has no column 'responses'"):
        evaluate([{"data_source": "arithmetic", "reward_model": {"ground_truth": "1"}}])
    parts_folder(tmp_path / "other.parquet").mkdir()
    with pytest.raises(ValueError, match="other.parquet is not finished: start its main_generation again"):
        evaluate(ROWS, f"data.path={tmp_path}/other.parquet")


def test_it_measures_what_validation_measures(arithmetic_data: Path, tiny_model: Path, tmp_path: Path):
    """The model that training starts from, validated by the trainer and by the two commands, seed and sampling equal:
    the same responses, hence the same numbers."""
    (tmp_path / "scorer.py").write_text("""
def compute_score(data_source, solution_str, ground_truth, extra_info=None):
    # What a random model sometimes gets right, and answers that are sometimes equal.
    return {"score": float(any(c.isupper() for c in solution_str)), "pred": str(len(solution_str))}
""")
    scorer = [f"custom_reward_function.path={tmp_path}/scorer.py"]
    sampling = {"n": 4, "temperature": 0.8, "top_p": 0.9}
    trainer = main_ppo.build(
        runs.config(
            arithmetic_data,
            tiny_model,
            tmp_path / "run",
            *scorer,
            "actor_rollout_ref.rollout.val_kwargs.do_sample=True",
            *(f"actor_rollout_ref.rollout.val_kwargs.{name}={value}" for name, value in sampling.items()),
        )
    )
    try:
        trainer.start()
        trainer.tracking.start(0, 1)
        validated = trainer.validator(step=0)
    finally:
        trainer.tracking.finish()
        trainer.rollout.shutdown()
        trainer.actor.shutdown()
    generation = [
        f"model.path={tiny_model}",
        f"data.path={arithmetic_data}/val.parquet",
        f"data.output_path={tmp_path}/out.parquet",
        "data.n_samples=4",
        "rollout.temperature=0.8",
        "rollout.top_p=0.9",
        "rollout.response_length=12",
        "trainer.worker_group=local",
        "trainer.n_gpus_per_node=1",
        "trainer.device=cpu",
    ]
    main_generation.run(main_generation.build(load_config(generation, GenerationConfig, "generation")))
    run(build(load_config([f"data.path={tmp_path}/out.parquet", *scorer], EvalConfig, "evaluation")))
    source = json.loads((tmp_path / "out.json").read_text())["data_sources"]["arithmetic"]
    prefix = "val-core/arithmetic/acc/"
    expected = {k.removeprefix(prefix): v for k, v in validated.items() if k.startswith(prefix) and "_se" not in k}
    assert values(source["measures"]) == expected and 0 < expected["mean@4"] < 1 < len(set(expected.values()))
    level_2 = source["levels"]["2"]["measures"]
    assert level_2["pass@2"]["value"] == validated["val-aux/arithmetic/level_2/acc/pass@2"]
