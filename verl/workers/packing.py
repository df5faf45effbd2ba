"""Packed rows: sequences side by side in one row of tokens, and how each attends to itself alone.

Sequences that begin with the same prompt share its tokens: the prompt is computed once for all its responses. That
changes nothing but rounding, since under causal attention a prompt's hidden states do not depend on what follows.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from typing import Any, Protocol

import torch
from torch.nn.functional import pad, scaled_dot_product_attention

from verl.utils.device import compute_dtype

# Shorter sequences with fewer scores: a CPU is faster with all scores at once than block by block.
PLAIN_LENGTH, PLAIN_SCORES = 128, 1 << 22
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
            if shape[1] < PLAIN_LENGTH and q.shape[:3].numel() * shape[1] <= PLAIN_SCORES:
                output = plain_attention(q, k, v, mask, scale)
            else:
                output = scaled_dot_product_attention(
                    q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=True
                )
            outputs.append(output.transpose(1, 2).flatten(0, 1))
        return torch.cat(outputs).index_select(0, self.back)


def plain_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, scale: float | None
) -> torch.Tensor:
    """What `scaled_dot_product_attention` computes, by way of all scores: (R, heads, L, L) of them. mask: (L, L) bool,
    what a token sees; None: itself and all before it."""
    length, kv_heads = query.shape[2], key.shape[1]
    if mask is None:
        mask = torch.ones(length, length, dtype=torch.bool, device=query.device).tril()
    unseen = torch.zeros(mask.shape, dtype=query.dtype, device=query.device).masked_fill(~mask, float("-inf"))
    grouped = query.unflatten(1, (kv_heads, -1)).flatten(2, 3)  # the queries of a key-value head, side by side
    scores = (grouped @ key.transpose(-1, -2)).unflatten(2, (-1, length))
    scores = scores * (query.shape[-1] ** -0.5 if scale is None else scale) + unseen
    output = scores.softmax(-1).flatten(2, 3) @ value
    return output.unflatten(2, (-1, length)).flatten(1, 2)


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
    return pad(lengths.cumsum(0), (1, 0)).to(torch.int32)


@cache
def varlen_kernel(device: torch.device) -> VarLenKernel | None:
    """flash-attn's kernel for sequences of different lengths where it is installed, else torch's; None on a device that
    computes in float32, which neither can. RuntimeError if its results are wrong."""
    if compute_dtype(device) == torch.float32:
        return None
    kernel = flash_varlen if find_spec("flash_attn") is not None else torch_varlen
    check_kernel(kernel, device)
    return kernel


def flash_varlen(
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
    """flash-attn's kernel. query_starts, key_starts: (R + 1,) int32, where each sequence begins, and the end."""
    from flash_attn import flash_attn_varlen_func

    return flash_attn_varlen_func(
        query, key, value, query_starts, key_starts, longest_query, longest_key,
        softmax_scale=scale, causal=True, window_size=_window_size(window),
    )  # fmt: skip


def torch_varlen(
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
    """torch's kernel, 2.11 to 2.13; see `flash_varlen`."""
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
    placement = example_placement()
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


def example_placement() -> Placement:
    """Three sequences in a row of 9 tokens; the second borrows the two first tokens of the first."""
    slots = torch.tensor([[0, 1, 2, 3, 4], [0, 1, 5, 6, 0], [7, 8, 0, 0, 0]])
    return Placement(slots, torch.tensor([5, 4, 2]), torch.tensor([0, 2, 0]))
