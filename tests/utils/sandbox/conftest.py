import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from verl.utils.sandbox.run import PYTHON, Limits, Result, Sandbox, SandboxUnavailable, _interpreter

# Without root there is no other user to become, which is accepted here.
ALLOW = () if os.geteuid() == 0 else ("user",)


@pytest.fixture(scope="session")
def open_python() -> str:
    """An interpreter that other users can start: this one, or the system's."""
    folders = [Path(sys.base_prefix), *Path(sys.base_prefix).parents]
    if all(folder.stat().st_mode & 0o001 for folder in folders):
        return sys.executable
    python = shutil.which("python3", path="/usr/bin:/usr/local/bin")
    old = "import sys; sys.exit(sys.version_info < (3, 11))"
    if python is None or subprocess.run([python, "-c", old]).returncode != 0:
        pytest.skip(f"no python3 of 3.11 or later that other users can start: {sys.base_prefix} is closed to them")
    return python


@pytest.fixture(scope="module", params=["namespaces", "folder"])
def make_sandbox(request: pytest.FixtureRequest, open_python: str) -> Iterator[Callable[..., Sandbox]]:
    """Sandboxes in namespaces, and as they are where the kernel allows none."""

    def make(code: str, **limits: float) -> Sandbox:
        return Sandbox(code, Limits(**limits), allow=ALLOW, namespaces=request.param == "namespaces")

    with pytest.MonkeyPatch.context() as patch:
        if request.param == "folder" and open_python != sys.executable:
            patch.setenv(PYTHON, open_python)
            _interpreter.cache_clear()
        try:
            with make("") as sandbox:
                sandbox.run()
        except SandboxUnavailable as error:
            pytest.skip(str(error))
        if request.param == "namespaces" and Sandbox._namespaces_refused:
            pytest.skip(f"this machine permits no namespaces: {Sandbox._namespaces_refused}")
        yield make
    _interpreter.cache_clear()


@pytest.fixture
def run(make_sandbox: Callable[..., Sandbox]) -> Callable[..., Result]:
    """One run of a program."""

    def run(code: str, stdin: str = "", **limits: float) -> Result:
        with make_sandbox(code, **limits) as sandbox:
            return sandbox.run(stdin)

    return run
