"""A test of this folder is skipped, with the reason, where the GPUs or the vLLM that it needs are not there.

`@pytest.mark.gpu(2)` needs two GPUs; without a number, one. They need vLLM too, unless marked `vllm=False`.
"""

from importlib import metadata

import pytest


def missing(gpus: int = 1, vllm: bool = True) -> str | None:
    """What this machine lacks, in one line; None: nothing."""
    import torch

    if (found := torch.cuda.device_count()) < gpus:
        return f"needs {gpus} GPU{'s' if gpus > 1 else ''}, this machine has {found}"
    if not vllm:
        return None
    try:
        metadata.version("vllm")
    except metadata.PackageNotFoundError:
        return "needs vLLM for GPUs: pip install 'vllm==0.32.*'"
    return None


@pytest.hookimpl(tryfirst=True)  # before fixtures, which start engines
def pytest_runtest_setup(item: pytest.Item) -> None:
    marker = item.get_closest_marker("gpu")
    assert marker is not None, f"{item.nodeid}: mark it with pytest.mark.gpu"
    if (reason := missing(*marker.args, **marker.kwargs)) is not None:
        pytest.skip(reason)
