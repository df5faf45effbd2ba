"""Attention over a packed row: sequences side by side in one row of tokens, none of which sees another.

`use_packed_attention` puts `packed_attention` in the place of a model's own attention. The model then has to be called
with the keyword `packing`, which reaches every layer and says where the sequences lie. A keyword, not a global: under
activation checkpointing a layer runs once more in the backward pass.

Sequences that begin with the same prompt share its tokens: the prompt is computed once for all its responses. That
changes nothing but rounding, since under causal attention a prompt's hidden states do not depend on what follows.
"""

import copy
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from typing import Any, Protocol

import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, PreTrainedModel

from verl.utils.device import compute_dtype

IMPLEMENTATION = "packed"  # its name in transformers' table of attention functions
BUCKET_FILL = 0.75  # a sequence shorter than this share of a bucket's longest begins a bucket of its own


class Packing(Protocol):
    """How the N tokens of a packed row attend to each other."""

    def attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float | None, window: int | None
    ) -> torch.Tensor:
        """Causal attention within each sequence.

        query: (N, heads, D). key, value: (N, KV heads, D). scale: of the scores; None: 1 / sqrt(D). window: a token
        sees so many tokens, itself the last; None: all before it. Returns (N, heads, D).
        """


@dataclass
class Placement:
    """Where R sequences lie in a packed row of N tokens.

    slots: (R, L) int64, place in the row of each sequence's tokens; anything where a sequence has ended.
    lengths: (R,) int64. borrowed: (R,) int64, so many first tokens lie among those of an earlier sequence; the others
    are the sequence's own, and lie together, in the order of the sequences.
    """

    slots: torch.Tensor
    lengths: torch.Tensor
    borrowed: torch.Tensor

    def within(self) -> torch.Tensor:
        """(R, L) bool: where a sequence has a token."""
        return torch.arange(self.slots.shape[1]) < self.lengths[:, None]

    def own(self) -> torch.Tensor:
        """(R, L) bool: where a sequence has a token of its own."""
        return self.within() & (torch.arange(self.slots.shape[1]) >= self.borrowed[:, None])

    def select(self, rows: torch.Tensor) -> "Placement":
        return Placement(self.slots[rows], self.lengths[rows], self.borrowed[rows])


def make_packing(placement: Placement, device: torch.device) -> Packing:
    """The way to compute a packed row's attention on `device`."""
    placement = placement.select(placement.lengths > placement.borrowed)
    kernel = varlen_kernel(device)
    return Buckets(placement, device) if kernel is None else VarLen(placement, device, kernel)


# -------------------------------------------------------------------------------------------------- CPU: in buckets
class Buckets:
    """Sequences of similar length are laid out side by side, right-padded: causal attention needs no mask then.

    A bucket's padding costs attention alone; everything else in the model sees the packed row.
    """

    def __init__(self, placement: Placement, device: torch.device) -> None:
        taken, slots, self.shapes = 0, [], []
        own_count = int((placement.lengths - placement.borrowed).sum())
        back = torch.empty(own_count, dtype=torch.int64)
        for rows in _similar(placement.lengths):
            bucket = placement.select(rows)
            bucket.slots = bucket.slots[:, : int(bucket.lengths[0])]
            own = bucket.own()
            back[bucket.slots[own]] = taken + own.flatten().nonzero().squeeze(1)
            slots.append(bucket.slots.flatten())
            self.shapes.append(bucket.slots.shape)
            taken += bucket.slots.numel()
        self.slots = torch.cat(slots).to(device)  # of each place in the buckets
        self.back = back.to(device)  # place in the buckets of each token

    def attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float | None, window: int | None
    ) -> torch.Tensor:
        """See `Packing`."""
        tensors = [tensor.index_select(0, self.slots) for tensor in (query, key, value)]
        sizes = [shape.numel() for shape in self.shapes]
        outputs = []
        for shape, *parts in zip(self.shapes, *(tensor.split(sizes) for tensor in tensors), strict=True):
            q, k, v = (part.unflatten(0, shape).transpose(1, 2) for part in parts)  # (rows, heads, length, D)
            mask = _window_mask(shape[1], window, query.device)
            output = scaled_dot_product_attention(
                q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=True
            )
            outputs.append(output.transpose(1, 2).flatten(0, 1))
        return torch.cat(outputs).index_select(0, self.back)


def _similar(lengths: torch.Tensor) -> list[torch.Tensor]:
    """Indices in groups of similar length, the longest of each group first."""
    order = torch.argsort(lengths, descending=True, stable=True)
    groups, start = [], 0
    while start < len(order):
        shortest = BUCKET_FILL * float(lengths[order[start]])
        count = int((lengths[order[start:]] >= shortest).sum())
        groups.append(order[start : start + count])
        start += count
    return groups


def _window_mask(length: int, window: int | None, device: torch.device) -> torch.Tensor | None:
    """(length, length) bool: what a token sees; None where the window is as good as none."""
    if window is None or window >= length:
        return None
    position = torch.arange(length, device=device)
    distance = position[:, None] - position
    return (distance >= 0) & (distance < window)


# --------------------------------------------------------------------------------------------------- GPU: one kernel
VarLenKernel = Callable[..., torch.Tensor]


class VarLen:
    """All sequences by one call of a kernel that takes where each begins.

    A sequence's queries are its own tokens and its keys all of them, so keys are copied where some are borrowed; the
    kernels align the causal mask with the last query and the last key.
    """

    def __init__(self, placement: Placement, device: torch.device, kernel: VarLenKernel) -> None:
        own = placement.lengths - placement.borrowed
        self.kernel = kernel
        self.starts = [_starts(lengths).to(device) for lengths in (own, placement.lengths)]
        self.longest = [int(lengths.max()) for lengths in (own, placement.lengths)]
        self.key_slots = placement.slots[placement.within()].to(device) if placement.borrowed.any() else None

    def attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float | None, window: int | None
    ) -> torch.Tensor:
        """See `Packing`."""
        if self.key_slots is not None:
            key, value = (tensor.index_select(0, self.key_slots) for tensor in (key, value))
        return self.kernel(query, key, value, *self.starts, *self.longest, scale, window)


def _starts(lengths: torch.Tensor) -> torch.Tensor:
    return nn.functional.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)


@cache
def varlen_kernel(device: torch.device) -> VarLenKernel | None:
    """flash-attn's kernel for sequences of different lengths where it is installed, else torch's; None on a device that
    computes in float32, which neither can. RuntimeError if its results are wrong."""
    if compute_dtype(device) == torch.float32:
        return None
    kernel = _flash_attn if find_spec("flash_attn") is not None else _torch_varlen
    check_kernel(kernel, device)
    return kernel


def _flash_attn(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    query_starts: torch.Tensor,
    key_starts: torch.Tensor,
    longest_query: int,
    longest_key: int,
    scale: float | None,
    window: int | None,
) -> torch.Tensor:
    from flash_attn import flash_attn_varlen_func

    return flash_attn_varlen_func(
        query, key, value, query_starts, key_starts, longest_query, longest_key,
        softmax_scale=scale, causal=True, window_size=_window_size(window),
    )  # fmt: skip


def _torch_varlen(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    query_starts: torch.Tensor,
    key_starts: torch.Tensor,
    longest_query: int,
    longest_key: int,
    scale: float | None,
    window: int | None,
) -> torch.Tensor:
    from torch.nn.attention.varlen import varlen_attn

    grouped: dict[str, Any] = {"enable_gqa": True}
    if "enable_gqa" not in inspect.signature(varlen_attn).parameters:  # torch 2.11
        groups = query.shape[1] // key.shape[1]
        key, value, grouped = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1), {}
    output = varlen_attn(
        query, key, value, query_starts, key_starts, longest_query, longest_key,
        scale=scale, window_size=_window_size(window), **grouped,
    )  # fmt: skip
    assert isinstance(output, torch.Tensor)
    return output


def _window_size(window: int | None) -> tuple[int, int]:
    """Tokens seen to the left and to the right of a token, beside itself; -1: all."""
    return (-1 if window is None else window - 1, 0)


@torch.no_grad()
def check_kernel(kernel: VarLenKernel, device: torch.device) -> None:
    """RuntimeError unless `kernel` computes what `Buckets` does, on sequences of which one borrows, with a window and
    without."""
    placement = _example_placement()
    generator = torch.Generator().manual_seed(0)
    shape, dtype = (int((placement.lengths - placement.borrowed).sum()), 4, 32), compute_dtype(device)
    query, key, value = (torch.randn(shape, generator=generator).to(device, dtype) for _ in range(3))
    key, value = key[:, :2].contiguous(), value[:, :2].contiguous()
    for window in (None, 2):
        expected = Buckets(placement, device).attend(query, key, value, None, window)
        found = VarLen(placement, device, kernel).attend(query, key, value, None, window)
        difference = float((found - expected).abs().max())
        if not difference < 0.05:  # bfloat16 has steps of 1/64 at 2
            raise RuntimeError(
                f"attention over packed sequences is wrong by {difference:.2g} on this device and these versions of "
                "torch and flash-attn: set actor_rollout_ref.model.use_remove_padding=False"
            )


def _example_placement() -> Placement:
    """Three sequences in a row of 9 tokens; the second borrows the two first tokens of the first."""
    slots = torch.tensor([[0, 1, 2, 3, 4], [0, 1, 5, 6, 0], [7, 8, 0, 0, 0]])
    return Placement(slots, torch.tensor([5, 4, 2]), torch.tensor([0, 2, 0]))


# -------------------------------------------------------------------------------------------------- a model's attention
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


@torch.no_grad()
def use_packed_attention(lm: PreTrainedModel, model_path: str) -> None:
    """Put `packed_attention` in the place of every layer's attention; `lm` is on the CPU, as it was loaded.

    `lm.config` stays as it was: copies of the model that are made from it have their own attention. Sliding windows
    are honoured. ValueError for a model that cannot be packed; a trial tells.
    """
    placement, decoder, text_config = _example_placement(), lm.get_decoder(), lm.config.get_text_config()
    ids = torch.arange(9) % text_config.vocab_size
    sequences = [slots[:length] for slots, length in zip(placement.slots, placement.lengths, strict=True)]
    expected = [decoder(input_ids=ids[None, slots], use_cache=False).last_hidden_state[0] for slots in sequences]

    config = copy.deepcopy(lm.config)
    lm.set_attn_implementation(IMPLEMENTATION)
    lm.config = config

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
