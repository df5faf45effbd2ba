"""A group of workers as the driver sees it, and the group that is one worker in the driver's own process."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

from verl.single_controller.dispatch import Dispatch, Rows, collect, partition_rows, registered_methods, run_method
from verl.single_controller.worker import Place, Worker
from verl.utils.device import resolve_device, share_cores


class WorkerError(RuntimeError):
    """A worker failed. One line says rank, node, method and cause; `__cause__` carries the worker's traceback."""


class WorkerDied(WorkerError):
    """The process of a worker is gone: killed, out of memory, or crashed."""


def nothing() -> None:
    """What the driver does while it waits, unless told otherwise."""


@dataclass(frozen=True)
class Call:
    """One call of all workers: what `WorkerGroup.call` was given; `rows` as in `partition_rows`, None for all."""

    method: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    rows: Rows | None
    timeout_s: float | None
    meanwhile: Callable[[], None]


class WorkerGroup:
    """`group.method(...)` calls a registered method of the worker class on all workers (see `dispatch`)."""

    def __init__(self, worker_cls: type[Worker], world_size: int) -> None:
        self.worker_cls = worker_cls
        self.world_size = world_size
        self.methods = registered_methods(worker_cls)
        for name in self.methods:
            if name in vars(self) or hasattr(type(self), name):
                raise ValueError(f"{worker_cls.__name__}.{name} cannot be registered: worker groups use that name")

    def __getattr__(self, name: str) -> Any:
        methods = self.__dict__.get("methods", {})
        if name in methods:
            return partial(self.call, name)
        cls = self.__dict__.get("worker_cls", type(self))
        known = ", ".join(sorted(methods)) or "none"
        raise AttributeError(f"{cls.__name__} has no registered method {name!r}; it has: {known}")

    def call(self, method: str, /, *args: Any, **kwargs: Any) -> Any:
        """Run a registered method on all workers and bring the results back as its dispatch says.

        `timeout_s`: a TimeoutError if they take longer; None: no limit (a dead worker is noticed at once all the same).
        `meanwhile`: called in the driver while the workers compute.
        """
        dispatch = self.methods[method]
        rows = None
        timeout_s, meanwhile = kwargs.pop("timeout_s", None), kwargs.pop("meanwhile", nothing)
        if dispatch is Dispatch.ROWS:
            rows = partition_rows(method, args, kwargs.pop("rows", None), self.world_size)
        return collect(method, dispatch, self._run(Call(method, args, kwargs, rows, timeout_s, meanwhile)), rows)

    def _run(self, call: Call) -> list[Any]:
        """The workers' results, by rank."""
        raise NotImplementedError

    def shutdown(self) -> None:
        """End the workers. Further calls fail; a second shutdown does nothing."""
        raise NotImplementedError

    def __enter__(self) -> "WorkerGroup":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.shutdown()


class LocalWorkerGroup(WorkerGroup):
    """One worker in this process: breakpoints work, its exceptions arrive as they are, and Ray is not needed."""

    def __init__(
        self,
        worker_cls: type[Worker],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
        *,
        device: str = "auto",
    ) -> None:
        super().__init__(worker_cls, world_size=1)
        place = Place(rank=0, world_size=1, local_rank=0, local_world_size=1, device=resolve_device(device))
        self.worker: Worker | None = worker_cls(*args, **(kwargs or {}))
        self.worker.setup_distributed(place)

    def _run(self, call: Call) -> list[Any]:
        if self.worker is None:
            raise WorkerError(f"{call.method} was called after the workers were shut down")
        call.meanwhile()  # before: the worker is this process
        rows = None if call.rows is None else call.rows[0]
        return [run_method(self.worker, call.method, call.args, call.kwargs, rows)]

    def shutdown(self) -> None:
        if self.worker is not None:
            self.worker.close()
            self.worker = None


class WorkerGroupConfig(Protocol):
    """The keys that a `trainer` section has for its workers."""

    worker_group: str
    nnodes: int
    n_gpus_per_node: int
    device: str
    start_timeout_s: int


def create_worker_group(config: WorkerGroupConfig, worker_cls: type[Worker], *args: Any, **kwargs: Any) -> WorkerGroup:
    """The group that `trainer.*` describes, of workers built as `worker_cls(*args, **kwargs)`."""
    if config.worker_group == "ray":
        from verl.single_controller.ray_worker_group import RayWorkerGroup

        # Threads of the driver wait for each other busily, and would take their cores from the workers.
        share_cores(config.n_gpus_per_node + 1)
        return RayWorkerGroup(
            worker_cls,
            args,
            kwargs,
            n_workers_per_node=config.n_gpus_per_node,
            nnodes=config.nnodes,
            device=config.device,
            start_timeout_s=config.start_timeout_s,
        )
    if config.worker_group != "local":
        raise ValueError(f"trainer.worker_group={config.worker_group} is not a worker group; set it to ray or local")
    for name in ("nnodes", "n_gpus_per_node"):
        if (value := getattr(config, name)) != 1:
            raise ValueError(f"trainer.worker_group=local has one worker, not trainer.{name}={value}; set that to 1")
    return LocalWorkerGroup(worker_cls, args, kwargs, device=config.device)
