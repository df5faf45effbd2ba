"""Prompts as token ids: the chat template, the length limit, and left padding."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from verl.utils.dataset.rows import RowFile, as_messages

TRUNCATIONS = ("error", "left", "right")


def check_truncation(truncation: str) -> None:
    if truncation not in TRUNCATIONS:
        raise ValueError(f"data.truncation is {truncation!r}; it is one of {', '.join(TRUNCATIONS)}")


def prompt_ids(tokenizer: Any, file: RowFile, column: str) -> list[np.ndarray]:
    """Token ids (P_i,) int32 of every prompt of a file, by the tokenizer's chat template, ready to be answered."""
    if tokenizer.chat_template is None:
        raise ValueError(
            f"the tokenizer of {tokenizer.name_or_path} has no chat template: take the instruction-tuned model, or put "
            "a Jinja template into the model's folder as chat_template.jinja"
        )
    texts = []
    for row, value in enumerate(file.rows[column]):
        messages = as_messages(value, file, row, column)
        try:
            texts.append(tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False))
        except Exception as error:  # a template may raise anything, e.g. for a role that it does not know
            raise file.error(row, column, f"the chat template refuses it: {error}") from error
    # The template has written the special tokens already.
    return [np.asarray(ids, dtype=np.int32) for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]]


def cut(ids: np.ndarray, limit: int, truncation: str, file: RowFile, row: int, column: str) -> np.ndarray:
    """`ids` if they fit the limit, else cut at the `left` or `right` end, or refused (`error`)."""
    if len(ids) <= limit:
        return ids
    if truncation == "error":
        remedy = "raise data.max_prompt_length, set data.filter_overlong_prompts=True, or set data.truncation"
        raise file.error(row, column, f"the prompt has {len(ids)} tokens, data.max_prompt_length is {limit}: {remedy}")
    return ids[-limit:] if truncation == "left" else ids[:limit]


def pad_id(tokenizer: Any) -> int:
    """The id that fills up shorter rows: the pad token, or the end-of-sequence token where there is none."""
    for token_id in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token_id is not None:
            return int(token_id)
    raise ValueError(f"the tokenizer of {tokenizer.name_or_path} has neither a pad nor an end-of-sequence token")


def pad_left(rows: Sequence[np.ndarray], value: int) -> torch.Tensor:
    """(Q, longest) int64, each row at the right end."""
    out = torch.full((len(rows), max(map(len, rows))), value, dtype=torch.int64)
    for i, row in enumerate(rows):
        out[i, out.shape[1] - len(row) :] = torch.from_numpy(row.astype(np.int64))
    return out


def pad_right(rows: Sequence[np.ndarray], value: int) -> torch.Tensor:
    """(Q, longest) int64, each row at the left end."""
    out = torch.full((len(rows), max(map(len, rows))), value, dtype=torch.int64)
    for i, row in enumerate(rows):
        out[i, : len(row)] = torch.from_numpy(row.astype(np.int64))
    return out
