"""Small local copies of the data sets, with the columns, file names and folders of their repositories."""

import base64
import io
import json
import pickle
import zlib

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset, Features, Image, List, Value
from PIL import Image as Pillow

from verl.trainer.config.schema import DataConfig
from verl.utils.dataset.rl_dataset import RLHFDataset

TOO_LONG = 4096  # tokens that no prompt of these copies has


def write(path, rows):
    """Parquet or JSONL, by the suffix."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read(path):
    return pq.read_table(path).to_pylist()


def summary(folder):
    return json.loads((folder / "summary.json").read_text())


def trainable(path, tokenizer):
    """The rows as the trainer reads them."""
    return RLHFDataset(str(path), tokenizer, DataConfig(max_prompt_length=TOO_LONG))


def ready_row(question, answer, index):
    """A row of DAPO-Math-17k or AIME-2024."""
    content = (
        "Solve the following math problem step by step. The last line of your response should be of the form Answer: "
        f"$Answer (without quotes) where $Answer is the answer to the problem.\n\n{question}\n\n"
        'Remember to put your answer on its own line after "Answer:".'
    )
    return {
        "data_source": "math_dapo",
        "prompt": [{"content": content, "role": "user"}],
        "ability": "MATH",
        "reward_model": {"ground_truth": answer, "style": "rule-lighteval/MATH_v2"},
        "extra_info": {"index": index},
    }


def dapo_math(root, rows=None):
    """Three questions four times each; the last copy of the second has another answer."""
    questions = [("What is 1+1?", "2"), ("What is 2+2?", "4"), ("What is 3+3?", "6")] * 4
    questions[10] = ("What is 2+2?", "5")
    rows = rows or [ready_row(q, a, f"id-{i}") for i, (q, a) in enumerate(questions)]
    return write(root / "DAPO-Math-17k" / "data" / "dapo-math-17k.parquet", rows)


def aime_2024(root):
    rows = [ready_row("How many primes are below 100?", "25", str(i)) for i in range(3)]
    return write(root / "AIME-2024" / "data" / "aime-2024.parquet", rows)


def hard_sets(root):
    """All of download_dapomath.py but the two above."""
    write(root / "aime25" / "test.jsonl", [{"problem": "Find the sum of all bases.", "answer": "70", "id": "0"}])
    amc = [
        {"id": 0, "question": "How long?", "answer": 27.0, "url": ""},
        {"id": 1, "question": "How wide?", "answer": None, "url": ""},
    ]
    write(root / "amc23" / "data" / "test-00000-of-00001.parquet", amc)
    math_500 = {
        "problem": "Convert $(0,3)$ to polar coordinates.",
        "solution": "...",
        "answer": "\\left( 3, \\frac{\\pi}{2} \\right)",
        "subject": "Precalculus",
        "level": 2,
        "unique_id": "test/precalculus/807.json",
    }
    write(root / "MATH-500" / "test.jsonl", [math_500])
    write(root / "minervamath" / "test.jsonl", [{"question": "How luminous is it?", "answer": "3.8e33"}])
    olympiad = {"context": None, "modality": "Text-only", "subfield": "Algebra", "answer_type": "Numerical"}
    rows = [
        olympiad | {"id": 1, "question": "Solve $x^2=2$.", "final_answer": ["$\\sqrt{2}$", "$-\\sqrt{2}$"]},
        olympiad | {"id": 2, "question": "Find $T$.", "context": "Let $T=7$.", "final_answer": ["7"], "error": "1e-1"},
        olympiad | {"id": 3, "question": "Prove it.", "final_answer": None},
    ]
    write(root / "olympiadbench" / "data" / "test-00000-of-00001.parquet", rows)


def math(root):
    def row(solution, level="Level 5"):
        return {"problem": f"Problem {solution}", "level": level, "type": "Algebra", "solution": solution}

    boxes = [
        row("First $\\boxed{1}$, then $\\boxed{\\frac{1}{\\sqrt{2}}}$."),
        row("A set: $\\boxed{\\{1, {2}\\}}$"),
        row("Plainly \\boxed 7$."),
        row("It follows."),
    ]
    folder = root / "MATH-lighteval"
    write(folder / "data" / "train-00000-of-00001.parquet", boxes)
    write(folder / "data" / "test-00000-of-00001.parquet", [row("So \\fbox{5}.", "Level 1")])
    # The repository has its subjects beside the whole; they are no part of the default configuration.
    write(folder / "algebra" / "train-00000-of-00001.parquet", boxes)
    return folder


def gsm8k(root):
    rows = [
        {"question": "How much does she earn?", "answer": "She sells 2 * 500 = <<2*500=1000>>1000.\n#### 1,000"},
        {"question": "How many are left?", "answer": "None is left."},
    ]
    for config in ("main", "socratic"):
        for split in ("train", "test"):
            write(root / "gsm8k" / config / f"{split}-00000-of-00001.parquet", rows)
    return root / "gsm8k"


def png(colour):
    file = io.BytesIO()
    Pillow.new("RGB", (4, 3), colour).save(file, "PNG")
    return file.getvalue()


def geometry_row(colour, problem="<image>Find x.", answer="3"):
    return {"images": [{"bytes": png(colour), "path": None}], "problem": problem, "answer": answer}


def geometry3k(root, train=None):
    features = Features({"images": List(Image()), "problem": Value("string"), "answer": Value("string")})
    splits = {
        "train": train
        or [geometry_row("red"), geometry_row("blue"), geometry_row("red"), geometry_row("red", answer="")],
        "validation": [geometry_row("green", answer="2 \\sqrt { 221 }")],
        "test": [geometry_row("white")],
    }
    for split, rows in splits.items():
        path = root / "geometry3k" / "data" / f"{split}-00000-of-00001.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        Dataset.from_list(rows, features=features).to_parquet(path)
    return root / "geometry3k"


def packed(tests):
    """Hidden tests as LiveCodeBench publishes them."""
    return base64.b64encode(zlib.compress(pickle.dumps(json.dumps(tests)))).decode()


def code_row(question_id, date="2024-09-01T00:00:00", kind="stdin", fn_name=None, **columns):
    def case(text):  # a functional test's are JSON
        given, expected = (t if kind == "stdin" else json.dumps(t, ensure_ascii=False) for t in (text, text.upper()))
        return {"input": given, "output": expected, "testtype": kind}

    return {
        "question_title": "Shout",
        "question_content": "Print the line in capitals.",
        "platform": "atcoder" if kind == "stdin" else "leetcode",
        "question_id": question_id,
        "contest_id": "abc",
        "contest_date": date,
        "starter_code": "" if kind == "stdin" else "class Solution:\n    def shout(self, s: str) -> str:\n        ",
        "difficulty": "easy",
        "public_test_cases": json.dumps([case("a")]),
        "private_test_cases": packed([case("b"), case("c\u00e9")]),
        "metadata": json.dumps({"func_name": fn_name} if fn_name else {}),
    } | columns


def livecodebench(root):
    """The files of release_v2, a problem before the others in the first."""
    folder = root / "code_generation_lite"
    write(folder / "test.jsonl", [code_row("1", "2023-05-07T00:00:00"), code_row("2")])
    write(folder / "test2.jsonl", [code_row("3", "2025-01-04T00:00:00", "functional", "shout")])
    return folder
