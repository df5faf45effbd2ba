"""Folders of checkpoints: written under a temporary name, made durable, then renamed, so that a name means complete.

Whoever writes a file records its size and checksum; the manifest of a checkpoint holds the records of all its files, so
that a file which is cut short, lost or altered later is noticed.
"""

import json
import os
import re
import shutil
import time
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

MANIFEST = "manifest.json"
CHUNK = 1 << 24  # bytes read at a time
# A network file system may show a new file to other nodes a while later.
VISIBLE_AFTER_S = 10.0


@dataclass(frozen=True)
class FileRecord:
    """Size in bytes and CRC-32 of a file as it was written. A CRC finds every error that 32 neighbouring bits hold, and
    misses others once in 4e9; it runs at 4 GB/s a core, where cryptographic hashes do 1 to 2."""

    size: int
    crc32: int


def record(path: Path) -> FileRecord:
    """Make a written file durable and record it."""
    fsync(path)
    return FileRecord(path.stat().st_size, file_crc32(path))


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

    def commit(self, step: int, files: Mapping[str, FileRecord]) -> Path:
        """Make the checkpoint of `step` durable and give it its name. `files`: by path below its folder, each already
        durable (`record`).

        Raises FileNotFoundError if one of them is not as recorded: workers on other nodes wrote elsewhere.
        """
        folder = self._temporary(step)
        manifest = {name: asdict(record) for name, record in files.items()}
        (folder / MANIFEST).write_text(json.dumps({"files": manifest}, indent=1), encoding="utf-8")
        if (fault := find_fault(folder)) is not None:
            raise FileNotFoundError(
                f"after saving, {folder} is not complete: {fault}; trainer.default_local_dir must be a folder that "
                "the driver and all nodes share"
            )
        for path in [folder / MANIFEST, *(path for path in folder.rglob("*") if path.is_dir()), folder]:
            fsync(path)
        if self.path(step).exists():
            self._remove(self.path(step))
        folder.rename(self.path(step))
        fsync(self.root)
        return self.path(step)

    def steps(self) -> list[int]:
        """The steps that have a checkpoint, the newest first."""
        return sorted(self._numbers(r"global_step_(\d+)"), reverse=True)

    def unfinished(self) -> list[Path]:
        """Folders, later than every checkpoint, that were begun and never committed: the run ended while it wrote."""
        newest = max(self.steps(), default=-1)
        steps = sorted(self._numbers(r"global_step_(\d+)\.incomplete"))
        return [self._temporary(step) for step in steps if step > newest]

    def prune(self, keep: int) -> None:
        """Delete complete checkpoints but for the newest `keep` (at least 1)."""
        complete = [step for step in self.steps() if find_fault(self.path(step)) is None]
        for step in complete[keep:]:
            self._remove(self.path(step))

    def put_aside(self, folder: Path) -> Path:
        """Take the name from a checkpoint that turned out to be damaged; what there is of it is kept."""
        aside = folder.with_name(f"{folder.name}.damaged")
        shutil.rmtree(aside, ignore_errors=True)
        return folder.rename(aside)

    def _temporary(self, step: int) -> Path:
        return self.root / f"global_step_{step}.incomplete"

    def _numbers(self, pattern: str) -> list[int]:
        names = [path.name for path in self.root.glob("global_step_*") if path.is_dir()]
        return [int(match[1]) for name in names if (match := re.fullmatch(pattern, name))]

    def _remove(self, folder: Path) -> None:
        # Renamed first: half of a checkpoint must never have a checkpoint's name. An earlier removal that was
        # interrupted is completed.
        folder.rename(folder.with_name(f"{folder.name}.deleted"))
        for path in self.root.glob("global_step_*.deleted"):
            shutil.rmtree(path)


def read_manifest(folder: Path) -> dict[str, FileRecord]:
    """The record of every file of a checkpoint. ValueError, one line, if that cannot be told."""
    path = folder / MANIFEST
    if not path.is_file():
        raise ValueError(f"it has no {MANIFEST}")
    try:
        files = json.loads(path.read_text(encoding="utf-8"))["files"]
        return {name: FileRecord(int(entry["size"]), int(entry["crc32"])) for name, entry in files.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"its {MANIFEST} cannot be read") from error


def find_fault(folder: Path, sizes_of: Iterable[str] | None = None, contents_of: Iterable[str] = ()) -> str | None:
    """How a checkpoint differs from its manifest, None if it does not. Looks at the sizes of the files `sizes_of`
    (None: all), and reads those of `contents_of`."""
    try:
        files = read_manifest(folder)
    except ValueError as error:
        return str(error)
    for name in files if sizes_of is None else sizes_of:
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != files[name].size:
            return f"{name} has {path.stat().st_size} bytes instead of {files[name].size}"
    for name in contents_of:
        if name not in files:
            return f"its {MANIFEST} does not list {name}"
        if file_crc32(folder / name) != files[name].crc32:
            return f"{name} is not what was written (its checksum differs)"
    return None


def missing(paths: Sequence[Path]) -> list[Path]:
    """Those that do not exist, nor begin to within `VISIBLE_AFTER_S`."""
    deadline = time.monotonic() + VISIBLE_AFTER_S
    while absent := [path for path in paths if not path.exists()]:
        if time.monotonic() > deadline:
            break
        time.sleep(0.2)
        for folder in {path.parent for path in absent if path.parent.is_dir()}:
            list(folder.iterdir())  # a network file system looks anew
    return absent


def file_crc32(path: Path) -> int:
    """CRC-32 of a file's content, read a piece at a time."""
    value = 0
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            value = zlib.crc32(chunk, value)
    return value


def fsync(path: Path) -> None:
    """Make what was written to a file, or the names in a folder, durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
