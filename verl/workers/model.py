"""The models that are trained: a causal language model that gives log-probabilities and entropies."""

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils.logging import disable_progress_bar

from verl.utils.torch_functional import log_prob_and_entropy
from verl.workers.sequences import Sequences


class ScoringModel(nn.Module):
    """A causal language model whose forward pass gives log-probabilities and entropies of response tokens.

    The language-model head is applied here, a chunk at a time, rather than outside: FSDP2 gathers the head's weight for
    the forward and the backward pass of the module it wraps, and this is that module.
    """

    def __init__(self, lm: PreTrainedModel) -> None:
        super().__init__()
        self.lm = lm

    def forward(self, sequences: Sequences, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
        """log_prob and entropy, (M,) float32, of the M response tokens of `sequences`."""
        hidden = self.lm.get_decoder()(input_ids=sequences.input_ids, use_cache=False).last_hidden_state
        hidden = hidden[sequences.token_rows, sequences.hidden_positions]
        return log_prob_and_entropy(hidden, self.lm.get_output_embeddings().weight, sequences.labels, temperature)


def load_language_model(model_path: str) -> PreTrainedModel:
    """The model of a Hugging Face folder or hub name in float32, without dropout. ValueError for one whose logits are
    more than last hidden state times head."""
    disable_progress_bar()
    lm = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)
    check_head(lm, model_path)
    switch_off_dropout(lm)
    return lm


@torch.no_grad()
def check_head(lm: PreTrainedModel, model_path: str) -> None:
    """Refuse a model whose logits are not last hidden state times head: one with a bias, a scale or a soft cap."""
    ids = torch.arange(4)[None] % lm.config.get_text_config().vocab_size
    hidden = lm.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state
    log_probs = torch.log_softmax(hidden @ lm.get_output_embeddings().weight.T, dim=-1)
    expected = torch.log_softmax(lm(input_ids=ids, use_cache=False).logits, dim=-1)
    difference = float((log_probs - expected).abs().max())
    if not difference < 1e-3:
        raise ValueError(
            f"actor_rollout_ref.model.path={model_path}: {type(lm).__name__} does more to its logits than multiply by "
            f"the head (log-probs differ by {difference:.2g}), which this engine does not compute; use another model"
        )


def switch_off_dropout(lm: PreTrainedModel) -> None:
    """Dropout would make the log-probs of two passes differ, and with them the first ratio of a step from 1."""
    for module in lm.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name in ("dropout", "attention_dropout", "activation_dropout", "hidden_dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
