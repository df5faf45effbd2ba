"""Folders of checkpoints: written under a temporary name, made durable, then renamed, so that a name means complete."""

import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path


class CheckpointFolder:
    """Checkpoints `global_step_{k}` below `root`. `begin`, write into what it returns, `commit`."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def path(self, step: int) -> Path:
        return self.root / f"global_step_{step}"

    def begin(self, step: int) -> Path:
        """An empty folder to write step `step`'s checkpoint into."""
        folder = self._temporary(step)
        shutil.rmtree(folder, ignore_errors=True)  # what an interrupted save left
        folder.mkdir(parents=True)
        return folder

    def commit(self, step: int, required: Sequence[str] = ()) -> Path:
        """Make the checkpoint of `step` durable and give it its name.

        Raises FileNotFoundError if one of the `required` files is not in it: workers on other nodes wrote elsewhere.
        """
        folder = self._temporary(step)
        for name in required:
            if not (folder / name).is_file():
                raise FileNotFoundError(
                    f"{folder} has no {name} after saving: trainer.default_local_dir must be a folder that the "
                    "driver and all nodes share"
                )
        for path in [*folder.rglob("*"), folder]:
            _fsync(path)
        shutil.rmtree(self.path(step), ignore_errors=True)
        folder.rename(self.path(step))
        _fsync(self.root)
        return self.path(step)

    def newest(self) -> Path | None:
        """The complete checkpoint of the highest step, if there is one."""
        steps = [
            int(m[1]) for p in self.root.glob("global_step_*") if (m := re.fullmatch(r"global_step_(\d+)", p.name))
        ]
        return self.path(max(steps)) if steps else None

    def set_aside(self) -> None:
        """Rename the folder, if it has anything, so that a run started anew never goes on from what is in it."""
        if not self.root.is_dir() or not any(self.root.iterdir()):
            return
        number = 1 + sum(1 for _ in self.root.parent.glob(f"{self.root.name}.before_*"))
        aside = self.root.with_name(f"{self.root.name}.before_{number}")
        print(f"trainer.resume_mode=disable: earlier checkpoints are kept as {aside}")
        self.root.rename(aside)

    def _temporary(self, step: int) -> Path:
        return self.root / f"global_step_{step}.incomplete"


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
