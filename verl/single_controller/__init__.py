"""One driver, many workers: how its calls reach them and what comes back.

`ray_worker_group` is imported where it is used, so that a `local` group works without Ray.
"""

from verl.single_controller.dispatch import Dispatch, register
from verl.single_controller.worker import Worker
from verl.single_controller.worker_group import (
    LocalWorkerGroup,
    WorkerDied,
    WorkerError,
    WorkerGroup,
    create_worker_group,
)

__all__ = [
    "Dispatch",
    "LocalWorkerGroup",
    "Worker",
    "WorkerDied",
    "WorkerError",
    "WorkerGroup",
    "create_worker_group",
    "register",
]
