import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_processing.make_tiny_model import build_tokenizer
from verl.utils.dataset.sft_dataset import SFTDataset

TOKENIZER = build_tokenizer()


def dataset(tmp_path, rows, prompt_length=64, response_length=64, **options):
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "sft.parquet")
    return SFTDataset(str(tmp_path / "sft.parquet"), TOKENIZER, prompt_length, response_length, **options)


MESSAGES = [{"role": "user", "content": "47+85="}]


def test_loss_is_on_the_response_and_its_end(tmp_path):
    row = dataset(tmp_path, [{"prompt": MESSAGES, "response": "21 31 #132"}])[0]
    assert TOKENIZER.decode(row["input_ids"]) == "<|user|>47+85=<|assistant|>21 31 #132<|end|>"
    assert TOKENIZER.decode(row["input_ids"][row["loss_mask"]]) == "21 31 #132<|end|>"


def test_tokens_are_those_of_the_chat_template(tmp_path):
    row = dataset(tmp_path, [{"prompt": MESSAGES, "response": "#132"}])[0]
    conversation = [*MESSAGES, {"role": "assistant", "content": "#132"}]
    text = TOKENIZER.apply_chat_template(conversation, tokenize=False)
    assert row["input_ids"].tolist() == TOKENIZER(text, add_special_tokens=False)["input_ids"]


def test_batch_pads_prompts_left_and_responses_right(tmp_path):
    data = dataset(tmp_path, [{"prompt": "1+1=", "response": "#2"}, {"prompt": "10+10=", "response": "#20"}])
    batch = data.batch([0, 1])
    assert batch["prompts"].shape == (2, 8) and batch["responses"].shape == (2, 4)
    assert batch["prompt_length"].tolist() == [6, 8]
    assert batch["response_mask"].tolist() == [[True] * 3 + [False], [True] * 4]
    pad = TOKENIZER.pad_token_id
    assert batch["prompts"][0, :2].tolist() == [pad, pad] and batch["responses"][0, 3] == pad
    for i in range(2):
        prompt = batch["prompts"][i, 8 - batch["prompt_length"][i] :].tolist()
        response = batch["responses"][i][batch["response_mask"][i]].tolist()
        assert prompt + response == data[i]["input_ids"].tolist()


@pytest.mark.parametrize(
    ("row", "options", "message"),
    [
        ({"prompt": MESSAGES, "answer": "x"}, {}, "no column 'response'"),
        ({"prompt": MESSAGES, "response": ""}, {}, "row 0, column 'response': expected the text"),
        ({"prompt": MESSAGES, "response": "1234"}, {"response_length": 4}, "data.max_response_length is 4"),
        ({"prompt": MESSAGES, "response": "1"}, {"prompt_length": 4}, "data.max_prompt_length is 4"),
        ({"prompt": [], "response": "1"}, {}, "row 0, column 'prompt'"),
    ],
)
def test_bad_rows_are_refused_by_place(tmp_path, row, options, message):
    with pytest.raises(ValueError, match=message):
        dataset(tmp_path, [row], **options)
