"""The attention of a model that is given packed rows.

`use_packed_attention` puts `packed_attention` in the place of the model's own. The model then has to be called with the
keyword `packing`, which reaches every layer and says where the sequences lie. A keyword, not a global: under activation
checkpointing a layer runs once more in the backward pass.
"""

import copy
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, PreTrainedModel

from verl.workers.packing import Buckets, Packing, example_placement

IMPLEMENTATION = "packed"  # its name in transformers' table of attention functions


@torch.compiler.disable
def packed_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    packing: Packing | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """What transformers calls: query (1, heads, N, D), key and value (1, KV heads, N, D) to (1, N, heads, D)."""
    if packing is None:
        raise RuntimeError("a model with packed attention was called without `packing`: use verl.workers.model.decode")
    for name in ("softcap", "s_aux", "position_bias"):
        if others.get(name) is not None:
            raise ValueError(f"{type(module).__name__} wants `{name}`, which packed attention does not compute")
    query, key, value = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    return packing.attend(query, key, value, scaling, sliding_window)[None], None


AttentionInterface.register(IMPLEMENTATION, packed_attention)


class _Counting:
    """A packing that counts its calls, and those with a window."""

    def __init__(self, packing: Packing) -> None:
        self.packing, self.calls, self.windows = packing, 0, 0

    def attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float | None, window: int | None
    ) -> torch.Tensor:
        self.calls += 1
        self.windows += window is not None
        return self.packing.attend(query, key, value, scale, window)


def use_packed_attention(lm: PreTrainedModel, model_path: str, trial: bool = True) -> None:
    """Put `packed_attention` in the place of every layer's attention; `lm` is on the CPU, as it was loaded.

    `lm.config` stays as it was: copies of the model that are made from it have their own attention. Sliding windows
    are honoured. ValueError for a model that cannot be packed, as a trial tells; without one, `lm` needs no weights.
    """
    if trial:
        _try_packing(lm, model_path)
    else:
        _set_attention(lm)


def _set_attention(lm: PreTrainedModel) -> None:
    config = copy.deepcopy(lm.config)
    lm.set_attn_implementation(IMPLEMENTATION)
    lm.config = config


@torch.no_grad()
def _try_packing(lm: PreTrainedModel, model_path: str) -> None:
    """Set it, and compare hidden states with and without."""
    placement, decoder, text_config = example_placement(), lm.get_decoder(), lm.config.get_text_config()
    ids = torch.arange(9) % text_config.vocab_size
    sequences = [slots[:length] for slots, length in zip(placement.slots, placement.lengths, strict=True)]
    expected = [decoder(input_ids=ids[None, slots], use_cache=False).last_hidden_state[0] for slots in sequences]
    _set_attention(lm)
    packing = _Counting(Buckets(placement, torch.device("cpu")))
    position_ids = torch.tensor([[0, 1, 2, 3, 4, 2, 3, 0, 1]])
    try:
        found = decoder(input_ids=ids[None], position_ids=position_ids, use_cache=False, packing=packing)
    except (TypeError, ValueError) as error:  # it takes no such keyword, or its attention more than we compute
        raise _not_packable(lm, model_path, str(error)) from error
    if packing.calls != text_config.num_hidden_layers:
        raise _not_packable(lm, model_path, f"{packing.calls} of {text_config.num_hidden_layers} layers can be packed")
    if packing.windows != _sliding_layers(text_config):
        raise _not_packable(lm, model_path, "its layers do not say how far they look back")
    hidden = found.last_hidden_state[0]
    difference = max(float((hidden[slots] - own).abs().max()) for slots, own in zip(sequences, expected, strict=True))
    if not difference < 1e-3 * max(1.0, float(hidden.abs().max())):
        raise _not_packable(lm, model_path, f"its hidden states change by {difference:.2g}")


def _sliding_layers(text_config: Any) -> int:
    """Layers that do not look at all tokens before theirs, of whatever kind."""
    kinds = getattr(text_config, "layer_types", None)
    if kinds is not None:
        return sum(kind != "full_attention" for kind in kinds)
    return text_config.num_hidden_layers if getattr(text_config, "sliding_window", None) is not None else 0


def _not_packable(lm: PreTrainedModel, model_path: str, reason: str) -> ValueError:
    return ValueError(
        f"actor_rollout_ref.model.path={model_path}: sequences of {type(lm).__name__} cannot be packed ({reason}): set "
        "actor_rollout_ref.model.use_remove_padding=False"
    )
