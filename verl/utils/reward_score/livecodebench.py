"""Score of programs: does the code in a response pass the tests of its problem? It runs in verl.utils.sandbox.

Tests are of two kinds, as in LiveCodeBench (arXiv 2403.07974): a program reads standard input and prints; or a
function, plain or a method of a class `Solution`, is called with arguments and returns. Inputs go into the sandbox,
outputs come out, and are compared here: expected outputs never enter it.
"""

import json
import math
import re
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from typing import Any

from verl.utils.sandbox.run import Limits, Result, Sandbox, check_confinement

FENCE, OPENING = "```", re.compile(r"```(python3?|py)\b", re.IGNORECASE)
TIMEOUT_S = 6  # per test, the published benchmark's
TIME_IS_UP = "limit of time for all tests"


@dataclass(frozen=True)
class Cases:
    """`inputs` are texts for a program, or lists of arguments of the function `name`; `outputs` are texts or values."""

    name: str | None
    inputs: list[Any]
    outputs: list[Any]


def compute_score(
    data_source: str,
    solution_str: str,
    ground_truth: str | dict[str, Any] | list[dict[str, Any]],
    extra_info: dict[str, Any] | None = None,
    timeout_s: int = TIMEOUT_S,
    total_s: float = math.inf,
    memory_mb: int = 2048,
    stop_at_failure: bool = True,
    packages: Sequence[str] = ("numpy",),
    allow: Collection[str] = (),
) -> dict[str, Any]:
    """1 if the last ```python block of the response passes every test, else 0.

    `ground_truth` is JSON, as text or parsed, in one of LiveCodeBench's two forms:
     - {"inputs": [...], "outputs": [...], "fn_name": null or a name}, as its evaluation builds it;
     - [{"input": ..., "output": ..., "testtype": "stdin" or "functional"}, ...], as its rows hold it, the function's
       name in `extra_info["metadata"]["func_name"]` or `extra_info["func_name"]`.
    A functional input is one JSON value per line, its output one JSON value.

    A test may take `timeout_s` (whole seconds) of CPU time and twice that in all, and all tests together `total_s`: one
    that has not ended by then has failed. `memory_mb` (per process), `packages` and `allow` are the sandbox's.

    Beside `score` and `acc`: `pred`, always None (programs are not voted on); `pass_rate`, the tests passed out of all,
    where `stop_at_failure` ends at the first that fails; `verdict`, what that one came to, "passed" or "no code";
    `timed_out`, 1 if that was a limit of time.
    Raises ValueError for a ground truth in neither form, SandboxUnavailable where code cannot be confined.
    """
    end = time.monotonic() + total_s
    cases = read_cases(ground_truth, extra_info or {})
    check_confinement(tuple(packages), tuple(allow))
    code = last_block(solution_str)
    if code is None:
        return {"score": 0.0, "acc": 0.0, "pred": None, "pass_rate": 0.0, "verdict": "no code", "timed_out": 0.0}
    limits = Limits(cpu_s=timeout_s, wall_s=2.0 * timeout_s, memory_bytes=memory_mb << 20)
    passed, verdict, timed_out = 0, "passed", False
    with Sandbox(code, limits, packages, allow) as sandbox:
        for given, expected in zip(cases.inputs, cases.outputs, strict=True):
            left = end - time.monotonic()
            if left <= 0:
                if verdict == "passed":
                    verdict, timed_out = TIME_IS_UP, True
                break
            wall_s = min(limits.wall_s, left)
            result = sandbox.run(given, wall_s) if cases.name is None else sandbox.call(cases.name, given, wall_s)
            outcome = judge(result, expected, is_call=cases.name is not None)
            passed += outcome == "passed"
            if outcome != "passed" and verdict == "passed":
                verdict, timed_out = outcome, result.timed_out
                if stop_at_failure:
                    break
    score = float(verdict == "passed")
    rate = passed / len(cases.inputs)
    found = {"pass_rate": rate, "verdict": verdict, "timed_out": float(timed_out)}
    return {"score": score, "acc": score, "pred": None} | found


def last_block(response: str) -> str | None:
    """The code of the last closed block that is marked ```python (or python3, or py), None if there is none."""
    last: str | None = None
    block: list[str] | None = None
    for line in response.split("\n"):
        mark = line.strip()
        if OPENING.match(mark):
            block = []
        elif mark.startswith(FENCE) and block is not None:
            last, block = "\n".join(block), None
        elif block is not None:
            block.append(line)
    return last


def judge(result: Result, expected: Any, is_call: bool) -> str:
    """ "passed", "wrong answer", or why the run is no success."""
    if result.reason is not None:
        return result.reason
    if not is_call:
        return "passed" if same_text(result.stdout, expected) else "wrong answer"
    if result.value is None:
        return "no result"
    try:
        return "passed" if json.loads(result.value) == expected else "wrong answer"
    except (ValueError, RecursionError):  # the code has written to the harness's pipe by itself
        return "no result"


def same_text(output: str, expected: str) -> bool:
    """The published checker's rule: as many lines, blank space around the whole and around each line apart, and each
    line equal, or all its words decimal numbers of equal value ("1.0" is "1", but nothing is rounded)."""
    ours, theirs = ([line.strip() for line in text.strip().split("\n")] for text in (output, expected))
    return len(ours) == len(theirs) and all(map(_same_line, ours, theirs))


def _same_line(ours: str, theirs: str) -> bool:
    if ours == theirs:
        return True
    numbers = _decimals(theirs)
    return numbers is not None and numbers == _decimals(ours)


def _decimals(line: str) -> list[Decimal] | None:
    try:
        numbers = [Decimal(word) for word in line.split()]
    except InvalidOperation:
        return None
    return numbers if all(number.is_finite() for number in numbers) else None


def read_cases(ground_truth: Any, extra_info: dict[str, Any]) -> Cases:
    """The tests of a ground truth in either form. Raises a one-line ValueError if it is in neither."""
    if isinstance(ground_truth, str):
        try:
            ground_truth = json.loads(ground_truth)
        except ValueError as error:
            raise ValueError(f"the ground truth is no JSON: {error}") from error
    if isinstance(ground_truth, list):
        ground_truth = _from_rows(ground_truth, extra_info)
    if not isinstance(ground_truth, dict) or not {"inputs", "outputs"} <= ground_truth.keys():
        raise ValueError("the ground truth has neither `inputs` and `outputs` nor a list of tests")
    inputs, outputs, name = ground_truth["inputs"], ground_truth["outputs"], ground_truth.get("fn_name")
    if not inputs or len(inputs) != len(outputs):
        raise ValueError(f"the ground truth has {len(inputs)} inputs and {len(outputs)} outputs")
    if name is not None:
        inputs = [_arguments(given) for given in inputs]
        outputs = [json.loads(expected) if isinstance(expected, str) else expected for expected in outputs]
    return Cases(name, list(inputs), list(outputs))


def _from_rows(rows: list[dict[str, Any]], extra_info: dict[str, Any]) -> dict[str, Any]:
    if missing := [key for row in rows for key in ("input", "output", "testtype") if key not in row]:
        raise ValueError(f"a test of the ground truth has no {missing[0]!r}")
    kinds = {row["testtype"] for row in rows}
    metadata = extra_info.get("metadata", extra_info)
    name = (json.loads(metadata) if isinstance(metadata, str) else metadata).get("func_name")
    if kinds == {"functional"} and not name:
        raise ValueError("functional tests need the function's name in extra_info['metadata']['func_name']")
    if kinds not in ({"stdin"}, {"functional"}):
        raise ValueError(f"the tests of a ground truth are all stdin or all functional, not {sorted(map(str, kinds))}")
    columns = {f"{key}s": [row[key] for row in rows] for key in ("input", "output")}
    return columns | {"fn_name": name if kinds == {"functional"} else None}


def _arguments(given: str | list[Any]) -> list[Any]:
    """A functional input: JSON values, one per line, or the arguments as they are."""
    return [json.loads(line) for line in given.split("\n")] if isinstance(given, str) else list(given)
