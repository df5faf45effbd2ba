"""Published data sets as rows, read one by one from the hub or from a local copy.

Errors name file, row and column; rows count from 0.
"""

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from datasets import Dataset, DatasetDict, load_dataset, load_from_disk
from huggingface_hub import hf_hub_download

READ_ROWS = 64  # read at a time; rows with hidden tests or images have megabytes
SPLITS = {"train": "train", "test": "test", "validation": "validation", "valid": "validation", "val": "validation"}


class UnavailableError(Exception):
    """A data set that cannot be had. The message says what to fetch and where to put it."""


@dataclass(frozen=True)
class Source:
    """One split of a repository on the hub, or the `files` (JSONL) of one that `load_dataset` cannot load.

    A local copy lies in a folder of the repository's name under --source.
    """

    repo: str
    split: str
    config: str | None = None
    files: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return self.repo.rpartition("/")[2]


@dataclass(frozen=True)
class Record:
    """A row as published. `row` counts in its file (`origin`), `index` in the whole split."""

    values: dict[str, Any]
    origin: str
    row: int
    index: int

    def __getitem__(self, column: str) -> Any:
        if column not in self.values:
            raise ValueError(f"{self.place}: there is no column {column!r}; it has {', '.join(self.values)}")
        return self.values[column]

    def text(self, column: str) -> str:
        """The stripped text of a column that must have some."""
        value = self[column]
        if not isinstance(value, str) or not value.strip():
            raise self.error(column, f"expected text, found {value!r}")
        return value.strip()

    @property
    def place(self) -> str:
        return f"{self.origin}, row {self.row}"

    def error(self, column: str, problem: str) -> ValueError:
        return ValueError(f"{self.place}, column {column!r}: {problem}")


@dataclass(frozen=True)
class Table:
    """The rows of one file, read as they are asked for; `length` is None where it is only known at the end."""

    origin: str
    length: int | None
    rows: Iterable[dict[str, Any]]


def local_folder(source: Source, folder: Path) -> Path:
    """Where `folder` holds the source; `folder` itself if it is its folder."""
    inside = folder / source.name
    return folder if folder.name == source.name and not inside.is_dir() else inside


def open_source(source: Source, folder: Path | None) -> list[Table]:
    """The tables of a source: from the hub (`folder` None), else from a local copy. This is a saved dataset, or parquet
    or JSONL files, of which those are taken whose path names the split (all, where none names any)."""
    if folder is None:
        return _open_hub(source)
    root = local_folder(source, folder)
    if source.files:
        return [_jsonl_table(root / name) for name in source.files]
    if (root / "dataset_dict.json").is_file() or (root / "state.json").is_file():
        return [_saved_dataset(source, root)]
    base = next((root / name for name in (source.config, "data") if name and (root / name).is_dir()), root)
    files = [path for path in copied_files(base) if path.suffix in (".parquet", ".jsonl")]
    splits = {path: _named_split(path.relative_to(base)) for path in files}
    if any(splits.values()):
        files = [path for path in files if splits[path] == source.split]
    if not files:
        found = ", ".join(sorted(filter(None, set(splits.values())))) or "none"
        raise ValueError(f"{base} has no parquet or JSONL file of split {source.split!r}; splits found: {found}")
    return [_parquet_table(path) if path.suffix == ".parquet" else _jsonl_table(path) for path in files]


def _open_hub(source: Source) -> list[Table]:
    if source.files:
        return [_jsonl_table(Path(hf_hub_download(source.repo, f, repo_type="dataset"))) for f in source.files]
    dataset = load_dataset(source.repo, source.config, split=source.split)
    return [_dataset_table(dataset, f"{source.repo} ({source.split})")]


def copied_files(folder: Path) -> list[Path]:
    paths = (path for path in folder.rglob("*") if path.is_file())
    return sorted(path for path in paths if not any(part.startswith(".") for part in path.relative_to(folder).parts))


def _named_split(path: Path) -> str | None:
    words = re.findall(r"[a-z]+", str(path.with_suffix("")).lower())
    return next((SPLITS[word] for word in reversed(words) if word in SPLITS), None)


def _saved_dataset(source: Source, root: Path) -> Table:
    dataset = load_from_disk(root)
    if isinstance(dataset, DatasetDict):
        if source.split not in dataset:
            raise ValueError(f"{root} has no split {source.split!r}; it has {', '.join(dataset)}")
        dataset = dataset[source.split]
    return _dataset_table(dataset, str(root))


def _dataset_table(dataset: Dataset, origin: str) -> Table:
    # As Arrow: images stay the bytes that they are.
    batches = dataset.with_format("arrow").iter(READ_ROWS)
    return Table(origin, len(dataset), (row for batch in batches for row in batch.to_pylist()))


def _parquet_table(path: Path) -> Table:
    try:
        file = pq.ParquetFile(path)
    except (OSError, ValueError) as error:  # what pyarrow raises for a file that is not parquet
        raise ValueError(f"{path} cannot be read as parquet: {' '.join(str(error).split())}") from error
    batches = file.iter_batches(READ_ROWS)
    return Table(str(path), file.metadata.num_rows, (row for batch in batches for row in batch.to_pylist()))


def _jsonl_table(path: Path) -> Table:
    def rows() -> Iterator[dict[str, Any]]:
        with path.open(encoding="utf-8") as lines:
            for number, line in enumerate(line for line in lines if line.strip()):
                try:
                    row = json.loads(line)
                except json.JSONDecodeError as error:
                    raise ValueError(f"{path}, row {number} is not JSON: {error}") from error
                if not isinstance(row, dict):
                    raise ValueError(f"{path}, row {number} is not a JSON object")
                yield row

    return Table(str(path), None, rows())


def records_of(tables: Sequence[Table]) -> Iterator[Record]:
    index = 0
    for table in tables:
        for row, values in enumerate(table.rows):
            yield Record(values, table.origin, row, index)
            index += 1


def as_answer(value: Any) -> str:
    """The text of a published answer, "" where there is none; 27.0 is 27."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return "" if value is None else str(value).strip()
