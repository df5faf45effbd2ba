"""MATH and GSM8K: training and test questions.

    python data_processing/download_easymath.py --output-dir data/easymath

The answer of MATH is the last box of its solution, that of GSM8K what follows `####`.
"""

import re
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a script finds its own folder only

from data_processing.outputs import NO_ANSWER, Output, make, new_row, parser, run
from data_processing.sources import Record, Source, as_answer
from verl.utils.reward_score.instructions import BOXED

MATH, GSM8K = "DigitalLearningGmbH/MATH-lighteval", "openai/gsm8k"
BOX = re.compile(r"\\(?:boxed|fbox)\s*")


def last_boxed(solution: str) -> str:
    """What the last \\boxed{} or \\fbox{} holds, braces nested to any depth; \\boxed 2 holds 2. "" without one."""
    boxes = list(BOX.finditer(solution))
    if not boxes:
        return ""
    rest = solution[boxes[-1].end() :]
    if not rest.startswith("{"):
        bare = re.match(r"[^\s$]+", rest)
        return bare.group() if bare else ""
    depth = 0
    for brace in re.finditer(r"\\.|[{}]", rest, re.DOTALL):  # \{ and \} are braces to be printed
        depth += {"{": 1, "}": -1}.get(brace.group(), 0)
        if depth == 0:
            return rest[1 : brace.start()].strip()
    return ""


def math_row(record: Record) -> dict[str, Any] | str:
    answer = last_boxed(as_answer(record["solution"]))
    if not answer:
        return NO_ANSWER
    extra = {"level": record.text("level").removeprefix("Level "), "subject": record.text("type")}
    return new_row(MATH, f"{record.text('problem')}\n\n{BOXED}", answer, extra)


def gsm8k_row(record: Record) -> dict[str, Any] | str:
    _, marker, answer = as_answer(record["answer"]).rpartition("####")
    answer = answer.strip().replace(",", "")
    if not marker or not answer:
        return NO_ANSWER
    return new_row(GSM8K, f"{record.text('question')}\n\n{BOXED}", answer)


def main(argv: list[str] | None = None) -> None:
    arguments = parser("MATH and GSM8K.").parse_args(argv)
    outputs = []
    for split in ("train", "test"):
        outputs += [
            Output(f"math_{split}.parquet", Source(MATH, split), split, math_row, ("level", "subject")),
            Output(f"gsm8k_{split}.parquet", Source(GSM8K, split, "main"), split, gsm8k_row),
        ]
    make(arguments, outputs)


if __name__ == "__main__":
    run(main)
