"""The process that stands between the caller and untrusted code: builds the enclosure, runs, watches, cleans up.

It is started fresh for each piece of code (run.py), with an empty environment and the standard library only, and speaks
frames (frames.py) on its standard input and output. It ends, and everything in the sandbox with it, when the caller
closes its input or dies.
"""

import fcntl
import json
import os
import resource
import select
import signal
import time
from pathlib import Path
from typing import Any

from . import kernel
from .enclosure import OVERFLOW_ID, OwnFolder, OwnRoot, can_switch_user, enter_namespaces, in_child, own_id
from .frames import read_frame, write_frame

READ_SIZE = 1 << 16
CALL, ANSWER, FAILURE = 3, 4, 5  # descriptors of the sandboxed process, besides the standard ones
FAILED = 3  # place of that one's pipe among the outputs
STACK_BYTES = 256 << 20  # recursion through C, as of a cached function, needs more than the usual 8 MiB


class Supervisor:
    """One sandbox: its enclosure, its limits, and the runs in it."""

    def __init__(self, setup: dict[str, Any], code: bytes):
        self.limits: dict[str, Any] = setup["limits"]
        self.python: str = setup["python"]
        privileged = can_switch_user()
        files = {"harness.py": Path(__file__).with_name("harness.py").read_bytes(), "solution.py": code}
        self.enclosure: OwnRoot | OwnFolder
        if setup["namespaces"]:
            self.user = own_id() if privileged else OVERFLOW_ID
            self.switches_user = privileged
            enter_namespaces(privileged)
            _continue_as_first_process()
            self.enclosure = OwnRoot(files, setup["folders"], setup["packages"], self.limits["disk_bytes"])
        else:
            self.user = own_id() if privileged else os.geteuid()
            self.switches_user = privileged
            user = self.user if privileged else None
            self.enclosure = OwnFolder(files, setup["folders"], setup["packages"], user)
        kernel.prctl(kernel.PR_SET_DUMPABLE, 0)  # /proc shows nothing of this process to the code's user

    def weaknesses(self) -> list[str]:
        """What the code is not kept from: "network", "files" of others that it may read or write, and its caller's
        "user"."""
        if isinstance(self.enclosure, OwnRoot):
            return []
        weak = {
            "network": not kernel.can_filter_calls(),
            "files": not kernel.landlock_abi(),
            "user": not self.switches_user,
        }
        return [name for name, is_weak in weak.items() if is_weak]

    def run(self, request: dict[str, Any], stdin: bytes) -> tuple[dict[str, Any], list[bytes]]:
        """Run the code once. Returns the facts of the run, and what it wrote: stdout, stderr, the answer to a call."""
        self.enclosure.new_work(self.user)
        call, wall_s = request.get("call"), request.get("wall_s")
        inputs = [_in_memory(stdin), _in_memory(json.dumps(call).encode())]
        pipes = [os.pipe() for _ in range(4)]  # stdout, stderr, the answer of a call, failure to start
        given = {0: inputs[0]} | dict(zip((1, 2, ANSWER, FAILURE), (write for _, write in pipes), strict=True))
        if call:
            given[CALL] = inputs[1]
        start = time.monotonic()
        child = os.fork()
        if child == 0:
            in_child(lambda: self._become(given, call is not None))
        for descriptor in (*inputs, *(write for _, write in pipes)):
            os.close(descriptor)
        try:
            outputs, reason = self._watch(child, [read for read, _ in pipes], start + (wall_s or self.limits["wall_s"]))
        finally:
            ended = self.enclosure.kill_all(self.user)
        for (read, _), output in zip(pipes, outputs, strict=True):
            _read_rest(read, output, self.limits["output_bytes"])
            os.close(read)
        if any(len(output) > self.limits["output_bytes"] for output in outputs):
            reason = "output"
        if outputs[FAILED]:
            reason = outputs[FAILED].decode()
            raise OSError(f"{self.python} did not start ({reason}); VERL_SANDBOX_PYTHON can name another interpreter")
        status, cpu = ended[child]
        facts = {"exit_status": status, "cpu_s": cpu, "wall_s": time.monotonic() - start, "stopped": reason}
        return facts, [bytes(output) for output in outputs[:FAILED]]

    def _watch(self, child: int, pipes: list[int], deadline: float) -> tuple[list[bytearray], str | None]:
        """Read until the process ends, or until a limit is passed, which is returned."""
        outputs = {pipe: bytearray() for pipe in pipes}
        ended = os.pidfd_open(child)
        poll = select.poll()
        for descriptor in (*pipes, ended, 0):
            poll.register(descriptor, select.POLLIN)
        reason = None
        while reason is None:
            ready = [descriptor for descriptor, _ in poll.poll(max(0.0, deadline - time.monotonic()) * 1000)]
            if 0 in ready:
                raise EOFError  # the caller has gone
            for pipe in outputs.keys() & set(ready):
                data = os.read(pipe, READ_SIZE)
                outputs[pipe] += data
                if not data:
                    poll.unregister(pipe)
                if len(outputs[pipe]) > self.limits["output_bytes"]:
                    reason = "output"
            if ended in ready:
                break
            if time.monotonic() >= deadline:
                reason = "wall time"
        os.close(ended)
        return list(outputs.values()), reason

    def _become(self, descriptors: dict[int, int], call: bool) -> None:
        """In the forked child: keep only `descriptors` (by their new number), give up everything else, and become the
        sandboxed interpreter."""
        copies = {new: fcntl.fcntl(old, fcntl.F_DUPFD, 64) for new, old in descriptors.items()}
        os.closerange(0, 64)
        for new, copy in copies.items():
            os.dup2(copy, new, inheritable=new != FAILURE)
        os.closerange(64, 4096)
        try:
            self._confine()
            sandbox = self.enclosure.sandbox
            harness = [f"{sandbox}/harness.py", f"{sandbox}/solution.py", f"{sandbox}/packages"]
            flags = ["-s", "-S", "-P", "-B", "-X", "utf8"]
            arguments = [self.python, *flags, *harness, "call" if call else "program"]
            os.execve(self.python, arguments, _environment(self.enclosure.work))
        except Exception as error:  # the supervisor reports it
            os.write(FAILURE, str(error).encode())

    def _confine(self) -> None:
        os.setsid()
        # First the user, then the limits: they bind nothing on root.
        if self.switches_user:
            os.setgroups([])
            os.setresgid(self.user, self.user, self.user)
            os.setresuid(self.user, self.user, self.user)
        os.chdir(self.enclosure.work)
        kernel.prctl(kernel.PR_SET_NO_NEW_PRIVS, 1)
        self.enclosure.confine()
        cpu = self.limits["cpu_s"]
        limits = {
            resource.RLIMIT_CPU: (cpu, cpu + 1),  # a signal, and a second later the one that cannot be ignored
            resource.RLIMIT_AS: self.limits["memory_bytes"],
            # Contest programs lift this limit, and fail if they may not. The address space counts the stack too.
            resource.RLIMIT_STACK: (STACK_BYTES, resource.getrlimit(resource.RLIMIT_STACK)[1]),
            resource.RLIMIT_NPROC: self.limits["processes"],
            resource.RLIMIT_NOFILE: self.limits["open_files"],
            resource.RLIMIT_FSIZE: self.limits["file_bytes"],
            resource.RLIMIT_CORE: 0,
            resource.RLIMIT_MEMLOCK: 0,
            resource.RLIMIT_MSGQUEUE: 0,
        }
        for kind, limit in limits.items():
            _limit(kind, *(limit if isinstance(limit, tuple) else (limit, limit)))
        if kernel.can_filter_calls():
            kernel.filter_calls()


def _limit(kind: int, soft: int, hard: int) -> None:
    """Set a resource limit, or keep the machine's if that is lower."""
    ceiling = resource.getrlimit(kind)[1]
    if ceiling != resource.RLIM_INFINITY:
        soft, hard = min(soft, ceiling), min(hard, ceiling)
    resource.setrlimit(kind, (soft, hard))


def _environment(work: str) -> dict[str, str]:
    """All that the code finds in its environment. One thread for numpy; a fixed hash seed, so that a program that
    prints a set scores the same each time."""
    threads = {f"{library}_NUM_THREADS": "1" for library in ("OMP", "OPENBLAS", "MKL")}
    return {"PATH": "/usr/bin:/bin", "HOME": work, "TMPDIR": work, "LANG": "C.UTF-8", "PYTHONHASHSEED": "0"} | threads


def _in_memory(content: bytes) -> int:
    """A file with this content, open at its beginning. A file, not a pipe: contest programs ask for its size."""
    descriptor = os.memfd_create("input")
    with open(descriptor, "wb", closefd=False) as file:
        file.write(content)
    os.lseek(descriptor, 0, os.SEEK_SET)
    return descriptor


def _read_rest(pipe: int, output: bytearray, limit: int) -> None:
    """What an ended process left in a pipe, up to one byte more than the limit."""
    while len(output) <= limit and (data := os.read(pipe, READ_SIZE)):
        output += data
    del output[limit + 1 :]


def _continue_as_first_process() -> None:
    """Fork into the new PID namespace; this process only waits for that one, and ends as it does."""
    child = os.fork()
    if child:
        os.close(0)
        os.close(1)
        _, status = os.waitpid(child, 0)
        os._exit(abs(os.waitstatus_to_exitcode(status)))
    kernel.prctl(kernel.PR_SET_PDEATHSIG, signal.SIGKILL)


def main() -> None:
    """Serve one caller: a frame with the setup and the code, then one frame per run."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    source, sink = os.fdopen(0, "rb", closefd=False), os.fdopen(1, "wb", closefd=False)
    setup = read_frame(source)
    if setup is None:
        return
    try:
        supervisor = Supervisor(setup[0], setup[1][0])
    except OSError as error:
        write_frame(sink, {"error": str(error)})
        return
    try:
        write_frame(sink, {"weaknesses": supervisor.weaknesses()})
        while request := read_frame(source):
            try:
                facts, outputs = supervisor.run(request[0], request[1][0])
            except OSError as error:
                write_frame(sink, {"error": str(error)})
                return
            write_frame(sink, facts, *outputs)
    except (EOFError, BrokenPipeError):
        return  # the caller has gone
    finally:
        supervisor.enclosure.remove()
