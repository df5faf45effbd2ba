"""The models that are trained: a causal language model that gives log-probabilities and entropies, and the critic's,
which gives values."""

from contextlib import suppress

import torch
import torch.distributed as dist
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedModel
from transformers.initialization import no_init_weights
from transformers.utils.logging import disable_progress_bar

from verl.utils.torch_functional import log_prob_and_entropy
from verl.workers.attention import IMPLEMENTATION, use_packed_attention
from verl.workers.sequences import Sequences


def decode(lm: PreTrainedModel, sequences: Sequences) -> torch.Tensor:
    """(m, H) last hidden states where the m response tokens of `sequences` are predicted, in the compute dtype.

    RuntimeError if packed sequences meet a model without `use_packed_attention`: it would mix them.
    """
    decoder, keywords = lm.get_decoder(), {}
    if sequences.packing is not None:
        if decoder.config._attn_implementation != IMPLEMENTATION:
            raise RuntimeError("packed sequences need a model with packed attention: call use_packed_attention")
        keywords = {"position_ids": sequences.position_ids, "packing": sequences.packing}
    hidden = decoder(input_ids=sequences.input_ids, use_cache=False, **keywords).last_hidden_state
    return hidden.flatten(0, 1).index_select(0, sequences.predictors)


class ScoringModel(nn.Module):
    """A causal language model whose forward pass gives log-probabilities and entropies of response tokens.

    The language-model head is applied here, a chunk at a time, rather than outside: FSDP2 gathers the head's weight for
    the forward and the backward pass of the module it wraps, and this is that module.
    """

    def __init__(self, lm: PreTrainedModel) -> None:
        super().__init__()
        self.lm = lm

    def forward(self, sequences: Sequences, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
        """log_prob and entropy, (m,) float32, of the m response tokens of `sequences`."""
        hidden = decode(self.lm, sequences)
        return log_prob_and_entropy(hidden, self.lm.get_output_embeddings().weight, sequences.labels, temperature)


class ValueModel(nn.Module):
    """A causal language model whose head has one output in place of the vocabulary: the value of a state.

    The head starts at zero, so a new critic's values are 0, whatever the model: nothing random to agree on.
    """

    def __init__(self, lm: PreTrainedModel) -> None:
        super().__init__()
        head = nn.Linear(lm.get_output_embeddings().weight.shape[1], 1, bias=False)
        nn.init.zeros_(head.weight)
        lm.set_output_embeddings(head)
        self.lm = lm

    def forward(self, sequences: Sequences) -> torch.Tensor:
        """(m,) float32 values of the states before the m response tokens of `sequences`: where each is predicted."""
        # A product in bfloat16 would round values close to 1 to steps of 1/256.
        return decode(self.lm, sequences).float() @ self.lm.get_output_embeddings().weight[0].float()


def load_value_model(model_path: str, packed: bool = False) -> ValueModel:
    """A critic on the model of a Hugging Face folder or hub name; otherwise as `load_language_model`."""
    return ValueModel(_load(model_path, packed, with_head=False))


def load_language_model(model_path: str, packed: bool = False) -> PreTrainedModel:
    """The model of a Hugging Face folder or hub name in float32, without dropout; `packed`: for packed sequences (else
    padded ones). In a process group only worker 0 reads the weights: an engine gives the others their part.

    ValueError for a model whose logits are more than last hidden state times head, or that cannot be packed."""
    return _load(model_path, packed, with_head=True)


def _load(model_path: str, packed: bool, with_head: bool) -> PreTrainedModel:
    disable_progress_bar()
    reads_weights = _reads_weights()
    lm = _read(model_path) if reads_weights else _without_weights(model_path)
    if reads_weights:
        check_tensors(lm, model_path)
        if with_head:
            check_head(lm, model_path)
    switch_off_dropout(lm)
    if packed:
        use_packed_attention(lm, model_path, trial=reads_weights)
    return lm


def _reads_weights() -> bool:
    return not dist.is_initialized() or dist.get_rank() == 0


def _read(model_path: str) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)


def _without_weights(model_path: str) -> PreTrainedModel:
    """The model with memory for its weights that is never written to, and so takes none; its buffers are computed."""
    with no_init_weights():
        lm = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model_path), dtype=torch.float32)
    lm.tie_weights()
    with suppress(OSError):  # it has none of its own: then it is the one that the configuration makes
        lm.generation_config = GenerationConfig.from_pretrained(model_path)
    return lm


def check_tensors(lm: PreTrainedModel, model_path: str) -> None:
    """Refuse a model with weights that are no parameters, which nothing here would carry along, and one whose head
    should be its embeddings but has weights of its own."""
    parameters = {name for name, _ in lm.named_parameters(remove_duplicate=False)}
    if buffers := sorted(lm.state_dict().keys() - parameters):
        raise ValueError(
            f"actor_rollout_ref.model.path={model_path}: {type(lm).__name__} keeps weights in buffers ({buffers[0]}, "
            f"{len(buffers)} in all), which this engine does not bring to workers, rollouts and exports: use another"
        )
    head, embeddings = lm.get_output_embeddings(), lm.get_input_embeddings()
    if lm.config.get_text_config().tie_word_embeddings and head.weight is not embeddings.weight:
        raise ValueError(
            f"actor_rollout_ref.model.path={model_path}: config.json says tie_word_embeddings=true, but the weights "
            "hold a head of their own: set it to false there, or take the head out of the file"
        )


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
