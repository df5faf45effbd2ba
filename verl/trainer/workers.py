"""Starts the workers that the configuration asks for."""

from typing import Any

from verl.single_controller.worker import Worker
from verl.single_controller.worker_group import LocalWorkerGroup, WorkerGroup


def start_workers(
    worker_cls: type[Worker],
    args: tuple[Any, ...],
    *,
    kind: str,
    nnodes: int,
    n_workers_per_node: int,
    device: str,
    start_timeout_s: float,
) -> WorkerGroup:
    """A `local` group of one worker in this process, or a `ray` group."""
    if kind == "local":
        return LocalWorkerGroup(worker_cls, args, device=device)
    from verl.single_controller.ray_worker_group import RayWorkerGroup  # a local run needs no Ray

    return RayWorkerGroup(
        worker_cls,
        args,
        n_workers_per_node=n_workers_per_node,
        nnodes=nnodes,
        device=device,
        start_timeout_s=start_timeout_s,
    )
