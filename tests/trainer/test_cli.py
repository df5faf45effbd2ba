"""How every entry point ends when it is interrupted; `tests/e2e` has its errors, and a run that is interrupted."""

import signal

import pytest

from verl.trainer.cli import run_cli
from verl.trainer.config import PPOConfig

REQUIRED = ["data.train_files=t", "data.val_files=v", "actor_rollout_ref.model.path=m"]


def interrupted(argument):
    signal.raise_signal(signal.SIGINT)


def hidden(argument):
    """A library that makes another error of every exception."""
    try:
        interrupted(argument)
    except BaseException as error:
        raise OSError("rank 0 failed") from error


def built(config) -> str:
    return "job"


def main(build, run, *extra: str) -> int:
    arguments = [*REQUIRED, *extra]
    return run_cli(build, run, PPOConfig, "ppo_trainer", arguments, interrupted=lambda job: f"{job} interrupted")


@pytest.fixture(autouse=True)
def _interruptible():
    """Also where the tests run in the background."""
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, previous)


@pytest.mark.parametrize(
    ("build", "run", "line"),
    [
        (interrupted, None, "interrupted"),
        (hidden, None, "interrupted"),
        (built, interrupted, "job interrupted"),
        (built, hidden, "job interrupted"),
    ],
)
def test_an_interrupt_is_one_line_and_status_130(capsys, build, run, line):
    assert main(build, run) == 130
    assert capsys.readouterr().err == f"{line}\n"
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    with pytest.raises((KeyboardInterrupt, OSError)):
        main(build, run, "--traceback")


def test_a_run_in_the_background_ignores_interrupts(capsys):
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    assert main(built, interrupted) == 0


def test_an_error_of_the_job_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError):
        main(built, lambda job: 1 / 0)
