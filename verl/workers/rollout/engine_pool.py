"""The engines of a run, in Ray actors or in this process: started, called, watched, and replaced when they fail."""

import time
from concurrent.futures import FIRST_COMPLETED, Future, wait
from concurrent.futures import TimeoutError as FutureTimeout
from dataclasses import dataclass
from typing import Any, Protocol

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from verl.single_controller.ray_worker_group import worker_environment
from verl.workers.rollout.vllm_engine import EngineSpec, VLLMEngine

MAX_RESTARTS = 3  # engines replaced in a run: more than that is no accident


class EngineError(RuntimeError):
    """Engines failed more often than allowed, or could not be started. One line says which, where and why."""


class Handle(Protocol):
    """An engine as its callers see it. `restartable`: another can take its place."""

    restartable: bool

    def submit(self, method: str, *args: Any) -> Future: ...

    def kill(self) -> None: ...


class LocalHandle:
    """The engine is in this process: calls run at once. Its exceptions arrive as they are."""

    restartable = False

    def __init__(self, in_process: bool) -> None:
        self.in_process = in_process
        self.engine: VLLMEngine | None = None

    def submit(self, method: str, *args: Any) -> Future:
        future: Future = Future()
        if method == "start":
            self.engine = VLLMEngine(args[0], self.in_process)
            future.set_result(self.engine.locate())
        else:
            future.set_result(getattr(self.engine, method)(*args))
        return future

    def kill(self) -> None:
        if self.engine is not None:
            self.engine.close()
            self.engine = None


class EngineHost:
    """The Ray actor around one engine. It is bare at first, so that a failed start is an error of a call."""

    def __init__(self, label: str) -> None:
        self.label = label

    def __repr__(self) -> str:  # Ray's prefix of what the engine prints
        return self.label

    def call(self, method: str, *args: Any) -> Any:
        if method == "start":
            self.engine = VLLMEngine(*args)
            return self.engine.locate()
        return getattr(self.engine, method)(*args)


@dataclass(frozen=True)
class EnginePlace:
    """Where an engine goes. `gpus`: the GPUs of its node that it shares with training workers, as
    CUDA_VISIBLE_DEVICES has them; None: Ray gives it `claimed_gpus` of its own."""

    node_id: str | None
    gpus: str | None = None
    claimed_gpus: int = 0


class RayHandle:
    """The engine is in a Ray actor. It claims no CPU core, and a GPU only if it does not share the trainer's."""

    restartable = True

    def __init__(self, label: str, place: EnginePlace) -> None:
        env = {"TORCH_CPP_LOG_LEVEL": "ERROR"} | worker_environment()
        if place.gpus is not None:
            env["CUDA_VISIBLE_DEVICES"] = place.gpus
        strategy = "SPREAD" if place.node_id is None else NodeAffinitySchedulingStrategy(place.node_id, soft=False)
        actor_cls = ray.remote(EngineHost).options(
            num_cpus=0,
            num_gpus=place.claimed_gpus,
            scheduling_strategy=strategy,
            runtime_env={"env_vars": env},
        )
        self.actor: Any = actor_cls.remote(label)

    def submit(self, method: str, *args: Any) -> Future:
        return self.actor.call.remote(method, *args).future()

    def kill(self) -> None:
        if ray.is_initialized():
            ray.kill(self.actor)


class Slot:
    """The place of one engine in the pool, with the engine that holds it now."""

    def __init__(self, number: int, place: EnginePlace | None) -> None:
        self.number = number
        self.place = place
        self.handle: Handle | None = None
        self.call: Future | None = None  # in flight
        self.deadline = 0.0
        self.starting = False
        self.process = ("", 0)  # host and process id of the engine
        self.rows: set[int] = set()  # handed to the engine, not yet finished


class EnginePool:
    """Starts one engine for each place, calls them, and replaces the ones that die, raise or hang.

    Args:
        spec: of every engine.
        places: one for each engine; None: the one engine is in this process.
        timeout_s: longest wait for one call; start_timeout_s: for a start.
        max_restarts: engines replaced in the run before it stops.
    """

    def __init__(
        self,
        spec: EngineSpec,
        places: list[EnginePlace] | None,
        timeout_s: float,
        start_timeout_s: float,
        max_restarts: int = MAX_RESTARTS,
    ) -> None:
        self.spec = spec
        self.timeout_s = timeout_s
        self.start_timeout_s = start_timeout_s
        self.max_restarts = max_restarts
        self.restarts = 0
        self.slots = [Slot(n, place) for n, place in enumerate([None] if places is None else places)]

    # ------------------------------------------------------------------------------------------------- starting
    def start(self) -> None:
        """Start all engines at the same time and wait for them."""
        for slot in self.slots:
            self._launch(slot)
        for slot in self.slots:
            error = self.wait_for(slot)
            if error is not None:
                self.shutdown()
                raise EngineError(f"{self._where(slot)} did not start: {describe(error)}") from error

    def _launch(self, slot: Slot) -> None:
        if slot.place is None:
            # On a GPU the weights come through a handle that only another process can open.
            slot.handle = LocalHandle(in_process=self.spec.device == "cpu")
        else:
            slot.handle = RayHandle(f"vllm engine={slot.number}", slot.place)
        slot.starting = True
        self.submit(slot, "start", self.spec, timeout_s=self.start_timeout_s)

    # -------------------------------------------------------------------------------------------------- calling
    def submit(self, slot: Slot, method: str, *args: Any, timeout_s: float | None = None) -> None:
        assert slot.handle is not None and slot.call is None, "one call at a time"
        slot.deadline = time.monotonic() + (self.timeout_s if timeout_s is None else timeout_s)
        slot.call = slot.handle.submit(method, *args)

    def wait_any(self) -> None:
        """Wait until a call in flight has ended or is overdue."""
        calls = {slot.call: slot.deadline for slot in self.slots if slot.call is not None}
        remaining = min(calls.values()) - time.monotonic()
        wait(calls, timeout=max(0.0, remaining), return_when=FIRST_COMPLETED)

    def take(self, slot: Slot) -> tuple[Any, Exception | None] | None:
        """(result, None) or (None, error) of the slot's call, if it has ended or is overdue; else None. An engine whose
        start has ended well can be called from then on."""
        assert slot.call is not None
        if slot.call.done():
            call, slot.call = slot.call, None
            error = call.exception()
            if error is not None and not isinstance(error, Exception):
                raise error
            if error is not None:
                return None, error
            if slot.starting:
                slot.starting, slot.process = False, call.result()
            return call.result(), None
        if time.monotonic() < slot.deadline:
            return None
        slot.call = None
        limit = "trainer.start_timeout_s" if slot.starting else "actor_rollout_ref.rollout.engine_timeout_s"
        return None, TimeoutError(f"no answer within {limit}")

    def wait_for(self, slot: Slot) -> Exception | None:
        """Wait for the slot's call; its error."""
        while (taken := self.take(slot)) is None:
            assert slot.call is not None
            wait([slot.call], timeout=max(0.0, slot.deadline - time.monotonic()))
        return taken[1]

    def call_all(self, method: str, *args: Any) -> list[Any]:
        """The results of one call to every engine. A failure is an EngineError."""
        futures = [(slot, slot.handle.submit(method, *args)) for slot in self.slots if slot.handle is not None]
        results = []
        for slot, future in futures:
            try:
                results.append(future.result(timeout=self.timeout_s))
            except (Exception, FutureTimeout) as error:
                raise EngineError(f"{self._where(slot)} failed in {method}: {describe(error)}") from error
        return results

    # ------------------------------------------------------------------------------------------------ replacing
    def replace(self, slot: Slot, error: Exception) -> None:
        """Kill the slot's engine and start another; EngineError if that was done too often. The new one has the
        weights of the model's folder: it may be used when `starting` is over and it has been given the present ones."""
        assert slot.handle is not None
        if not slot.handle.restartable:
            raise error
        self.restarts += 1
        if self.restarts > self.max_restarts:
            raise EngineError(
                f"{self._where(slot)} failed, the {self.restarts}. failure of this run "
                f"(at most {self.max_restarts} are replaced): {describe(error)}"
            ) from error
        print(f"{self._where(slot)} failed and is started again: {describe(error)}", flush=True)
        slot.handle.kill()
        slot.call, slot.process = None, ("", 0)
        self._launch(slot)

    def settle(self) -> None:
        """Between batches: replace the engines that do not answer, and wait for those that are starting (the others may
        have finished the batch without them)."""
        for slot in self.slots:
            if not slot.starting:
                self.submit(slot, "locate")
        for slot in self.slots:
            while slot.call is not None:
                if error := self.wait_for(slot):
                    self.replace(slot, error)

    def _where(self, slot: Slot) -> str:
        host, pid = slot.process
        return f"vLLM engine {slot.number}" + (f" on {host} (pid {pid})" if pid else "")

    def shutdown(self) -> None:
        for slot in self.slots:
            if slot.handle is not None:
                slot.handle.kill()
                slot.handle = None


def describe(error: BaseException) -> str:
    """Type and message of what failed, in one line; of an error in a Ray actor, its cause."""
    cause = getattr(error, "cause", None) or error
    lines = [line.strip() for line in str(cause).splitlines() if line.strip()]
    return f"{type(cause).__name__}: {' '.join(lines)[:600]}"
