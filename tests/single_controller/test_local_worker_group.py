from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.distributed as dist

from tests.single_controller.counting_worker import CountingWorker
from verl.protocol import DataProto
from verl.single_controller import Dispatch, LocalWorkerGroup, Worker, WorkerError, create_worker_group, register
from verl.trainer.config.schema import TrainerConfig
from verl.utils.device import available_cores

LOCAL = TrainerConfig(worker_group="local", n_gpus_per_node=1, device="cpu")


@pytest.fixture(autouse=True)
def keep_thread_count():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def batch(n_rows: int) -> DataProto:
    uid = np.array([f"q{i}" for i in range(n_rows)], object)
    return DataProto.from_dict({"x": torch.arange(n_rows), "uid": uid, "number": np.arange(n_rows)})


def test_methods_run_here_with_all_cores_and_a_process_group_of_one():
    with create_worker_group(LOCAL, CountingWorker, offset=1.0) as group:
        assert group.world_size == 1
        assert group.describe(suffix="!") == ["0/1 cpu!"]
        assert group.threads() == [(available_cores(), str(available_cores()))]
        assert group.sum_of_ranks() == 1.0
        out, metrics = group.square_with_metrics(batch(3))
        assert out["y"].tolist() == [1.0, 2.0, 5.0] and metrics == [{"rows": 3.0, "total": 3.0}]
        assert group.square(batch(3), rows=[[2, 0, 1]])["y"].tolist() == [1.0, 2.0, 5.0]
        assert len(group.square(batch(0))) == 0
    assert not dist.is_initialized()


def test_the_drivers_batch_is_never_written_to():
    data = batch(3)
    with LocalWorkerGroup(CountingWorker, device="cpu") as group:
        assert group.overwrite_rows(data)["x"].tolist() == [0, 0, 0]
        group.overwrite_all(data)
    assert data["x"].tolist() == [0, 1, 2] and data["number"].tolist() == [0, 1, 2]


def test_results_carry_no_graph():
    class Model(Worker):
        @register(Dispatch.ROWS)
        def forward(self, data: DataProto) -> DataProto:
            return DataProto.from_dict({"out": torch.nn.Linear(1, 1)(data["x"].float()[:, None])})

    with LocalWorkerGroup(Model, device="cpu") as group:
        assert not group.forward(batch(2))["out"].requires_grad


def test_exceptions_arrive_as_they_are():
    with LocalWorkerGroup(CountingWorker, device="cpu") as group:
        with pytest.raises(ValueError, match="row 7 is broken"):
            group.raise_on(0)
        with pytest.raises(ValueError, match="lose_a_row got 3 rows and returned 2; it must return one per row"):
            group.lose_a_row(batch(3))


def test_unknown_and_unregistered_methods_are_attribute_errors_with_the_workers_name():
    with LocalWorkerGroup(CountingWorker, device="cpu") as group:
        with pytest.raises(AttributeError, match="CountingWorker has no registered method 'updat_actor'; it has: desc"):
            group.updat_actor(batch(1))
        with pytest.raises(AttributeError, match="no registered method 'not_registered'"):
            group.not_registered()
        with pytest.raises(TypeError, match="unexpected keyword"):
            group.describe(rows=[[0]])


def test_names_of_the_group_itself_cannot_be_registered():
    class Clash(Worker):
        @register(Dispatch.ALL)
        def shutdown(self) -> None: ...

    with pytest.raises(ValueError, match="Clash.shutdown cannot be registered"):
        LocalWorkerGroup(Clash, device="cpu")


def test_two_groups_share_the_process_group_until_the_last_one_ends():
    first, second = (LocalWorkerGroup(CountingWorker, device="cpu") for _ in range(2))
    first.shutdown()
    first.shutdown()
    assert second.sum_of_ranks() == 1.0
    with pytest.raises(WorkerError, match="describe was called after the workers were shut down"):
        first.describe()
    second.shutdown()
    assert not dist.is_initialized()


def test_local_refuses_more_than_one_worker_and_unknown_groups_and_devices():
    with pytest.raises(ValueError, match="local has one worker, not trainer.n_gpus_per_node=8; set that to 1"):
        create_worker_group(replace(LOCAL, n_gpus_per_node=8), CountingWorker)
    with pytest.raises(ValueError, match="local has one worker, not trainer.nnodes=2"):
        create_worker_group(replace(LOCAL, nnodes=2), CountingWorker)
    with pytest.raises(ValueError, match="trainer.worker_group=thread is not a worker group; set it to ray or local"):
        create_worker_group(replace(LOCAL, worker_group="thread"), CountingWorker)
    with pytest.raises(ValueError, match="trainer.device=tpu is not a device; set it to auto, cuda or cpu"):
        create_worker_group(replace(LOCAL, device="tpu"), CountingWorker)
