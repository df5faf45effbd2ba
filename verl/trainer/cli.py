"""What every entry point does with its command line."""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from verl.trainer.config.compose import PRESETS, load_config
from verl.trainer.config.document import default_of
from verl.trainer.config.schema import leaf_keys

C = TypeVar("C")
J = TypeVar("J")


def run_cli(
    build: Callable[[C], J], run: Callable[[J], None], schema: type[C], preset: str, argv: list[str] | None = None
) -> int:
    """Load the configuration, `build` the job from it, `run` it; returns the exit status.

    What the user can mend (a ValueError or OSError before the job runs) ends in one line and status 2, an interrupt
    (Ctrl-C) at any time in one line, its own if it has one, and status 130; `--traceback` shows where they came from.
    Once the job runs, other errors keep their traceback.
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
    try:
        try:
            job = build(load_config(arguments.overrides, schema, arguments.config_name, arguments.config_dir))
        except (ValueError, OSError) as error:
            if arguments.traceback:
                raise
            print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
            return 2
        run(job)
    except KeyboardInterrupt as interrupt:
        if arguments.traceback:
            raise
        print(str(interrupt) or "interrupted", file=sys.stderr)
        return 130
    return 0
