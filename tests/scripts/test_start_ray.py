"""scripts/start_ray.sh: two nodes on one machine, a launch script across them, and what is refused."""

import contextlib
import re
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.scripts.launches import SCRIPTS, SMALL, environment, make_data, sizes, steps

START = SCRIPTS / "start_ray.sh"


def test_usage_and_a_missing_token_end_at_once(tmp_path):
    variables = environment(RAY_AUTH_TOKEN_PATH=str(tmp_path / "token"))
    for arguments, message in (
        ([], "usage: bash scripts/start_ray.sh head | join ADDRESS:PORT"),
        (["join"], "usage: bash scripts/start_ray.sh head | join ADDRESS:PORT"),
        (["join", "127.0.0.1:6379"], f"error: no token in {tmp_path / 'token'}: copy it from the first node"),
    ):
        result = subprocess.run(["bash", START, *arguments], env=variables, capture_output=True, text=True)
        assert result.returncode == 2
        assert result.stderr.startswith(message)


@contextlib.contextmanager
def node(arguments: list[str], variables: dict[str, str], log: Path) -> Iterator[None]:
    """A node that has started; ended by SIGTERM, as Ctrl-C would."""
    with log.open("w") as output:
        process = subprocess.Popen(["bash", START, *arguments], env=variables, stdout=output, stderr=output)
        try:
            deadline = time.monotonic() + 120
            while "Ray runtime started" not in log.read_text():
                assert process.poll() is None and time.monotonic() < deadline, log.read_text()
                time.sleep(0.2)
            yield
        finally:
            process.terminate()
            try:
                process.wait(timeout=30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def processes_of(folder: Path) -> list[psutil.Process]:
    """Those with `folder` in their command line: Ray's temporary folder names the cluster."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if any(str(folder) in argument for argument in process.cmdline()):
                found.append(process)
    return found


@pytest.fixture
def cluster(tmp_path) -> Iterator[dict[str, str]]:
    """The environment of drivers of a cluster of two nodes with a core each, apart from any other on this machine."""
    folder = Path(tempfile.mkdtemp(prefix="ray_", dir="/tmp"))  # a short path: sockets lie in it
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    variables = environment(RAY_AUTH_TOKEN_PATH=str(tmp_path / "token"), RAY_PORT=port)
    cpu = ["--num-cpus=1", "--num-gpus=0", "--object-store-memory=100000000"]
    try:
        with (
            node(["head", *cpu, f"--temp-dir={folder}"], variables, tmp_path / "head.log"),
            node(["join", f"127.0.0.1:{port}", *cpu], variables, tmp_path / "join.log"),
        ):
            yield variables | {"RAY_ADDRESS": f"127.0.0.1:{port}"}
        left = processes_of(folder)
        assert left == [], "a node leaves nothing behind"
    finally:
        for process in processes_of(folder):
            with contextlib.suppress(psutil.Error):
                process.kill()
        shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.slow  # starts two Ray nodes and trains two steps across them
def test_a_launch_script_trains_across_two_nodes(cluster, tiny_model, tmp_path):
    data = make_data(tmp_path / "data")
    run_dir = tmp_path / "run"
    variables = cluster | {
        "MODEL": str(tiny_model),
        "DATA": str(data / "easymath"),
        "GPUS": "1",
        "NODES": "2",
        "SETTINGS": "exact",
    }
    command = ["bash", SCRIPTS / "run_qwen2.5_1.5b_MVaR_math.sh", *SMALL, *sizes("easymath")]
    result = subprocess.run(
        [*command, f"trainer.default_local_dir={run_dir}"], env=variables, capture_output=True, text=True, timeout=400
    )
    assert result.returncode == 0, result.stderr[-2000:]
    port = cluster["RAY_PORT"]
    assert re.search(
        rf"on every other node: bash scripts/start_ray.sh join \S+:{port}\n", (tmp_path / "head.log").read_text()
    )
    logged = steps(run_dir)
    assert [step["step"] for step in logged] == [1, 2]
    assert all(step["actor/grad_norm"] > 0 for step in logged)
    checkpoint = run_dir / "checkpoints" / "global_step_2"
    assert len(list(checkpoint.rglob("__*_0.distcp"))) == 2, "each node wrote its shard"
