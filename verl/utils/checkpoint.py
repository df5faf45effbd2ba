"""Folders of checkpoints: written under a temporary name, made durable, then renamed, so that a name means complete."""

import os
import re
import shutil
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

    def commit(self, step: int) -> Path:
        """Make the checkpoint of `step` durable and give it its name."""
        folder = self._temporary(step)
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

    def _temporary(self, step: int) -> Path:
        return self.root / f"global_step_{step}.incomplete"


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
