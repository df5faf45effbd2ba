import os

import pytest
import torch

from verl.utils import device


def test_auto_is_cuda_where_there_is_one_and_a_missing_gpu_is_refused():
    assert device.resolve_device("auto", has_gpu=True) == "cuda"
    assert device.resolve_device("auto", has_gpu=False) == "cpu"
    assert device.resolve_device("cpu", has_gpu=True) == "cpu"
    assert device.resolve_device("auto") == ("cuda" if torch.cuda.is_available() else "cpu")
    with pytest.raises(ValueError, match="trainer.device=cuda, but there is no usable GPU; set trainer.device=cpu"):
        device.resolve_device("cuda", has_gpu=False)
    with pytest.raises(ValueError, match="trainer.device=gpu is not a device; set it to auto, cuda or cpu"):
        device.resolve_device("gpu")


@pytest.mark.parametrize(("quota", "cores"), [("max 100000", 8), ("250000 100000", 2), ("50000 100000", 1)])
def test_cores_are_bounded_by_affinity_and_by_the_containers_quota(tmp_path, monkeypatch, quota, cores):
    (tmp_path / "cpu.max").write_text(quota + "\n")
    monkeypatch.setattr(device, "CPU_QUOTA", tmp_path / "cpu.max")
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    assert device.available_cores() == cores


@pytest.mark.parametrize(("workers", "threads"), [(1, 8), (3, 2), (16, 1)])
def test_workers_of_a_node_share_its_cores(monkeypatch, workers, threads):
    before = torch.get_num_threads()
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    monkeypatch.setattr(device, "available_cores", lambda: 8)
    try:
        assert device.share_cores(workers) == threads == torch.get_num_threads()
        assert os.environ["OMP_NUM_THREADS"] == str(threads)
    finally:
        torch.set_num_threads(before)


def test_memory_of_this_process_is_reported():
    gib = device.memory_metrics(torch.device("cpu"))["perf/max_cpu_memory_gb"]
    assert 0.05 < gib < 100
