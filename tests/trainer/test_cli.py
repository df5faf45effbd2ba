"""What every entry point says at its end; `tests/e2e` has the errors themselves."""

import pytest

from verl.trainer.cli import run_cli
from verl.trainer.config import PPOConfig

REQUIRED = ["data.train_files=t", "data.val_files=v", "actor_rollout_ref.model.path=m"]


def interrupt(message=""):
    def call(argument):
        raise KeyboardInterrupt(*[message][: bool(message)])

    return call


def nothing(argument):
    return None


@pytest.mark.parametrize(
    ("build", "run", "line"),
    [
        (interrupt(), nothing, "interrupted"),
        (nothing, interrupt(), "interrupted"),
        (nothing, interrupt("interrupted at step 3"), "interrupted at step 3"),
    ],
)
def test_an_interrupt_is_one_line_and_status_130(capsys, build, run, line):
    assert run_cli(build, run, PPOConfig, "ppo_trainer", REQUIRED) == 130
    assert capsys.readouterr().err == f"{line}\n"
    with pytest.raises(KeyboardInterrupt):
        run_cli(build, run, PPOConfig, "ppo_trainer", [*REQUIRED, "--traceback"])
