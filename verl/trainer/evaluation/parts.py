"""A parquet file that is written in parts, so that a stopped run goes on where it was.

While it is made, `{file}.parts/` holds `settings.json` and the finished parts. Each gets its name only when it is
complete and durable; at the end they become the file, with the settings in its metadata.
"""

import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from verl.utils.checkpoint import fsync

METADATA = b"generation"  # the key of the settings in the file's schema
SETTINGS = "settings.json"
GROUP_BYTES = 1 << 26  # of a row group: columns of structs with more than 2 GiB of text in one cannot be read back

Settings = Mapping[str, Any]  # JSON values by configuration key


class PartedFile:
    """The file `path`, made of `n_parts` parts under `settings`.

    Raises a one-line ValueError if the file, or parts of it, were made under other settings.
    """

    def __init__(self, path: Path, settings: Settings, n_parts: int) -> None:
        self.path = path
        self.settings = settings
        self.n_parts = n_parts
        self.folder = parts_folder(path)
        begun = path if path.is_file() else self.folder / SETTINGS
        if begun.is_file():
            found = read_settings(path) if begun == path else json.loads(begun.read_text(encoding="utf-8"))
            if found is None:
                raise ValueError(f"data.output_path={path} is a file of another origin: name another one")
            if difference := describe_difference(found, settings):
                raise ValueError(
                    f"data.output_path={path} was begun with other settings: {difference}; set them back, name another "
                    f"file, or delete {path if begun == path else self.folder}"
                )

    def begin(self) -> None:
        """Make the folder of parts."""
        self.folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps(self.settings, indent=1)
        write_durably(self.folder / SETTINGS, lambda path: path.write_text(text, encoding="utf-8"))

    @property
    def finished(self) -> bool:
        return self.path.is_file()

    def missing(self) -> list[int]:
        """The parts that are still to be made, from 0."""
        return [part for part in range(self.n_parts) if not self._part(part).is_file()]

    def write(self, part: int, table: pa.Table) -> None:
        write_durably(self._part(part), lambda path: write_groups(path, table.schema, row_groups(table)))

    def finish(self) -> None:
        """Join the parts, all of which are there, to the file. One row group is in memory at a time."""
        schema = pq.read_schema(self._part(0)).with_metadata({METADATA: json.dumps(self.settings).encode()})
        write_durably(self.path, lambda path: write_groups(path, schema, self._groups()))
        self.remove_parts()

    def remove_parts(self) -> None:
        if self.folder.is_dir():
            shutil.rmtree(self.folder)

    def _groups(self) -> Iterator[pa.Table]:
        for part in range(self.n_parts):
            with pq.ParquetFile(self._part(part)) as file:
                for group in range(file.num_row_groups):
                    yield file.read_row_group(group)

    def _part(self, part: int) -> Path:
        return self.folder / f"part_{part:05d}.parquet"


def parts_folder(path: Path) -> Path:
    return path.with_name(f"{path.name}.parts")


def read_settings(path: Path) -> dict[str, Any] | None:
    """The settings under which a parquet file was made; None if it tells of none."""
    metadata = pq.read_schema(path).metadata or {}
    return json.loads(metadata[METADATA]) if METADATA in metadata else None


def describe_difference(before: Settings, now: Settings) -> str:
    """`key was x, is y` for each key that differs; "" if none does."""
    now = json.loads(json.dumps(now))
    keys = [key for key in {**before, **now} if before.get(key) != now.get(key)]
    return "; ".join(f"{key} was {before.get(key)}, is {now.get(key)}" for key in keys)


def row_groups(table: pa.Table) -> Iterator[pa.Table]:
    """Slices of a table, in order, each of at most GROUP_BYTES or of one row."""
    if table.nbytes <= GROUP_BYTES or len(table) == 1:
        yield table
        return
    half = len(table) // 2
    yield from row_groups(table.slice(0, half))
    yield from row_groups(table.slice(half))


def write_groups(path: Path, schema: pa.Schema, groups: Iterable[pa.Table]) -> None:
    """Write tables to a parquet file, each as a row group."""
    with pq.ParquetWriter(path, schema) as writer:
        for group in groups:
            writer.write_table(group.replace_schema_metadata(schema.metadata))


def write_durably(path: Path, write: Callable[[Path], Any]) -> None:
    """`write` to a temporary name; the file gets its own when all of it is on the disk."""
    temporary = path.with_name(f"{path.name}.incomplete")
    write(temporary)
    fsync(temporary)
    temporary.replace(path)
    fsync(path.parent)
