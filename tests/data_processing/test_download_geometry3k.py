import pytest
from datasets import Image, List, load_dataset

from data_processing import download_geometry3k
from data_processing.make_tiny_model import build_tokenizer
from tests.data_processing import copies
from verl.utils.reward_score.instructions import THINK_BOXED


def make(tmp_path, source="copies"):
    out = tmp_path / "out"
    download_geometry3k.main(["--output-dir", str(out), "--source", str(tmp_path / source)])
    return out


def test_images_come_back_as_images(tmp_path):
    copies.geometry3k(tmp_path / "copies")
    out = make(tmp_path)
    data = load_dataset("parquet", data_files=str(out / "train.parquet"), split="train", cache_dir=str(tmp_path / "hf"))
    assert data.features["images"] == List(Image())
    colours = [[image.convert("RGB").getpixel((0, 0)) for image in row["images"]] for row in data]
    assert colours == [[(255, 0, 0)], [(0, 0, 255)], [(255, 0, 0)]]
    assert copies.read(out / "test.parquet")[0]["images"][0]["bytes"] == copies.png("white")  # never encoded again


def test_prompt_keeps_the_place_of_the_image_and_asks_for_thoughts_and_a_box(tmp_path):
    copies.geometry3k(tmp_path / "copies")
    (row,) = copies.read(make(tmp_path) / "val.parquet")
    assert row["prompt"] == [{"role": "user", "content": f"<image>Find x.\n\n{THINK_BOXED}"}]
    assert row["data_source"] == "hiyouga/geometry3k"
    assert row["reward_model"]["ground_truth"] == "2 \\sqrt { 221 }"
    assert row["extra_info"] == {"split": "val", "index": 0}


def test_the_trainers_data_set_opens_it(tmp_path):
    copies.geometry3k(tmp_path / "copies")
    data = copies.trainable(make(tmp_path) / "train.parquet", build_tokenizer())
    assert len(data) == 3
    assert "<image>Find x." in data[0]["prompt_text"] and data[0]["ground_truth"] == "3"


def test_equal_questions_about_other_images_are_no_duplicates(tmp_path):
    copies.geometry3k(tmp_path / "copies")
    summary = copies.summary(make(tmp_path))["train.parquet"]
    assert (summary["rows"], summary["duplicates"], summary["duplicates_are"]) == (3, 1, "kept")
    assert summary["left_out"]["without an answer"]["rows"] == 1


def test_images_beside_a_jsonl_file_are_read(tmp_path):
    folder = tmp_path / "copies" / "geometry3k"
    for split in ("train", "validation", "test"):
        rows = [{"images": ["figures/1.png"], "problem": "<image>Find x.", "answer": "3"}]
        copies.write(folder / f"{split}.jsonl", rows)
    (folder / "figures").mkdir()
    with pytest.raises(ValueError, match=r"train.jsonl, row 0, column 'images': there is no file .*figures/1.png"):
        make(tmp_path)
    (folder / "figures" / "1.png").write_bytes(copies.png("red"))
    assert copies.read(make(tmp_path) / "train.parquet")[0]["images"][0]["bytes"] == copies.png("red")


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"images": [{"bytes": b"no image", "path": None}]}, "column 'images': Pillow cannot read it"),
        ({"problem": "Find x."}, "column 'problem': 0 times <image>, but there are 1 images"),
        ({"images": []}, "column 'images': expected a list of images"),
    ],
)
def test_bad_row_is_named(tmp_path, row, problem):
    copies.geometry3k(tmp_path / "copies", [copies.geometry_row("red"), copies.geometry_row("red") | row])
    with pytest.raises(ValueError, match=f"train-00000-of-00001.parquet, row 1, {problem}"):
        make(tmp_path)
