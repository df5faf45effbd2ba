"""Batches that lose engines on the way, and where engines stand; the engines are fakes that fail on command."""

from typing import Any

import numpy as np
import pytest
import ray
import torch

from tests.e2e.runs import config
from tests.workers.rollout.fake_engines import HANG, SAMPLING, FakeWorkers, Fleet
from verl.protocol import DataProto, object_array
from verl.trainer.ppo.generation import expand
from verl.workers.rollout import engine_pool
from verl.workers.rollout.engine_pool import EngineError, EnginePlace
from verl.workers.rollout.engine_rollout import EngineRollout
from verl.workers.rollout.sampling_worker import Location


@pytest.fixture
def fleet(monkeypatch) -> Fleet:
    fleet = Fleet()
    monkeypatch.setattr(engine_pool, "RayHandle", fleet)
    return fleet


@pytest.fixture
def make_rollout(fleet, tmp_path):
    """Starts an EngineRollout; without `locations`, beside two CPU workers of one node."""

    def make(*extra: str, locations: list[Location] | None = None) -> EngineRollout:
        locations = locations or [Location("cpu", "node", "")] * 2
        keys = ["actor_rollout_ref.rollout.name=vllm", "trainer.worker_group=ray", *extra]
        rollout = EngineRollout(config(tmp_path, tmp_path, tmp_path, *keys), FakeWorkers(locations), 0)
        rollout.start()
        return rollout

    return make


def questions(count: int, n: int = 4) -> DataProto:
    names = object_array([f"q{i}" for i in range(count)])
    columns = {
        "prompts": torch.randint(5, 99, (count, 6), generator=torch.Generator().manual_seed(0)),
        "prompt_length": torch.arange(count) % 6 + 1,
        "uid": names,
        "question_id": names,
    }
    return expand(DataProto.from_dict(columns), n, seed=1, step=0)


def generate(rollout: EngineRollout, batch: DataProto, n: int = 4) -> tuple[Any, dict[str, float], list[int]]:
    """The output, the metrics, and the rows that were told finished, in order."""
    told: list[int] = []

    def tell(rows: np.ndarray, output: Any) -> None:
        assert (output.lengths[rows] > 0).all()
        told.extend(rows.tolist())

    output, metrics = rollout.generate(batch, SAMPLING, n, tell)
    return output, metrics, told


def assert_complete(output: Any, told: list[int], expected: Any) -> None:
    """Every row was told once, and has its own response."""
    assert sorted(told) == list(range(len(output.lengths)))
    for name in ("responses", "lengths", "log_probs"):
        assert torch.equal(getattr(output, name), getattr(expected, name)), name


FAULTS = {
    "raises in its first call": {"advance": [RuntimeError("out of memory")]},
    "raises in the middle": {"advance": [None, None, RuntimeError("out of memory")]},
    "hangs in the middle": {"advance": [None, HANG]},
}


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS.keys())
def test_the_rows_of_a_lost_engine_are_generated_again_once(fleet, make_rollout, fault):
    batch = questions(10)
    expected, metrics, told = generate(make_rollout(), batch)
    assert_complete(expected, told, expected)
    assert metrics["rollout/engine_restarts"] == 0
    fleet.handles, fleet.faults = [], {1: fault}
    rollout = make_rollout()
    rollout.pool.timeout_s = 0.3
    output, metrics, told = generate(rollout, batch)
    assert_complete(output, told, expected)
    assert metrics["rollout/engine_restarts"] == 1 and rollout.pool.restarts == 1
    lost = fleet.handles[1]
    # A row is asked for a second time if and only if the lost engine had it and had not answered.
    answered = 3 * (lost.calls.count("advance") - 1)
    again = set(lost.taken[answered:])
    asked = [row for handle in fleet.handles for row in handle.taken]
    assert lost.killed and again == {row for row in asked if asked.count(row) == 2} != set()
    assert len(asked) == 40 + len(again)
    assert metrics["rollout/cached_prompt_share"] == pytest.approx(40 / int(batch["prompt_length"].sum()))


def test_a_new_engine_has_the_trained_weights_before_its_first_request(fleet, make_rollout):
    fleet.faults = {0: {"advance": [RuntimeError("gone")]}, 1: {"advance": [None] * 2 + [RuntimeError("gone")]}}
    rollout = make_rollout("actor_rollout_ref.rollout.max_num_seqs=4")
    generate(rollout, questions(20))
    assert len(fleet.handles) == 4
    for handle in fleet.handles[2:]:
        assert handle.calls[:2] == ["start", "weights"]
    assert any("advance" in handle.calls for handle in fleet.handles[2:])
    # The engines that compute go on computing: only the new one is sent weights.
    assert [len(engines) for engines in rollout.actor.sent_to] == [1, 1]
    rollout.update_weights()
    assert rollout.actor.sent_to[-1] == [slot.handle for slot in rollout.pool.slots]


def test_a_batch_is_completed_without_waiting_for_a_new_engine(fleet, make_rollout):
    """While the lost one starts again, the other does the rest; the new one is there for the next batch."""
    fleet.faults = {0: {"advance": [RuntimeError("gone")]}, 2: {"start": [HANG]}}
    rollout = make_rollout()
    batch = questions(6)
    _, metrics, told = generate(rollout, batch)
    assert sorted(told) == list(range(24)) and metrics["rollout/engine_restarts"] == 1
    assert rollout.pool.slots[0].starting
    assert rollout.pool.slots[0].call is not None
    rollout.pool.slots[0].call.set_result(None)
    _, metrics, told = generate(rollout, batch)
    assert sorted(told) == list(range(24)) and metrics["rollout/engine_restarts"] == 0
    assert not rollout.pool.slots[0].starting


def test_an_engine_lost_while_it_starts_again_counts_once_more(fleet, make_rollout):
    fleet.faults = {0: {"advance": [RuntimeError("gone")]}, 1: {"start": [ValueError("no memory")]}}
    rollout = make_rollout(locations=[Location("cpu", "node", "")])
    _, metrics, told = generate(rollout, questions(5))
    assert sorted(told) == list(range(20)) and metrics["rollout/engine_restarts"] == 2
    assert [handle.killed for handle in fleet.handles] == [True, True, False]


def test_engines_that_go_on_failing_stop_the_run(fleet, make_rollout):
    fleet.faults = {i: {"advance": [RuntimeError("illegal memory access")]} for i in range(10)}
    rollout = make_rollout()
    with pytest.raises(EngineError, match=r"the 4\. failure .*at most 3 are replaced.*illegal memory access"):
        generate(rollout, questions(5))
    assert len(fleet.handles) == 2 + 3


def test_restarts_count_over_the_whole_run(fleet, make_rollout):
    fleet.faults = {0: {"advance": [RuntimeError("gone")]}}
    rollout = make_rollout(locations=[Location("cpu", "node", "")])
    rollout.pool.max_restarts = 1
    assert generate(rollout, questions(2))[1]["rollout/engine_restarts"] == 1
    assert generate(rollout, questions(2))[1]["rollout/engine_restarts"] == 0
    fleet.handles[-1].faults = {"advance": [RuntimeError("gone")]}
    with pytest.raises(EngineError, match=r"the 2\. failure"):
        generate(rollout, questions(2))


@pytest.mark.parametrize("dies", ["before they train", "while they train"])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_an_engine_that_dies_between_two_batches_is_replaced(fleet, make_rollout, device, dies):
    rollout = make_rollout(locations=[Location(device, "node", str(gpu)) for gpu in range(2)])
    rollout.update_weights()
    generate(rollout, questions(4))
    fleet.handles[1].dead = dies == "before they train"
    rollout.pause()
    fleet.handles[1].dead = True
    rollout.update_weights()
    _, _, told = generate(rollout, questions(4))
    assert sorted(told) == list(range(16)) and len(fleet.handles) == 3 and fleet.handles[1].killed


def test_engines_share_the_work(fleet, make_rollout):
    generate(make_rollout(), questions(10))
    assert [len(handle.taken) for handle in fleet.handles] == [20, 20]


# ------------------------------------------------------------------------------------------------------- placement
def gpu_workers(nodes: int, per_node: int) -> list[Location]:
    return [Location("cuda", f"node{node}", str(gpu)) for node in range(nodes) for gpu in range(per_node)]


def test_engines_on_the_training_gpus_get_their_workers_devices(fleet, make_rollout):
    rollout = make_rollout("actor_rollout_ref.rollout.tensor_model_parallel_size=2", locations=gpu_workers(2, 4))
    assert [handle.place for handle in fleet.handles] == [
        EnginePlace("node0", "0,1"),
        EnginePlace("node0", "2,3"),
        EnginePlace("node1", "0,1"),
        EnginePlace("node1", "2,3"),
    ]
    spec = rollout.pool.spec
    assert (spec.transfer_backend, spec.dtype, spec.enable_sleep_mode) == ("ipc", "bfloat16", True)
    assert spec.kv_cache_memory_bytes is None and spec.enable_chunked_prefill
    rollout.update_weights()
    plan = rollout.actor.plan
    # vLLM's sender gathers the handles of all ranks' memory; rank 0 hands them to every engine.
    assert plan.feeds == {0: fleet.handles} and plan.engine_world_size == 2


def test_engines_on_gpus_of_their_own_claim_them(fleet, make_rollout, monkeypatch):
    monkeypatch.setattr(ray, "available_resources", lambda: {"GPU": 8.0})
    own = ["actor_rollout_ref.rollout.nnodes=2", "actor_rollout_ref.rollout.n_gpus_per_node=4"]
    rollout = make_rollout(*own, "actor_rollout_ref.rollout.tensor_model_parallel_size=4", locations=gpu_workers(1, 2))
    assert [handle.place for handle in fleet.handles] == [EnginePlace(None, None, 4)] * 2
    assert (rollout.pool.spec.transfer_backend, rollout.pool.spec.enable_sleep_mode) == ("nccl", False)
    assert rollout.pause() == {}


def test_gpus_that_the_cluster_does_not_have_left_are_named(fleet, make_rollout, monkeypatch):
    monkeypatch.setattr(ray, "available_resources", lambda: {"GPU": 3.0})
    own = ["actor_rollout_ref.rollout.nnodes=1", "actor_rollout_ref.rollout.n_gpus_per_node=4"]
    with pytest.raises(ValueError, match="is 4 GPUs for engines, only 3 are left"):
        make_rollout(*own, locations=gpu_workers(1, 2))


def test_engines_on_a_cpu_stand_beside_the_workers_that_feed_them(fleet, make_rollout):
    locations = [Location("cpu", node, "") for node in ("a", "a", "b", "b")]
    rollout = make_rollout(locations=locations)
    assert [handle.place.node_id for handle in fleet.handles] == ["a", "a", "b", "b"]
    rollout.update_weights()
    assert rollout.actor.plan.feeds == {0: fleet.handles[:2], 2: fleet.handles[2:]}
    spec = rollout.pool.spec
    assert (spec.transfer_backend, spec.enable_sleep_mode, spec.enable_chunked_prefill) == (
        "shared_memory",
        False,
        False,
    )


def test_engines_sleep_while_the_workers_train_and_get_the_cache_back_last(fleet, make_rollout):
    rollout = make_rollout(locations=gpu_workers(1, 2))
    rollout.update_weights()  # awake: nothing to wake
    assert rollout.pause() == {"rollout/freed_gb": 2.0}
    rollout.update_weights()
    rollout.update_weights()
    for handle in fleet.handles:
        calls = [call for call in handle.calls if call not in ("start", "locate")]
        assert calls == ["weights", "sleep", "wake_up weights", "weights", "wake_up kv_cache", "weights"]


def test_an_engine_that_keeps_its_cache_stays_awake(fleet, make_rollout):
    rollout = make_rollout("actor_rollout_ref.rollout.free_cache_engine=False", locations=gpu_workers(1, 1))
    assert rollout.pause() == {} and not rollout.pool.spec.enable_sleep_mode


def test_shutdown_ends_every_engine(fleet, make_rollout):
    rollout = make_rollout()
    rollout.shutdown()
    assert all(handle.killed for handle in fleet.handles)


def test_shutdown_before_the_start_does_nothing(tmp_path):
    """A run whose workers cannot load their model ends its rollout too; that must not hide the cause."""
    EngineRollout(config(tmp_path, tmp_path, tmp_path), FakeWorkers([]), 0).shutdown()
