"""Make the arithmetic ladder: addition of two numbers, one level per number of digits.

    prompt    47+85=
    response  75012 48113 #132        (7 + 5 + carry 0 = 12, 4 + 8 + carry 1 = 13; then the answer)

`train.parquet` and `val.parquet` hold questions, no question in both; `sft.parquet` holds demonstrations in which each
column's sum is wrong with the level's probability of `--slip-rate`, and what follows is worked out from the wrong sum.
A model that imitates them solves d digits about (1 - slip rate)^d of the time, which leaves RL something to amplify:
the defaults give a ladder from 0.95 (1 digit) to 0.03 (5 digits), with pass@8 far above on every level but the last.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from verl.utils import manifest

DATA_SOURCE = "arithmetic"
MARKER = "#"
MAX_DIGITS = 9
FILES = ["train.parquet", "val.parquet", "sft.parquet"]
FORMAT = 2  # raised when the rows made from equal arguments change, so that older folders are made again


def pool_size(digits: int) -> int:
    """How many questions a level has; operands have exactly `digits` digits (with one digit, 0 counts)."""
    return 100 if digits == 1 else (9 * 10 ** (digits - 1)) ** 2


def operands(index: int, digits: int) -> tuple[int, int]:
    """The `index`-th question of a level, 0 <= index < pool_size(digits)."""
    low, count = (0, 10) if digits == 1 else (10 ** (digits - 1), 9 * 10 ** (digits - 1))
    return low + index // count, low + index % count


def working(a: int, b: int, digits: int, slip_rate: float, rng: np.random.Generator) -> str:
    """The response to a+b: column by column from the lowest, its two digits, the carry and their sum in two digits;
    then the marker and the answer that the columns give."""
    columns, answer, carry = [], 0, 0
    for position in range(digits):
        x, y = a // 10**position % 10, b // 10**position % 10
        total = x + y + carry
        if slip_rate and rng.random() < slip_rate:
            total = int((total + rng.integers(1, 20)) % 20)  # any other sum of two digits and a carry
        columns.append(f"{x}{y}{carry}{total:02d}")
        carry = total // 10
        answer += total % 10 * 10**position
    return " ".join(columns) + f" {MARKER}{answer + carry * 10**digits}"


def question_row(a: int, b: int, digits: int, split: str, index: int) -> dict[str, Any]:
    return {
        "data_source": DATA_SOURCE,
        "prompt": [{"role": "user", "content": f"{a}+{b}="}],
        "ability": "math",
        "reward_model": {"style": "rule", "ground_truth": str(a + b)},
        "extra_info": {"split": split, "index": index, "level": digits},
    }


def shares(total: int, levels: list[int]) -> dict[int, int]:
    """`total` rows divided over the levels, the first ones taking what is left over."""
    return {d: total // len(levels) + (i < total % len(levels)) for i, d in enumerate(levels)}


def draw(digits: int, n_train: int, n_val: int, n_sft: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Question indices of one level per split. Validation takes at most half of a small level; training and
    demonstrations are drawn from the rest, and repeat questions where the rest is smaller than what was asked for."""
    pool = pool_size(digits)
    n_val = min(n_val, pool // 2)
    n_distinct = min(n_train, pool - n_val)
    distinct = rng.choice(pool, n_val + n_distinct, replace=False)
    val, train = distinct[:n_val], np.resize(distinct[n_val:], n_train)
    sft = np.empty(0, dtype=np.int64)
    while len(sft) < n_sft:
        drawn = rng.integers(pool, size=n_sft)
        sft = np.concatenate([sft, drawn[~np.isin(drawn, val)]])
    return {"train": train, "val": val, "sft": sft[:n_sft]}


def make_rows(
    seed: int, levels: list[int], train_size: int, val_size: int, sft_size: int, slip_rate: list[float]
) -> dict[str, list[dict[str, Any]]]:
    """The rows of every split, in an order that mixes the levels."""
    rng = np.random.default_rng(seed)
    rows: dict[str, list[dict[str, Any]]] = {"train": [], "val": [], "sft": []}
    n_train, n_val, n_sft = (shares(size, levels) for size in (train_size, val_size, sft_size))
    for digits, slips in zip(levels, slip_rate, strict=True):
        drawn = draw(digits, n_train[digits], n_val[digits], n_sft[digits], rng)
        for split, indices in drawn.items():
            for index in indices.tolist():
                a, b = operands(index, digits)
                row = question_row(a, b, digits, split, index)
                if split == "sft":
                    row["response"] = working(a, b, digits, slips, rng)
                rows[split].append(row)
    return {split: [table[i] for i in rng.permutation(len(table))] for split, table in rows.items()}


def check(arguments: argparse.Namespace) -> None:
    levels = arguments.levels
    if len(set(levels)) != len(levels) or not all(1 <= d <= MAX_DIGITS for d in levels):
        raise ValueError(f"--levels is {levels}: give different numbers of digits from 1 to {MAX_DIGITS}")
    for name in ("train_size", "val_size", "sft_size"):
        if getattr(arguments, name) < len(levels):
            option = "--" + name.replace("_", "-")
            raise ValueError(f"{option} is {getattr(arguments, name)}: give at least one row per level ({len(levels)})")
    if len(arguments.slip_rate) != len(levels) or not all(0 <= rate < 1 for rate in arguments.slip_rate):
        raise ValueError(f"--slip-rate is {arguments.slip_rate}: give a probability below 1 for each of {levels}")
    if arguments.seed < 0:
        raise ValueError(f"--seed is {arguments.seed}: give a number from 0 up")


def summary(split: str, rows: list[dict[str, Any]]) -> str:
    levels = sorted({row["extra_info"]["level"] for row in rows})
    counts = {d: sum(row["extra_info"]["level"] == d for row in rows) for d in levels}
    distinct = len({row["prompt"][0]["content"] for row in rows})
    per_level = ", ".join(f"{d} digits: {n}" for d, n in counts.items())
    return f"{split}: {len(rows)} rows, {distinct} distinct questions ({per_level})"


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Make the arithmetic ladder.")
    parser.add_argument("--output-dir", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--levels", type=int, nargs="+", default=[1, 2, 3, 4, 5], help="numbers of digits")
    parser.add_argument("--train-size", type=int, default=4000)
    parser.add_argument("--val-size", type=int, default=250)
    parser.add_argument("--sft-size", type=int, default=40000)
    parser.add_argument(
        "--slip-rate",
        type=float,
        nargs="+",
        default=[0.05, 0.15, 0.25, 0.35, 0.5],
        help="chance that a demonstrated column sum is wrong, for each level",
    )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    arguments = parse(argv)
    check(arguments)
    folder: Path = arguments.output_dir
    made_from = {k: v for k, v in vars(arguments).items() if k != "output_dir"} | {"format": FORMAT}
    if manifest.is_made(folder, made_from):
        print(f"{folder}: already made from these arguments")
        return
    sizes = {k: made_from[k] for k in ("train_size", "val_size", "sft_size")}
    rows = make_rows(arguments.seed, arguments.levels, slip_rate=arguments.slip_rate, **sizes)
    manifest.begin(folder)
    for split, table in rows.items():
        pq.write_table(pa.Table.from_pylist(table), folder / f"{split}.parquet")
        print(summary(split, table))
    manifest.finish(folder, made_from, FILES)


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.exit(f"error: {error}")
