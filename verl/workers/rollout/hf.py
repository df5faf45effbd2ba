"""Rollout with transformers, in the training process: for a CPU, a debugger, and as the other engine to compare with.

Rows are decoded in groups of equal prompt length, so that no attention mask is needed; a question's prompt is computed
once for all its responses; rows leave the batch as they end. Draws are keyed by (seed, step, uid, sample).
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedConfig, PreTrainedModel

from verl.utils.random import uniform
from verl.workers.rollout.base import GenerationOutput, SamplingParams
from verl.workers.rollout.kv_cache import make_cache


@dataclass
class _Group:
    """Rows decoded together: `rows` (R,) of the batch, and which of `prompts` (q, L) each continues, (R,)."""

    rows: torch.Tensor
    prompts: torch.Tensor
    prompt_of_row: torch.Tensor


class HFRollout:
    """Batched sampling with a key-value cache on an unsharded copy of the policy."""

    def __init__(
        self,
        config: PreTrainedConfig,
        device: torch.device,
        dtype: torch.dtype,
        eos_token_ids: list[int],
        pad_token_id: int,
        max_num_seqs: int,
    ) -> None:
        self.device = device
        self.pad_token_id = pad_token_id
        self.max_num_seqs = max_num_seqs
        self.eos_token_ids = torch.tensor(eos_token_ids, device=device)
        self.model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype).to(device).eval()
        self.model.requires_grad_(False)

    def load_weights(self, parameters: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Copy the trainer's whole parameters, by Hugging Face name, into the rollout's model."""
        own = dict(self.model.named_parameters())
        for name, tensor in parameters:
            own.pop(name).copy_(tensor)
        if own:
            raise ValueError(f"the trainer sent no weights for {', '.join(own)}")

    @torch.no_grad()
    def generate(
        self,
        prompts: torch.Tensor,
        prompt_length: torch.Tensor,
        question: np.ndarray,
        keys: np.ndarray,
        params: SamplingParams,
    ) -> GenerationOutput:
        """Sample one response for each row.

        Args:
            prompts: (N, P) int64, left-padded. prompt_length: (N,) int64.
            question: (N,) id; rows with equal ids have equal prompts, which are computed once.
            keys: (N,) int64 key of each row's random draws.
            params: how to sample.
        """
        n_rows = len(prompts)
        output = GenerationOutput.empty(n_rows, params.max_tokens, self.pad_token_id)
        row_keys = torch.from_numpy(keys)
        for group in self._groups(prompts, prompt_length, question):
            self._generate_group(group, row_keys[group.rows].to(self.device), params, output)
        return output

    def _groups(self, prompts: torch.Tensor, prompt_length: torch.Tensor, question: np.ndarray) -> list[_Group]:
        _, first, index = np.unique(question, return_index=True, return_inverse=True)
        lengths = prompt_length.numpy()
        order = np.lexsort((index, lengths))  # by prompt length, a question's rows together
        groups = []
        for length in np.unique(lengths):
            rows = order[lengths[order] == length]
            for start in range(0, len(rows), self.max_num_seqs):
                part = rows[start : start + self.max_num_seqs]
                questions, prompt_of_row = np.unique(index[part], return_inverse=True)
                groups.append(
                    _Group(
                        torch.from_numpy(part),
                        prompts[torch.from_numpy(first[questions]), prompts.shape[1] - int(length) :],
                        torch.from_numpy(prompt_of_row),
                    )
                )
        return groups

    def _generate_group(
        self, group: _Group, keys: torch.Tensor, params: SamplingParams, output: GenerationOutput
    ) -> None:
        cache = make_cache(self.model.config)
        prompt_of_row = group.prompt_of_row.to(self.device)
        logits = self._forward(group.prompts.to(self.device), cache)[prompt_of_row]
        cache.batch_select_indices(prompt_of_row)
        alive = torch.arange(len(group.rows), device=self.device)  # rows still decoded, ended ones among them
        ended = torch.zeros(len(group.rows), dtype=torch.bool, device=self.device)
        tokens = torch.full((len(group.rows), params.max_tokens), self.pad_token_id, device=self.device)
        log_probs = torch.zeros(tokens.shape, dtype=torch.float32, device=self.device)
        lengths = torch.zeros(len(group.rows), dtype=torch.int64, device=self.device)
        for position in range(params.max_tokens):
            token, log_prob = sample(logits, keys[alive], position, params)
            running = ~ended[alive]
            tokens[alive, position] = torch.where(running, token, self.pad_token_id)
            log_probs[alive, position] = torch.where(running, log_prob, 0.0)
            lengths[alive] += running
            ended[alive] |= torch.isin(token, self.eos_token_ids)
            keep = (~ended[alive]).nonzero().squeeze(1)
            if len(keep) == 0 or position + 1 == params.max_tokens:
                break
            # Dropping rows copies the cache: worth it when some are saved.
            if len(keep) <= 0.9 * len(alive):
                cache.batch_select_indices(keep)
                alive, token = alive[keep], token[keep]
            logits = self._forward(token[:, None], cache)
        output.put(group.rows, tokens, log_probs, lengths)

    def _forward(self, input_ids: torch.Tensor, cache: DynamicCache) -> torch.Tensor:
        """(R, V) float32 logits after the last token of each row."""
        output = self.model(input_ids=input_ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        return output.logits[:, -1].float()


def sample(
    logits: torch.Tensor, keys: torch.Tensor, position: int, params: SamplingParams
) -> tuple[torch.Tensor, torch.Tensor]:
    """One token per row and its log-probability under the distribution it was drawn from.

    Args:
        logits: (R, V) float32. keys: (R,) int64. position: index of the token in its response.

    Returns:
        token (R,) int64 and log_prob (R,) float32: after temperature, top-k and top-p; greedy tokens carry the
        log-probability at temperature 1.
    """
    if params.greedy:
        token = logits.argmax(dim=-1)
        return token, torch.log_softmax(logits, dim=-1).gather(1, token[:, None]).squeeze(1)
    log_p = torch.log_softmax(_truncate(logits / params.temperature, params), dim=-1)
    cdf = log_p.double().exp().cumsum(dim=-1)
    # Never above the last token of positive probability, whatever the rounding of the sum.
    draw = (uniform(keys, position) * cdf[:, -1]).unsqueeze(1)
    token = torch.searchsorted(cdf, draw, right=True).squeeze(1)
    token = torch.minimum(token, torch.searchsorted(cdf, cdf[:, -1:].contiguous()).squeeze(1))
    return token, log_p.gather(1, token[:, None]).squeeze(1)


def _truncate(logits: torch.Tensor, params: SamplingParams) -> torch.Tensor:
    """Logits with -inf outside the `top_k` most likely tokens and outside the smallest set of probability `top_p`."""
    if 0 < params.top_k < logits.shape[-1]:
        smallest = logits.topk(params.top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < smallest, float("-inf"))
    if params.top_p < 1.0:
        descending, order = logits.sort(dim=-1, descending=True)
        before = descending.softmax(dim=-1).cumsum(dim=-1) - descending.softmax(dim=-1)
        outside = torch.zeros_like(before, dtype=torch.bool).scatter(1, order, before >= params.top_p)
        logits = logits.masked_fill(outside, float("-inf"))
    return logits
