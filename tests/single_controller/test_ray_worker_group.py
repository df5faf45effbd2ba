"""Real Ray actors and gloo process groups; a group takes a few seconds to start, so tests share one where they can."""

import time
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import ray
import torch

from tests.single_controller.counting_worker import CountingWorker, SlowToStartWorker, UnbuildableWorker
from verl.protocol import DataProto
from verl.single_controller import LocalWorkerGroup, WorkerDied, WorkerError, WorkerGroup, create_worker_group
from verl.single_controller.ray_worker_group import RayWorkerGroup, check_resources, ensure_ray
from verl.trainer.config.schema import TrainerConfig
from verl.utils.device import available_cores

TWO = TrainerConfig(n_gpus_per_node=2, device="cpu", start_timeout_s=60)
# Slow: starts a Ray cluster and many workers.
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("ray_cluster")]


def batch(n_rows: int) -> DataProto:
    uid = np.array([f"q{i}" for i in range(n_rows)], object)
    return DataProto.from_dict({"x": torch.arange(n_rows), "uid": uid, "number": np.arange(n_rows)})


@pytest.fixture(scope="module")
def started(ray_cluster: None) -> Iterator[list[WorkerGroup]]:
    groups: list[WorkerGroup] = []
    yield groups
    for group in groups:
        group.shutdown()


@pytest.fixture
def group(started: list[WorkerGroup], monkeypatch: pytest.MonkeyPatch) -> WorkerGroup:
    """Two workers, shared by the tests until one of them breaks it."""
    try:
        started[-1].describe()
    except (IndexError, WorkerError):
        monkeypatch.setenv("OMP_NUM_THREADS", "13")
        started.append(create_worker_group(TWO, CountingWorker, offset=1.0))
    return started[-1]


def test_all_and_rank_zero(group: WorkerGroup):
    assert group.world_size == 2
    assert group.describe("!") == ["0/2 cpu!", "1/2 cpu!"]
    assert group.sum_of_ranks() == 3.0  # 1 + 2, by a collective of both ranks


def test_workers_share_the_cores_whatever_the_driver_set(group: WorkerGroup):
    threads = max(1, available_cores() // 2)
    assert group.threads() == [(threads, str(threads))] * 2


def test_rows_come_back_in_the_callers_order(group: WorkerGroup):
    data = batch(5)
    out = group.square(data, scale=2.0)
    assert out["y"].tolist() == [2.0 * i * i + 1.0 for i in range(5)]
    assert out["rank"].tolist() == [0, 0, 0, 1, 1] and out.meta_info == {"of": "y"}
    out = group.square(data, rows=[[4, 1], np.array([0, 3, 2])])
    assert out["y"].tolist() == [i * i + 1.0 for i in range(5)] and out["uid"].tolist() == data["uid"].tolist()
    assert out["rank"].tolist() == [1, 0, 1, 1, 0]
    out["y"].zero_()
    out["rank"][:] = 0  # the driver owns what it gets


def test_a_rank_may_have_no_rows(group: WorkerGroup):
    for rows in ([[], [0, 1]], [[1, 0], []]):
        out, metrics = group.square_with_metrics(batch(2), rows=rows)
        assert out["y"].tolist() == [1.0, 2.0]
        assert metrics == [{"rows": float(len(r)), "total": 1.0} for r in rows]
        assert group.longest(batch(4), rows=[[], [0, 1, 2, 3]])["wide"].shape == (4, 3)
    assert len(group.square(batch(0))) == 0


def test_metrics_come_by_rank(group: WorkerGroup):
    assert group.metrics_only(batch(3)) == [{"rows": 2.0, "total": 3.0}, {"rows": 1.0, "total": 3.0}]


def test_the_driver_works_while_the_workers_compute(group: WorkerGroup, tmp_path):
    """They wait for what it does meanwhile."""
    assert group.wait_for(str(tmp_path / "file"), meanwhile=(tmp_path / "file").touch) == [True, True]


def test_the_drivers_batch_is_never_written_to(group: WorkerGroup):
    data = batch(4)
    assert group.overwrite_rows(data)["x"].tolist() == [0] * 4
    group.overwrite_all(data)
    assert data["x"].tolist() == [0, 1, 2, 3] and data["number"].tolist() == [0, 1, 2, 3]


def test_a_batch_enters_the_object_store_once(group: WorkerGroup, monkeypatch: pytest.MonkeyPatch):
    stored = []
    put = ray.put
    monkeypatch.setattr(ray, "put", lambda value: stored.append(value) or put(value))
    group.square(batch(4))
    assert len(stored) == 1


def test_no_room_ends_in_a_time_out_that_names_the_shortfall(group: WorkerGroup):
    with pytest.raises(TimeoutError, match=r"no place for 3 workers .*need 3 CPU .*free in the whole cluster: 2 CPU"):
        RayWorkerGroup(CountingWorker, n_workers_per_node=3, device="cpu", start_timeout_s=1)


def test_world_size_one_equals_local_and_exceptions_name_rank_and_cause():
    x = torch.randn(64, 33, generator=torch.Generator().manual_seed(0))
    data = DataProto.from_dict({"x": x, "uid": np.arange(64)})
    threads = torch.get_num_threads()
    with LocalWorkerGroup(CountingWorker, (0.1,), device="cpu") as local:
        expected = local.square(data)
    torch.set_num_threads(threads)
    with create_worker_group(replace(TWO, n_gpus_per_node=1), CountingWorker, 0.1) as remote:
        assert torch.equal(remote.square(data)["y"], expected["y"])
        with pytest.raises(WorkerError, match=r"raise_unpicklable failed on rank 0 on .*this and that"):
            remote.raise_unpicklable()


def test_a_worker_that_raises_surfaces_though_the_other_rank_hangs(group: WorkerGroup):
    start = time.monotonic()
    with pytest.raises(
        WorkerError, match=r"^raise_on failed on rank 1 on \S+ \(pid \d+\): ValueError: row 7 is broken by 1$"
    ) as caught:
        group.raise_on(1)
    assert time.monotonic() - start < 20  # not the collectives' time-out
    assert not isinstance(caught.value, WorkerDied)
    assert "counting_worker.py" in str(caught.value.__cause__)  # the worker's own traceback
    with pytest.raises(
        WorkerError, match="describe was called after the workers were killed: raise_on failed on rank 1"
    ):
        group.describe()
    group.shutdown()


def test_a_worker_that_dies_is_named_though_the_other_rank_fails_of_it(group: WorkerGroup):
    start = time.monotonic()
    with pytest.raises(
        WorkerDied, match=r"^rank 1 on \S+ \(pid \d+\) died in exit_on \(killed, out of memory, or crash"
    ):
        group.exit_on(1)
    assert time.monotonic() - start < 20


def test_workers_that_cannot_be_built_or_are_late_fail_the_start():
    with pytest.raises(WorkerError, match=r"start failed on rank 0 on .*FileNotFoundError: no model at nowhere"):
        create_worker_group(replace(TWO, n_gpus_per_node=1), UnbuildableWorker, "nowhere")
    with pytest.raises(TimeoutError, match=r"rank 0 did not finish start in time; raise trainer.start_timeout_s"):
        create_worker_group(replace(TWO, n_gpus_per_node=1, start_timeout_s=2), SlowToStartWorker)


def test_more_workers_than_the_cluster_has_are_refused_before_anything_starts():
    with pytest.raises(
        ValueError,
        match="=64 asks for 64 workers, one CPU core each, but this node has 4; set trainer.n_gpus_per_node=4",
    ):
        create_worker_group(replace(TWO, n_gpus_per_node=64), CountingWorker)
    with pytest.raises(ValueError, match="trainer.device=cuda, but there is no usable GPU; set trainer.device=cpu"):
        create_worker_group(replace(TWO, device="cuda"), CountingWorker)


@pytest.mark.parametrize(
    ("nodes", "n", "nnodes", "device", "message"),
    [
        ([{"CPU": 8.0}], 0, 1, "cpu", "trainer.n_gpus_per_node=0 leaves no worker"),
        ([{"CPU": 8.0}], 1, 2, "cpu", "trainer.nnodes=2, but the Ray cluster has 1; .* set trainer.nnodes=1"),
        (
            [{"CPU": 4.0}, {"CPU": 2.0}],
            4,
            2,
            "cpu",
            "on 2 nodes, but only 1 of 2 nodes have that many; set trainer.n_gpus_per_node=2",
        ),
        ([{"CPU": 9.0, "GPU": 2.0}], 4, 1, "cuda", "one GPU and CPU core each, but this node has 2; set"),
        ([{"CPU": 0.0}], 1, 1, "cpu", "but this node has 0; start Ray with more of them"),
    ],
)
def test_shortfalls_are_named(nodes, n, nnodes, device, message):
    with pytest.raises(ValueError, match=message):
        check_resources(nodes, n, nnodes, device)


@pytest.mark.parametrize("address", ["127.0.0.1:1", "nonsense"])
def test_an_address_without_a_cluster_is_refused(monkeypatch: pytest.MonkeyPatch, address: str):
    monkeypatch.setenv("RAY_ADDRESS", address)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    with pytest.raises(ValueError, match=f"no Ray cluster at {address} .*; run `ray start` on each node first"):
        ensure_ray()


def test_a_cluster_that_just_suffices_passes():
    check_resources([{"CPU": 1.0}, {"CPU": 4.0, "GPU": 4.0}, {"CPU": 5.0, "GPU": 4.0}], 4, 2, "cuda")
