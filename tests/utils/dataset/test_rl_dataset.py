import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_processing.make_tiny_model import build_tokenizer
from verl.trainer.config.schema import DataConfig
from verl.utils.dataset.rl_dataset import RLHFDataset

TOKENIZER = build_tokenizer()


def row(content="1+1=", source="arithmetic", answer="2", **extra_info):
    return {
        "data_source": source,
        "prompt": [{"role": "user", "content": content}],
        "ability": "math",
        "reward_model": {"style": "rule", "ground_truth": answer},
        "extra_info": extra_info or {"split": "train"},
    }


def write(path, rows):
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return str(path)


def dataset(files, **config):
    return RLHFDataset(files, TOKENIZER, DataConfig(**config))


def test_batch_is_left_padded_to_its_longest_prompt(tmp_path):
    data = dataset(write(tmp_path / "a.parquet", [row("1+1="), row("123+456=", answer="579", level=3)]))
    batch = data.batch([0, 1])
    assert batch["prompt_length"].tolist() == [6, 10]
    assert batch["prompts"].shape == (2, 10)
    assert batch["prompts"][0, :4].tolist() == [TOKENIZER.pad_token_id] * 4
    for i, text in enumerate(["<|user|>1+1=<|assistant|>", "<|user|>123+456=<|assistant|>"]):
        assert TOKENIZER.decode(batch["prompts"][i, 10 - batch["prompt_length"][i] :]) == text
        assert batch["prompt_text"][i] == text
    assert batch["ground_truth"].tolist() == ["2", "579"]
    assert batch["level"].tolist() == ["", "3"]
    assert batch["extra_info"][1]["level"] == 3
    assert data.batch([0])["prompts"].shape == (1, 6)


def test_parquet_and_jsonl_files_are_joined_and_ids_name_file_and_row(tmp_path):
    first = write(tmp_path / "a.parquet", [row("1+1="), row("2+2=")])
    second = write(tmp_path / "b.jsonl", [row("3+3="), row("4+4=")])
    data = dataset([first, second])
    assert data.batch(range(4))["question_id"].tolist() == ["0:0", "0:1", "1:0", "1:1"]
    assert data[3]["prompt_text"] == "<|user|>4+4=<|assistant|>"
    assert data.place(3) == f"{second}, row 1"


def test_prompt_may_be_plain_text_and_column_is_configurable(tmp_path):
    rows = [{**row(), "question": "5+5="}]
    data = dataset(write(tmp_path / "a.parquet", rows), prompt_key="question")
    assert data[0]["prompt_text"] == "<|user|>5+5=<|assistant|>"


def test_overlong_prompts_are_dropped_and_keep_their_ids(tmp_path, capsys):
    path = write(tmp_path / "a.parquet", [row("1+1="), row("1+1" * 20), row("2+2=")])
    data = dataset(path, max_prompt_length=8, filter_overlong_prompts=True)
    assert [data[i]["question_id"] for i in range(len(data))] == ["0:0", "0:2"]
    assert "dropped 1 of 3 prompts" in capsys.readouterr().out


def test_images_are_said_to_be_left_out(tmp_path, capsys):
    dataset(write(tmp_path / "a.jsonl", [{**row(), "images": ["a.png"]}]))
    assert "the images of" in capsys.readouterr().out
    dataset(write(tmp_path / "b.jsonl", [row()]))
    assert "images" not in capsys.readouterr().out


@pytest.mark.parametrize(("truncation", "kept"), [("left", "56=<|assistant|>"), ("right", "<|user|>123")])
def test_truncation_cuts_the_named_end(tmp_path, truncation, kept):
    data = dataset(write(tmp_path / "a.parquet", [row("123+456=")]), max_prompt_length=4, truncation=truncation)
    assert data[0]["prompt_text"] == kept


def test_first_of_each_source_follows_the_rows(tmp_path):
    first = write(tmp_path / "a.parquet", [row(source="x"), row(source="y"), row(source="x")])
    second = write(tmp_path / "b.parquet", [row(source="y"), row(source="z")])
    assert dataset([first, second]).first_of_each_source() == [0, 1, 4]


def refusal(files, **config):
    with pytest.raises(ValueError) as caught:
        dataset(files, **config)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_missing_unreadable_and_empty_files_are_named(tmp_path):
    assert refusal(str(tmp_path / "no.parquet")).startswith("data.train_files: there is no file")
    (tmp_path / "bad.parquet").write_text("not parquet")
    assert "cannot be read as parquet" in refusal(str(tmp_path / "bad.parquet"))
    (tmp_path / "bad.jsonl").write_text('{"a": 1}\n{"a": \n')
    assert "bad.jsonl, row 1 is not JSON" in refusal(str(tmp_path / "bad.jsonl"))
    (tmp_path / "empty.jsonl").write_text("")
    assert "empty.jsonl has no rows" in refusal(str(tmp_path / "empty.jsonl"))
    (tmp_path / "data.csv").write_text("a,b\n")
    assert "'.csv'" in refusal(str(tmp_path / "data.csv"))
    assert refusal([]).startswith("data.train_files is empty")


def test_missing_column_is_named_with_those_there_are(tmp_path):
    rows = [{k: v for k, v in row().items() if k != "reward_model"}]
    message = refusal(write(tmp_path / "a.parquet", rows))
    assert "no column 'reward_model'; it has data_source, prompt, ability, extra_info" in message
    assert "no column 'question'" in refusal(write(tmp_path / "b.parquet", [row()]), prompt_key="question")


def test_bad_cells_are_named_by_file_row_and_column(tmp_path):
    good = row()
    cases = {
        "prompt": [{"role": "user", "content": None}],
        "reward_model": {"style": "rule", "ground_truth": None},
        "data_source": None,
    }
    for column, value in cases.items():
        path = write(tmp_path / f"{column}.jsonl", [good, {**good, column: value}])
        assert refusal(path).startswith(f"data.train_files: {path}, row 1, column '{column}'")
    path = write(tmp_path / "nothing.parquet", [good, {**good, "prompt": []}])
    assert "row 1, column 'prompt'" in refusal(path)


@pytest.mark.parametrize(
    ("changes", "place"),
    [
        ([{"prompt": "1+1="}], "row 1, column 'prompt': '1+1=' is text, in row 0 it is a list"),
        (
            [{"reward_model": {"ground_truth": 2}}],
            "row 1, column 'reward_model.ground_truth': 2 is a number, in row 0 it is text",
        ),
        ([{"n": None}, {"n": 1}, {"n": 1.5}, {"n": "x"}], "row 4, column 'n': 'x' is text, in row 2 it is a number"),
        ([{}, {"tags": ["a", 1]}], "row 2, column 'tags[]': 1 is a number, in the same row it is text"),
    ],
)
def test_the_first_value_of_another_type_is_named(tmp_path, changes, place):
    first = row() | {"n": None, "tags": None}
    path = write(tmp_path / "mixed.jsonl", [first, *(first | change for change in changes), first])
    assert refusal(path) == f"data.train_files: {path}, {place}: use one type"


def test_a_number_that_no_column_can_hold_is_refused(tmp_path):
    path = write(tmp_path / "large.jsonl", [row() | {"n": 2**70}])
    assert refusal(path).startswith(f"data.train_files: {path} cannot be made a table: ")


def test_a_tokenizer_without_a_chat_template_is_refused_with_the_remedy(tmp_path):
    tokenizer = build_tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="has no chat template: take the instruction-tuned model, or put a Jinja"):
        RLHFDataset(write(tmp_path / "a.parquet", [row()]), tokenizer, DataConfig())


def test_a_message_that_the_chat_template_refuses_is_named(tmp_path):
    tokenizer = build_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('no such role') }}"
    with pytest.raises(ValueError, match="a.parquet, row 0, column 'prompt': the chat template refuses it: no such"):
        RLHFDataset(write(tmp_path / "a.parquet", [row()]), tokenizer, DataConfig())


def test_overlong_prompt_is_refused_with_its_place_and_the_remedy(tmp_path):
    path = write(tmp_path / "a.parquet", [row("1+1="), row("123+456=")])
    message = refusal(path, max_prompt_length=8)
    assert "row 1, column 'prompt': the prompt has 10 tokens, data.max_prompt_length is 8" in message
    assert "every prompt (2) is longer than data.max_prompt_length=2" in refusal(
        path, max_prompt_length=2, filter_overlong_prompts=True
    )
    assert "data.truncation is 'middle'" in refusal(path, truncation="middle")


def test_a_parquet_file_is_read_without_pickling_its_rows(tmp_path, monkeypatch):
    """`datasets` would, to name them by their content; it cannot for a column of more than 2 GiB."""

    def pickle_table(_):
        raise OverflowError("offset overflow while concatenating arrays")

    monkeypatch.setattr("datasets.arrow_dataset.generate_fingerprint", pickle_table)
    with pytest.raises(ValueError, match="offset overflow"):
        dataset(write(tmp_path / "a.jsonl", [row()]))
    assert len(dataset(write(tmp_path / "a.parquet", [row()]))) == 1
