"""Rows of published data sets, written as parquet to train on or to validate with. What the download scripts share.

A script names its `Output`s; `make` does the rest: has the records converted one by one, counts what is dropped or left
out, and writes parquet files with a summary.
"""

import argparse
import hashlib
import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Features, Image, List, Value
from datasets.exceptions import DatasetsError
from huggingface_hub.errors import HTTPError
from rich.console import Console
from rich.progress import track

from data_processing.sources import (
    Record,
    Source,
    Table,
    UnavailableError,
    copied_files,
    local_folder,
    open_source,
    records_of,
)
from verl.utils import manifest
from verl.utils.tokenizer import load_tokenizer

SUMMARY = "summary.json"
FORMAT = 2  # raised when the rows made from an equal source change, so that older folders are made again
WRITE_BYTES = 16 << 20  # of text and images in one row group
TELL_S = 30.0  # between two lines about the progress, where no bar can be drawn
NAMED_PLACES = 10  # rows that the summary names per reason for leaving them out
NO_ANSWER = "without an answer"
# No connection, no such repository, no access; HTTPError (not an OSError): of the proxy, or of a connection that breaks
# off; RuntimeError: of hf_xet, which transfers the files; DatasetsError: of a file that arrived broken.
HUB_ERRORS = (OSError, HTTPError, RuntimeError, DatasetsError)


@dataclass(frozen=True)
class Output:
    """A parquet file to write. `convert` makes a row (`new_row`) or says in words why the record is left out.

    `extra` are the columns of `extra_info` beside split and index, all text. Duplicates (equal prompts and images) are
    always counted; the first of them stays, or all.
    """

    file: str
    source: Source
    split: str
    convert: Callable[[Record], dict[str, Any] | str]
    extra: tuple[str, ...] = ()
    drop_duplicates: bool = False
    images: bool = False

    @property
    def features(self) -> Features:
        text = Value("string")
        columns: dict[str, Any] = {
            "data_source": text,
            "prompt": List({"role": text, "content": text}),
            "ability": text,
            "reward_model": {"style": text, "ground_truth": text},
            "extra_info": {"split": text, "index": Value("int64"), **dict.fromkeys(self.extra, text)},
        }
        return Features(columns | ({"images": List(Image())} if self.images else {}))


def new_row(
    data_source: str,
    prompt: str | list[dict[str, str]],
    answer: str,
    extra: Mapping[str, Any] = MappingProxyType({}),
    ability: str = "math",
) -> dict[str, Any]:
    """A row in the field's schema; a `prompt` of text is one message of the user, `extra` goes into extra_info."""
    return {
        "data_source": data_source,
        "prompt": [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt,
        "ability": ability,
        "reward_model": {"style": "rule", "ground_truth": answer},
        "extra_info": {name: None if value is None else str(value) for name, value in extra.items()},
    }


@dataclass
class Tally:
    """What happened to the rows of one output."""

    rows: int = 0
    duplicates: int = 0
    conflicts: int = 0  # duplicates whose answer is another one
    left_out: dict[str, list[str]] = field(default_factory=dict)  # reason -> places
    lengths: list[int] = field(default_factory=list)
    _seen: dict[bytes, bytes] = field(default_factory=dict)

    def is_duplicate(self, row: dict[str, Any]) -> bool:
        images = [image["bytes"] for image in row.get("images", [])]
        question, answer = _digest(json.dumps(row["prompt"]).encode(), *images), _digest(_ground_truth(row).encode())
        if question not in self._seen:
            self._seen[question] = answer
            return False
        self.duplicates += 1
        self.conflicts += self._seen[question] != answer
        return True

    def summary(self, output: Output, unit: str) -> dict[str, Any]:
        lengths = np.asarray(self.lengths)
        return {
            "source": output.source.repo,
            "rows": self.rows,
            "duplicates": self.duplicates,
            "duplicates_are": "dropped" if output.drop_duplicates else "kept",
            "duplicates_with_another_answer": self.conflicts,
            "left_out": {
                reason: {"rows": len(places), "first": places[:NAMED_PLACES]}
                for reason, places in self.left_out.items()
            },
            "prompt_length": {
                "unit": unit,
                "min": int(lengths.min()),
                "mean": round(float(lengths.mean()), 1),
                "p99": int(np.quantile(lengths, 0.99, method="higher")),
                "max": int(lengths.max()),
            },
        }


def _digest(*parts: bytes) -> bytes:
    return hashlib.blake2b(b"".join(hashlib.blake2b(part).digest() for part in parts), digest_size=16).digest()


def _ground_truth(row: dict[str, Any]) -> str:
    return row["reward_model"]["ground_truth"]


def _lengths(rows: list[dict[str, Any]], tokenizer: Any | None) -> list[int]:
    """Prompt lengths in characters, or in tokens as the model sees them (its chat template included)."""
    if tokenizer is None:
        return [sum(len(message["content"]) for message in row["prompt"]) for row in rows]
    texts = [tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, tokenize=False) for row in rows]
    return [len(ids) for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]]


def _kept(output: Output, records: Iterable[Record], tally: Tally) -> Iterator[dict[str, Any]]:
    for record in records:
        row = output.convert(record)
        if isinstance(row, str):
            tally.left_out.setdefault(row, []).append(record.place)
        elif not (tally.is_duplicate(row) and output.drop_duplicates):
            tally.rows += 1
            row["extra_info"] |= {"split": output.split, "index": record.index}
            yield row


def _row_groups(rows: Iterable[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    group, size = [], 0
    for row in rows:
        group.append(row)
        size += len(_ground_truth(row)) + sum(len(message["content"]) for message in row["prompt"])
        size += sum(len(image["bytes"]) for image in row.get("images", []))
        if size >= WRITE_BYTES:
            yield group
            group, size = [], 0
    if group:
        yield group


def with_progress(records: Iterable[Record], file: str, total: int | None) -> Iterator[Record]:
    """The records, with a bar on a terminal and now and then a line elsewhere, as under nohup or Slurm."""
    console = Console(stderr=True)
    if console.is_terminal:
        yield from track(records, file, total, console=console)
        return
    told = time.monotonic()
    for read, record in enumerate(records):
        if time.monotonic() - told >= TELL_S:
            told = time.monotonic()
            print(f"{file}: {read} rows read" + (f" of {total}" if total else ""), file=sys.stderr, flush=True)
        yield record


def write(output: Output, tables: Sequence[Table], folder: Path, tokenizer: Any | None) -> dict[str, Any]:
    """Write one output; returns its summary."""
    lengths = [table.length for table in tables]
    total = None if None in lengths else sum(n for n in lengths if n is not None)
    records = with_progress(records_of(tables), output.file, total)
    tally = Tally()
    schema = output.features.arrow_schema  # its metadata tells `datasets` which column holds images
    with pq.ParquetWriter(folder / output.file, schema, compression="zstd") as writer:
        for group in _row_groups(_kept(output, records, tally)):
            tally.lengths += _lengths(group, tokenizer)
            writer.write_table(pa.Table.from_pylist(group, schema=schema))
    if not tally.rows:
        why = "; ".join(f"{len(places)} {reason}" for reason, places in tally.left_out.items()) or "it is empty"
        raise ValueError(f"no row of {output.source.repo} is left for {output.file}: {why}")
    return tally.summary(output, "characters" if tokenizer is None else "tokens")


def in_words(file: str, summary: dict[str, Any]) -> str:
    """The summary of one file, on one line."""
    parts = [f"{summary['rows']} rows"]
    if summary["duplicates"]:
        parts.append(
            f"{summary['duplicates']} duplicates {summary['duplicates_are']} "
            f"({summary['duplicates_with_another_answer']} with another answer)"
        )
    for reason, left_out in summary["left_out"].items():
        parts.append(f"left out {left_out['rows']} {reason} (first: {left_out['first'][0]})")
    length = summary["prompt_length"]
    parts.append(
        f"prompts of {length['min']} to {length['max']} {length['unit']}, mean {length['mean']}, "
        f"99 % up to {length['p99']}"
    )
    return f"{file}: " + "; ".join(parts)


def parser(description: str) -> argparse.ArgumentParser:
    """The options that all scripts have."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--output-dir", type=Path, required=True)
    parser.add_argument(
        "--source", type=Path, help="folder with local copies, each in a folder of its repository's name; else the hub"
    )
    parser.add_argument("--tokenizer", help="model folder or id; prompt lengths are then counted in tokens")
    return parser


def make(arguments: argparse.Namespace, outputs: Sequence[Output]) -> None:
    """Write the outputs and `summary.json` to `arguments.output_dir`, unless they were made from the same before."""
    folder, local = arguments.output_dir, arguments.source
    options = {k: v for k, v in vars(arguments).items() if k != "output_dir"}
    copies = _local_copies(outputs, local) if local else []
    made_from = json.loads(json.dumps(options | {"format": FORMAT, "copies": copies}, default=str))
    if manifest.is_made(folder, made_from):
        print(f"{folder}: already made from these arguments")
        return
    tokenizer = load_tokenizer(arguments.tokenizer, "--tokenizer") if arguments.tokenizer else None
    tables = [open_source(output.source, local) if local else _from_hub(output, outputs) for output in outputs]
    manifest.begin(folder)
    summaries = {}
    for output, of_output in zip(outputs, tables, strict=True):
        summaries[output.file] = write(output, of_output, folder, tokenizer)
        print(in_words(output.file, summaries[output.file]), flush=True)
    (folder / SUMMARY).write_text(json.dumps(summaries, indent=2) + "\n")
    manifest.finish(folder, made_from, [*(output.file for output in outputs), SUMMARY])


def _from_hub(output: Output, outputs: Sequence[Output]) -> list[Table]:
    try:
        return open_source(output.source, None)
    except HUB_ERRORS as error:
        cause = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise UnavailableError(
            f"cannot load {output.source.repo} from the hub ({cause}); {_remedy(outputs)}"
        ) from error


def _local_copies(outputs: Sequence[Output], folder: Path) -> list[list[Any]]:
    """Path, size and time of every file of the local copies: with one changed, the outputs are made again."""
    missing: dict[str, Output] = {}
    paths: dict[Path, None] = {}
    for output in outputs:
        root = local_folder(output.source, folder)
        wanted = [root / name for name in output.source.files] or [root]
        missing |= {str(path): output for path in wanted if not path.exists()}
        paths |= dict.fromkeys(copied_files(root))
    if missing:
        raise UnavailableError(f"there is no {', '.join(missing)}; {_remedy(list(missing.values()))}")
    return [[str(path), path.stat().st_size, path.stat().st_mtime_ns] for path in paths]


def _remedy(outputs: Sequence[Output]) -> str:
    sources = {output.source.repo: output.source for output in outputs}.values()
    commands = [
        " ".join(["hf download --repo-type dataset", s.repo, *s.files, "--local-dir", f"DIR/{s.name}"]) for s in sources
    ]
    return f"where there is a network, run `{'`, `'.join(commands)}`; then give --source DIR here"


def run(main: Callable[[], None]) -> None:
    """Run a script: errors on one line; exit status 2 where a data set cannot be had."""
    try:
        main()
    except UnavailableError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
