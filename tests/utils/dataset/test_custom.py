import re
from pathlib import Path

import pytest

from data_processing.make_tiny_model import build_tokenizer
from verl.trainer.config.schema import CustomClassConfig, DataConfig
from verl.utils.dataset.custom import dataset_class
from verl.utils.dataset.rl_dataset import RLHFDataset

ROW = (
    '{"data_source": "arithmetic", "prompt": [{"role": "user", "content": "%s"}],'
    ' "reward_model": {"style": "rule", "ground_truth": "2"}}\n'
)


def load(tmp_path, source, name="Mine"):
    (tmp_path / "mine.py").write_text(source)
    return dataset_class(CustomClassConfig(str(tmp_path / "mine.py"), name))


def build(tmp_path, source, *prompts):
    (tmp_path / "rows.jsonl").write_text("".join(ROW % prompt for prompt in prompts))
    return load(tmp_path, source)(str(tmp_path / "rows.jsonl"), build_tokenizer(), DataConfig(), "data.train_files")


def mine(body):
    return f"from verl.utils.dataset.rl_dataset import RLHFDataset\nclass Mine(RLHFDataset):\n{body}"


def test_without_a_path_it_is_the_projects_own():
    assert dataset_class(CustomClassConfig()) is RLHFDataset


def test_the_example_of_the_documentation_works(tmp_path):
    page = (Path(__file__).parents[3] / "docs" / "data.md").read_text()
    example = re.search(r"```python\n(from verl.utils.dataset.rl_dataset.*?)```", page, re.DOTALL)[1]
    assert len(example.splitlines()) <= 12
    data = build(tmp_path, example.replace("class Shouted", "class Mine"), "1+1=", "2+2=")
    assert data[1]["prompt_text"] == "<|user|>2+2=!<|assistant|>"
    batch = data.batch([0, 1])
    assert batch["num_tokens"].tolist() == [7, 7]
    assert batch["extra_info"].tolist() == [{"num_tokens": 7}] * 2


def test_rows_may_be_dropped_and_added(tmp_path):
    data = build(tmp_path, mine("    def prepare(self, rows): return rows.select([2, 0, 0])"), "1+1=", "2+2=", "3+3=")
    assert [data[i]["prompt_text"][8:12] for i in range(len(data))] == ["3+3=", "1+1=", "1+1="]
    assert data.place(2).endswith("rows.jsonl, row 2")


def test_rows_are_checked_after_they_were_prepared(tmp_path):
    with pytest.raises(ValueError, match="data.train_files: .*rows.jsonl has no column 'reward_model'"):
        build(tmp_path, mine("    def prepare(self, rows): return rows.remove_columns('reward_model')"), "1+1=")
    (tmp_path / "other").mkdir()
    with pytest.raises(ValueError, match="data.train_files: prepare made None of .*rows.jsonl; it returns a datasets"):
        build(tmp_path / "other", mine("    def prepare(self, rows): pass"), "1+1=")


def test_a_class_that_cannot_be_used_is_refused_by_key_and_file(tmp_path):
    def refusal(source, name="Mine"):
        number = len(list(tmp_path.iterdir()))
        (tmp_path / str(number)).mkdir()
        with pytest.raises(ValueError) as caught:
            load(tmp_path / str(number), source, name)
        message = str(caught.value)
        assert message.startswith("data.custom_cls.") and "mine.py" in message and "\n" not in message
        return message

    assert "has no class 'Yours'; it has RLHFDataset, Mine" in refusal(mine("    pass"), "Yours")
    assert "importing" in refusal("import no_such_module")
    part = "class Mine:\n    __len__ = __getitem__ = batch = place = lambda self: 1\n"
    assert "no method first_of_each_source, questions_of_files: derive it from RLHFDataset" in refusal(part)
    unread = mine("    def __getitem__(self, index): return {}")
    assert "overrides __getitem__, which batches do not call: override row(index, record)" in refusal(unread)
    narrow = mine("    def __init__(self, files): pass")
    assert "does not take (files, tokenizer, config, key): too many positional" in refusal(narrow)


def test_half_a_class_is_refused(tmp_path):
    with pytest.raises(ValueError, match="data.custom_cls.path needs data.custom_cls.name"):
        dataset_class(CustomClassConfig(path="mine.py"))
    with pytest.raises(ValueError, match="data.custom_cls.name needs data.custom_cls.path"):
        dataset_class(CustomClassConfig(name="Mine"))
    with pytest.raises(ValueError, match="data.custom_cls.path: .*none.py is not a Python file"):
        dataset_class(CustomClassConfig(str(tmp_path / "none.py"), "Mine"))
