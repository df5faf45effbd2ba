"""Rollout by vLLM engines: where they stand, what they sample, and how they get the trained weights."""

from collections import defaultdict
from typing import Any

import numpy as np
import ray
import torch

from verl.protocol import DataProto
from verl.single_controller.worker_group import WorkerGroup
from verl.trainer.config.schema import PPOConfig
from verl.utils.device import available_cores, compute_dtype
from verl.workers.rollout.base import GenerationOutput, OnFinished, SamplingParams
from verl.workers.rollout.engine_pool import EnginePlace, EnginePool, Slot
from verl.workers.rollout.request_queue import LengthEstimate, RequestQueue
from verl.workers.rollout.vllm_engine import EngineSpec, Request, Response
from verl.workers.rollout.weight_transfer import SHARED_MEMORY, TransferPlan

SLICE_S = 0.5  # an engine computes so long between two looks of the driver


class EngineRollout:
    """See the module. With `rollout.nnodes=0` the engines share the training workers' devices and sleep while those
    train; else they have GPUs of their own."""

    def __init__(self, config: PPOConfig, actor: WorkerGroup, pad_token_id: int) -> None:
        self.config = config
        self.pad_token_id = pad_token_id
        self.rollout = config.actor_rollout_ref.rollout
        self.actor = actor
        self._pool: EnginePool | None = None
        self.restarts_told = 0
        self.lengths = LengthEstimate()
        self.connected: list[Any] = []  # the engines that the workers' sender talks to
        self.asleep = False

    # ------------------------------------------------------------------------------------------------- starting
    def start(self) -> None:
        self.locations = self.actor.locate()
        self.device = torch.device(self.locations[0].device)
        if self.device.type == "cuda" and not self.colocated:
            check_free_gpus(self.rollout.nnodes * self.rollout.n_gpus_per_node)
        self.places = self._places()
        trainer = self.config.trainer
        self._pool = EnginePool(
            self._spec(),
            self.places,
            self.rollout.engine_timeout_s,
            trainer.start_timeout_s,
        )
        self.pool.start()

    @property
    def pool(self) -> EnginePool:
        assert self._pool is not None, "the engines are not started"
        return self._pool

    @property
    def colocated(self) -> bool:
        return self.rollout.nnodes == 0

    @property
    def sleeps(self) -> bool:
        return self.colocated and self.rollout.free_cache_engine and self.device.type == "cuda"

    def _places(self) -> list[EnginePlace] | None:
        """Where engines go; None: the one engine is in this process."""
        if self.config.trainer.worker_group == "local":
            return None
        parallel, workers = self.rollout.tensor_model_parallel_size, self.locations
        if self.device.type == "cpu":
            # One for each worker, or as many as asked for, next to a worker of each node: weights come through memory.
            count = len(workers) if self.colocated else self.rollout.nnodes * self.rollout.n_gpus_per_node
            nodes = list(dict.fromkeys(worker.node_id for worker in workers))
            return [EnginePlace(nodes[number * len(nodes) // count]) for number in range(count)]
        if not self.colocated:
            engines = self.rollout.nnodes * self.rollout.n_gpus_per_node // parallel
            return [EnginePlace(None, claimed_gpus=parallel) for _ in range(engines)]
        groups = [workers[first : first + parallel] for first in range(0, len(workers), parallel)]
        return [EnginePlace(group[0].node_id, ",".join(worker.gpus for worker in group)) for group in groups]

    def _spec(self) -> EngineSpec:
        rollout, cpu = self.rollout, self.device.type == "cpu"
        per_node: dict[Any, int] = defaultdict(int)
        for place in self.places or [EnginePlace(None)]:
            per_node[place.node_id] += 1
        backend = SHARED_MEMORY if cpu else "ipc" if self.colocated else "nccl"
        return EngineSpec(
            model_path=self.config.actor_rollout_ref.model.path,
            device=self.device.type,
            dtype=str(self.dtype).removeprefix("torch."),
            tensor_parallel_size=rollout.tensor_model_parallel_size,
            max_model_len=max_model_len(self.config),
            max_num_seqs=rollout.max_num_seqs,
            max_num_batched_tokens=rollout.max_num_batched_tokens,
            gpu_memory_utilization=rollout.gpu_memory_utilization,
            kv_cache_memory_bytes=kv_cache_bytes(self.config, self.device.type),
            enforce_eager=rollout.enforce_eager,
            enable_chunked_prefill=rollout.enable_chunked_prefill and not cpu,
            enable_sleep_mode=self.sleeps,
            calculate_log_probs=rollout.calculate_log_probs,
            transfer_backend=backend,
            stop_token_ids=tuple(self.actor.stop_token_ids()),
            seed=self.config.trainer.seed,
            threads=max(1, available_cores() // max(per_node.values())),
        )

    @property
    def dtype(self) -> torch.dtype:
        """Of the engines: what training computes in."""
        return compute_dtype(self.device)

    # ------------------------------------------------------------------------------------------------ generating
    def generate(
        self, batch: DataProto, params: SamplingParams, n: int, on_finished: OnFinished
    ) -> tuple[GenerationOutput, dict[str, float]]:
        requests, questions = make_requests(batch), batch["question_id"]
        expected = [self.lengths(question) for question in questions]
        queue = RequestQueue(
            np.arange(len(batch)).reshape(-1, n).tolist(),
            [len(request.prompt) + length for request, length in zip(requests, expected, strict=True)],
            capacity=self.rollout.max_num_seqs + max(n, self.rollout.max_num_seqs // 4),
        )
        output = GenerationOutput.empty(
            len(batch), params.max_tokens, self.pad_token_id, self.rollout.calculate_log_probs
        )
        cached, unfinished = 0, len(batch)
        while unfinished:
            self._hand_out(queue, requests, params)
            self.pool.wait_any()
            finished = [response for slot in self.pool.slots for response in self._collect(slot, queue)]
            if finished:
                rows = fill(output, finished)
                unfinished -= len(rows)
                cached += sum(response.cached_tokens for response in finished)
                on_finished(rows, output)
        self.lengths.observe(questions, output.lengths.tolist())
        restarts, self.restarts_told = self.pool.restarts - self.restarts_told, self.pool.restarts
        return output, {
            "rollout/engine_restarts": float(restarts),
            "rollout/cached_prompt_share": cached / int(batch["prompt_length"].sum()),
        }

    def _hand_out(self, queue: RequestQueue, requests: list[Request], params: SamplingParams) -> None:
        """More requests to every engine that is between two calls; each that has any goes on computing."""
        running = [slot for slot in self.pool.slots if not slot.starting]
        free = {number for number, slot in enumerate(running) if slot.call is None}
        for slot, rows in zip(running, queue.deal([slot.rows for slot in running], free), strict=True):
            slot.rows |= set(rows)
            if slot.call is None and slot.rows:
                self.pool.submit(slot, "advance", [requests[row] for row in rows], params, SLICE_S)

    def _collect(self, slot: Slot, queue: RequestQueue) -> list[Response]:
        """What the slot's engine has finished. A failed one is replaced; its rows go back into the queue."""
        started = slot.starting
        taken = self.pool.take(slot) if slot.call is not None else None
        if taken is None:
            return []
        result, error = taken
        if error is not None:
            queue.give_back(slot.rows)
            slot.rows = set()
            self.pool.replace(slot, error)
            return []
        if started:
            self._send_weights([slot])
            return []
        slot.rows -= {response.row for response in result}
        return result

    # --------------------------------------------------------------------------------------------------- weights
    def pause(self) -> dict[str, float]:
        if not self.sleeps:
            return {}
        self.pool.settle()
        self.asleep = True
        return {"rollout/freed_gb": sum(self.pool.call_all("sleep")) / 2**30}

    def update_weights(self) -> dict[str, float]:
        self.pool.settle()
        # The cache's memory comes back last: gathering weights needs some.
        if self.asleep:
            self.pool.call_all("wake_up", "weights")
        self._send_weights(self.pool.slots)
        if self.asleep:
            self.pool.call_all("wake_up", "kv_cache")
        self.asleep = False
        return {}

    def _send_weights(self, slots: list[Slot]) -> None:
        """Bring the trained weights to these engines; all training workers take part."""
        handles = [slot.handle for slot in slots]
        if handles != self.connected:
            self.actor.connect_rollout(self._plan(slots))
            self.connected = handles
        # An engine that is lost in the middle of a transfer may leave the workers waiting for it.
        self.actor.call("update_weights", timeout_s=self.rollout.engine_timeout_s)

    def _plan(self, slots: list[Slot]) -> TransferPlan:
        backend = self.pool.spec.transfer_backend
        feeds: dict[int, list[Any]] = defaultdict(list)
        for slot in slots:
            rank = 0
            if backend == SHARED_MEMORY and slot.place is not None:
                rank = next(r for r, worker in enumerate(self.locations) if worker.node_id == slot.place.node_id)
            feeds[rank].append(slot.handle)
        return TransferPlan(
            backend, self.dtype, dict(feeds), self.rollout.tensor_model_parallel_size, self.rollout.engine_timeout_s
        )

    def shutdown(self) -> None:
        if self._pool is not None:
            self._pool.shutdown()


def check_free_gpus(needed: int) -> None:
    """ValueError if the cluster has fewer GPUs left, now that the training workers have theirs."""
    free = int(ray.available_resources().get("GPU", 0))
    if free < needed:
        raise ValueError(
            f"actor_rollout_ref.rollout.nnodes x n_gpus_per_node is {needed} GPUs for engines, only {free} are left "
            "beside the training workers': lower one of them, or set nnodes=0 to share the training GPUs"
        )


def make_requests(batch: DataProto) -> list[Request]:
    """A request for each row. No two rows have the same seed: 32 bits are what every device's generator takes, so keys
    that agree in them are moved apart."""
    seeds = distinct_seeds(batch["row_key"].numpy())
    width = batch["prompts"].shape[1]
    prompts, lengths = batch["prompts"].numpy(), batch["prompt_length"].tolist()
    return [
        Request(row, prompts[row, width - length :], seed)
        for row, (length, seed) in enumerate(zip(lengths, seeds, strict=True))
    ]


def distinct_seeds(keys: np.ndarray) -> list[int]:
    """The low 32 bits of each key, or the next number that no earlier row has."""
    taken: dict[int, None] = {}
    for key in keys.tolist():
        seed = key & 0xFFFFFFFF
        while seed in taken:
            seed = (seed + 1) & 0xFFFFFFFF
        taken[seed] = None
    return list(taken)


def fill(output: GenerationOutput, finished: list[Response]) -> np.ndarray:
    """Write finished responses into `output`; returns their rows (R,)."""
    responses, log_probs = output.responses.numpy(), None if output.log_probs is None else output.log_probs.numpy()
    for response in finished:
        length = len(response.tokens)
        responses[response.row, :length] = response.tokens
        output.lengths[response.row] = length
        if log_probs is not None:
            log_probs[response.row, :length] = response.log_probs
    return np.array([response.row for response in finished])


def max_model_len(config: PPOConfig) -> int:
    """`rollout.max_model_len`, or the longest sequence that the data allow."""
    longest = config.data.max_prompt_length + config.data.max_response_length
    return config.actor_rollout_ref.rollout.max_model_len or longest


def kv_cache_bytes(config: PPOConfig, device: str) -> int | None:
    """`rollout.kv_cache_memory_bytes`; where it is null, 1 GiB on a CPU, and on a GPU None: what is free of
    `gpu_memory_utilization`."""
    given = config.actor_rollout_ref.rollout.kv_cache_memory_bytes
    return 2**30 if given is None and device == "cpu" else given
