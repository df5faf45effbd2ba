"""The process that has the reward function imported, forks scoring processes, and ends them with all their descendants.

Forking a process that has everything imported takes milliseconds, so that losing one costs little. A function whose
import leaves threads running cannot be forked safely: then each scoring process is started fresh and imports by itself.

Messages from the driver: `start <worker>` with the worker's connection and clock as descriptors, `kill <worker>`,
`demote <worker>`. To the driver: `ready <0 or 1: asynchronous>`, `failed <why>`, `exit <worker> <status>`.
"""

import contextlib
import ctypes
import gc
import os
import pickle
import select
import signal
import socket
import subprocess
import sys
import time
import traceback
from pathlib import Path
from typing import Any, NoReturn

from verl.workers.reward.channel import Clock
from verl.workers.reward.function import RewardFunction
from verl.workers.reward.outcomes import as_exception
from verl.workers.reward.worker import Worker, is_asynchronous

LIBC = ctypes.CDLL(None)
PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36
HARMLESS_THREADS = {"jemalloc_bg_thd"}  # of pyarrow; its library prepares it for forks
STRAY_GRACE_S = 1.0  # for what a dead worker leaves behind, as a sandbox that cleans up after itself
DEMOTED_NICENESS = 10


class ProcessServer:
    """Parent of the scoring processes, and of whatever they leave behind."""

    def __init__(self, setup: dict[str, Any], control: socket.socket):
        self.setup = setup
        self.control = control
        self.reward: RewardFunction
        self.workers: dict[int, int] = {}  # process -> worker
        self.strays: dict[int, float] = {}  # process -> when it is killed
        self.fresh = False  # whether workers are started fresh instead of forked
        self.terminated = False
        self._started: dict[int, subprocess.Popen] = {}

    def serve(self) -> None:
        """Until the driver closes its side, or dies."""
        wake_read, wake_write = os.pipe()
        os.set_blocking(wake_write, False)
        signal.set_wakeup_fd(wake_write, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)  # it only has to wake the loop
        signal.signal(signal.SIGTERM, self._on_terminate)
        try:
            self.reward = load(self.setup)
        except BaseException as error:  # importing a user's file may raise anything; the driver reports it
            self.control.send(f"failed {as_exception(error)}".encode()[:60_000])
            return
        prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        gc.freeze()  # collections would touch, and so copy, what forked processes share
        self.fresh = bool(_other_threads() - HARMLESS_THREADS)
        self.control.send(b"ready %d" % is_asynchronous(self.reward))
        poll = select.poll()
        poll.register(self.control, select.POLLIN)
        poll.register(wake_read, select.POLLIN)
        while not self.terminated:
            wait_s = min(self.strays.values(), default=float("inf")) - time.monotonic()
            for descriptor, _ in poll.poll(None if wait_s == float("inf") else max(0.0, wait_s) * 1000):
                if descriptor == wake_read:
                    os.read(wake_read, 1 << 12)
                elif not self._obey():
                    return
            self._reap()

    def _on_terminate(self, *_: object) -> None:
        """The driver has died, or someone wants the pool to end."""
        self.terminated = True

    def _obey(self) -> bool:
        """One message of the driver; False when it has closed."""
        message, descriptors, _, _ = socket.recv_fds(self.control, 64, 2)
        if not message:
            return False
        order, worker = message.split()
        if order == b"start":
            self._start(int(worker), *descriptors)
            for descriptor in descriptors:
                os.close(descriptor)
            return True
        for process in [process for process, number in self.workers.items() if number == int(worker)]:
            if order == b"kill":
                os.killpg(process, signal.SIGKILL)
            else:
                os.setpriority(os.PRIO_PGRP, process, DEMOTED_NICENESS)
        return True

    def _start(self, worker: int, connection: int, clock: int) -> None:
        if self.fresh:
            setup = os.memfd_create("setup")
            with open(setup, "wb", closefd=False) as file:
                pickle.dump(self.setup, file)
            os.lseek(setup, 0, os.SEEK_SET)
            command = start_command("worker", connection, clock)
            started = subprocess.Popen(command, stdin=setup, pass_fds=(connection, clock), process_group=0)
            os.close(setup)
            self._started[started.pid] = started
            self.workers[started.pid] = worker
            return
        process = os.fork()
        if process == 0:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            self.control.close()
            os.setpgid(0, 0)
            run_worker(self.reward, self.setup, connection, clock)
        os.setpgid(process, process)  # here too: the driver may want it killed before it has run
        self.workers[process] = worker

    def _reap(self) -> None:
        """Take ended children; end what a worker left behind."""
        while True:
            try:
                ended = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            except ChildProcessError:
                ended = None
            if ended is None:
                break
            process = ended.si_pid
            if process in self.workers:
                _kill_group(process)  # before its number is free again
            _, status = os.waitpid(process, 0)
            self.strays.pop(process, None)
            if process in self.workers:
                code = os.waitstatus_to_exitcode(status)
                if started := self._started.pop(process, None):
                    started.returncode = code
                self.control.send(b"exit %d %d" % (self.workers.pop(process), code))
        for stray in _children() - self.workers.keys():
            deadline = self.strays.setdefault(stray, time.monotonic() + STRAY_GRACE_S)
            if time.monotonic() >= deadline:
                os.kill(stray, signal.SIGKILL)
                self.strays[stray] = time.monotonic() + STRAY_GRACE_S

    def shut_down(self) -> None:
        """End every descendant."""
        for process in self.workers:
            _kill_group(process)
        deadline = time.monotonic() + STRAY_GRACE_S
        while children := _children():
            for child in children:
                if child in self.workers or time.monotonic() >= deadline:
                    os.kill(child, signal.SIGKILL)
            ended, _ = os.waitpid(-1, os.WNOHANG)
            if ended == 0:
                time.sleep(0.01)


def _kill_group(process: int) -> None:
    with contextlib.suppress(ProcessLookupError):  # nobody is left in it
        os.killpg(process, signal.SIGKILL)


def _children() -> set[int]:
    """This process's children, those included that were orphaned below it."""
    return {int(child) for child in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()}


def _other_threads() -> set[str]:
    tasks = [task for task in Path("/proc/self/task").iterdir() if task.name != str(os.getpid())]
    return {(task / "comm").read_text().strip() for task in tasks}


def run_worker(reward: RewardFunction, setup: dict[str, Any], connection: int, clock: int) -> NoReturn:
    """In a process of its own: serve the driver, and end with the process server."""
    status = 1
    try:
        prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        Worker(reward, setup["timeout_s"], socket.socket(fileno=connection), Clock(clock)).serve()
    except (EOFError, ConnectionError):
        status = 0  # the driver has gone
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)  # never back into the process server, whose copy this is


def prctl(option: int, value: int) -> None:
    if LIBC.prctl(option, ctypes.c_ulong(value), 0, 0, 0) != 0:
        raise OSError(f"prctl {option} failed")


def load(setup: dict[str, Any]) -> RewardFunction:
    """The reward function of a setup, imported."""
    reward = pickle.loads(setup["reward"])
    assert callable(reward.function)
    return reward


def start_command(role: str, *descriptors: int) -> list[str]:
    """Command of a process of the pool; its setup is to be its standard input."""
    program = "import pickle, sys; setup = pickle.load(sys.stdin.buffer); sys.path[:] = setup['path']; "
    program += "from verl.workers.reward.process_server import main; main(setup, sys.argv[1:])"
    return [sys.executable, "-P", "-c", program, role, *map(str, descriptors)]


def main(setup: dict[str, Any], arguments: list[str]) -> None:
    """Start of the process server, `server CONTROL`, and of a worker that is not forked, `worker CONNECTION CLOCK`."""
    role, descriptors = arguments[0], [int(argument) for argument in arguments[1:]]
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]  # what a killed process printed is not lost
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    if role == "worker":
        run_worker(load(setup), setup, *descriptors)
    prctl(PR_SET_CHILD_SUBREAPER, 1)
    prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # until the function is imported: there is nothing to end in order
    control = socket.socket(fileno=descriptors[0])
    server = ProcessServer(setup, control)
    try:
        server.serve()
    except ConnectionError:
        pass  # the driver has gone
    finally:
        server.shut_down()
