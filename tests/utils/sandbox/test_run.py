import functools
import json
import os
import resource
import subprocess
import sys

import pytest

from verl.utils.sandbox import kernel
from verl.utils.sandbox.run import ALLOW, PYTHON, Sandbox, SandboxUnavailable, run_python

ALLOWED = ("network", "files", "user")


@pytest.fixture
def make_sandbox():
    """Sandboxes as this machine has them; which kind makes no difference here."""
    return functools.partial(Sandbox, allow=ALLOWED)


def test_a_program_reads_stdin_and_prints(run):
    result = run("print(int(input()) + 1)", "41\n")
    assert (result.stdout, result.stderr, result.exit_status) == ("42\n", "", 0)
    assert result.reason is None and not result.timed_out and result.value is None


def test_run_python_runs_once():
    assert run_python("print(input()[::-1])", "abc", allow=ALLOWED).stdout == "cba\n"


@pytest.mark.parametrize(
    "code",
    [
        "import os\nprint(os.read(0, os.fstat(0).st_size).decode())",  # the size, which a pipe does not have
        "print(open(0).read())",
        "print(open('/dev/stdin').read())",
        "import sys\nprint(sys.stdin.readline())",
    ],
)
def test_ways_of_contest_programs_to_read_stdin(run, code):
    assert run(code, "12 34").stdout == "12 34\n"


def test_standard_modules_need_no_import_and_the_module_is_main(run):
    code = (
        "if __name__ == '__main__':\n    print(sqrt(16), Counter('aab')['a'], List[int], math.floor(1.5))\n    exit()"
    )
    assert run(code).stdout == "4.0 2 typing.List[int] 1\n"


@pytest.mark.parametrize(
    ("code", "status", "reason"),
    [
        ("raise ValueError('wrong')", 1, "exit status 1"),
        ("import sys\nsys.exit(3)", 3, "exit status 3"),
        ("import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)", -11, "exit status -11"),
        ("this is no Python", 1, "exit status 1"),
    ],
)
def test_a_failing_program_shows_its_status(run, code, status, reason):
    result = run(code)
    assert (result.exit_status, result.reason) == (status, reason)


def test_text_that_no_file_could_hold_is_no_program():
    assert run_python("print('\ud800')", "\udfff", allow=ALLOWED).exit_status == 0


def test_each_run_has_a_fresh_interpreter_and_an_empty_folder(make_sandbox):
    code = "import os\nprint(os.listdir('.'), globals().get('seen'))\nopen('left', 'w').write('x')\nseen = 1"
    with make_sandbox(code) as sandbox:
        assert [sandbox.run().stdout for _ in range(2)] == ["[] None\n"] * 2


def test_a_call_returns_json_and_keeps_prints_apart(make_sandbox):
    code = """
class Solution:
    def pairs(self, numbers: List[int], other):
        print('[[0, 0]]')
        return [(number, other) for number in numbers]

if __name__ == '__main__':
    raise SystemExit('a demonstration')
"""
    with make_sandbox(code) as sandbox:
        result = sandbox.call("pairs", [[1, 2], "é"])
        assert json.loads(result.value) == [[1, "é"], [2, "é"]]
        assert result.stdout == "[[0, 0]]\n"
        missing = sandbox.call("absent", [])
        assert missing.value is None and missing.exit_status == 1


def test_a_plain_function_and_numbers_of_numpy(make_sandbox):
    pytest.importorskip("numpy")
    code = "import numpy\ndef f(n):\n    return [numpy.int64(n), numpy.ones(n).sum(), numpy.arange(n)]"
    with make_sandbox(code) as sandbox:
        assert json.loads(sandbox.call("f", [3]).value) == [3, 3.0, [0, 1, 2]]


def test_what_json_cannot_hold_is_no_value(make_sandbox):
    with make_sandbox("def f():\n    return {1, 2}") as sandbox:
        result = sandbox.call("f", [])
    assert result.value is None and "a set, which JSON cannot hold" in result.stderr


def test_only_named_packages_can_be_imported(run):
    assert run("import torch").exit_status == 1


def test_recursion_through_c_has_room(run):
    code = "from functools import cache\n@cache\ndef f(n):\n    return n and f(n - 1) + 1\nprint(f(20000))"
    assert run(code).stdout == "20000\n"


def test_a_program_that_lifts_its_stack_limit_recurses(run):
    if resource.getrlimit(resource.RLIMIT_STACK)[1] != resource.RLIM_INFINITY:
        pytest.skip("this machine limits the stack for good")
    code = """
import resource, sys
from functools import cache
resource.setrlimit(resource.RLIMIT_STACK, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
sys.setrecursionlimit(10**6)
@cache
def f(n):
    return n and f(n - 1) + 1
print(f(100000))
"""
    assert run(code).stdout == "100000\n"


def test_threads_and_processes_work(run):
    code = """
import multiprocessing, os, subprocess, threading
def say(what):
    print(what, flush=True)
threads = [threading.Thread(target=say, args=("thread",)) for _ in range(3)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
if os.fork() == 0:
    say("fork")
    os._exit(0)
os.wait()
print(subprocess.check_output(["/bin/echo", "subprocess"], text=True), end="")
print(subprocess.check_output("echo shell | cat", shell=True, text=True), end="", flush=True)
process = multiprocessing.Process(target=say, args=("multiprocessing",))
process.start()
process.join()
"""
    expected = ["thread"] * 3 + ["fork", "subprocess", "shell", "multiprocessing"]
    assert run(code).stdout.split() == expected


def test_sets_of_text_print_the_same_each_time(run):
    code = "print(set('abcdefghij'))"
    assert run(code).stdout == run(code).stdout


@pytest.fixture
def weak(monkeypatch):
    """As on a kernel that can cut off neither the network nor files."""
    start = Sandbox._start
    monkeypatch.setattr(Sandbox, "_start", lambda *a, **k: start(*a, **k) | {"weaknesses": ["network", "files"]})


def test_what_cannot_be_cut_off_is_refused_unless_allowed(weak, monkeypatch):
    with pytest.raises(SandboxUnavailable, match=f"use the network; .*Set {ALLOW}=network,files to"):
        Sandbox("print(1)", namespaces=False, allow=("user",))
    monkeypatch.setenv(ALLOW, "files, user")
    with pytest.raises(SandboxUnavailable, match=f"{ALLOW}=network to"):
        Sandbox("print(1)", namespaces=False)
    Sandbox("print(1)", namespaces=False, allow=("network",)).close()


def test_a_misspelt_allowance_lists_the_right_ones(monkeypatch):
    monkeypatch.setenv(ALLOW, "netwrok")
    with pytest.raises(ValueError, match="netwrok is not one of network, files, user"):
        Sandbox("print(1)")


def test_an_interpreter_that_does_not_start_is_named(monkeypatch):
    with Sandbox("", allow=ALLOWED) as sandbox:
        sandbox._setup["python"] = "/usr/bin/no-python"
    with pytest.raises(SandboxUnavailable, match="/usr/bin/no-python did not start"):
        sandbox._start(namespaces=False)
        sandbox.run()


def test_where_the_kernel_refuses_namespaces_a_folder_takes_their_place(open_python):
    """In a process that may call everything but unshare, as in most containers."""
    if not kernel.can_filter_calls():
        pytest.skip("system calls cannot be filtered on this machine, so that unshare cannot be refused")
    script = f"""
import logging
from verl.utils.sandbox import kernel
from verl.utils.sandbox.run import run_python
logging.basicConfig()
kernel._REFUSED = {{"unshare": kernel._REFUSED["unshare"]}}
kernel.prctl(kernel.PR_SET_NO_NEW_PRIVS, 1)
kernel.filter_calls()
for _ in range(2):
    print(run_python("import os; print(os.getcwd() != '/work')", allow={ALLOWED}).stdout)
"""
    environment = os.environ | {PYTHON: open_python}
    result = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert result.stdout.split() == ["True", "True"]
    assert result.stderr.count("runs without namespaces (") == 1 and "unshare: Operation not permitted" in result.stderr
