import json
import os
import time
from pathlib import Path

import pytest
import torch

from verl.protocol import DataProto
from verl.trainer.config.schema import PPOConfig, RewardModelConfig
from verl.trainer.ppo.reward import load_reward, make_reward_manager
from verl.utils.reward_score import compute_score as compute_any_score
from verl.utils.reward_score.livecodebench import TIME_IS_UP, compute_score, last_block, same_text
from verl.utils.sandbox.run import SandboxUnavailable, check_confinement
from verl.workers.reward.function import RewardFunction, RewardRequest
from verl.workers.reward.outcomes import ScoringTimeout
from verl.workers.reward.pool import ScoringPool

SUMS = {"inputs": ["1 2\n", "3 4\n", "-1 1\n"], "outputs": ["3\n", "7\n", "0\n"], "fn_name": None}
PAIRS = {"inputs": ['[1, 2]\n"é"', '[]\n""'], "outputs": ['[[1, "é"], [2, "é"]]', "[]"], "fn_name": "pairs"}


@pytest.fixture(autouse=True, scope="module")
def _confined():
    try:
        check_confinement()
    except SandboxUnavailable as error:
        pytest.skip(str(error))


def program(code: str) -> str:
    return f"Some thoughts.\n```python\n{code}\n```\nThat is all."


def score(code: str, ground_truth: object = SUMS, **kwargs) -> dict:
    return compute_score("livecodebench", program(code), ground_truth, {}, **kwargs)


@pytest.mark.parametrize(
    ("response", "code"),
    [
        ("```python\na\n```", "a"),
        ("```python\na\n```\nor better\n```python\nb\nc\n```\n", "b\nc"),
        ("```py\na\n```", "a"),
        ("```Python3 title=x\r\na\n```", "a"),
        ("```python\na\n```\n```cpp\nb\n```", "a"),
        ("```python\nnever closed\n```python\nb\n```", "b"),
        ("```python\na\n```\n```python\ncut off", "a"),
        ("```python\n```", ""),
        ("```python\ncut off", None),
        ("```\na\n```", None),
        ("```pythonic\na\n```", None),
        ("no code", None),
        ("", None),
    ],
)
def test_the_last_closed_python_block_counts(response, code):
    assert last_block(response) == code


@pytest.mark.parametrize(
    ("output", "expected", "same"),
    [
        ("3\n", "3", True),
        ("\n 3 \n\n", "3", True),
        ("1 \n2", "1\n 2\n", True),
        ("1 2", "1\n2", False),
        ("1\n\n2", "1\n2", False),
        ("1.0", "1", True),
        ("1.50 2", "1.5  2.0", True),
        ("1e3", "1000", True),
        ("0.3333333", "0.33333333", False),
        ("50000000000000001", "50000000000000000", False),
        ("yes  no", "yes no", False),
        ("Yes", "yes", False),
        ("case 1.0", "case 1", False),
        ("nan", "nan", True),
        ("sNaN", "1", False),
        ("inf", "Infinity", False),
        ("", "", True),
        ("", "0", False),
    ],
)
def test_comparison_of_printed_output(output, expected, same):
    assert same_text(output, expected) is same


def test_a_right_program():
    result = score("a, b = map(int, input().split())\nprint(a + b)")
    found = {"pass_rate": 1.0, "verdict": "passed", "timed_out": 0.0}
    assert result == {"score": 1.0, "acc": 1.0, "pred": None} | found


def test_the_ground_truth_may_be_text_and_the_scorer_is_known_by_name():
    response = program("print(sum(map(int, input().split())))")
    result = compute_any_score("livecodebench", response, json.dumps(SUMS), {})
    assert isinstance(result, dict) and result["score"] == 1.0


def test_a_program_that_fails_in_the_middle():
    code = "a, b = map(int, input().split())\nprint(a + b if a != 3 else 0)"
    first = score(code)
    assert (first["score"], first["pass_rate"], first["verdict"]) == (0.0, pytest.approx(1 / 3), "wrong answer")
    every = score(code, stop_at_failure=False)
    assert (every["score"], every["pass_rate"], every["verdict"]) == (0.0, pytest.approx(2 / 3), "wrong answer")


@pytest.mark.parametrize(
    ("code", "verdict", "timed_out"),
    [
        ("print(1 / 0)", "exit status 1", 0.0),
        ("while True: pass", "limit of ", 1.0),  # of CPU time; of wall time if the machine is busy
        ("kept = bytearray(1 << 30)", "exit status 1", 0.0),
    ],
)
def test_the_verdict_says_what_failed(code, verdict, timed_out):
    result = score(code, timeout_s=1, memory_mb=500)
    assert result["verdict"].startswith(verdict) and result["timed_out"] == timed_out


def test_no_code():
    assert compute_score("livecodebench", "It is 3.", SUMS) == {
        "score": 0.0, "acc": 0.0, "pred": None, "pass_rate": 0.0, "verdict": "no code", "timed_out": 0.0,
    }  # fmt: skip


METHOD = "class Solution:\n    def pairs(self, numbers: List[int], other: str):\n        return "


@pytest.mark.parametrize(
    ("code", "right"),
    [
        (METHOD + "[[number, other] for number in numbers]", 1.0),
        (METHOD + "tuple((number, other) for number in numbers)", 1.0),
        ("def pairs(numbers, other):\n    return [[number, other] for number in numbers]", 1.0),
        (METHOD + "[[other, number] for number in numbers]", 0.0),
        (METHOD + "None", 0.0),
        (METHOD + "{1, 2}", 0.0),
        ("class Solution:\n    pass", 0.0),
    ],
)
def test_function_tests(code, right):
    assert score(code, PAIRS)["score"] == right


def test_arguments_that_are_lists_already():
    ground_truth = {"inputs": [[2, 3]], "outputs": [8], "fn_name": "power"}
    assert score("def power(a, b): return a ** b", ground_truth)["score"] == 1.0


@pytest.mark.parametrize(
    "extra", [{"metadata": '{"func_name": "f"}'}, {"metadata": {"func_name": "f"}}, {"func_name": "f"}]
)
def test_rows_of_tests_with_a_function(extra):
    rows = [{"input": "[1]\n2", "output": "[1, 2]", "testtype": "functional"}]
    response = program("def f(a, b): return a + [b]")
    assert compute_score("livecodebench", response, json.dumps(rows), extra)["score"] == 1.0


def test_rows_of_tests_with_stdin():
    rows = [{"input": "1 2", "output": "3", "testtype": "stdin"}]
    result = compute_score("livecodebench", program("print(3)"), rows, {"metadata": "{}"})
    assert result["score"] == 1.0


@pytest.mark.parametrize(
    ("ground_truth", "message"),
    [
        ("3", "neither `inputs` and `outputs` nor a list of tests"),
        ("no JSON", "is no JSON"),
        ({"inputs": ["1"], "outputs": []}, "1 inputs and 0 outputs"),
        ({"inputs": [], "outputs": []}, "0 inputs"),
        ([{"input": "1", "output": "1"}], "no 'testtype'"),
        ([{"input": "1", "output": "1", "testtype": "functional"}], "need the function's name"),
        ([{"input": "1", "output": "1", "testtype": "other"}], "all stdin or all functional, not \\['other'\\]"),
    ],
)
def test_a_ground_truth_in_no_known_form(ground_truth, message):
    with pytest.raises(ValueError, match=message):
        score("print(1)", ground_truth)


ATTACKS = """
sys.exit(0)
os._exit(0)
os.kill(os.getpid(), signal.SIGKILL)
os.kill(os.getppid(), signal.SIGKILL)
print({"score": 1.0, "passed": True})
os.write(4, b"passed"); os._exit(0)
os.write(1, b"passed"); os.close(1); os._exit(0)
json.loads = json.dumps = lambda *a, **k: "passed"
builtins.all = builtins.any = lambda *a: True
atexit.register(os._exit, 0)
sys.settrace(lambda *a: None); raise SystemExit(0)
sys.stdout = sys.__stdout__ = None
threading.Thread(target=lambda: os._exit(0)).start()
os.execv("/bin/true", ["true"])
""".strip().splitlines()
PRELUDE = "import atexit, builtins, gc, json, os, signal, sys, threading\n"
EQUAL_TO_ALL = """
class Equal(str):
    __eq__ = lambda self, other: True
    __hash__ = str.__hash__
    __class__ = property(lambda self: str)
"""


@pytest.mark.parametrize("attack", ATTACKS)
def test_tampering_passes_no_test(attack):
    assert score(PRELUDE + attack, {"inputs": ["1"], "outputs": ["271828"], "fn_name": None})["score"] == 0.0
    call = PRELUDE + f"def f(n):\n    {attack}\n    return n"
    assert score(call, {"inputs": ["1"], "outputs": ["271828"], "fn_name": "f"})["score"] == 0.0


def test_an_answer_that_claims_to_equal_everything():
    code = EQUAL_TO_ALL + "def f(n):\n    return Equal('x')"
    assert score(code, {"inputs": ["1"], "outputs": ['"271828"'], "fn_name": "f"})["score"] == 0.0


@pytest.mark.parametrize("value", ["'[' * 100_000", "'1' * 10_000", "'NaN'", "''"])
def test_what_is_written_to_the_answers_pipe_is_only_data(value):
    code = f"""
import gc, os
def f(n):
    token = next(thing['token'] for thing in gc.get_objects() if isinstance(thing, dict) and 'token' in thing)
    os.write(4, (token + {value}).encode())
    os._exit(0)
"""
    result = score(code, {"inputs": ["1"], "outputs": ["271828"], "fn_name": "f"})
    assert result["score"] == 0.0 and result["verdict"] in ("no result", "wrong answer")


def test_the_expected_output_is_not_to_be_found():
    """Everything readable is searched for it, and the find would be printed."""
    code = """
import gc, os, re, sys
seen = [repr(thing) for thing in gc.get_objects()] + [repr(os.environ), repr(sys.argv)]
for folder in ('/sandbox', '/work', '/proc/self', '/tmp', os.getcwd(), os.path.dirname(__file__)):
    for parent, _, names in os.walk(folder):
        for name in names:
            try:
                seen.append(open(os.path.join(parent, name), errors='replace').read(1 << 20))
            except OSError:
                pass
print(next(iter(re.findall('27182[0-9]{5}', ' '.join(seen))), 'nothing'))
"""
    expected = str(2_718_200_000 + os.getpid())
    assert score(code, {"inputs": ["1"], "outputs": [expected], "fn_name": None})["verdict"] == "wrong answer"


MANY = {"inputs": ["1"] * 200, "outputs": ["1"] * 200, "fn_name": None}


def test_all_tests_together_have_a_limit_of_time():
    """It cuts a test short, whatever that alone may take; none is begun afterwards."""
    begin = time.monotonic()
    result = score("import time\ntime.sleep(1000)", MANY, total_s=0.5, stop_at_failure=False)
    assert result["verdict"] == "limit of wall time" and result["timed_out"] == 1.0
    assert time.monotonic() - begin < 10  # a test alone may take 12 s
    result = score("print(input())", MANY, total_s=1.0)  # 200 starts of an interpreter take longer
    assert result["score"] == 0.0 and 0 < result["pass_rate"] < 1 and result["timed_out"] == 1.0
    assert result["verdict"] in (TIME_IS_UP, "limit of wall time")


@pytest.mark.slow  # uses up a time-out of the pool, with some room for a busy machine
@pytest.mark.parametrize("code", ["import time\ntime.sleep(1000)", "import time\ntime.sleep(0.4)\nprint(input())"])
def test_in_the_pool_a_program_that_runs_out_of_time_is_wrong_and_not_a_time_out(code):
    config = PPOConfig(reward_model=RewardModelConfig(num_workers=1, timeout_s=5.0))
    columns = {"data_source": ["livecodebench"], "ground_truth": [json.dumps(MANY)], "extra_info": [{}]}
    batch = DataProto.from_dict({"response_mask": torch.ones(1, 2, dtype=torch.bool), **columns})
    manager = make_reward_manager(load_reward(config), config.reward_model)
    try:
        scores, extras, metrics = manager(batch, [program(code)])
    finally:
        manager.close()
    assert scores.sum() == 0.0 and extras["acc"].tolist() == [0.0]
    assert metrics["reward/timeouts"] == metrics["reward/exceptions"] == 0.0
    assert metrics["reward_extra/timed_out/mean"] == 1.0


@pytest.mark.slow  # waits for time-outs
def test_a_solution_ends_with_the_scorer_that_is_killed(tmp_path):
    """In the pool, whose time-out is shorter here than the test's."""
    mark = f"solution-{os.getpid()}-{time.monotonic_ns()}"
    code = f"import os\nos.execv('/bin/sh', ['{mark}', '-c', 'sleep 1000; true'])"
    request = RewardRequest("livecodebench", program(code), SUMS, {})

    def running() -> int:
        count = 0
        for file in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                count += file.read_bytes().startswith(mark.encode())
            except OSError:
                continue
        return count

    with ScoringPool(RewardFunction(None, "compute_score"), 1, 3.0) as pool:
        future = pool.submit([request])
        deadline = time.monotonic() + 60
        while not running() and not future.done():
            assert time.monotonic() < deadline
            time.sleep(0.02)
        assert isinstance(future.result()[0], ScoringTimeout)
        while running():
            assert time.monotonic() < deadline
            time.sleep(0.02)
