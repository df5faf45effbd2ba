from collections.abc import Iterator

import pytest

from verl.trainer.ppo.registry import one_thread


@pytest.fixture(autouse=True)
def single_thread() -> Iterator[None]:
    """Tensors are small here; on a busy machine several threads are many times slower than one."""
    with one_thread():
        yield
