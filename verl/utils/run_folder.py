"""The folder of a run: one run at a time writes into it, and a run that starts anew moves an earlier one's files aside.

A lock is flock(2)'s, on a file that stays: it ends with the process that holds it, however that ends.
"""

import errno
import fcntl
import os
import re
import socket
from pathlib import Path

LOCK = ".lock"
CHECKPOINTS = "checkpoints"
RECORDS = ("metrics.jsonl", "samples", "tensorboard")
NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)


class RunLock:
    """Holds `path`, in a folder that is made for it, until `release`.

    Args:
        path: the file that is locked.
        setting: `key=value` by which the user named what it guards.
        otherwise: what to do rather than wait.

    Raises a one-line ValueError if another run holds it, or if it cannot be written. Where the file system has no
    locks, a warning is all there is.
    """

    def __init__(self, path: Path, setting: str, otherwise: str) -> None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("a+", encoding="utf-8")
        except OSError as error:
            cause = "it is a file" if path.parent.is_file() else error.strerror
            raise ValueError(f"{setting}: {path.parent} cannot be written ({cause}): name another folder") from error
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self._file.seek(0)
            holder = self._file.read()
            self._file.close()
            raise ValueError(f"{setting}: in use by another run ({holder}); wait for it, or {otherwise}") from error
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            print(f"warning: {setting}: no locks on this file system, a second run there would not be noticed")
        self._file.truncate(0)
        self._file.write(f"pid {os.getpid()} on {socket.gethostname()}")
        self._file.flush()

    def release(self) -> None:
        """Let go; once more does nothing."""
        self._file.close()


def set_aside(run_dir: Path, *, checkpoints: bool) -> None:
    """Move what an earlier run logged, and its checkpoints too if so told, to `before_{N}` of its folder."""
    names = [CHECKPOINTS, *RECORDS] if checkpoints else RECORDS  # in this order: a run must not go on without records
    found = [name for name in names if _has_content(run_dir / name)]
    if not found:
        return
    numbers = [int(match[1]) for path in run_dir.iterdir() if (match := re.fullmatch(r"before_(\d+)", path.name))]
    aside = run_dir / f"before_{max(numbers, default=0) + 1}"
    aside.mkdir()
    for name in [*found, "config.yaml"]:
        if (run_dir / name).exists():
            (run_dir / name).rename(aside / name)
    print(f"starting anew: {', '.join(found)} of an earlier run are kept in {aside}")


def _has_content(path: Path) -> bool:
    return any(path.iterdir()) if path.is_dir() else path.is_file() and path.stat().st_size > 0
