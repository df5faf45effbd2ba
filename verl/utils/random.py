"""Random draws that depend on what is drawn, not on who draws it or when.

A row's key is a hash of (seed, step, uid, sample); its t-th uniform number is a hash of the key and t. So any number of
workers, in any order, draws the same numbers, and a resumed run draws what the uninterrupted one would have drawn.
"""

import hashlib
from collections.abc import Sequence

import numpy as np
import torch

_GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)  # 64-bit constants as the signed integers that torch has
_MIX_1 = 0xBF58476D1CE4E5B9 - (1 << 64)
_MIX_2 = 0x94D049BB133111EB - (1 << 64)


def hash_key(*parts: object) -> int:
    """A signed 64-bit integer from the text of `parts`."""
    digest = hashlib.blake2b("\x1f".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def row_keys(seed: int, step: int, uid: Sequence[str], sample_index: Sequence[int]) -> np.ndarray:
    """(N,) int64 keys of the rows of a batch."""
    return np.array([hash_key(seed, step, u, s) for u, s in zip(uid, sample_index, strict=True)], dtype=np.int64)


def generator(*parts: object) -> np.random.Generator:
    """A numpy generator for draws made once a step, keyed like a row."""
    return np.random.default_rng(hash_key(*parts) & (1 << 64) - 1)


def _shift_right(x: torch.Tensor, bits: int) -> torch.Tensor:
    return (x >> bits) & ((1 << (64 - bits)) - 1)  # torch's shift of a signed integer copies the sign


def uniform(keys: torch.Tensor, position: int) -> torch.Tensor:
    """(R,) float64 in [0, 1): number `position` of each key's sequence, by the splitmix64 finaliser."""
    x = keys + (position + 1) * _GOLDEN % (1 << 63)
    x = (x ^ _shift_right(x, 30)) * _MIX_1
    x = (x ^ _shift_right(x, 27)) * _MIX_2
    x = x ^ _shift_right(x, 31)
    return _shift_right(x, 11).to(torch.float64) * 2.0**-53
