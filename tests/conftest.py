from collections.abc import Iterator
from pathlib import Path

import pytest

from data_processing import make_arithmetic, make_tiny_model


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """One Ray cluster for all tests of a session, with 4 logical cores whatever the machine has."""
    import ray

    from verl.single_controller.ray_worker_group import ensure_ray

    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("RAY_ADDRESS", raising=False)
        started = ensure_ray(num_cpus=4)
    yield
    if started:
        ray.shutdown()


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face folder of a random model that any test may train: hidden 64, 2 layers, 2 heads of size 32."""
    folder = tmp_path_factory.mktemp("tiny_model")
    sizes = ["--intermediate-size", "64"]
    make_tiny_model.main(
        ["--output-dir", str(folder), "--hidden-size", "64", "--layers", "2", "--heads", "2", "--kv-heads", "1", *sizes]
    )
    return folder


@pytest.fixture(scope="session")
def arithmetic_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small arithmetic ladder: train.parquet, val.parquet, sft.parquet."""
    folder = tmp_path_factory.mktemp("arithmetic")
    slips = ["--slip-rate", "0.05", "0.15", "0.25"]
    sizes = ["--train-size", "60", "--val-size", "12", "--sft-size", "200"]
    make_arithmetic.main(["--output-dir", str(folder), "--levels", "1", "2", "3", *slips, *sizes])
    return folder
