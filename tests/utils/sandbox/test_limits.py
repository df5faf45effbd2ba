"""Of one run: what takes too much is stopped, and said."""

import pytest

FAST = {"cpu_s": 1, "wall_s": 10.0}


def test_cpu_time(run):
    result = run("while True:\n    pass", **FAST)
    assert result.timed_out and result.reason == "limit of CPU time" and result.cpu_s < 3


# Its second signal comes a second after the first, in either kind of sandbox.
@pytest.mark.slow
def test_a_program_that_ignores_the_cpu_signal_is_killed(run):
    code = "import signal\nsignal.signal(signal.SIGXCPU, signal.SIG_IGN)\nwhile True:\n    pass"
    result = run(code, **FAST)
    assert result.timed_out and result.exit_status == -9


def test_wall_time(run):
    result = run("print('before', flush=True)\nimport time\ntime.sleep(100)", wall_s=0.5)
    assert result.timed_out and result.reason == "limit of wall time" and result.stdout == "before\n"


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_endless_output(run, stream):
    result = run(f"import sys\nwhile True:\n    sys.{stream}.write('x' * 10000)", output_bytes=100_000)
    assert result.reason == "limit of output" and not result.timed_out
    assert 100_000 < len(getattr(result, stream)) < 1_000_000


def test_output_up_to_the_limit_is_whole(run):
    assert len(run("print('x' * 999_999)", output_bytes=1_000_000).stdout) == 1_000_000


def test_a_last_burst_of_output_counts(run):
    result = run("import os\nos.write(1, b'x' * 60_000)\nos._exit(0)", output_bytes=50_000)
    assert result.reason == "limit of output"


def test_memory(run):
    result = run("kept = bytearray(600 << 20)", memory_bytes=512 << 20)
    assert result.exit_status == 1 and "MemoryError" in result.stderr
    assert run("kept = bytearray(100 << 20)", memory_bytes=512 << 20).exit_status == 0


def test_memory_that_is_no_address_space(run):
    code = """
import ctypes
libc = ctypes.CDLL(None)
print(libc.shmget(0, 1 << 20, 0o1600), libc.memfd_create(b'x', 0), libc.semget(0, 32000, 0o1600))
"""
    assert run(code).stdout == "-1 -1 -1\n"


def test_a_stack_without_limit_is_bounded_by_memory(run):
    """In a fresh process, whose stack really has room to grow into."""
    code = """
import resource, subprocess, sys
resource.setrlimit(resource.RLIMIT_STACK, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
deep = '''
import sys
from functools import cache
sys.setrecursionlimit(2**31 - 1)
@cache
def f(n):
    return f(n + 1)
f(0)
'''
process = subprocess.run([sys.executable, '-S', '-c', deep], stderr=subprocess.DEVNULL)
print(process.returncode != 0, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss << 10 < 400 << 20)
"""
    assert run(code, memory_bytes=400 << 20).stdout == "True True\n"


def test_processes_and_threads(run):
    code = """
import threading, time
started = 0
try:
    for _ in range(100):
        threading.Thread(target=time.sleep, args=(0.2,)).start()
        started += 1
except RuntimeError:
    print(started < 8)
"""
    assert run(code, processes=8).stdout == "True\n"


def test_files(run):
    code = """
kept = []
try:
    while True:
        kept.append(open('/dev/null'))
except OSError:
    print(len(kept) < 32)
try:
    open('large', 'wb').write(bytes(2 << 20))
except OSError:
    print('too large')
"""
    assert run(code, open_files=32, file_bytes=1 << 20).stdout == "True\ntoo large\n"


def test_the_work_folder_in_namespaces_has_a_size(run, request):
    if "[folder]" in request.node.name:
        pytest.skip("only a folder in memory has a size of its own")
    code = """
try:
    for i in range(8):
        open(str(i), 'wb').write(bytes(1 << 20))
except OSError:
    print(i < 6)
"""
    assert run(code, disk_bytes=4 << 20).stdout == "True\n"


def test_limits_cannot_be_raised(run):
    code = """
import resource
for kind in (resource.RLIMIT_AS, resource.RLIMIT_NPROC, resource.RLIMIT_CPU, resource.RLIMIT_FSIZE):
    try:
        resource.setrlimit(kind, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        print('raised', kind)
    except (ValueError, OSError):
        pass
"""
    result = run(code)
    assert (result.stdout, result.exit_status) == ("", 0)
