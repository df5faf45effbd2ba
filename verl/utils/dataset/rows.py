"""Rows of parquet and JSONL files, with errors that name file, row and column. Rows count from 0."""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from datasets import Dataset
from datasets.fingerprint import generate_random_fingerprint

Prepare = Callable[[Dataset], Dataset]
KINDS = {str: "text", bool: "a truth value", int: "a number", float: "a number", list: "a list", dict: "a dict"}


def as_read(rows: Dataset) -> Dataset:
    """The preparation that changes nothing."""
    return rows


@dataclass(frozen=True)
class RowFile:
    """The rows of one file, named by the configuration key `key`. `read` is the only way to make one."""

    key: str
    path: Path
    rows: Dataset

    @classmethod
    def read(cls, path: str | Path, key: str, required: Sequence[str], prepare: Prepare = as_read) -> "RowFile":
        """The rows of `path` as `prepare` leaves them, which must have the `required` columns; `key` is the
        configuration key it came from."""
        path = Path(path)
        if not path.is_file():
            raise ValueError(f"{key}: there is no file {path}; give a parquet or JSONL file")
        if path.suffix == ".parquet":
            rows = _read_parquet(path, key)
        elif path.suffix in (".jsonl", ".json"):
            rows = _read_jsonl(path, key)
        else:
            raise ValueError(f"{key}: {path} ends in {path.suffix!r}; give a .parquet or .jsonl file")
        rows = prepare(rows)
        if not isinstance(rows, Dataset):
            raise ValueError(f"{key}: prepare made {_brief(rows)} of {path}; it returns a datasets.Dataset")
        if len(rows) == 0:
            raise ValueError(f"{key}: {path} has no rows")
        for column in required:
            if column not in rows.column_names:
                raise ValueError(f"{key}: {path} has no column {column!r}; it has {', '.join(rows.column_names)}")
        return cls(key, path, rows)

    def error(self, row: int, column: str, problem: str) -> ValueError:
        return ValueError(f"{self.key}: {self.path}, row {row}, column {column!r}: {problem}")


def read_files(
    files: str | Sequence[str], key: str, required: Sequence[str], prepare: Prepare = as_read
) -> list[RowFile]:
    """The files named by a configuration key, which holds one path or a list of paths."""
    paths = [files] if isinstance(files, str | Path) else list(files)
    if not paths:
        raise ValueError(f"{key} is empty: give a parquet or JSONL file, or a list of them")
    return [RowFile.read(path, key, required, prepare) for path in paths]


def as_messages(value: Any, file: RowFile, row: int, column: str) -> list[dict[str, str]]:
    """Chat messages [{role, content}, ...]; a plain string is one message of the user."""
    if isinstance(value, str):
        return [{"role": "user", "content": value}]
    if not isinstance(value, list) or not value:
        raise file.error(row, column, f"expected a list of {{role, content}} messages, found {_brief(value)}")
    for message in value:
        if not isinstance(message, dict) or not all(isinstance(message.get(k), str) for k in ("role", "content")):
            raise file.error(
                row, column, f"a message needs a role and a content of text, this one is {_brief(message)}"
            )
    return value


def _read_parquet(path: Path, key: str) -> Dataset:
    try:
        table = pq.read_table(path)
    except (OSError, ValueError) as error:  # what pyarrow raises for a file that is not parquet
        raise ValueError(f"{key}: {path} cannot be read as parquet: {_one_line(error)}") from error
    # The fingerprint it would make itself pickles the table, which fails for columns of more than 2 GiB.
    return Dataset(table, fingerprint=generate_random_fingerprint())


def _read_jsonl(path: Path, key: str) -> Dataset:
    rows = []
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{key}: {path}, row {number} is not JSON: {error}") from error
            if not isinstance(row, dict):
                raise ValueError(f"{key}: {path}, row {number} is not a JSON object: {_brief(row)}")
            rows.append(row)
    try:
        return Dataset.from_list(rows)
    except (ValueError, TypeError, OverflowError) as error:  # pyarrow's, mostly for values of different types
        problem = _first_of_another_type(rows) or f" cannot be made a table: {_one_line(error)}"
        raise ValueError(f"{key}: {path}{problem}") from error


def _first_of_another_type(rows: list[dict[str, Any]]) -> str | None:
    """The first value whose type is another one than that of the values before it in its column, for a message."""
    first: dict[str, tuple[int, str]] = {}
    for number, row in enumerate(rows):
        for column, kind, value in _kinds(row):
            seen_in, seen = first.setdefault(column, (number, kind))
            if kind != seen:
                where = "in the same row" if seen_in == number else f"in row {seen_in}"
                return (
                    f", row {number}, column {column!r}: {_brief(value)} is {kind}, {where} it is {seen}: use one type"
                )
    return None


def _kinds(value: Any, column: str = "") -> Iterator[tuple[str, str, Any]]:
    """(column, type, value) of a JSON value and of all inside; `a.b` is a field of `a`, `a[]` an item. Whole and other
    numbers may stand in one column, and null beside everything."""
    if column and value is not None:
        yield column, KINDS[type(value)], value
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from _kinds(inner, f"{column}.{name}" if column else name)
    elif isinstance(value, list):
        for inner in value:
            yield from _kinds(inner, f"{column}[]")


def _brief(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
