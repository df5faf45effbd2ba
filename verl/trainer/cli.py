"""What every entry point does with its command line."""

import argparse
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TypeVar

from verl.trainer.config.compose import PRESETS, load_config
from verl.trainer.config.document import default_of
from verl.trainer.config.schema import leaf_keys

C = TypeVar("C")
J = TypeVar("J")


def run_cli(
    build: Callable[[C], J],
    run: Callable[[J], None],
    schema: type[C],
    preset: str,
    argv: list[str] | None = None,
    *,
    interrupted: Callable[[J], str] = lambda job: "interrupted",
) -> int:
    """Load the configuration, `build` the job from it, `run` it; returns the exit status.

    What the user can mend (a ValueError or OSError before the job runs) ends in one line and status 2, Ctrl-C at any
    time in one line, `interrupted`'s if the job runs, and status 130; `--traceback` shows where they came from. Once
    the job runs, other errors keep their traceback.
    """
    parser = argparse.ArgumentParser(description="Configuration keys are listed by --keys and in docs/config.md.")
    parser.add_argument("--config-name", default=preset, help="preset to start from (default: %(default)s)")
    parser.add_argument("--config-dir", type=Path, default=PRESETS, help="folder of presets (default: the package's)")
    parser.add_argument("--keys", action="store_true", help="list every configuration key and stop")
    parser.add_argument(
        "--traceback", action="store_true", help="show where a start-up error or an interrupt comes from"
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="configuration overrides")
    arguments = parser.parse_args(argv)
    if arguments.keys:
        for key, field in leaf_keys(schema).items():
            print(f"{key}  [{default_of(field)}]  {field.metadata['help']}")
        return 0
    job: J | None = None
    with interrupts() as received:
        try:
            try:
                job = build(load_config(arguments.overrides, schema, arguments.config_name, arguments.config_dir))
            except (ValueError, OSError) as error:
                if arguments.traceback or received:
                    raise
                print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
                return 2
            run(job)
        except BaseException:
            if arguments.traceback or not received:
                raise
            print("interrupted" if job is None else interrupted(job), file=sys.stderr)
            return 130
    return 0


@contextmanager
def interrupts() -> Iterator[list[int]]:
    """The interrupts received so far, in a list that grows. Each raises KeyboardInterrupt, as ever; but a library may
    turn that into another error on its way (torch.distributed.checkpoint does)."""
    received: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        received.append(number)
        raise KeyboardInterrupt

    previous = signal.getsignal(signal.SIGINT)
    if previous is not signal.SIG_IGN:  # which a shell sets for what it runs in the background
        signal.signal(signal.SIGINT, note)
    try:
        yield received
    finally:
        signal.signal(signal.SIGINT, previous)
