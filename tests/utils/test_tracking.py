import io
import json
import sys
import types

import numpy as np
import pytest
import torch
from rich.console import Console

from verl.trainer.config.schema import PPOConfig
from verl.utils import tracking
from verl.utils.tracking import ConsoleLogger, Tracking, console_numbers, lines_up_to, to_json

NAMES = {"project_name": "p", "experiment_name": "e", "config": {"a": {"b": 1}}}


def make(run_dir, *loggers, **options):
    return Tracking(loggers, run_dir, **{**NAMES, **options})


def run(run_dir, steps, start=0, *loggers):
    track = make(run_dir, *(loggers or ("jsonl",)))
    track.start(start, 10)
    for step in steps:
        track.log({"critic/score/mean": step / 10, "loss": 1.0 / (step + 1)}, step)
        track.log_samples(step, [{"prompt": "p", "response": "r", "reward": step}], "train")
    track.finish()


def lines(run_dir):
    return (run_dir / "metrics.jsonl").read_text()


def test_metrics_jsonl_has_one_object_per_step_with_plain_numbers(tmp_path):
    track = make(tmp_path, "jsonl")
    track.start(0, 2)
    track.log({"a": torch.tensor(1.5), "b": np.float32(0.25), "c": np.int64(3), "d": float("nan"), "e": 7}, 0)
    track.log({"a": float("inf"), "f": True}, 1)
    assert [json.loads(line) for line in lines(tmp_path).splitlines()] == [
        {"step": 0, "a": 1.5, "b": 0.25, "c": 3, "d": None, "e": 7},
        {"step": 1, "a": None, "f": 1.0},
    ]


def test_resumed_run_leaves_the_files_of_an_uninterrupted_one(tmp_path, capsys):
    run(tmp_path / "whole", range(9))
    run(tmp_path / "stopped", range(7))
    with (tmp_path / "stopped" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "cri')
    run(tmp_path / "stopped", range(4, 6), 3)
    assert "dropped 4 lines of an earlier run after step 3" in capsys.readouterr().out
    names = sorted(p.name for p in (tmp_path / "stopped" / "samples").iterdir())
    assert names == [f"train_step_{k}.jsonl" for k in range(6)]
    run(tmp_path / "stopped", range(6, 9), 5)
    assert lines(tmp_path / "stopped") == lines(tmp_path / "whole")


def test_a_run_that_starts_anew_moves_the_earlier_one_aside(tmp_path, capsys):
    run(tmp_path, range(5), 0, "jsonl", "tensorboard")
    earlier = lines(tmp_path)
    assert capsys.readouterr().out == ""
    run(tmp_path, range(2), 0, "jsonl", "tensorboard")
    assert f"are kept in {tmp_path}/before_1\n" in capsys.readouterr().out
    assert [json.loads(line)["step"] for line in lines(tmp_path).splitlines()] == [0, 1]
    assert len(list((tmp_path / "samples").iterdir())) == 2
    assert len(list((tmp_path / "tensorboard").iterdir())) == 1
    assert lines(tmp_path / "before_1") == earlier
    assert len(list((tmp_path / "before_1" / "samples").iterdir())) == 5
    assert len(list((tmp_path / "before_1" / "tensorboard").iterdir())) == 1


def test_a_damaged_metrics_file_is_refused_with_its_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\nnonsense\n{"step": 2}\n')
    with pytest.raises(ValueError, match=r"metrics.jsonl, line 2 is not an object with a step"):
        lines_up_to(path, 5)


def test_steps_are_logged_once_and_in_order(tmp_path):
    track = make(tmp_path, "jsonl")
    track.start(3, 10)
    with pytest.raises(ValueError, match="step 3 come after those of step 3"):
        track.log({"a": 1.0}, 3)
    track.log({"a": 1.0}, 4)
    with pytest.raises(ValueError, match="step 4 come after those of step 4"):
        track.log({"a": 1.0}, 4)


def test_samples_keep_every_row_in_strict_json(tmp_path):
    track = make(tmp_path, "jsonl")
    track.start(0, 1)
    row = {"prompt": "1+1=", "response": 'é "\n', "reward": np.float32(0.5), "bundle": None, "advantage": float("-inf")}
    track.log_samples(3, [row, {"extra": {"x": np.arange(2)}}], "val")
    written = (tmp_path / "samples" / "val_step_3.jsonl").read_text(encoding="utf-8").splitlines()
    assert json.loads(written[0]) == {**row, "reward": 0.5, "advantage": None}
    assert json.loads(written[1]) == {"extra": {"x": [0, 1]}}
    assert to_json({"p": tmp_path}) == json.dumps({"p": str(tmp_path)})


def test_resolved_configuration_lies_beside_the_metrics(tmp_path):
    run(tmp_path, [1])
    assert (tmp_path / "config.yaml").read_text() == "a:\n  b: 1\n"


def test_from_config_takes_names_folder_and_loggers(tmp_path):
    config = PPOConfig()
    config.trainer.logger = ["jsonl", "console"]
    config.trainer.default_local_dir = str(tmp_path / "run")
    track = Tracking.from_config(config)
    track.start(0, 1)
    assert (tmp_path / "run" / "config.yaml").exists()
    assert len(track._loggers) == 2


def test_unknown_logger_names_the_key_and_the_known_ones(tmp_path):
    with pytest.raises(ValueError, match="trainer.logger has 'mlflow'; there are console, jsonl, tensorboard, wandb"):
        make(tmp_path, "jsonl", "mlflow")


METRICS = {
    "critic/score/mean": 0.5,
    "actor/entropy": 0.25,
    "val-core/a/acc/mean@8": 0.5,
    "val-core/a/acc/mean@8_se": 0.1,
    "val-core/b/acc/mean@4": 0.25,
    "val-aux/a/level_1/acc/mean@8": 0.9,
    "timing_s/step": 1.25,
    "actor/lr": 1.0,
}


def test_console_shows_the_few_numbers_that_matter():
    assert console_numbers(METRICS) == ["reward 0.500", "entropy 0.250", "val 0.375", "1.25 s/step"]
    assert console_numbers({"actor/lr": 1.0}) == []


def test_console_counts_rewards_that_failed():
    none = {f"reward/{kind}": 0.0 for kind in ("exceptions", "timeouts", "crashes", "non_finite")}
    some = none | {"reward/responses": 20.0, "reward/timeouts": 1.0, "reward/non_finite": 18.0}
    assert console_numbers(none | {"reward/responses": 20.0}) == []
    assert console_numbers(some) == ["19 of 20 rewards failed"]
    assert console_numbers({f"val-aux/{name}": value for name, value in some.items()}) == [
        "19 of 20 validation rewards failed"
    ]


def console_output(terminal):
    logger = ConsoleLogger(None, "p", "my-run", {})
    logger.console = Console(file=io.StringIO(), force_terminal=terminal, width=120, soft_wrap=True)
    logger.start(0, 4)
    logger.log(METRICS, 1)
    logger.log({"critic/score/mean": 0.75}, 2)
    logger.show_samples([{"prompt": "[1]+1=", "response": "[/red]#2", "reward": 1.0}], 2)
    logger.finish()
    return logger.console.file.getvalue()


def test_console_prints_a_line_per_step_without_a_terminal():
    assert console_output(terminal=False).splitlines() == [
        "step 1/4  reward 0.500  entropy 0.250  val 0.375  1.25 s/step",
        "step 2/4  reward 0.750",
        "sample of step 2: [1]+1= -> [/red]#2  (reward 1)",
    ]


def test_console_draws_a_bar_on_a_terminal_and_keeps_the_last_validation():
    last = [line for line in console_output(terminal=True).splitlines() if "my-run" in line][-1]
    assert "2/4" in last and "reward 0.750  val 0.375" in last


def test_shown_samples_are_spread_over_the_questions(tmp_path):
    shown = []
    track = make(tmp_path, "console", shown_samples=3)
    track._loggers[0].show_samples = lambda rows, step: shown.append([row["reward"] for row in rows])
    track.start(0, 1)
    rows = [{"prompt": "", "response": "", "reward": i} for i in range(9)]
    track.log_samples(1, rows, "val")
    track.log_samples(1, rows, "train")
    assert shown == [[0, 4, 8]]


def test_tensorboard_scalars_can_be_read_back(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run(tmp_path, range(5), 0, "tensorboard")
    run(tmp_path, range(3, 5), 2, "tensorboard")
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload().Scalars("loss")
    assert [(e.step, e.value) for e in events] == [(k, pytest.approx(1 / (k + 1))) for k in range(5)]


@pytest.fixture
def wandb(monkeypatch, tmp_path):
    """A stand-in for the wandb package that remembers how it was called."""
    module = types.ModuleType("wandb")
    module.__spec__ = types.SimpleNamespace(name="wandb")
    module.started, module.logged = [], []
    run = types.SimpleNamespace(
        log=lambda metrics, **options: module.logged.append((metrics, options)), finish=lambda: None
    )
    module.init = lambda **options: module.started.append(options) or run
    module.Settings = lambda **options: options
    module.Table = lambda columns, data: (columns, data)
    monkeypatch.setitem(sys.modules, "wandb", module)
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    return module


def test_wandb_is_offline_and_says_so_when_not_logged_in(wandb, tmp_path, capsys):
    run(tmp_path, [1], 0, "wandb")
    assert wandb.started[0]["mode"] == "offline"
    assert "not logged in" in capsys.readouterr().out
    assert wandb.logged == [({"critic/score/mean": 0.1, "loss": 0.5}, {"step": 1})]
    assert (wandb.started[0]["project"], wandb.started[0]["name"]) == ("p", "e")


def test_wandb_is_online_with_a_key_and_follows_wandb_mode(wandb, tmp_path, capsys, monkeypatch):
    (tmp_path / "netrc").write_text("machine api.wandb.ai\n  login user\n  password k\n")
    run(tmp_path / "one", [1], 0, "wandb")
    (tmp_path / "netrc").write_text("machine elsewhere.org\n  login user\n  password k\n")
    assert not tracking.wandb_logged_in()
    monkeypatch.setenv("WANDB_API_KEY", "k")
    run(tmp_path / "two", [1], 0, "wandb")
    monkeypatch.delenv("WANDB_API_KEY")
    monkeypatch.setenv("WANDB_MODE", "disabled")
    run(tmp_path / "three", [1], 0, "wandb")
    assert [options["mode"] for options in wandb.started] == [None, None, None]
    assert capsys.readouterr().out == ""


def test_resumed_run_is_the_same_wandb_run_and_a_new_one_is_not(wandb, tmp_path):
    run(tmp_path, [1, 2], 0, "wandb")
    run(tmp_path, [3], 2, "wandb")
    run(tmp_path, [1], 0, "wandb")
    first, resumed, anew = (options["id"] for options in wandb.started)
    assert first == resumed != anew


def test_wandb_table_of_samples_waits_for_the_metrics_of_its_step(wandb, tmp_path):
    track = make(tmp_path, "wandb", shown_samples=1)
    track.start(0, 1)
    track.log_samples(1, [{"prompt": "p", "response": "r"}], "val")
    assert wandb.logged == [({"val/samples": (["prompt", "response"], [["p", "r"]])}, {"step": 1, "commit": False})]


def test_missing_package_is_refused_before_the_run(monkeypatch, tmp_path):
    monkeypatch.setattr(tracking.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="trainer.logger has 'wandb', which is not installed"):
        make(tmp_path, "wandb")


@pytest.mark.slow  # imports everything in a new process
def test_trackers_are_imported_only_when_used():
    import subprocess

    code = "import sys, verl.utils.tracking; print('wandb' in sys.modules, 'tensorboard' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]
