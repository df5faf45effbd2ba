"""The global random generators of Python, numpy and torch in this process.

Nothing here draws from them (see `random`), but a user's reward, estimator or loss may: they are seeded at the start,
and their states are part of a checkpoint.
"""

import random
from typing import Any

import numpy as np
import torch

from verl.utils.random import hash_key


def seed_generators(*parts: object) -> None:
    """Seed all of them with a number made from `parts`."""
    key = hash_key(*parts) & (1 << 63) - 1
    # numpy's linter would rather have generators that are passed along; the global one is the subject here.
    random.seed(key)
    np.random.seed(key & 0xFFFFFFFF)  # noqa: NPY002
    torch.manual_seed(key)


def generator_states() -> dict[str, Any]:
    """Their states; of the GPU's too, once this process uses one."""
    states = {"python": random.getstate(), "numpy": np.random.get_state(), "torch": torch.get_rng_state()}  # noqa: NPY002
    return states | ({"cuda": torch.cuda.get_rng_state()} if torch.cuda.is_initialized() else {})


def restore_generators(states: dict[str, Any]) -> None:
    """Go on from what `generator_states` returned."""
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])  # noqa: NPY002
    torch.set_rng_state(states["torch"])
    if "cuda" in states and torch.cuda.is_initialized():
        torch.cuda.set_rng_state(states["cuda"])
