import contextlib
import os
import signal
import subprocess
import sys
import time
import tracemalloc
from collections import Counter
from pathlib import Path
from random import Random

import pytest

from verl.workers.reward import processes
from verl.workers.reward.function import RewardFunction, RewardRequest
from verl.workers.reward.outcomes import ScorerDied, ScoringTimeout
from verl.workers.reward.pool import ScoringPool

SCORERS = Path(__file__).with_name("scorers.py")
ROOT = Path(__file__).parents[3]


def request(response: str, **info: object) -> RewardRequest:
    return RewardRequest("some/source", response, "the truth", info)


def requests(*responses: str) -> list[RewardRequest]:
    return [request(response) for response in responses]


def new_pool(name: str = "compute_score", num_workers: int = 2, timeout_s: float = 1.0, **kwargs) -> ScoringPool:
    return ScoringPool(RewardFunction(str(SCORERS), name, kwargs), num_workers, timeout_s)


@pytest.fixture(scope="module")
def pool():
    with new_pool() as pool:
        yield pool


def kinds(results: list) -> list[str]:
    return [type(result).__name__ for result in results]


def marked(mark: str) -> list[str]:
    """Commands of the processes that have this mark in their environment."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if f"MARK={mark}\0".encode() in (process / "environ").read_bytes():
                found.append((process / "cmdline").read_bytes().decode())
    return found


def wait_until(condition) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_results_are_in_order(pool):
    results = pool.evaluate(requests(*[f"value {i}" for i in range(500)]))
    assert [result["score"] for result in results] == list(range(500))


def test_the_function_gets_all_of_the_request_and_its_kwargs():
    with new_pool(bonus=2) as pool:
        (result,) = pool.evaluate([request("value 1", level=3)])
    assert result == {"score": 1.0, "source": "some/source", "truth": "the truth", "info": {"level": 3}, "bonus": 2}


def test_nothing_to_score(pool):
    assert pool.evaluate([]) == []


def test_several_submissions_are_scored_at_once(pool):
    futures = [pool.submit(requests(*[f"value {i}" for i in range(start, start + 50)])) for start in range(0, 500, 50)]
    scores = [result["score"] for future in futures for result in future.result()]
    assert scores == list(range(500))


def test_what_a_function_raises_is_its_result(pool):
    results = pool.evaluate(requests("raise no such answer", "good", "system_exit", "interrupt"))
    assert kinds(results) == ["ValueError", "float", "RuntimeError", "RuntimeError"]
    assert [str(results[i]) for i in (0, 2, 3)] == [
        "no such answer",
        "it raised SystemExit: 5",
        "it raised KeyboardInterrupt",
    ]


def test_what_cannot_travel_is_an_exception_that_says_so(pool):
    two, unpicklable = pool.evaluate(requests("two", "unpicklable"))
    assert "TwoArguments: this and that" in str(two)
    assert "a result of type Unpicklable cannot be sent to the driver: TypeError: not this one" in str(unpicklable)


def test_a_request_that_cannot_travel_fails_alone(pool):
    lone = RewardRequest("s", "good", lambda: None, {})
    results = pool.evaluate([request("good"), lone, request("good"), *[lone] * 20])
    assert kinds(results) == ["float", "RuntimeError", "float", *["RuntimeError"] * 20]
    assert f"of {SCORERS}: the request cannot be sent to a scoring process: " in str(results[1])
    assert "\n" not in str(results[1])
    assert pool.evaluate(requests("good")) == [1.0]


def test_waiting_requests_share_their_ground_truth():
    """200 copies of it would be 200 MiB, and messages of 8 requests for two processes some 30 each."""
    truth = "x" * 2**20
    pool = new_pool(timeout_s=100.0)
    pool.evaluate(requests("good"))
    tracemalloc.start()
    try:
        future = pool.submit([RewardRequest("s", "hang", truth, {}) for _ in range(200)])
        pool.close()  # once what was submitted has been taken in
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 20 * 2**20
    with pytest.raises(RuntimeError, match="closed"):
        future.result()


def test_stuck_scorers_are_killed_and_counted(pool):
    before = pool.counts.timeouts
    results = pool.evaluate(requests("good", "hang", "spin", "good", "regex", "stubborn", "good"))
    stuck = ["ScoringTimeout"] * 2
    assert kinds(results) == ["float", *stuck, "float", *stuck, "float"]
    assert "took longer than 1 s" in str(results[1]) and str(SCORERS) in str(results[1])
    assert pool.counts.timeouts == before + 4


def test_scorers_that_die_are_counted_apart(pool):
    before = pool.counts.deaths
    results = pool.evaluate(requests("good", "exit", "good", "segfault", "good"))
    assert kinds(results) == ["float", "ScorerDied", "float", "ScorerDied", "float"]
    assert "exited with status 3" in str(results[1]) and "was killed by SIGSEGV" in str(results[3])
    assert pool.counts.deaths == before + 2


def test_descendants_die_with_their_scorer(pool):
    mark = f"pool-{os.getpid()}"
    future = pool.submit(requests(f"children {mark}"))
    wait_until(lambda: len(marked(mark)) == 2)
    assert kinds(future.result()) == ["ScoringTimeout"]
    wait_until(lambda: marked(mark) == [])


def test_a_scorer_that_forks_and_returns_twice_answers_once(pool):
    results = pool.evaluate(requests(*["fork", "value 7"] * 10))
    assert results[::2] == [1.0] * 10 and {result["score"] for result in results[1::2]} == {7.0}


def test_megabytes_on_stdout_disturb_nothing(capfd):
    with new_pool() as pool:  # whose processes have the captured stdout
        assert pool.evaluate(requests("print", "good")) == [1.0, 1.0]
    assert capfd.readouterr().out.count("x") == 5_000_000


# The calls have to take longer together than the time-out, each on its own much less.
@pytest.mark.slow
def test_the_time_out_begins_with_the_call_not_with_the_batch():
    with new_pool(num_workers=1) as pool:
        assert pool.evaluate(requests(*["sleep 0.4"] * 8)) == [1.0] * 8


def test_calls_are_made_once_beside_stuck_ones(tmp_path):
    files = [tmp_path / str(i) for i in range(60)]
    responses = [response for file in files for response in (f"once {file}", "hang")][:70] + [
        f"once {file}" for file in files[35:]
    ]
    with new_pool() as pool:
        results = pool.evaluate(requests(*responses))
    assert Counter(kinds(results)) == {"float": 60, "ScoringTimeout": 35}
    assert [file.read_text() for file in files] == ["x"] * 60


@pytest.mark.slow  # a time-out long enough for all of them
def test_stuck_calls_wait_side_by_side_once_it_is_known_what_a_call_takes():
    with new_pool(timeout_s=3.0) as pool:
        pool.evaluate(requests(*["good"] * 8))
        assert kinds(pool.evaluate(requests(*["hang"] * 20))) == ["ScoringTimeout"] * 20
        assert pool.counts.most_parked == 20  # two at a time, for a fifth of the time-out each: 10 at most


def test_more_stuck_calls_than_may_wait(monkeypatch):
    monkeypatch.setattr("verl.workers.reward.dispatcher.MAX_PARKED", 1)
    with new_pool(timeout_s=0.3) as pool:
        results = pool.evaluate(requests(*["hang", "good"] * 6))
        assert pool.counts.most_parked == 1
    assert kinds(results) == ["ScoringTimeout", "float"] * 6


OUTCOMES = {
    "value 3": "dict", "good": "float", "sleep 0.01": "float", "fork": "float", "raise x": "ValueError",
    "system_exit": "RuntimeError", "hang": "ScoringTimeout", "exit": "ScorerDied", "segfault": "ScorerDied",
}  # fmt: skip


# Some tens of time-outs, few of which may pass side by side.
@pytest.mark.slow
def test_every_call_of_a_random_mixture_has_its_outcome(monkeypatch):
    monkeypatch.setattr("verl.workers.reward.dispatcher.MAX_PARKED", 3)
    random = Random(0)
    weights = [1 if outcome in ("ScoringTimeout", "ScorerDied") else 10 for outcome in OUTCOMES.values()]
    batches = [random.choices(list(OUTCOMES), weights, k=random.choice([1, 5, 60])) for _ in range(20)]
    with new_pool() as pool:
        futures = [pool.submit(requests(*batch)) for batch in batches]
        results = [future.result() for future in futures]
    assert [kinds(result) for result in results] == [[OUTCOMES[what] for what in batch] for batch in batches]


# Starting about a hundred processes takes a few seconds.
@pytest.mark.slow
def test_one_percent_hanging_and_one_percent_crashing():
    """With as many time-outs one after the other in each of 2 workers it would take 25 s and more."""
    responses = [f"value {i}" for i in range(5120)]
    hanging, crashing = range(50, 5120, 100), range(99, 5120, 100)
    for i in hanging:
        responses[i] = "spin" if i % 1000 == 50 else "hang"
    for i in crashing:
        responses[i] = "segfault" if i % 1000 == 99 else "exit"
    with new_pool() as pool:
        pool.evaluate(requests("good"))
        start = time.monotonic()
        results = pool.evaluate(requests(*responses))
        seconds = time.monotonic() - start
        counts = pool.counts
    assert all(isinstance(results[i], ScoringTimeout) for i in hanging)
    assert all(isinstance(results[i], ScorerDied) for i in crashing)
    assert all(results[i]["score"] == i for i in range(5120) if i not in hanging and i not in crashing)
    assert (counts.calls, counts.timeouts, counts.deaths) == (5121, len(hanging), len(crashing))
    assert seconds < 20


def test_processes_have_one_thread_and_no_interest_in_sigint(pool):
    (result,) = pool.evaluate(requests("threads"))
    assert result["omp"] == "1" and result["ignores"]


@pytest.mark.parametrize("name", ["compute_async", "returns_awaitable"])
def test_an_asynchronous_function(name):
    with new_pool(name) as pool:
        results = pool.evaluate(requests("sleep 0.01", "hang", "raise no", "good"))
    assert kinds(results) == ["dict", "ScoringTimeout", "ValueError", "dict"]
    assert results[0]["said"] == "sleep 0.01"


@pytest.mark.slow  # hundreds of calls that wait
def test_asynchronous_calls_wait_together():
    with new_pool("compute_async", num_workers=1, timeout_s=20.0) as pool:
        start = time.monotonic()
        results = pool.evaluate(requests(*["sleep 0.5"] * 200))
    assert kinds(results) == ["dict"] * 200
    assert time.monotonic() - start < 50  # 100 s one after the other


# A stubborn one ends 2 s after its time-out, when its process has answered nothing else for as long.
@pytest.mark.parametrize("kind", ["block", "exit", pytest.param("stubborn", marks=pytest.mark.slow)])
def test_one_asynchronous_call_does_not_take_the_others_with_it(kind):
    with new_pool("compute_async") as pool:
        results = pool.evaluate(requests(*["sleep 0.01"] * 20, kind, *["sleep 0.01"] * 20))
        assert kinds(pool.evaluate(requests("good"))) == ["dict"]
    assert Counter(kinds(results)) == {"dict": 40, "ScorerDied" if kind == "exit" else "ScoringTimeout": 1}
    assert not isinstance(results[20], dict)


def test_a_function_whose_import_leaves_a_thread_is_not_forked(tmp_path):
    file = tmp_path / "threaded.py"
    file.write_text(
        "import threading, time\n"
        "threading.Thread(target=time.sleep, args=(1000,), daemon=True).start()\n"
        "def score(data_source, solution_str, ground_truth, extra_info=None):\n"
        "    if solution_str == 'hang':\n"
        "        time.sleep(1000)\n"
        "    return float(threading.active_count())\n"
    )
    with ScoringPool(RewardFunction(str(file), "score"), 1, 1.0) as pool:
        results = pool.evaluate(requests("a", "hang", "b"))
    assert results[0] == results[2] == 2.0 and isinstance(results[1], ScoringTimeout)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("raise ImportError('no such library')", "score.py raised ImportError: no such library"),
        ("import sys; sys.exit(1)", "it raised SystemExit: 1"),
        ("import os; os._exit(1)", "has ended"),
        ("other = 1", "has no function 'score'"),
    ],
)
def test_a_function_that_cannot_be_imported_is_named(tmp_path, source, message):
    file = tmp_path / "score.py"
    file.write_text(source)
    with ScoringPool(RewardFunction(str(file), "score"), 2, 1.0) as pool:
        for _ in range(2):
            with pytest.raises(RuntimeError, match=f"reward function score of {file}: .*{message}"):
                pool.evaluate(requests("a"))


def test_an_import_that_does_not_end(tmp_path, monkeypatch):
    monkeypatch.setattr(processes, "START_LIMIT_S", 0.5)
    file = tmp_path / "score.py"
    file.write_text("import time; time.sleep(1000)")
    with (
        ScoringPool(RewardFunction(str(file), "score"), 2, 1.0) as pool,
        pytest.raises(RuntimeError, match=f"{file}: not imported after 0.5 s"),
    ):
        pool.evaluate(requests("a"))


def test_closing_ends_everything_and_what_waits():
    pool = new_pool(timeout_s=100.0)
    mark = f"closing-{os.getpid()}"
    future = pool.submit(requests(f"children {mark}"))
    wait_until(lambda: len(marked(mark)) == 2)
    pool.close()
    with pytest.raises(RuntimeError, match="closed"):
        future.result()
    with pytest.raises(RuntimeError, match="closed"):
        pool.submit(requests("good"))
    pool.close()
    assert marked(mark) == []


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_all_ends_with_the_driver(tmp_path, number):
    mark = f"driver-{os.getpid()}-{number}"
    script = tmp_path / "driver.py"
    script.write_text(
        "from verl.workers.reward.function import RewardFunction, RewardRequest\n"
        "from verl.workers.reward.pool import ScoringPool\n"
        f"pool = ScoringPool(RewardFunction({str(SCORERS)!r}, 'compute_score'), 2, 1000.0)\n"
        f"pool.evaluate([RewardRequest('s', 'children {mark}', 't', {{}})])\n"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT), "MARK": mark}
    driver = subprocess.Popen([sys.executable, str(script)], env=environment, stderr=subprocess.DEVNULL)
    wait_until(lambda: sum("sleep" in command for command in marked(mark)) >= 2)
    driver.send_signal(number)
    driver.wait()
    wait_until(lambda: marked(mark) == [])


def test_values_that_make_no_pool():
    with pytest.raises(ValueError, match="not 0 and 1.0 s"):
        new_pool(num_workers=0)
    with pytest.raises(ValueError, match="not 1 and 0 s"):
        new_pool(num_workers=1, timeout_s=0)
