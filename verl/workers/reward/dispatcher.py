"""Which process scores which call: the driver's side of the scoring pool, one event loop in a thread of its own.

A call that has not returned after a grace keeps its process up to its time-out, while another process takes over the
rest of its batch and its place among the `num_workers`: hanging calls wait side by side, not one after the other.
"""

import asyncio
import pickle
import signal
import time
from collections import deque
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from verl.workers.reward.channel import Clock
from verl.workers.reward.function import Call as Request
from verl.workers.reward.function import RewardFunction, describe
from verl.workers.reward.outcomes import ScorerDied, ScoringTimeout, decode, timed_out
from verl.workers.reward.processes import Process, Processes

BATCH_SIZE = 8  # calls handed to a process at a time,
BATCH_BYTES = 1 << 20  # or fewer, once they have as many
CONCURRENT_CALLS = 64  # of an asynchronous function, per process
MAX_PARKED = 64  # processes that may wait beside the working ones for a call that takes long
SPARES = 2  # processes kept ready beside the working ones
MAX_LOSSES = 3  # times that a call may be lost with a process that ended for no call of its own

# The grace is the longest of GRACE_S, a share of the time-out, and a multiple of what calls take. The first call of a
# process may import: its grace goes by other first calls, and is a larger share of the time-out until one has returned.
GRACE_S, GRACE, GRACE_IN_CALLS, FIRST_CALL = 0.005, 0.01, 5.0, 0.2
# A parked process gives way to others, should the processors be short, after this share of the time-out, or at once if
# more are parked than work.
DEMOTED = 0.25
SILENCE_S = 2.0  # beyond the time-out, after which a process that answers nothing and is in no call is ended
END_LIMIT_S = 5.0  # for a killed process to end, should the kernel hold it up


@dataclass
class Counts:
    """What a pool has done so far."""

    calls: int = 0  # with any outcome
    timeouts: int = 0  # calls ended at the time-out
    deaths: int = 0  # calls during which the process ended
    kills: int = 0  # processes ended by the pool: for a call, or because there were more than needed
    started: int = 0  # processes
    most_parked: int = 0  # processes at a time


@dataclass
class Job:
    """Calls submitted together."""

    future: Future
    results: list[Any]
    missing: int


@dataclass
class Call:
    """One request; it has a number as long as it has no outcome."""

    job: Job
    index: int
    request: Request
    losses: int = 0


class Dispatcher:
    """The calls and who has them. `run` is the thread's work; everything else is called in the loop."""

    def __init__(self, reward: RewardFunction, num_workers: int, timeout_s: float):
        self.reward, self.num_workers, self.timeout_s = reward, num_workers, timeout_s
        self.counts = Counts()
        self.loop = asyncio.new_event_loop()
        self.pending: deque[int] = deque()
        self.calls: dict[int, Call] = {}
        self.error: Exception | None = None  # why nothing is scored any more
        self.concurrent: bool | None = None  # known when the function is imported
        self._numbers = iter(range(1 << 62))
        self._call_s = 0.0  # mean duration of a call
        self._first_call_s: float | None = None  # longest duration of a process's first call

    def run(self) -> None:
        """Until `loop.stop`."""
        self.loop.set_exception_handler(self._broken)
        self.group = Processes(self.reward, self.timeout_s, self.loop, self)
        try:
            self.loop.run_forever()
        finally:
            self.on_failure(RuntimeError("the scoring pool is closed"))
            self.group.close()
            self.loop.close()

    def add(self, future: Future, requests: list[Request]) -> None:
        """Score these requests."""
        if self.error is not None:
            future.set_exception(self.error)
            return
        job = Job(future, [None] * len(requests), len(requests))
        if not requests:
            future.set_result([])
        for index, request in enumerate(requests):
            number = next(self._numbers)
            self.calls[number] = Call(job, index, request)
            self.pending.append(number)
        self._dispatch()

    # What happens.

    def on_import(self, concurrent: bool) -> None:
        self.concurrent = concurrent
        self._dispatch()

    def on_answer(self, process: Process, call: int, payload: bytes | None, seconds: float) -> None:
        if payload is None:
            self._take_back(process, process.calls - {call})
            return
        result = decode(payload)
        process.calls.discard(call)
        if not process.answered:
            self._first_call_s = max(self._first_call_s or 0.0, seconds)
        process.answered += 1
        process.heard = time.monotonic()
        self._call_s += (seconds - self._call_s) / min(200, self.counts.calls + 1)  # over about the last 200
        if isinstance(result, ScoringTimeout):  # of an asynchronous call; a thread of it may run on
            self.counts.timeouts += 1
            self._set_parked(process)
        self._resolve(call, result)

    def on_read(self, process: Process) -> None:
        if process.calls and not self.concurrent:
            return
        if not process.calls and process.parked:
            process.parked = False
            if self.concurrent:
                self._end(process)
        self._dispatch()

    def on_exit(self, process: Process, status: int) -> None:
        if process.overdue:
            self._settle(process, status)
        current, _ = process.clock.read()
        if current in process.calls & self.calls.keys():
            self._resolve_death(current, status)
        self._take_back(process, process.calls & {current})
        self._dispatch()

    def on_failure(self, error: Exception) -> None:
        """Every waiting future raises this, and so will those to come."""
        self.error = self.error or error
        waiting = {id(call.job): call.job for call in self.calls.values()}
        self.calls.clear()
        self.pending.clear()
        for job in waiting.values():
            job.future.set_exception(self.error)

    def _broken(self, _: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """An error of the pool itself: raised to who waits, who would wait for ever otherwise."""
        error = context.get("exception")
        self.on_failure(error if isinstance(error, Exception) else RuntimeError(context["message"]))

    # Calls.

    def _dispatch(self) -> None:
        """Give pending calls to processes that are free, and keep as many processes as there should be."""
        if self.concurrent is None or self.error is not None:
            return
        working = [process for process in self.group.processes.values() if not process.ended and not process.parked]
        ready = [process for process in working if process.ready and not process.gone]
        if self.concurrent:
            for process in ready[: self.num_workers]:
                self._send(process, CONCURRENT_CALLS - len(process.calls))
        else:
            busy = sum(bool(process.calls) and not process.gone for process in working)
            for process in [process for process in ready if not process.calls][: max(0, self.num_workers - busy)]:
                self._send(process, BATCH_SIZE)
        surplus = len(working) - self.num_workers - SPARES
        for _ in range(-surplus):
            self.group.start()
            self.counts.started += 1
        idle = [process for process in ready if not process.calls]
        for process in sorted(idle, key=lambda process: not process.demoted)[: max(0, surplus)]:
            self._end(process)

    def _send(self, process: Process, room: int) -> None:
        """Up to `room` calls, fewer towards the end so that the last ones are spread."""
        count = min(room, -(-len(self.pending) // (2 * self.num_workers)))
        batch: list[tuple[int, bytes]] = []
        size = 0
        while self.pending and len(batch) < count and (size < BATCH_BYTES or self.concurrent):
            number = self.pending.popleft()
            if number not in self.calls:  # answered, after it was taken back
                continue
            if (request := self._pickle(number)) is not None:
                batch.append((number, request))
                size += len(request)
        if not batch:
            return
        process.batch += 1
        process.calls.update(number for number, _ in batch)
        process.heard = time.monotonic()
        self.group.send(process, (process.batch, batch))
        if process.timer is None:
            process.timer = self.loop.call_later(self._grace(process), self._check, process)

    def _pickle(self, number: int) -> bytes | None:
        """The request of a call as bytes; None if it has none, which is the call's outcome then."""
        try:
            return pickle.dumps(self.calls[number].request, protocol=pickle.HIGHEST_PROTOCOL)
        except Exception as error:  # pickling runs the request's own code
            message = f"{self.reward}: the request cannot be sent to a scoring process: {describe(error)}"
            self._resolve(number, RuntimeError(message))
            return None

    def _resolve(self, number: int, result: Any) -> None:
        """The outcome of a call, unless it has one: it may have been taken back while it was answered after all."""
        call = self.calls.pop(number, None)
        if call is None:
            return
        self.counts.calls += 1
        call.job.results[call.index] = result
        call.job.missing -= 1
        if call.job.missing == 0:
            call.job.future.set_result(call.job.results)

    def _resolve_death(self, number: int, status: int) -> None:
        cause = f"was killed by {signal.Signals(-status).name}" if status < 0 else f"exited with status {status}"
        self.counts.deaths += 1
        self._resolve(number, ScorerDied(f"{self.reward}: the process {cause} during the call"))

    def _take_back(self, process: Process, kept: set[int]) -> None:
        """Make the calls of a process, but for those `kept`, pending again, before all others."""
        lost = sorted((process.calls - kept) & self.calls.keys())
        process.calls = set(kept)
        if process.ended and not kept:  # it ended by none of its calls, or by each of these, for all that is known
            for number in lost:
                self.calls[number].losses += 1
            for number in [number for number in lost if self.calls[number].losses >= MAX_LOSSES]:
                lost.remove(number)
                self.counts.deaths += 1
                self._resolve(number, ScorerDied(f"{self.reward}: {MAX_LOSSES} processes ended that had this call"))
        self.pending.extendleft(reversed(lost))

    def _end(self, process: Process) -> None:
        process.parked = False
        self.counts.kills += 1
        self.group.end(process)

    # Time.

    def _grace(self, process: Process) -> float:
        """Seconds that a call may run before its process gives up its place."""
        if self.concurrent:
            return self.timeout_s
        grace = max(GRACE_S, GRACE * self.timeout_s, GRACE_IN_CALLS * self._call_s)
        if process.answered:
            return grace
        first = FIRST_CALL * self.timeout_s
        if self._first_call_s is not None:
            first = min(first, GRACE_IN_CALLS * self._first_call_s)
        return max(grace, first)

    def _check(self, process: Process) -> None:
        """Look at what a process is doing, act, and come back when there may be something to do."""
        self.group.read(process)  # what it has answered comes before any judgement
        process.timer = None
        if process.ended or process.gone or not process.calls:
            return
        now = time.monotonic()
        current, since = process.clock.read()
        running, grace = now - since, self._grace(process)
        interval = grace
        if current == Clock.NOTHING:
            if now >= process.heard + self.timeout_s + SILENCE_S:
                self._on_timeout(process, set(process.calls) if self.concurrent else set())
                return
        elif running >= self.timeout_s:
            self._on_timeout(process, {current})
            return
        else:
            if not self.concurrent and running >= grace:
                self._yield_place(process, current, running)
            elif not process.parked:
                interval = grace - running
            remaining = self.timeout_s - running
            interval = remaining if process.parked and process.demoted else min(interval, remaining)
        process.timer = self.loop.call_later(interval, self._check, process)

    def _yield_place(self, process: Process, current: int, running: float) -> None:
        """If a call has been running long: first its place, then its share of the processors."""
        if not process.parked:
            process.clock.revoke(process.batch)
            now_in, _ = process.clock.read()  # it may have gone on this moment
            if now_in == current:
                self._set_parked(process)
            self._take_back(process, process.calls & {now_in})
            self._dispatch()
        is_crowded = self._count_parked() > self.num_workers
        if process.parked and not process.demoted and (is_crowded or running >= DEMOTED * self.timeout_s):
            process.demoted = True
            self.group.demote(process)

    def _set_parked(self, process: Process) -> None:
        """If there is room for one more."""
        process.parked = process.parked or self._count_parked() < MAX_PARKED
        self.counts.most_parked = max(self.counts.most_parked, self._count_parked())

    def _count_parked(self) -> int:
        return sum(process.parked for process in self.group.processes.values())

    def _on_timeout(self, process: Process, overdue: set[int]) -> None:
        """Kill; the outcome waits for the process's end, which tells a hang from a crash that came late."""
        process.overdue = overdue & self.calls.keys()
        self._end(process)
        self.loop.call_later(END_LIMIT_S, self._settle, process, -signal.SIGKILL)
        self._take_back(process, process.calls & overdue)
        self._dispatch()

    def _settle(self, process: Process, status: int) -> None:
        for number in process.overdue & self.calls.keys():
            if status == -signal.SIGKILL:
                self.counts.timeouts += 1
                self._resolve(number, timed_out(self.reward, self.timeout_s))
            else:
                self._resolve_death(number, status)
