"""What hostile code tries. Every one of these really tries it."""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from verl.utils.sandbox.enclosure import OWN_ID_BASE

ROOT = Path(__file__).parents[3]


def processes_of(user: int) -> list[Path]:
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(FileNotFoundError):
            if process.stat().st_uid == user:
                found.append(process)
    return found


def test_a_fork_bomb_is_bounded_and_leaves_nothing(run):
    code = """
import os
print(os.getuid(), flush=True)
while True:
    try:
        os.fork()
    except OSError:
        pass
"""
    result = run(code, wall_s=1.0)
    user = int(result.stdout.split()[0])
    assert result.timed_out
    assert user < OWN_ID_BASE or processes_of(user) == []


def test_a_daemon_does_not_outlive_its_run(run):
    code = """
import os, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        os.setsid()
        time.sleep(1000)
    os._exit(0)
print(os.getuid())
"""
    result = run(code)
    user = int(result.stdout)
    assert result.exit_status == 0
    assert user < OWN_ID_BASE or processes_of(user) == []


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give up groups")
def test_code_runs_without_privileges(run):
    code = """
import ctypes, os
print(min(os.getresuid()) > 0, min(os.getresgid()) > 0, os.getgroups())
print(ctypes.CDLL(None).prctl(39, 0, 0, 0, 0))  # PR_GET_NO_NEW_PRIVS
open('mine', 'w').close()
for act in (lambda: os.setuid(0), lambda: os.setgroups([0]), lambda: os.chroot('.'), lambda: os.chown('mine', 0, 0)):
    try:
        act()
        print('it could')
    except OSError:
        pass
"""
    assert run(code).stdout == "True True []\n1\n"


def test_environments_of_other_processes_are_out_of_reach(run, monkeypatch):
    monkeypatch.setenv("SECRET_TOKEN", "hunter2")
    code = f"""
import os
print(sorted(os.environ))
for process in [*filter(str.isdigit, os.listdir('/proc')), os.getppid(), {os.getpid()}, {os.getppid()}]:
    try:
        if int(process) != os.getpid():
            print(process, open(f'/proc/{{process}}/environ').read())
    except OSError:
        pass
"""
    code = code.replace("os.listdir('/proc')", "(os.listdir('/proc') if os.access('/proc', os.R_OK) else [])")
    threads = ["MKL_NUM_THREADS", "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"]
    names = sorted([*threads, "HOME", "LANG", "PATH", "PYTHONHASHSEED", "TMPDIR"])
    assert run(code).stdout == f"{names}\n"


@pytest.fixture
def open_folder():
    """A folder in which every user may read and write."""
    folder = Path(tempfile.mkdtemp(dir="/tmp"))
    folder.chmod(0o777)
    (folder / "expected").write_text("the expected output")
    (folder / "expected").chmod(0o666)
    yield folder
    shutil.rmtree(folder)


def test_nothing_is_written_outside(run, open_folder):
    code = f"""
import os
folders = '{open_folder} {ROOT} /tmp /var/tmp /dev/shm / /usr /usr/bin /sandbox .. /proc'.split()
for path in [f'{{folder}}/written-by-sandbox' for folder in folders] + ['{open_folder}/expected', '../solution.py']:
    try:
        open(path, 'w').close()
        print(path)
    except OSError:
        pass
"""
    result = run(code)
    assert (result.stdout, result.exit_status) == ("", 0)
    assert (open_folder / "expected").read_text() == "the expected output"


def test_files_of_others_are_not_read(run, open_folder):
    code = f"""
for path in ('{open_folder}/expected', '{Path(__file__)}', '/etc/passwd', '/proc/1/cmdline', '/proc/1/root'):
    try:
        print(path, open(path).read())
    except OSError:
        pass
"""
    result = run(code)
    assert (result.stdout, result.exit_status) == ("", 0)


def test_no_socket_reaches_anything(run):
    with socket.create_server(("127.0.0.1", 0)) as tcp, socket.socket(socket.AF_UNIX) as local:
        local.bind(f"\0verl-sandbox-test-{os.getpid()}")
        local.listen()
        code = f"""
import ctypes, socket
for family, address in [(socket.AF_INET, {tcp.getsockname()}), (socket.AF_UNIX, {local.getsockname()})]:
    try:
        socket.socket(family).connect(address)
        print('connected', address)
    except OSError:
        pass
print(ctypes.CDLL(None).syscall(425, 1, ctypes.create_string_buffer(120)))  # io_uring_setup
"""
        assert run(code).stdout == "-1\n"


def test_it_cannot_kill_its_parents(make_sandbox):
    code = f"""
import os, signal
print('alive', flush=True)
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGKILL):
    for process in (os.getppid(), 1, {os.getpid()}, {os.getppid()}):
        try:
            os.kill(process, number)
        except OSError:
            pass
try:
    os.kill(-1, signal.SIGKILL)
except OSError:
    pass
"""
    with make_sandbox(code) as sandbox:
        assert [sandbox.run().stdout for _ in range(2)] == ["alive\n"] * 2


def test_it_cannot_look_into_its_parents(run):
    code = f"""
import ctypes, os
libc = ctypes.CDLL(None)
for process in (os.getppid(), 1, {os.getpid()}):
    print(libc.ptrace(16, process, None, None))
    for name in ('mem', 'maps', 'fd', 'cwd'):
        try:
            path = f'/proc/{{process}}/{{name}}'
            print(path, os.listdir(path) if name in ('fd', 'cwd') else open(path, 'rb').read(10))
        except OSError:
            pass
"""
    assert run(code).stdout == "-1\n" * 3


def test_no_new_namespaces_or_mounts(run):
    code = """
import ctypes
libc = ctypes.CDLL(None)
print(libc.unshare(0x10000000), libc.mount(b'none', b'/tmp', b'tmpfs', 0, None), libc.setns(0, 0))
"""
    assert run(code).stdout == "-1 -1 -1\n"


@pytest.mark.parametrize("call", ["clone", "clone3"])
def test_no_file_system_of_its_own_by_a_clone_into_new_namespaces(run, call):
    """It would be memory that neither the work folder's size nor the address space bounds."""
    code = f"""
import ctypes, os, signal, struct
libc = ctypes.CDLL(None, use_errno=True)
libc.syscall.restype = ctypes.c_long
numbers = {{"x86_64": dict(clone=56, clone3=435), "aarch64": dict(clone=220, clone3=435)}}[os.uname().machine]
flags = 0x10000000 | 0x00020000  # CLONE_NEWUSER, CLONE_NEWNS
user, group = os.getuid(), os.getgid()
if "{call}" == "clone":
    arguments = [ctypes.c_ulong(value) for value in (flags | signal.SIGCHLD, 0, 0, 0, 0)]
else:
    clone_args = struct.pack("8Q", flags, 0, 0, 0, signal.SIGCHLD, 0, 0, 0)
    arguments = [ctypes.create_string_buffer(clone_args, 64), ctypes.c_size_t(64)]
child = libc.syscall(ctypes.c_long(numbers["{call}"]), *arguments)
if child < 0:
    print(os.strerror(ctypes.get_errno()))
elif child:
    os.waitpid(child, 0)
else:
    try:
        print("cloned", flush=True)
        for file, text in (("setgroups", "deny"), ("uid_map", f"0 {{user}} 1"), ("gid_map", f"0 {{group}} 1")):
            with open(f"/proc/self/{{file}}", "w") as map:
                map.write(text)
        context = libc.syscall(430, b"tmpfs", 0)  # fsopen
        libc.syscall(431, context, 6, None, None, 0)  # fsconfig: create
        os.fchdir(libc.syscall(432, context, 0, 0))  # fsmount
        for i in range(12):
            with open(str(i), "wb") as file:
                file.write(bytes(1 << 20))
        print("written", i + 1, "MiB", flush=True)
    finally:
        os._exit(0)
"""
    said = {"clone": "Operation not permitted", "clone3": "Function not implemented"}
    assert run(code, disk_bytes=4 << 20).stdout == f"{said[call]}\n"


def test_a_tree_of_folders_that_is_hard_to_delete_is_deleted(run):
    before = set(Path(tempfile.gettempdir()).glob("verl-sandbox-*"))
    code = """
import os
for _ in range(1100):
    os.mkdir('d')
    os.chdir('d')
os.chmod('.', 0)
os.symlink('/', '../link')
"""
    run(code)
    assert set(Path(tempfile.gettempdir()).glob("verl-sandbox-*")) <= before


def test_no_expected_output_is_anywhere_in_the_process(make_sandbox):
    code = """
import gc, os, sys
def f():
    frame = sys._getframe()
    seen = []
    while frame:
        seen.append(repr(frame.f_locals))
        frame = frame.f_back
    seen += [repr(thing) for thing in gc.get_objects() if type(thing) in (dict, list, tuple, str)]
    folder = os.path.dirname(__file__)
    files = [f'{folder}/{name}' for name in os.listdir(folder)]
    seen += [open(file, errors='replace').read() for file in files if os.path.isfile(file)]
    print(sys.argv, seen)
"""
    with make_sandbox(code) as sandbox:
        result = sandbox.call("f", [])
    assert result.exit_status == 0 and "RECURSION_LIMIT" in result.stdout  # it did see the harness
    assert "livecodebench" not in result.stdout and "outputs" not in result.stdout


@pytest.mark.parametrize(
    "attack",
    [
        "sys.exit(0)",
        "os._exit(0)",
        "os.write(4, b'{}'); os._exit(0)",
        "os.close(4)",
        "print('0' * 32 + '42')",  # as if with a token, but on stdout
    ],
)
def test_a_call_that_returns_nothing_has_no_value(make_sandbox, attack):
    code = f"import os, sys\ndef f():\n    {attack}\n    sys.exit()"
    with make_sandbox(code) as sandbox:
        assert sandbox.call("f", []).value is None


def test_all_ends_with_the_caller(tmp_path):
    script = tmp_path / "caller.py"
    mark = f"sleeping-{os.getpid()}-{time.monotonic_ns()}"
    code = f"import os\nos.execv('/bin/sh', ['{mark}', '-c', 'echo; sleep 1000; true'])"
    script.write_text(
        f"from verl.utils.sandbox.run import Sandbox\nSandbox({code!r}, allow=('network', 'files', 'user')).run()\n"
    )
    caller = subprocess.Popen([sys.executable, str(script)], env=os.environ | {"PYTHONPATH": str(ROOT)})

    def is_running() -> bool:
        found = False
        for process in Path("/proc").glob("[0-9]*/cmdline"):
            with contextlib.suppress(OSError):
                found |= process.read_bytes().startswith(mark.encode())
        return found

    _wait_until(is_running)
    caller.send_signal(signal.SIGKILL)
    caller.wait()
    _wait_until(lambda: not is_running())


def _wait_until(condition) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.skipif(os.geteuid() != 0, reason="starts a caller as another user, which needs root")
def test_an_unprivileged_caller_gets_a_user_namespace(open_python):
    if not all(path.stat().st_mode & 0o001 for path in [ROOT, *ROOT.parents]):
        pytest.skip(f"other users cannot reach {ROOT}")
    code = """
import os
status = dict(line.split(':', 1) for line in open('/proc/self/status'))
print(os.getuid(), os.getpid(), int(status['CapEff'], 16))
try:
    os.kill(1, 9)
    print(open('/etc/passwd').read())
except OSError as error:
    print(type(error).__name__)
"""
    script = f"""
import sys
from verl.utils.sandbox.run import Sandbox
with Sandbox({code!r}, allow=('user',)) as sandbox:
    print(Sandbox._namespaces_refused, file=sys.stderr)
    print(sandbox.run().stdout)
"""
    result = subprocess.run(
        [open_python, "-B", "-c", script], env={"PYTHONPATH": str(ROOT)}, user=1234, group=1234, extra_groups=[],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    if result.stderr.strip():
        pytest.skip(f"no user namespaces here: {result.stderr}")
    assert result.stdout.splitlines() == ["65534 2 0", "FileNotFoundError", ""]
