"""DAPO-Math-17k to train on, and the hard maths test sets: AIME 2024 and 2025, AMC, MATH-500, Minerva, OlympiadBench.

    python data_processing/download_dapomath.py --output-dir data/dapomath
    python data_processing/download_dapomath.py --output-dir data/dapomath --source copies --sets dapo-math-17k amc

DAPO-Math-17k as published holds each of its about 17 thousand questions a hundred times, AIME-2024 each of its 30
questions 32 times; one of each stays unless --keep-duplicates is given. Both carry their instruction in the prompt,
which is kept word for word.
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a script finds its own folder only

from data_processing.outputs import NO_ANSWER, Output, make, new_row, parser, run
from data_processing.sources import Record, Source, as_answer
from verl.utils.reward_score.instructions import BOXED

READ_FORMS = ("Answer: $Answer", "\\boxed")  # what the verifier of math_dapo and aime2024 reads


@dataclass(frozen=True)
class ReadySet:
    """A set published in the field's schema, its instruction in the prompt: columns prompt and reward_model."""

    repo: str
    data_source: str
    split: str  # of the rows made; the repositories call theirs train

    def output(self, file: str, keep_duplicates: bool) -> Output:
        return Output(
            file, Source(self.repo, "train"), self.split, self.convert, ("id",), drop_duplicates=not keep_duplicates
        )

    def convert(self, record: Record) -> dict[str, Any] | str:
        prompt, reward_model = record["prompt"], record["reward_model"]
        if not isinstance(prompt, list) or not prompt or not all(_is_message(message) for message in prompt):
            raise record.error("prompt", f"expected messages of {{role, content}}, found {prompt!r}")
        if not any(form in message["content"] for message in prompt for form in READ_FORMS):
            raise record.error(
                "prompt", f"it asks for none of the forms that the verifier reads ({', '.join(READ_FORMS)}); add one"
            )
        if not isinstance(reward_model, dict):
            raise record.error("reward_model", f"expected {{style, ground_truth}}, found {reward_model!r}")
        answer = as_answer(reward_model.get("ground_truth"))
        if not answer:
            return NO_ANSWER
        published_id = (record.values.get("extra_info") or {}).get("index")
        return new_row(self.data_source, prompt, answer, {"id": published_id})


@dataclass(frozen=True)
class TestSet:
    """A set of questions and answers, to which the instruction is added. `extra`: name in extra_info -> column."""

    repo: str
    data_source: str
    question: str
    answer: str
    extra: dict[str, str] = field(default_factory=dict)

    def output(self, file: str, keep_duplicates: bool) -> Output:
        return Output(file, Source(self.repo, "test"), "test", self.convert, tuple(self.extra))

    def convert(self, record: Record) -> dict[str, Any] | str:
        published = record[self.answer]
        answer = ", ".join(map(_bare, published)) if isinstance(published, list) else as_answer(published)
        if not answer:
            return NO_ANSWER
        context = (record.values.get("context") or "").strip()  # of OlympiadBench: what the question builds on
        prompt = "\n\n".join([*([context] if context else []), record.text(self.question), BOXED])
        extra = {name: record.values.get(column) for name, column in self.extra.items()}
        return new_row(self.data_source, prompt, answer, extra)


SETS: dict[str, ReadySet | TestSet] = {
    "dapo-math-17k": ReadySet("BytedTsinghua-SIA/DAPO-Math-17k", "math_dapo", "train"),
    "aime-2024": ReadySet("BytedTsinghua-SIA/AIME-2024", "aime2024", "test"),
    "aime-2025": TestSet("math-ai/aime25", "aime2025", "problem", "answer", {"id": "id"}),
    "amc": TestSet("math-ai/amc23", "amc", "question", "answer", {"id": "id"}),
    "math-500": TestSet(
        "HuggingFaceH4/MATH-500",
        "HuggingFaceH4/MATH-500",
        "problem",
        "answer",
        {"id": "unique_id", "level": "level", "subject": "subject"},
    ),
    "minerva": TestSet("math-ai/minervamath", "minerva", "question", "answer"),
    "olympiadbench": TestSet(
        "math-ai/olympiadbench",
        "olympiadbench",
        "question",
        "final_answer",
        {"id": "id", "subject": "subfield", "tolerance": "error"},
    ),
}


def _is_message(message: Any) -> bool:
    return isinstance(message, dict) and all(isinstance(message.get(k), str) for k in ("role", "content"))


def _bare(answer: Any) -> str:
    """One of OlympiadBench's answers without the dollars around it."""
    text = as_answer(answer)
    return text[1:-1].strip() if text.count("$") == 2 and text[0] == text[-1] == "$" else text


def main(argv: list[str] | None = None) -> None:
    options = parser("DAPO-Math-17k and the hard maths test sets.")
    options.add_argument("--sets", nargs="+", choices=list(SETS), default=list(SETS))
    options.add_argument("--keep-duplicates", action="store_true", help="keep what DAPO-Math-17k and AIME-2024 repeat")
    arguments = options.parse_args(argv)
    sets = dict.fromkeys(arguments.sets)
    make(arguments, [SETS[name].output(f"{name}.parquet", arguments.keep_duplicates) for name in sets])


if __name__ == "__main__":
    run(main)
