import errno
import fcntl
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from verl.utils.run_folder import LOCK, RunLock, set_aside

HOLD = """
import sys, time
from pathlib import Path
from verl.utils.run_folder import RunLock
lock = RunLock(Path(sys.argv[1]), "key=value", "")
print("held", flush=True)
time.sleep(600)
"""


def lock(folder: Path) -> RunLock:
    return RunLock(folder / LOCK, f"key={folder}", "name another key")


def test_a_second_run_in_a_folder_is_refused_until_the_first_lets_go(tmp_path):
    first = lock(tmp_path / "run")
    who = f"pid {os.getpid()} on {socket.gethostname()}"
    for _ in range(2):  # nor does being refused change anything
        with pytest.raises(ValueError) as refused:
            lock(tmp_path / "run")
        assert str(refused.value) == (
            f"key={tmp_path}/run: in use by another run ({who}); wait for it, or name another key"
        )
    lock(tmp_path / "other").release()
    first.release()
    first.release()
    lock(tmp_path / "run").release()


def test_a_lock_ends_with_its_process(tmp_path):
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-c", HOLD, str(tmp_path / LOCK)]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(ValueError, match=f"pid {holder.pid} on"):
            lock(tmp_path)
        holder.send_signal(signal.SIGKILL)
        holder.wait()
    lock(tmp_path).release()


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOTSUP])
def test_a_file_system_without_locks_is_a_warning(tmp_path, monkeypatch, capsys, number):
    def flock(file, operation):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    lock(tmp_path).release()
    said = capsys.readouterr().out
    assert said.startswith(f"warning: key={tmp_path}: no locks on this file system") and said.count("\n") == 1


def test_a_folder_that_cannot_be_written_is_named_with_the_cause(tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    for folder, cause in ((file, "it is a file"), (file / "below", "Not a directory"), (Path("/proc/a"), "No such")):
        with pytest.raises(ValueError, match=rf"^key={folder}: {folder} cannot be written \({cause}.*\): name another"):
            lock(folder)


def leave(run_dir: Path, step: int) -> None:
    """What a run leaves."""
    for name in ("checkpoints/global_step_1/x", "samples/train_step_1.jsonl", "tensorboard/events", "metrics.jsonl"):
        (run_dir / name).parent.mkdir(parents=True, exist_ok=True)
        (run_dir / name).write_text(str(step))
    (run_dir / "config.yaml").write_text(str(step))


def test_what_earlier_runs_left_is_kept_apart(tmp_path, capsys):
    set_aside(tmp_path, checkpoints=True)
    assert capsys.readouterr().out == "" and list(tmp_path.iterdir()) == []
    leave(tmp_path, 1)
    set_aside(tmp_path, checkpoints=True)
    assert capsys.readouterr().out == (
        "starting anew: checkpoints, metrics.jsonl, samples, tensorboard of an earlier run are kept in "
        f"{tmp_path}/before_1\n"
    )
    leave(tmp_path, 2)
    set_aside(tmp_path, checkpoints=False)
    set_aside(tmp_path, checkpoints=False)  # nothing is left to move
    assert sorted(path.name for path in tmp_path.iterdir()) == ["before_1", "before_2", "checkpoints"]
    logged = ["config.yaml", "metrics.jsonl", "samples", "tensorboard"]
    assert sorted(path.name for path in (tmp_path / "before_1").iterdir()) == ["checkpoints", *logged]
    assert sorted(path.name for path in (tmp_path / "before_2").iterdir()) == logged
    for number in "12":
        assert (tmp_path / f"before_{number}" / "metrics.jsonl").read_text() == number


def test_a_run_that_left_no_records_is_not_kept(tmp_path):
    (tmp_path / "samples").mkdir()
    for name in ("config.yaml", "metrics.jsonl"):
        (tmp_path / name).write_text("")
    set_aside(tmp_path, checkpoints=True)
    assert not list(tmp_path.glob("before_*"))
