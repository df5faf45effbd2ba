"""Engines and training workers in the place of real ones, which fail on command."""

from concurrent.futures import Future
from typing import Any

import numpy as np
import ray

from verl.workers.rollout.base import SamplingParams
from verl.workers.rollout.engine_pool import EnginePlace
from verl.workers.rollout.sampling_worker import Location
from verl.workers.rollout.vllm_engine import Request, Response

HANG = "hang"
SAMPLING = SamplingParams(max_tokens=8)


def response_to(request: Request) -> Response:
    """What every engine answers: the seed's digits, one token each."""
    tokens = np.array([int(digit) for digit in str(request.seed)[:8]], dtype=np.int64)
    return Response(request.row, tokens, -0.1 * tokens.astype(np.float32), cached_tokens=1)


class FakeHandle:
    """An engine that answers at once, three responses a call. `faults`: by method, what happens to its first calls
    (None: nothing; an exception: raised; HANG: no answer ever)."""

    restartable = True

    def __init__(self, number: int, place: EnginePlace, faults: dict[str, list[Any]]) -> None:
        self.number = number
        self.place = place
        self.faults = {method: list(what) for method, what in faults.items()}
        self.calls: list[str] = []
        self.requests: dict[int, Request] = {}  # held
        self.taken: list[int] = []  # rows it was asked for, ever
        self.killed = False
        self.dead = False

    def submit(self, method: str, *args: Any) -> Future:
        assert not self.killed, "called after its end"
        self.calls.append(method)
        future: Future = Future()
        fault = self.faults[method].pop(0) if self.faults.get(method) else None
        fault = ray.exceptions.ActorDiedError() if self.dead else fault
        if method == "advance":
            self.take(args[0])
        if fault is None:
            future.set_result(getattr(self, method)(*args))
        elif fault != HANG:
            future.set_exception(fault)
        return future

    def kill(self) -> None:
        self.killed = True

    def take(self, requests: list[Request]) -> None:
        self.taken += [request.row for request in requests]
        self.requests |= {request.row: request for request in requests}

    def start(self, spec: Any) -> tuple[str, int]:
        self.spec = spec
        return self.locate()

    def locate(self) -> tuple[str, int]:
        return "node", 100 + self.number

    def advance(self, requests: list[Request], params: SamplingParams, seconds: float) -> list[Response]:
        return [response_to(self.requests.pop(row)) for row in list(self.requests)[:3]]

    def weights(self) -> None:
        pass

    def sleep(self) -> int:
        return 2**30

    def wake_up(self, tag: str) -> None:
        self.calls[-1] += f" {tag}"


class FakeWorkers:
    """Training workers that note which engines they send weights to."""

    def __init__(self, locations: list[Location]) -> None:
        self.locations = locations
        self.plan: Any = None
        self.sent_to: list[list[FakeHandle]] = []

    def locate(self) -> list[Location]:
        return self.locations

    def stop_token_ids(self) -> list[int]:
        return [1]

    def connect_rollout(self, plan: Any) -> None:
        self.plan = plan

    def call(self, method: str, timeout_s: float) -> None:
        assert method == "update_weights" and timeout_s > 0
        engines = [engine for engines in self.plan.feeds.values() for engine in engines]
        self.sent_to.append(engines)
        for engine in engines:
            engine.submit("weights").result()


class Fleet:
    """Every handle that the pool makes, in order; `faults[i]` are the i-th one's."""

    def __init__(self) -> None:
        self.faults: dict[int, dict[str, list[Any]]] = {}
        self.handles: list[FakeHandle] = []

    def __call__(self, label: str, place: EnginePlace) -> FakeHandle:
        number = len(self.handles)
        self.handles.append(FakeHandle(number, place, self.faults.get(number, {})))
        return self.handles[-1]
