"""Ctrl-C, as a terminal sends it: to the whole group of processes. And a run in the folder of one that goes on."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.e2e.runs import config, overrides
from verl.trainer.main_ppo import build
from verl.utils.run_folder import LOCK, RunLock


def processes(session: int) -> list[str]:
    """The processes of a session that have not ended, by /proc/PID/stat: pid (name) state ppid pgrp session."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, _, number = path.read_text().rpartition(")")[2].split()[:4]
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(number) == session and state != "Z":
            found.append(path.read_text())
    return found


@pytest.mark.slow  # a run in a process of its own
@pytest.mark.parametrize("group", ["local", pytest.param("ray", marks=pytest.mark.slow)])
def test_an_interrupted_run_says_where_it_goes_on_and_leaves_nothing_running(
    arithmetic_data, tiny_model, tmp_path, varied_reward, group
):
    keys = [
        *varied_reward,
        "reward_model.num_workers=1",
        f"trainer.worker_group={group}",
        "trainer.save_freq=2",
        "trainer.total_training_steps=100000",
        "trainer.max_actor_ckpt_to_keep=1",
    ]
    command = [sys.executable, "-m", "verl.trainer.main_ppo", *overrides(arithmetic_data, tiny_model, tmp_path, *keys)]
    environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
    environment |= {"PYTHONPATH": str(Path(__file__).parents[2])}
    signal.signal(signal.SIGINT, signal.default_int_handler)  # tests in the background ignore it, and pass that on
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    run = subprocess.Popen(command, env=environment, start_new_session=True, **pipes)
    try:
        deadline = time.monotonic() + 300
        while not list(tmp_path.glob("checkpoints/global_step_*[0-9]")):
            assert run.poll() is None and time.monotonic() < deadline, run.communicate()
            time.sleep(0.1)
        before = (tmp_path / "metrics.jsonl").read_text()
        with pytest.raises(ValueError, match=rf"trainer.default_local_dir={tmp_path}: in use .*pid {run.pid} on"):
            build(config(arithmetic_data, tiny_model, tmp_path, *keys))
        assert (tmp_path / "metrics.jsonl").read_text().startswith(before)
        os.killpg(run.pid, signal.SIGINT)
        _, said = run.communicate(timeout=120)
    finally:
        if run.poll() is None:
            os.killpg(run.pid, signal.SIGKILL)
    assert run.returncode == 130, said
    lines = said.splitlines()
    found = re.fullmatch(r"interrupted at step (\d+); started again, the run goes on from (global_step_\d+)", lines[-1])
    assert found and "Traceback" not in said, said
    assert (tmp_path / "checkpoints" / found[2]).is_dir()
    deadline = time.monotonic() + 30
    while left := processes(run.pid):
        assert time.monotonic() < deadline, left
        time.sleep(0.1)
    RunLock(tmp_path / LOCK, "", "").release()


@pytest.mark.parametrize("override", ["data.train_files=/nowhere.parquet", "reward_model.num_workers=-1", None])
def test_a_run_that_failed_holds_nothing(arithmetic_data, tiny_model, tmp_path, monkeypatch, override):
    if override is None:
        monkeypatch.setattr("verl.trainer.main_ppo.check_resumable", lambda *_: 1 / 0)
    with pytest.raises((ValueError, ZeroDivisionError)) as failed:  # noqa: F841, its traceback holds the frames
        build(config(arithmetic_data, tiny_model, tmp_path, *filter(None, [override])))
    RunLock(tmp_path / LOCK, "", "").release()
