"""Run untrusted Python code in a fresh, confined interpreter. docs/sandbox.md says what it is kept from and how."""

import contextlib
import functools
import importlib.util
import json
import logging
import os
import secrets
import select
import signal
import subprocess
import sys
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from verl.utils.sandbox.frames import read_frame, write_frame

logger = logging.getLogger(__name__)

ALLOW = "VERL_SANDBOX_ALLOW"  # comma-separated: what the code need not be kept from
PYTHON = "VERL_SANDBOX_PYTHON"  # another interpreter for the code
WEAKNESSES = {
    "network": "it could use the network",
    "files": "it could read what every user may read and write where every user may write",
    "user": "it would run as this user, whose processes and environment variables it could reach",
}
# The package by its folder alone: `verl` itself would have to be imported with everything that it needs.
START = "import sys; sys.path.append(sys.argv[1]); from sandbox.supervisor import main; main()"
SUPERVISOR_GRACE_S = 30.0  # beyond the wall time of a run, after which the supervisor counts as hung
ENDED_BY_CPU_LIMIT = (-signal.SIGXCPU, -signal.SIGKILL)


class SandboxUnavailable(RuntimeError):
    """Untrusted code cannot be confined as asked; nothing of it was run."""


@dataclass(frozen=True)
class Limits:
    """Of one run. Memory and CPU time count per process, `processes` includes threads."""

    cpu_s: int = 10
    wall_s: float = 20.0
    memory_bytes: int = 2 << 30  # address space
    processes: int = 8
    open_files: int = 64
    file_bytes: int = 16 << 20  # of one file
    disk_bytes: int = 64 << 20  # of the work folder, which is in memory; without namespaces there is no such limit
    output_bytes: int = 16 << 20  # of stdout, and of stderr, and of a call's result


@dataclass(frozen=True)
class Result:
    """Outcome of one run.

    `exit_status` is negative if a signal ended the process; `reason` says in words why the run is no success, None if
    the code ended by itself with status 0; `value` is a call's return value as JSON text, None if there is none.
    """

    stdout: str
    stderr: str
    exit_status: int
    timed_out: bool
    reason: str | None
    value: str | None
    cpu_s: float
    wall_s: float


class Sandbox:
    """One piece of code, to be run any number of times, each time in a fresh interpreter and an empty work folder."""

    _namespaces_refused = ""  # why this machine has none, once that is known

    def __init__(
        self,
        code: str,
        limits: Limits | None = None,
        packages: Sequence[str] = ("numpy",),
        allow: Collection[str] = (),
        namespaces: bool = True,
    ):
        """`packages`, where they are installed here, can be imported by the code besides the standard library. `allow`
        (of "network", "files", "user"; also VERL_SANDBOX_ALLOW) accepts that the code is not kept from these where the
        machine offers no means. `namespaces=False` does without them even if there are any.

        Raises SandboxUnavailable if something is not cut off and not allowed.
        """
        self.limits = limits or Limits()
        self._setup: dict[str, Any] = {"limits": asdict(self.limits), **_interpreter(), "packages": _folders(packages)}
        self._code = code.encode(errors="replace")
        allowed = {*allow, *filter(None, os.environ.get(ALLOW, "").replace(" ", "").split(","))}
        if unknown := allowed - WEAKNESSES.keys():
            raise ValueError(f"{ALLOW}: {', '.join(sorted(unknown))} is not one of {', '.join(WEAKNESSES)}")
        if namespaces and not Sandbox._namespaces_refused:
            header = self._start(namespaces=True)
            if "error" in header:
                self.close()
                Sandbox._namespaces_refused = header["error"]
                logger.warning("untrusted code runs without namespaces (%s); see docs/sandbox.md", header["error"])
        if not namespaces or Sandbox._namespaces_refused:
            header = self._start(namespaces=False)
        self._raise_error(header)
        if missing := [name for name in header["weaknesses"] if name not in allowed]:
            self.close()
            why = Sandbox._namespaces_refused or "namespaces are switched off"
            raise SandboxUnavailable(
                f"untrusted code cannot be confined here ({why}): {'; '.join(WEAKNESSES[name] for name in missing)}. "
                f"Set {ALLOW}={','.join(missing)} to run it all the same; docs/sandbox.md says more"
            )

    def run(self, stdin: str = "", wall_s: float | None = None) -> Result:
        """Run the code as a program (`__name__` is "__main__") with this standard input, for at most `wall_s` seconds
        (None: the limit's)."""
        return self._run({"wall_s": wall_s}, stdin)

    def call(self, name: str, arguments: Sequence[Any], wall_s: float | None = None) -> Result:
        """Run the code as a module and call its function `name`, or that method of its class `Solution`, with
        `arguments`, which JSON can hold. `value` of the result is what it returned, as JSON."""
        token = secrets.token_hex(16)
        call = {"name": name, "arguments": list(arguments), "token": token}
        return self._run({"call": call, "wall_s": wall_s}, "", token)

    def close(self) -> None:
        """End the supervisor, and with it all that is left of the sandbox."""
        with contextlib.suppress(BrokenPipeError):  # closing writes what could not be written before
            self._requests.close()
        self._answers.close()
        self._process.wait()

    def __enter__(self) -> "Sandbox":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _start(self, namespaces: bool) -> dict[str, Any]:
        package = Path(__file__).parents[1]
        command = [sys.executable, "-I", "-S", "-c", START, str(package)]
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, env={}, cwd="/", start_new_session=True)
        assert self._process.stdin is not None and self._process.stdout is not None
        self._requests, self._answers = self._process.stdin, self._process.stdout
        return self._exchange(self._setup | {"namespaces": namespaces}, self._code)[0]

    def _exchange(self, header: dict[str, Any], blob: bytes) -> tuple[dict[str, Any], list[bytes]]:
        with contextlib.suppress(BrokenPipeError):  # it has ended, as its answer will show
            write_frame(self._requests, header, blob)
        if not select.select([self._answers], [], [], self.limits.wall_s + SUPERVISOR_GRACE_S)[0]:
            self._process.kill()
        answer = read_frame(self._answers)
        if answer is None:
            self.close()
            raise RuntimeError(f"the sandbox's supervisor ended with status {self._process.returncode}")
        return answer

    def _raise_error(self, header: dict[str, Any]) -> None:
        if "error" in header:
            self.close()
            raise SandboxUnavailable(f"untrusted code cannot be run here: {header['error']}")

    def _run(self, request: dict[str, Any], stdin: str, token: str = "") -> Result:
        header, outputs = self._exchange(request, stdin.encode(errors="replace"))
        self._raise_error(header)
        stdout, stderr, answer = (output.decode(errors="replace") for output in outputs)
        status, stopped, cpu_s = header["exit_status"], header["stopped"], header["cpu_s"]
        # The kernel counts ticks, so that its CPU time may be a little more than the process's.
        if stopped is None and status in ENDED_BY_CPU_LIMIT and cpu_s > self.limits.cpu_s - 0.5:
            stopped = "CPU time"
        has_value = bool(token) and stopped is None and answer.startswith(token)
        return Result(
            stdout=stdout,
            stderr=stderr,
            exit_status=status,
            timed_out=stopped in ("wall time", "CPU time"),
            reason=f"limit of {stopped}" if stopped else f"exit status {status}" if status else None,
            value=answer.removeprefix(token) if has_value else None,
            cpu_s=cpu_s,
            wall_s=header["wall_s"],
        )


def run_python(
    code: str,
    stdin: str = "",
    limits: Limits | None = None,
    packages: Sequence[str] = ("numpy",),
    allow: Collection[str] = (),
) -> Result:
    """Run a program once; for several inputs a Sandbox is cheaper. Arguments and errors as Sandbox's."""
    with Sandbox(code, limits, packages, allow) as sandbox:
        return sandbox.run(stdin)


@functools.cache
def check_confinement(packages: tuple[str, ...] = ("numpy",), allow: tuple[str, ...] = ()) -> None:
    """Raise SandboxUnavailable if code cannot be confined and run here: at start-up, before there is any code. Tried
    once per process."""
    with Sandbox("", packages=packages, allow=allow) as sandbox:
        sandbox.run()


@functools.cache
def _interpreter() -> dict[str, Any]:
    """The interpreter for the code, without any virtual environment around it, and the folders that it consists of."""
    python = os.environ.get(PYTHON, sys.executable)
    ask = "import json, sys; print(json.dumps([sys.executable, sys.base_prefix, sys.base_exec_prefix]))"
    answer = subprocess.run([python, "-I", "-S", "-c", ask], capture_output=True, text=True, check=True).stdout
    executable, *prefixes = map(os.path.realpath, json.loads(answer))
    return {"python": executable, "folders": sorted(set(prefixes))}


def _folders(packages: Sequence[str]) -> dict[str, str]:
    """The folders of installed packages, and the shared libraries that wheels keep beside them."""
    folders = {}
    for package in packages:
        spec = importlib.util.find_spec(package)
        for folder in map(Path, (spec.submodule_search_locations or ()) if spec else ()):
            for path in (folder, folder.with_name(f"{folder.name}.libs")):
                if path.is_dir():
                    folders[path.name] = os.path.realpath(path)
    return folders
