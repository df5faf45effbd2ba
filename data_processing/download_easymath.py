"""MATH and GSM8K: training and test questions.

    python data_processing/download_easymath.py --output-dir data/easymath

The answer of MATH is the last box of its solution, or the last ones if they make a list, that of GSM8K what follows
`####`.
"""

import re
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a script finds its own folder only

from data_processing.outputs import NO_ANSWER, Output, make, new_row, parser, run
from data_processing.sources import Record, Source, as_answer
from verl.utils.reward_score.answers import boxes, last_box
from verl.utils.reward_score.instructions import BOXED

MATH, GSM8K = "DigitalLearningGmbH/MATH-lighteval", "openai/gsm8k"
BOX = re.compile(r"\\(?:boxed|fbox)\s*")


def last_boxed(solution: str) -> str:
    """What the last \\boxed{} or \\fbox{} holds, as the verifier reads it: boxes side by side are a list. \\boxed 2
    holds 2. "" without one, or if the last one is not closed."""
    tokens = list(BOX.finditer(solution))
    if not tokens:
        return ""
    rest = solution[tokens[-1].end() :]
    if not rest.startswith("{"):
        bare = re.match(r"[^\s$]+", rest)
        return bare.group() if bare else ""
    closed = any(start == tokens[-1].start() for start, _, _ in boxes(solution))
    box = last_box(solution) if closed else None
    return box[1].strip() if box else ""


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
