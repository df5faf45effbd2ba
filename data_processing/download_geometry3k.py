"""Geometry3k: questions about a figure. The column `images` holds the figures, which `datasets` reads as images.

    python data_processing/download_geometry3k.py --output-dir data/geometry3k

Each `<image>` in a question stands for one of its images, in their order.
"""

import io
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a script finds its own folder only

from PIL import Image

from data_processing.outputs import NO_ANSWER, Output, make, new_row, parser, run
from data_processing.sources import Record, Source, as_answer
from verl.utils.reward_score.instructions import THINK_BOXED

REPO = "hiyouga/geometry3k"
PLACEHOLDER = "<image>"


def images_of(record: Record) -> list[dict[str, Any]]:
    """The images as {bytes, path}, each checked. In JSONL they are paths beside the file."""
    column = record["images"]
    if not isinstance(column, list) or not column:
        raise record.error("images", f"expected a list of images, found {column!r}")
    images = []
    for value in column:
        image: dict[str, Any] = {"path": value} if isinstance(value, str) else value
        data, path = image.get("bytes"), image.get("path")
        if data is None:
            file = Path(record.origin).parent / str(path)
            if not file.is_file():
                raise record.error("images", f"there is no file {file}")
            data = file.read_bytes()
        try:
            Image.open(io.BytesIO(data)).verify()
        except (OSError, SyntaxError, ValueError) as error:  # what Pillow raises for what is no image
            raise record.error("images", f"Pillow cannot read it: {error}") from error
        images.append({"bytes": data, "path": path})
    return images


def convert(record: Record) -> dict[str, Any] | str:
    question, images, answer = record.text("problem"), images_of(record), as_answer(record["answer"])
    if question.count(PLACEHOLDER) != len(images):
        raise record.error(
            "problem", f"{question.count(PLACEHOLDER)} times {PLACEHOLDER}, but there are {len(images)} images"
        )
    if not answer:
        return NO_ANSWER
    return new_row(REPO, f"{question}\n\n{THINK_BOXED}", answer) | {"images": images}


def main(argv: list[str] | None = None) -> None:
    arguments = parser("Geometry3k, with its images.").parse_args(argv)
    make(
        arguments,
        [
            Output(f"{name}.parquet", Source(REPO, split), name, convert, images=True)
            for split, name in (("train", "train"), ("validation", "val"), ("test", "test"))
        ],
    )


if __name__ == "__main__":
    run(main)
