"""Engines that raise, hang or do not start; they are fakes that fail on command."""

import pytest
import ray

from tests.workers.rollout.fake_engines import HANG, SAMPLING, Fleet
from verl.workers.rollout import engine_pool
from verl.workers.rollout.engine_pool import EngineError, EnginePlace, EnginePool, describe


@pytest.fixture
def fleet(monkeypatch) -> Fleet:
    fleet = Fleet()
    monkeypatch.setattr(engine_pool, "RayHandle", fleet)
    return fleet


def pool_of(engines: int, timeout_s: float = 5.0, max_restarts: int = 2) -> EnginePool:
    return EnginePool(None, [EnginePlace("node")] * engines, timeout_s, 5.0, max_restarts)


def test_all_engines_start_at_the_same_time(fleet):
    pool = pool_of(3)
    pool.start()
    assert [handle.calls for handle in fleet.handles] == [["start"]] * 3
    assert [slot.process for slot in pool.slots] == [("node", 100), ("node", 101), ("node", 102)]


def test_an_engine_that_cannot_start_ends_the_run_with_its_cause(fleet):
    fleet.faults[1] = {"start": [ValueError("no room\nfor the cache")]}
    pool = pool_of(3)
    with pytest.raises(EngineError, match="^vLLM engine 1 did not start: ValueError: no room for the cache$"):
        pool.start()
    assert all(handle.killed for handle in fleet.handles)


def test_a_start_that_never_ends_names_the_key_of_its_limit(fleet):
    fleet.faults[0] = {"start": [HANG]}
    pool = pool_of(1)
    pool.start_timeout_s = 0.1
    with pytest.raises(EngineError, match=r"did not start: TimeoutError: no answer within trainer\.start_timeout_s"):
        pool.start()


def test_a_call_that_raises_gives_its_error(fleet):
    fleet.faults[0] = {"advance": [RuntimeError("out of memory")]}
    pool = pool_of(1)
    pool.start()
    pool.submit(pool.slots[0], "advance", [], SAMPLING, 0.0)
    pool.wait_any()
    taken = pool.take(pool.slots[0])
    assert taken is not None and taken[0] is None and str(taken[1]) == "out of memory"


def test_a_call_is_given_up_at_its_limit_and_not_before(fleet):
    fleet.faults[0] = {"advance": [HANG]}
    pool = pool_of(2, timeout_s=0.2)
    pool.start()
    for slot in pool.slots:
        pool.submit(slot, "advance", [], SAMPLING, 0.0)
    pool.wait_any()  # the second has answered
    assert pool.take(pool.slots[0]) is None and pool.take(pool.slots[1]) == ([], None)
    pool.wait_any()
    result, error = pool.take(pool.slots[0]) or (None, None)
    assert result is None and isinstance(error, TimeoutError)
    assert str(error) == "no answer within actor_rollout_ref.rollout.engine_timeout_s"


def test_a_replaced_engine_is_killed_and_counted(fleet, capsys):
    pool = pool_of(2)
    pool.start()
    pool.replace(pool.slots[1], RuntimeError("gone"))
    assert [handle.killed for handle in fleet.handles] == [False, True, False] and pool.restarts == 1
    assert pool.slots[1].handle is fleet.handles[2] and pool.slots[1].starting
    assert pool.wait_for(pool.slots[1]) is None
    assert pool.slots[1].process == ("node", 102) and not pool.slots[1].starting
    line = "vLLM engine 1 on node (pid 101) failed and is started again: RuntimeError: gone\n"
    assert capsys.readouterr().out == line


def test_one_failure_too_many_stops_the_run_with_its_cause(fleet):
    pool = pool_of(1, max_restarts=2)
    pool.start()
    for _ in range(2):
        pool.replace(pool.slots[0], RuntimeError("gone"))
        assert pool.wait_for(pool.slots[0]) is None
    cause = RuntimeError("gone for good")
    message = r"engine 0 on node \(pid 102\) failed, the 3\. .*at most 2 are replaced\): RuntimeError: gone for good"
    with pytest.raises(EngineError, match=message) as caught:
        pool.replace(pool.slots[0], cause)
    assert caught.value.__cause__ is cause and len(fleet.handles) == 3


def test_an_engine_in_this_process_is_not_replaced(fleet):
    pool = pool_of(1)
    pool.start()
    fleet.handles[0].restartable = False
    cause = RuntimeError("a bug to look at")
    with pytest.raises(RuntimeError) as caught:
        pool.replace(pool.slots[0], cause)
    assert caught.value is cause and not fleet.handles[0].killed


def test_a_call_to_all_names_the_engine_and_the_call_that_failed(fleet):
    fleet.faults[1] = {"sleep": [RuntimeError("no such device")]}
    pool = pool_of(2)
    pool.start()
    with pytest.raises(
        EngineError, match=r"engine 1 on node \(pid 101\) failed in sleep: RuntimeError: no such device"
    ):
        pool.call_all("sleep")
    assert pool.call_all("sleep") == [2**30] * 2


def test_an_error_of_a_ray_actor_is_described_by_its_cause():
    error = ray.exceptions.RayTaskError("call", "a long\ntraceback", ValueError("too long\n  for the cache"))
    assert describe(error) == "ValueError: too long for the cache"
    assert describe(TimeoutError()) == "TimeoutError: "
