"""The scoring processes as the driver sees them: started, spoken to, and ended through the process server."""

import asyncio
import contextlib
import os
import pickle
import socket
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Protocol

from verl.workers.reward.channel import READ_SIZE, Clock, Unpacker, pack
from verl.workers.reward.function import RewardFunction
from verl.workers.reward.process_server import start_command

START_LIMIT_S = 300.0  # to import the reward function
CLOSE_LIMIT_S = 5.0


@dataclass(eq=False)
class Process:
    """One scoring process. What it is used for (`batch` and what follows) is the dispatcher's."""

    number: int
    connection: socket.socket
    clock: Clock
    ready: bool = False
    gone: bool = False  # it has closed its connection; the process server will say how it ended
    ended: bool = False  # known to have, or about to
    unpacker: Unpacker = field(default_factory=Unpacker)
    unsent: bytearray = field(default_factory=bytearray)

    batch: int = 0  # number of the latest
    calls: set[int] = field(default_factory=set)  # that it has and has not answered
    answered: int = 0
    heard: float = 0.0  # when it last answered or was sent a batch
    parked: bool = False  # held up by a call, while another one takes its place
    demoted: bool = False
    overdue: set[int] = field(default_factory=set)  # calls for which it is being killed
    timer: asyncio.TimerHandle | None = None


class Listener(Protocol):
    """Who is told what happens."""

    def on_import(self, concurrent: bool) -> None:
        """The function is imported, and asynchronous or not: processes can be started."""

    def on_answer(self, process: Process, call: int, payload: bytes | None, seconds: float) -> None:
        """It has answered a call, or, without a payload, not begun it."""

    def on_read(self, process: Process) -> None:
        """After one or several answers, or when a process has become ready."""

    def on_exit(self, process: Process, status: int) -> None:
        """It has ended; all that it answered has been told."""

    def on_failure(self, error: Exception) -> None:
        """Nothing can be scored any more."""


class Processes:
    """The process server and the processes that it has started, by number. Used in the loop's thread only."""

    def __init__(self, reward: RewardFunction, timeout_s: float, loop: asyncio.AbstractEventLoop, listener: Listener):
        self.reward, self.loop, self.listener = reward, loop, listener
        self.processes: dict[int, Process] = {}
        self.started = 0
        self.imported = False
        self.control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        setup = {"path": sys.path, "reward": pickle.dumps(reward), "timeout_s": timeout_s}
        threads = {f"{library}_NUM_THREADS": "1" for library in ("OMP", "MKL", "OPENBLAS", "NUMEXPR")}
        self.server = subprocess.Popen(
            start_command("server", theirs.fileno()),
            stdin=subprocess.PIPE,
            pass_fds=(theirs.fileno(),),
            env=os.environ | threads,
            start_new_session=True,
        )
        theirs.close()
        assert self.server.stdin is not None
        with contextlib.suppress(BrokenPipeError), self.server.stdin as file:  # it has ended, as `_hear` will find
            pickle.dump(setup, file)
        loop.add_reader(self.control, self._hear)
        loop.call_later(START_LIMIT_S, self._check_import)

    def close(self) -> None:
        """End the process server and, by it, every process."""
        for process in self.processes.values():
            process.connection.close()
        self.control.close()
        try:
            self.server.wait(CLOSE_LIMIT_S if self.imported else 0.0)
        except subprocess.TimeoutExpired:
            self.server.kill()
            self.server.wait()

    def start(self) -> None:
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        memory = os.memfd_create("clock")
        os.ftruncate(memory, Clock.SIZE)
        process = Process(self.started, ours, Clock(memory))
        process.clock.reset()
        self._order(f"start {process.number}", (theirs.fileno(), memory))
        theirs.close()
        os.close(memory)
        self.processes[process.number] = process
        self.started += 1
        self.loop.add_reader(ours, self.read, process)
        self.loop.call_later(START_LIMIT_S, self._check_start, process)

    def end(self, process: Process) -> None:
        """Have it killed, with its descendants. `on_exit` follows."""
        self._order(f"kill {process.number}")
        self._leave(process)

    def demote(self, process: Process) -> None:
        """Let it run only where others leave time."""
        self._order(f"demote {process.number}")

    def send(self, process: Process, message: Any) -> None:
        process.unsent += pack(message)
        self._write(process)

    def read(self, process: Process) -> None:
        """Tell everything that a process has answered by now."""
        told = False
        while not process.ended and not process.gone:
            try:
                data = process.connection.recv(READ_SIZE)
            except (BlockingIOError, ConnectionResetError):
                break
            if not data:
                process.gone = True
                self.loop.remove_reader(process.connection)
            for message in process.unpacker.feed(data):
                told = True
                if message is None:
                    process.ready = True
                else:
                    self.listener.on_answer(process, *message)
        if told:
            self.listener.on_read(process)

    def _write(self, process: Process) -> None:
        with contextlib.suppress(BlockingIOError, BrokenPipeError, ConnectionResetError):  # its exit will be reported
            sent = process.connection.send(process.unsent)
            del process.unsent[:sent]
        if process.unsent and not process.gone:
            self.loop.add_writer(process.connection, self._write, process)
        else:
            self.loop.remove_writer(process.connection)

    def _leave(self, process: Process) -> None:
        """Listen no more. The connection stays open until the end: closing it would end the process in another way."""
        process.ended = True
        if process.timer is not None:
            process.timer.cancel()
        self.loop.remove_reader(process.connection)
        self.loop.remove_writer(process.connection)

    def _order(self, text: str, descriptors: Iterable[int] = ()) -> None:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # it has ended, as `_hear` will find
            socket.send_fds(self.control, [text.encode()], list(descriptors))

    def _hear(self) -> None:
        """One message of the process server."""
        try:
            message = self.control.recv(1 << 16)
        except ConnectionResetError:
            message = b""
        kind, _, rest = message.decode().partition(" ")
        if kind == "ready":
            self.imported = True
            self.listener.on_import(rest == "1")
        elif kind == "exit":
            number, status = map(int, rest.split())
            process = self.processes.pop(number)
            if not process.ended:
                self.read(process)
                self._leave(process)
            process.connection.close()
            if not process.ready and not process.overdue:
                self._fail(f"a scoring process ended as it started, with status {status}")
            self.listener.on_exit(process, status)
        else:
            self.loop.remove_reader(self.control)
            self._fail(rest or "the process that imports it and starts the scoring processes has ended")

    def _check_import(self) -> None:
        if not self.imported:
            self._fail(f"not imported after {START_LIMIT_S:g} s")

    def _check_start(self, process: Process) -> None:
        if not process.ready and not process.ended:
            self._fail(f"a scoring process has not started after {START_LIMIT_S:g} s")

    def _fail(self, reason: str) -> None:
        self.listener.on_failure(RuntimeError(f"{self.reward}: {reason}"))
