"""Demonstrations for supervised fine-tuning, in the same form as rollouts: prompts, and responses with a mask."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from verl.protocol import DataProto
from verl.utils.dataset.rows import read_files
from verl.utils.dataset.tokens import check_truncation, cut, pad_id, pad_left, pad_right, prompt_ids


class SFTDataset:
    """Rows of one or several files with a prompt (chat messages, or the text of one) and a response (text).

    The end-of-sequence token is added to each response and is learnt with it. A prompt longer than
    `max_prompt_length` follows `truncation` (`error`, `left`, `right`); a longer response is refused.
    """

    def __init__(
        self,
        files: str | Sequence[str],
        tokenizer: Any,
        max_prompt_length: int,
        max_response_length: int,
        truncation: str = "error",
        prompt_key: str = "prompt",
        response_key: str = "response",
        key: str = "data.train_files",
    ):
        check_truncation(truncation)
        if tokenizer.eos_token_id is None:
            raise ValueError(f"the tokenizer of {tokenizer.name_or_path} has no end-of-sequence token to learn")
        self.pad_token_id = pad_id(tokenizer)
        self._prompts: list[np.ndarray] = []
        self._responses: list[np.ndarray] = []
        for file in read_files(files, key, [prompt_key, response_key]):
            for row, ids in enumerate(prompt_ids(tokenizer, file, prompt_key)):
                self._prompts.append(cut(ids, max_prompt_length, truncation, file, row, prompt_key))
            texts = list(file.rows[response_key])
            for row, text in enumerate(texts):
                if not isinstance(text, str) or not text:
                    raise file.error(row, response_key, f"expected the text of a response, found {text!r}")
            for row, ids in enumerate(tokenizer(texts, add_special_tokens=False)["input_ids"]):
                if len(ids) + 1 > max_response_length:
                    raise file.error(
                        row,
                        response_key,
                        f"the response has {len(ids) + 1} tokens with its end, data.max_response_length is "
                        f"{max_response_length}: raise it",
                    )
                self._responses.append(np.asarray([*ids, tokenizer.eos_token_id], dtype=np.int32))

    def __len__(self) -> int:
        return len(self._prompts)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        """`input_ids` (L,) int32: prompt, response, end; `loss_mask` (L,) bool: true on the response and its end."""
        prompt, response = self._prompts[index], self._responses[index]
        return {
            "input_ids": np.concatenate([prompt, response]),
            "loss_mask": np.arange(len(prompt) + len(response)) >= len(prompt),
        }

    def batch(self, indices: Sequence[int] | np.ndarray) -> DataProto:
        """N demonstrations: `prompts` (N, P) int64 left-padded, `prompt_length` (N,), `responses` (N, T) int64
        right-padded, `response_mask` (N, T) bool, the mask of the loss."""
        prompts = [self._prompts[int(i)] for i in indices]
        responses = [self._responses[int(i)] for i in indices]
        lengths = torch.tensor([len(r) for r in responses], dtype=torch.int64)
        padded = pad_right(responses, self.pad_token_id)
        return DataProto.from_dict(
            {
                "prompts": pad_left(prompts, self.pad_token_id),
                "prompt_length": torch.tensor([len(p) for p in prompts], dtype=torch.int64),
                "responses": padded,
                "response_mask": torch.arange(padded.shape[1]) < lengths[:, None],
            }
        )
