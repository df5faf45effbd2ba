"""Workers as Ray actors: checked and placed before they start, watched while they run.

Each worker claims one CPU core, and one GPU where the device is cuda. The driver, scorers and rollout engines claim
none: with every core claimed by a worker, another actor claiming one would never be placed.
"""

import logging
import os
import socket
import sys
import time
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import ray
import torch.distributed as dist
from ray.exceptions import NodeDiedError, OutOfMemoryError, RayActorError, RayError, RayTaskError, WorkerCrashedError
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from verl.single_controller.dispatch import run_method
from verl.single_controller.worker import Place, Worker
from verl.single_controller.worker_group import Call, WorkerDied, WorkerError, WorkerGroup
from verl.utils.device import available_cores, resolve_device

CLOSE_TIMEOUT_S = 30.0
# A death breaks the collectives of the other ranks, whose errors may arrive first: wait this long for the real cause.
BLAME_S = 3.0
DEATHS = (RayActorError, WorkerCrashedError, NodeDiedError, OutOfMemoryError)

CLAIMS: dict[str, dict[str, float]] = {"cpu": {"CPU": 1}, "cuda": {"CPU": 1, "GPU": 1}}
UNITS = {"cpu": "CPU core", "cuda": "GPU and CPU core"}
FORWARDED = ("HF_", "NCCL_", "GLOO_", "TORCH_", "PYTORCH_", "TOKENIZERS_", "VLLM_", "TRITON_")


def ensure_ray(nnodes: int = 1, num_cpus: int | None = None) -> bool:
    """Join the cluster that RAY_ADDRESS names (or, for several nodes, the one running here), else start one here.

    Returns whether one was started; its owner calls `ray.shutdown()`. `num_cpus`: cores of a cluster started here.
    """
    if ray.is_initialized():
        return False
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # else Ray hides GPUs from actors that claim none
    address = os.environ.get("RAY_ADDRESS") or ("auto" if nnodes > 1 else "local")
    if address == "local":
        ray.init(
            address="local",
            num_cpus=num_cpus or available_cores(),
            include_dashboard=False,
            logging_level=logging.ERROR,
        )
        return True
    try:
        if address != "auto" and "://" not in address:  # Ray itself would retry a dead address for minutes
            host, _, port = address.rpartition(":")
            socket.create_connection((host, int(port)), timeout=10).close()
        ray.init(address=address, logging_level=logging.ERROR)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"no Ray cluster at {address} ({_one_line(error)}); run `ray start` on each node first "
            "(scripts/start_ray.sh; if it has a token, set RAY_AUTH_MODE=token), or for one node unset RAY_ADDRESS and "
            "set trainer.nnodes=1"
        ) from error
    return False


def _node_resources() -> list[dict[str, float]]:
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def ray_device(name: str) -> str:
    """`trainer.device` as `cpu` or `cuda`, by what the nodes of the cluster have."""
    return resolve_device(name, has_gpu=any(node.get("GPU", 0) for node in _node_resources()))


def check_resources(nodes: Sequence[dict[str, float]], n_workers_per_node: int, nnodes: int, device: str) -> None:
    """Refuse what the cluster can never place. `nodes`: total resources of each node that is up, as Ray names them."""
    for name, value in (("n_gpus_per_node", n_workers_per_node), ("nnodes", nnodes)):
        if value < 1:
            raise ValueError(f"trainer.{name}={value} leaves no worker; set it to at least 1")
    if len(nodes) < nnodes:
        raise ValueError(
            f"trainer.nnodes={nnodes}, but the Ray cluster has {len(nodes)}; "
            f"start Ray on the others or set trainer.nnodes={len(nodes)}"
        )
    claim = CLAIMS[device]
    room = sorted((int(min(node.get(k, 0) // v for k, v in claim.items())) for node in nodes), reverse=True)
    most = room[nnodes - 1]
    if most >= n_workers_per_node:
        return
    if len(nodes) == 1:
        has = f"this node has {most}"
    else:
        has = f"only {sum(r >= n_workers_per_node for r in room)} of {len(nodes)} nodes have that many"
    asks = f"{n_workers_per_node} workers, one {UNITS[device]} each" + (f", on {nnodes} nodes" if nnodes > 1 else "")
    remedy = f"set trainer.n_gpus_per_node={most}" if most else "start Ray with more of them"
    raise ValueError(f"trainer.n_gpus_per_node={n_workers_per_node} asks for {asks}, but {has}; {remedy}")


class WorkerHost:
    """The Ray actor around one worker. It is bare at first, so that a worker class that cannot be built is an error
    of a call like any other."""

    def __init__(self, label: str) -> None:
        self.label = label
        self.store: dist.Store | None = None

    def __repr__(self) -> str:  # Ray's prefix of what the worker prints
        return self.label

    def locate(self) -> tuple[str, int]:
        """Node address and process id."""
        return ray.util.get_node_ip_address(), os.getpid()

    def open_store(self, address: str, world_size: int, timeout_s: float) -> int:
        """Serve the rendezvous of all ranks; returns the port (free, as the system chose it)."""
        timeout = timedelta(seconds=timeout_s)
        store = dist.TCPStore(address, 0, world_size, is_master=True, wait_for_workers=False, timeout=timeout)
        self.store = store
        return store.port

    def start(
        self,
        worker_cls: type[Worker],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        place: Place,
        master: tuple[str, int] | None,
        timeout_s: float,
    ) -> None:
        """Build the worker and join the process group (`master`: address and port of the store; None: alone)."""
        if master and self.store is None:
            timeout = timedelta(seconds=timeout_s)
            self.store = dist.TCPStore(*master, place.world_size, is_master=False, timeout=timeout)
        self.worker = worker_cls(*args, **kwargs)
        self.worker.setup_distributed(place, self.store)

    def execute(self, call: tuple[str, tuple[Any, ...], dict[str, Any]], rows: np.ndarray | None) -> Any:
        method, args, kwargs = call
        return run_method(self.worker, method, args, kwargs, rows)

    def close(self) -> None:
        self.worker.close()


class RayWorkerGroup(WorkerGroup):
    """`nnodes` times `n_workers_per_node` workers, each a Ray actor; ranks count node by node.

    Raises ValueError if the cluster is too small, TimeoutError if it has no room or workers do not start in time,
    WorkerError if a worker fails. After a failure all workers are killed: the others may hang in a collective.
    """

    def __init__(
        self,
        worker_cls: type[Worker],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
        *,
        n_workers_per_node: int = 1,
        nnodes: int = 1,
        device: str = "auto",
        start_timeout_s: float = 300.0,
    ) -> None:
        super().__init__(worker_cls, n_workers_per_node * nnodes)
        ensure_ray(nnodes)
        nodes = _node_resources()
        device = ray_device(device)
        check_resources(nodes, n_workers_per_node, nnodes, device)
        self._hosts: list[Any] = []
        self._where = ["an unknown node"] * self.world_size
        self._over: str | None = None
        deadline = time.monotonic() + start_timeout_s
        # One bundle per node, so that a node's workers are together and each bundle is on a node of its own.
        bundle = {name: amount * n_workers_per_node for name, amount in CLAIMS[device].items()}
        self._placement = placement_group([bundle] * nnodes, strategy="STRICT_SPREAD")
        try:
            self._wait_for_placement(bundle, nnodes, start_timeout_s)
            self._start_hosts(n_workers_per_node, CLAIMS[device])
            self._start_workers(args, kwargs or {}, n_workers_per_node, device, deadline)
        except BaseException:
            self._kill("the workers did not start")
            raise

    # ------------------------------------------------------------------------------------------------- starting
    def _wait_for_placement(self, bundle: dict[str, float], nnodes: int, timeout_s: float) -> None:
        if self._placement.wait(timeout_s):
            return
        free = ray.available_resources()
        asked = " and ".join(f"{amount:g} {name}" for name, amount in bundle.items())
        left = " and ".join(f"{free.get(name, 0):g} {name}" for name in bundle)
        raise TimeoutError(
            f"no place for {self.world_size} workers in trainer.start_timeout_s={timeout_s:g}: they need {asked} "
            f"on each of {nnodes} node(s), free in the whole cluster: {left}; end what holds the rest, or wait longer"
        )

    def _start_hosts(self, n_workers_per_node: int, claim: dict[str, float]) -> None:
        actor_cls = ray.remote(WorkerHost)
        for rank in range(self.world_size):
            options = actor_cls.options(
                num_cpus=claim["CPU"],
                num_gpus=claim.get("GPU", 0),
                scheduling_strategy=PlacementGroupSchedulingStrategy(self._placement, rank // n_workers_per_node),
                runtime_env={"env_vars": worker_environment()},
            )
            self._hosts.append(options.remote(f"{self.worker_cls.__name__} rank={rank}"))

    def _start_workers(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], n_local: int, device: str, deadline: float
    ) -> None:
        located = self._gather("start", [host.locate.remote() for host in self._hosts], deadline)
        self._where = [f"{address} (pid {pid})" for address, pid in located]
        master = None
        timeout_s = max(1.0, deadline - time.monotonic())
        if self.world_size > 1:
            address = located[0][0]
            port = self._gather(
                "start", [self._hosts[0].open_store.remote(address, self.world_size, timeout_s)], deadline
            )[0]
            master = (address, port)
        refs = []
        for rank, host in enumerate(self._hosts):
            place = Place(rank, self.world_size, rank % n_local, n_local, device)
            refs.append(host.start.remote(self.worker_cls, args, kwargs, place, master, timeout_s))
        self._gather("start", refs, deadline)

    # -------------------------------------------------------------------------------------------------- calling
    def _run(self, call: Call) -> list[Any]:
        if self._over:
            raise WorkerError(f"{call.method} was called after {self._over}")
        sent: Any = (call.method, call.args, call.kwargs)
        if call.args:  # a batch is stored once, for all workers
            sent = ray.put(sent)
        shares = [None] * self.world_size if call.rows is None else call.rows
        refs = [host.execute.remote(sent, share) for host, share in zip(self._hosts, shares, strict=True)]
        try:
            call.meanwhile()
            deadline = None if call.timeout_s is None else time.monotonic() + call.timeout_s
            return self._gather(call.method, refs, deadline)
        except BaseException as error:  # an interrupt too: the workers would go on computing
            self._kill(f"the workers were killed: {error}")
            raise

    def _gather(self, method: str, refs: list[Any], deadline: float | None = None) -> list[Any]:
        """Results by rank, watching all ranks at once: the first failure of any is raised, whatever the others do."""
        results: list[Any] = [None] * len(refs)
        failures: dict[int, RayError] = {}
        pending = refs
        while pending and not any(isinstance(error, DEATHS) for error in failures.values()):
            remaining = None if deadline is None else max(0.0, deadline - time.monotonic())
            ready, pending = ray.wait(pending, num_returns=1, timeout=remaining)
            if not ready:
                break
            rank = refs.index(ready[0])
            try:
                results[rank] = ray.get(ready[0])
            except RayError as error:
                if not failures:
                    deadline = time.monotonic() + BLAME_S
                failures[rank] = error
        if failures:
            self._raise_worker_error(method, failures)
        if pending:
            late = ", ".join(str(refs.index(ref)) for ref in pending)
            remedy = "; raise trainer.start_timeout_s" if method == "start" else ""
            raise TimeoutError(f"rank {late} did not finish {method} in time{remedy}")
        return results

    def _raise_worker_error(self, method: str, failures: dict[int, RayError]) -> NoReturn:
        for rank, error in failures.items():
            if isinstance(error, DEATHS):
                raise WorkerDied(
                    f"rank {rank} on {self._where[rank]} died in {method} (killed, out of memory, or crashed): "
                    f"{_exit_detail(error)}"
                ) from error
        rank, error = next(iter(failures.items()))
        cause = error.cause if isinstance(error, RayTaskError) else error
        raise WorkerError(
            f"{method} failed on rank {rank} on {self._where[rank]}: {type(cause).__name__}: {_one_line(cause)}"
        ) from error

    # --------------------------------------------------------------------------------------------------- ending
    def shutdown(self) -> None:
        if self._over is None and ray.is_initialized():
            deadline = time.monotonic() + CLOSE_TIMEOUT_S
            try:
                self._gather("close", [host.close.remote() for host in self._hosts], deadline)
            finally:
                self._kill("the workers were shut down")

    def _kill(self, reason: str) -> None:
        if self._over is not None:
            return
        self._over = reason
        if ray.is_initialized():
            for host in self._hosts:
                ray.kill(host)
            remove_placement_group(self._placement)


def worker_environment() -> dict[str, str]:
    """What workers take from the driver's environment: where it imports from, and settings of the libraries.

    Names that look like secrets stay out (Ray logs a runtime environment), as does whatever Ray or the worker sets
    itself, such as visible GPUs and thread counts.
    """
    env = {k: v for k, v in os.environ.items() if k.startswith(FORWARDED) and not k.endswith(("TOKEN", "KEY"))}
    installed = (Path(sys.prefix), Path(sys.base_prefix))
    own = [path for path in sys.path if path and not any(Path(path).is_relative_to(root) for root in installed)]
    source_tree = str(Path(__file__).resolve().parents[2])
    env["PYTHONPATH"] = os.pathsep.join(dict.fromkeys([source_tree, *own]))
    return env


def _one_line(error: object) -> str:
    return " ".join(str(error).split())


def _exit_detail(error: RayError) -> str:
    """Ray's account of a death without the list of actor ids before it and of guesses after it."""
    text = _one_line(error)
    return text.split("Worker exit detail: ")[-1].split(" Some common causes")[0]
