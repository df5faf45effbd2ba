"""The scoring process: calls the reward function for what the driver sends, and sends back what it returns."""

import asyncio
import inspect
import os
import pickle
import socket
import time
from collections.abc import Awaitable, Generator
from typing import Any

from verl.workers.reward.channel import READ_SIZE, Clock, Unpacker, pack, receive
from verl.workers.reward.function import RewardFunction
from verl.workers.reward.outcomes import as_exception, encode, timed_out

# A batch: its number, and per call its number and the pickled request.
Batch = tuple[int, list[tuple[int, bytes]]]


class Worker:
    """Serves one driver until that closes the connection."""

    def __init__(self, reward: RewardFunction, timeout_s: float, connection: socket.socket, clock: Clock):
        self.reward = reward
        self.timeout_s = timeout_s
        self.connection = connection
        self.clock = clock
        self.concurrent = is_asynchronous(reward)
        self._process = os.getpid()

    def serve(self) -> None:
        self.connection.sendall(pack(None))  # ready
        # One event loop for all calls, since functions keep clients bound to it; made when the first call needs it, as
        # it takes a millisecond of every new process.
        runner = asyncio.Runner()
        if self.concurrent:
            self.connection.setblocking(False)
            runner.run(self._serve_concurrently())
        else:
            self._serve_in_turn(runner)

    def _serve_in_turn(self, runner: asyncio.Runner) -> None:
        unpacker = Unpacker()
        while True:
            for number, calls in receive(self.connection, unpacker):
                for call, request in calls:
                    self.clock.start(call)
                    if self.clock.is_revoked(number):
                        self._send(call, None, 0.0)
                        continue
                    start = time.monotonic()
                    result = self._call(request)
                    if inspect.isawaitable(result):  # of a plain function that returns one
                        result = runner.run(self._finish(result))
                    self._answer(call, result, start)

    async def _serve_concurrently(self) -> None:
        loop, unpacker, tasks = asyncio.get_running_loop(), Unpacker(), set()
        while True:
            data = await loop.sock_recv(self.connection, READ_SIZE)
            if not data:
                os._exit(0)  # the driver has gone; cancelling what runs would only delay the end
            for _, calls in unpacker.feed(data):
                for call, request in calls:
                    task = asyncio.create_task(self._call_concurrently(call, request))
                    tasks.add(task)  # the loop itself keeps no reference
                    task.add_done_callback(tasks.discard)

    async def _call_concurrently(self, call: int, request: bytes) -> None:
        start = time.monotonic()
        self.clock.start(call)
        result = self._call(request)
        self.clock.stop()
        if inspect.isawaitable(result):
            result = await self._finish(_Timed(call, result, self.clock))
        self._answer(call, result, start)

    def _call(self, request: bytes) -> Any:
        try:
            return self.reward.call(pickle.loads(request))
        except BaseException as error:
            return as_exception(error)

    async def _finish(self, awaitable: Awaitable[Any]) -> Any:
        try:
            async with asyncio.timeout(self.timeout_s) as limit:
                result = await awaitable
        except BaseException as error:
            result = as_exception(error)
        return timed_out(self.reward, self.timeout_s) if limit.expired() else result

    def _answer(self, call: int, result: Any, start: float) -> None:
        if os.getpid() != self._process:
            os._exit(0)  # a child that the function forked and that returned from it
        self._send(call, encode(result), time.monotonic() - start)

    def _send(self, call: int, payload: bytes | None, seconds: float) -> None:
        """An answer, or None for a call that was not begun."""
        self.clock.stop()
        self.connection.setblocking(True)
        try:
            self.connection.sendall(pack((call, payload, seconds)))
        except ConnectionError:
            os._exit(0)  # the driver has gone
        self.connection.setblocking(not self.concurrent)


class _Timed:
    """An awaitable whose every step, from one suspension to the next, shows on the clock as its call's."""

    def __init__(self, call: int, awaitable: Awaitable[Any], clock: Clock):
        self.call, self.awaitable, self.clock = call, awaitable, clock

    def __await__(self) -> Generator[Any, Any, Any]:
        coroutine = _as_coroutine(self.awaitable)
        step, value = coroutine.send, None
        while True:
            self.clock.start(self.call)
            try:
                future = step(value)
            except StopIteration as end:
                return end.value
            finally:
                self.clock.stop()
            try:
                value = yield future
                step = coroutine.send
            except BaseException as error:  # a cancellation; it belongs to the call
                value, step = error, coroutine.throw


async def _as_coroutine(awaitable: Awaitable[Any]) -> Any:
    return await awaitable


def is_asynchronous(reward: RewardFunction) -> bool:
    function = reward.function
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__)
