"""LiveCodeBench: programming problems with their public and hidden tests.

    python data_processing/download_livecodebench.py --output-dir data/livecodebench --release release_v5 \\
        --start-date 2024-08-01 --end-date 2025-02-01

The ground truth of a row is JSON: `inputs` and `outputs` of the tests (text), and `fn_name`: the method to call with
the input's lines as JSON values, or null where the program reads standard input.
"""

import argparse
import base64
import binascii
import datetime
import json
import pickletools
import re
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a script finds its own folder only

from data_processing.outputs import Output, make, new_row, parser, run
from data_processing.sources import Record, Source

REPO, DATA_SOURCE = "livecodebench/code_generation_lite", "livecodebench"
LATEST = 6
EXTRA = {"id": "question_id", "level": "difficulty", "platform": "platform"}  # name in extra_info -> column
MAX_BYTES = 1 << 30  # of the hidden tests of one problem, unpacked
TEXT_OPCODES = {"UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"}
FRAMING_OPCODES = {"PROTO", "FRAME", "MEMOIZE", "PUT", "BINPUT", "LONG_BINPUT", "STOP"}

FROM_STARTER = "Complete this starter code:"
FROM_INPUT = "Write a Python program that reads the input from standard input and prints the output."
FENCED = "Put the whole program into one ```python code block."


def pickled_text(data: bytes) -> str:
    """The text that a pickle holds. The pickle is read, not run: unpickling what was downloaded could run any code."""
    texts: list[str] = []
    for opcode, argument, _ in pickletools.genops(data):
        if opcode.name in TEXT_OPCODES:
            texts.append(str(argument))
        elif opcode.name not in FRAMING_OPCODES:
            raise ValueError(f"its pickle holds more than text (opcode {opcode.name}), refused")
    if len(texts) != 1:
        raise ValueError(f"its pickle holds {len(texts)} texts, not one")
    return texts[0]


def unpack(text: str) -> str:
    """JSON of the tests, from JSON itself or from base64 of zlib of a pickle of it. ValueError for anything else."""
    if text.lstrip().startswith("["):
        return text
    try:
        unpacker = zlib.decompressobj()
        data = unpacker.decompress(base64.b64decode(text, validate=True), MAX_BYTES)
    except (binascii.Error, zlib.error) as error:
        raise ValueError(f"neither JSON nor packed tests: {error}") from error
    if not unpacker.eof:
        raise ValueError(f"the packed tests are cut off, or larger than {MAX_BYTES} bytes")
    return pickled_text(data)


def tests_of(record: Record, column: str) -> list[dict[str, str]]:
    """[{input, output, testtype}, ...] of one of the two columns of tests."""
    if not record[column]:
        return []
    try:
        tests = json.loads(unpack(record.text(column)))
    except ValueError as error:
        raise record.error(column, f"cannot be decoded: {error}") from error
    for test in tests if isinstance(tests, list) else [tests]:
        if not isinstance(test, dict) or not all(isinstance(test.get(k), str) for k in ("input", "output", "testtype")):
            raise record.error(column, "a test needs input, output and testtype, all text")
    return tests


def ground_truth(record: Record) -> tuple[str, str]:
    """The tests as JSON, or why there are none to use."""
    tests = tests_of(record, "public_test_cases") + tests_of(record, "private_test_cases")
    if not tests:
        return "", "without tests"
    fn_name = json.loads(record["metadata"] or "{}").get("func_name")
    if {test["testtype"] for test in tests} != ({"functional"} if fn_name else {"stdin"}):
        return "", "whose tests are not of the kind that func_name says"
    inputs, outputs = ([test[key] for test in tests] for key in ("input", "output"))
    return json.dumps({"inputs": inputs, "outputs": outputs, "fn_name": fn_name}), ""


def prompt_of(record: Record) -> str:
    starter = (record["starter_code"] or "").rstrip()
    task = f"{FROM_STARTER}\n\n```python\n{starter}\n```" if starter else FROM_INPUT
    return "\n\n".join([record.text("question_content"), task, FENCED])


def contest_date(record: Record) -> datetime.date:
    value = record["contest_date"]  # ISO text; a saved dataset may hold it as a time
    try:
        return value.date() if isinstance(value, datetime.datetime) else datetime.date.fromisoformat(value[:10])
    except (TypeError, ValueError) as error:
        raise record.error("contest_date", f"expected a date like 2024-08-01, found {value!r}") from error


def converter(start: datetime.date | None, end: datetime.date | None) -> Callable[[Record], dict[str, Any] | str]:
    def convert(record: Record) -> dict[str, Any] | str:
        date = contest_date(record)
        if (start and date < start) or (end and date > end):
            return "outside the dates asked for"
        answer, unusable = ground_truth(record)
        if unusable:
            return unusable
        extra = {name: record[column] for name, column in EXTRA.items()} | {"date": date}
        return new_row(DATA_SOURCE, prompt_of(record), answer, extra, "code")

    return convert


def release_files(release: str) -> tuple[str, ...]:
    """The files of a release: release_v3 has all up to the third, v3 the third alone, v2_v4 the second to fourth."""
    if match := re.fullmatch(r"release_v(\d)", release):
        first, last = 1, int(match[1])
    elif match := re.fullmatch(r"v(\d)(?:_v(\d))?", release):
        first, last = int(match[1]), int(match[2] or match[1])
    else:
        first, last = 0, 0
    if not 1 <= first <= last <= LATEST:
        raise ValueError(f"--release is {release!r}: give release_v1..{LATEST}, v1..{LATEST}, or a range like v4_v6")
    return tuple("test.jsonl" if number == 1 else f"test{number}.jsonl" for number in range(first, last + 1))


def main(argv: list[str] | None = None) -> None:
    options = parser("LiveCodeBench, with its hidden tests.")
    options.add_argument(
        "--release",
        help=f"release_v1 to release_v{LATEST}, one part (v5) or several (v4_v6); from the hub by default "
        f"release_v{LATEST}, from a local copy all that it holds",
    )
    for name, meaning in (("start", "first"), ("end", "last")):
        options.add_argument(f"--{name}-date", type=_date, help=f"{meaning} contest date to keep, like 2024-08-01")
    arguments = options.parse_args(argv)
    release = arguments.release or (None if arguments.source else f"release_v{LATEST}")
    source = Source(REPO, "test", files=release_files(release) if release else ())
    convert = converter(arguments.start_date, arguments.end_date)
    make(arguments, [Output("livecodebench.parquet", source, "test", convert, (*EXTRA, "date"))])


def _date(text: str) -> datetime.date:
    try:
        return datetime.date.fromisoformat(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no date like 2024-08-01") from error


if __name__ == "__main__":
    run(main)
