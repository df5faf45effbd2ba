"""Questions to train on or to validate with, tokenised once."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from datasets import Dataset

from verl.protocol import DataProto, object_array
from verl.trainer.config.schema import DataConfig
from verl.utils.dataset.rows import RowFile, read_files
from verl.utils.dataset.tokens import check_truncation, cut, pad_id, pad_left, prompt_ids
from verl.utils.text import counted


class RLHFDataset:
    """Rows of one or several files in the field's schema: the chat messages in `config.prompt_key`, `data_source`,
    `reward_model.ground_truth`, and optionally `extra_info` (its `level` groups validation metrics).

    `key` is the configuration key that the files came from; errors name it, or the file, row and column at fault.
    A class of one's own (`data.custom_cls`) overrides `prepare`, for a file's rows, or `row`, for a batch's columns.
    """

    def __init__(self, files: str | Sequence[str], tokenizer: Any, config: DataConfig, key: str = "data.train_files"):
        check_truncation(config.truncation)
        self.key = key
        self.tokenizer = tokenizer
        self.pad_token_id = pad_id(tokenizer)
        self.files = read_files(files, key, [config.prompt_key, "data_source", "reward_model"], self.prepare)
        for file in self.files:
            if "images" in file.rows.column_names:
                print(f"{key}: the images of {file.path} are not read: the model sees the text alone")
        self._ids: list[np.ndarray] = []
        self._places: list[tuple[int, int]] = []  # (file, row) of each question that is kept
        dropped = sum(self._add(i, file, config) for i, file in enumerate(self.files))
        if dropped:
            total = dropped + len(self)
            longer = f"longer than {counted(config.max_prompt_length, 'token')}"
            print(f"{key}: dropped {dropped} of {counted(total, 'prompt')} {longer}")
        if not self._places:
            raise ValueError(
                f"{key}: every prompt ({dropped}) is longer than data.max_prompt_length={config.max_prompt_length}: "
                "raise it"
            )

    def prepare(self, rows: Dataset) -> Dataset:
        """The rows of each file, before anything is checked or tokenised: a place to rewrite, add or drop some. Row
        numbers in messages count what it returns."""
        return rows

    def _add(self, file_index: int, file: RowFile, config: DataConfig) -> int:
        """Check and tokenise one file; returns how many prompts were dropped for their length."""
        dropped = 0
        _check_scoring_columns(file)
        for row, ids in enumerate(prompt_ids(self.tokenizer, file, config.prompt_key)):
            if config.filter_overlong_prompts and len(ids) > config.max_prompt_length:
                dropped += 1
                continue
            self._ids.append(cut(ids, config.max_prompt_length, config.truncation, file, row, config.prompt_key))
            self._places.append((file_index, row))
        return dropped

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.row(index, self._records([index])[0])

    def row(self, index: int, record: dict[str, Any]) -> dict[str, Any]:
        """What a batch holds of the question at `index`, whose row in its file is `record`: `prompt_ids` (P,) int32;
        `data_source`, `ground_truth`, `extra_info`; `question_id` ("file:row", both from 0), `prompt_text` (as the
        model sees it), `level` ("" without one)."""
        file_index, row = self._places[index]
        extra_info = record.get("extra_info") or {}
        level = extra_info.get("level")
        return {
            "prompt_ids": self._ids[index],
            "data_source": record["data_source"],
            "ground_truth": record["reward_model"]["ground_truth"],
            "extra_info": extra_info,
            "question_id": f"{file_index}:{row}",
            "prompt_text": self.tokenizer.decode(self._ids[index]),
            "level": "" if level is None else str(level),
        }

    def place(self, index: int) -> str:
        """File and row of a question, for messages."""
        file_index, row = self._places[index]
        return f"{self.files[file_index].path}, row {row}"

    def first_of_each_source(self) -> list[int]:
        """Index of the first question of every data source, in the order of the rows."""
        sources = [list(file.rows["data_source"]) for file in self.files]
        first: dict[str, int] = {}
        for index, (file_index, row) in enumerate(self._places):
            first.setdefault(sources[file_index][row], index)
        return list(first.values())

    def questions_of_files(self) -> list[np.ndarray]:
        """Indices of the questions of each file, (Q_f,) int64."""
        file_of = np.array([file_index for file_index, _ in self._places])
        return [np.flatnonzero(file_of == file_index) for file_index in range(len(self.files))]

    def collate(self, rows: Sequence[dict[str, Any]]) -> DataProto:
        """A batch of Q questions: tensors `prompts` (Q, P) int64, left-padded to the longest of the batch, and
        `prompt_length` (Q,) int64; everything else of a row as an array (Q,) of its name."""
        ids = [row["prompt_ids"] for row in rows]
        columns: dict[str, Any] = {
            "prompts": pad_left(ids, self.pad_token_id),
            "prompt_length": torch.tensor([len(i) for i in ids], dtype=torch.int64),
        }
        for name in rows[0]:
            if name == "prompt_ids":
                continue
            columns[name] = object_array([row[name] for row in rows])
        return DataProto.from_dict(columns)

    def batch(self, indices: Sequence[int] | np.ndarray) -> DataProto:
        """The questions at these indices, collated."""
        places = [int(index) for index in indices]
        return self.collate([self.row(i, record) for i, record in zip(places, self._records(places), strict=True)])

    def _records(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        """The rows of the files at these indices; each file is read once, which costs about as much as one row."""
        places = np.array([self._places[index] for index in indices]).reshape(-1, 2)
        records: list[dict[str, Any]] = [{} for _ in indices]
        for file_index in np.unique(places[:, 0]):
            positions = np.flatnonzero(places[:, 0] == file_index)
            columns = self.files[file_index].rows[places[positions, 1].tolist()]
            for position, values in zip(positions, zip(*columns.values(), strict=True), strict=True):
                records[position] = dict(zip(columns, values, strict=True))
        return records


def _check_scoring_columns(file: RowFile) -> None:
    for row, source in enumerate(file.rows["data_source"]):
        if not isinstance(source, str) or not source:
            raise file.error(row, "data_source", f"expected the name of a data source, found {source!r}")
    for row, reward_model in enumerate(file.rows["reward_model"]):
        if not isinstance(reward_model, dict) or reward_model.get("ground_truth") is None:
            raise file.error(row, "reward_model", f"expected {{style, ground_truth}}, found {reward_model!r}")
    if "extra_info" in file.rows.column_names:
        for row, extra_info in enumerate(file.rows["extra_info"]):
            if not isinstance(extra_info, dict | None):
                raise file.error(row, "extra_info", f"expected {{split, index, ...}}, found {extra_info!r}")
