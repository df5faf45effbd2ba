"""One vLLM engine: takes requests, computes a while, gives back what is finished; sleeps, wakes, takes new weights.

vLLM is imported when an engine is built. It stands in a Ray actor of its own, or in the driver (`worker_group=local`).
"""

import logging
import os
import socket
import time
import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from verl.utils.device import set_threads
from verl.workers.rollout.base import SamplingParams

WORKER_EXTENSION = "verl.workers.rollout.vllm_worker.WorkerExtension"


@dataclass(frozen=True)
class EngineSpec:
    """What an engine is built from. `device`: cpu or cuda. `kv_cache_memory_bytes`: None: by `gpu_memory_utilization`.
    `threads`: CPU threads of the engine."""

    model_path: str
    device: str
    dtype: str
    tensor_parallel_size: int
    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    gpu_memory_utilization: float
    kv_cache_memory_bytes: int | None
    enforce_eager: bool
    enable_chunked_prefill: bool
    enable_sleep_mode: bool
    calculate_log_probs: bool
    transfer_backend: str
    stop_token_ids: tuple[int, ...]
    seed: int
    threads: int


@dataclass(frozen=True)
class Request:
    """One response to sample. `row` names it, `seed` (32 bits) is that of its random draws."""

    row: int
    prompt: np.ndarray  # (L,) int64
    seed: int


@dataclass(frozen=True)
class Response:
    """A finished one: tokens (T,) int64, the end-of-sequence token included; log_probs (T,) float32 or None.
    `cached_tokens`: of the prompt, not computed again since another request had computed them."""

    row: int
    tokens: np.ndarray
    log_probs: np.ndarray | None
    cached_tokens: int


class VLLMEngine:
    """`in_process=False` puts vLLM's core into a child process: where the trainer is in this one, on a GPU."""

    def __init__(self, spec: EngineSpec, in_process: bool = True) -> None:
        self.spec = spec
        _set_environment(spec, in_process)
        if spec.device == "cpu":
            set_threads(spec.threads)
        set_num_threads = torch.set_num_threads
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # deprecations between vLLM and torch, of no use to a reader
            self.llm = _build(spec)
        torch.set_num_threads = set_num_threads  # on a CPU vLLM replaces it by nothing, for the whole process
        self.engine = self.llm.llm_engine

    def locate(self) -> tuple[str, int]:
        """Host name and process id."""
        return socket.gethostname(), os.getpid()

    # ------------------------------------------------------------------------------------------------ generating
    def advance(self, requests: list[Request], params: SamplingParams, seconds: float) -> list[Response]:
        """Take more requests, compute until some are finished and `seconds` have passed, and return those.

        Returns early once a good part is finished, so that free places are filled again.
        """
        for request in requests:
            self._add(str(request.row), request.prompt, self._sampling(params, request.seed))
        running = self.engine.get_num_unfinished_requests()
        finished: list[Response] = []
        start = time.monotonic()
        while self.engine.has_unfinished_requests():
            finished += [self._response(output) for output in self.engine.step() if output.finished]
            if time.monotonic() - start > seconds or len(finished) > running // 4:
                break
        return finished

    def _add(self, request_id: str, prompt: np.ndarray, params: Any) -> None:
        self.engine.add_request(request_id, {"prompt_token_ids": prompt.tolist()}, params)

    def _sampling(self, params: SamplingParams, seed: int) -> Any:
        import vllm
        from vllm.sampling_params import RequestOutputKind

        return vllm.SamplingParams(
            max_tokens=params.max_tokens,
            temperature=0.0 if params.greedy else params.temperature,
            top_p=params.top_p,
            top_k=params.top_k,
            seed=seed,
            stop_token_ids=list(self.spec.stop_token_ids),
            logprobs=0 if self.spec.calculate_log_probs else None,  # 0: of the sampled token alone
            flat_logprobs=True,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )

    def _response(self, output: Any) -> Response:
        completion = output.outputs[0]
        tokens = np.asarray(completion.token_ids, dtype=np.int64)
        log_probs = None
        if self.spec.calculate_log_probs:
            log_probs = np.asarray(completion.logprobs.logprobs, dtype=np.float32)
            if len(log_probs) != len(tokens):
                raise RuntimeError(f"vLLM gave {len(log_probs)} log-probs for {len(tokens)} tokens")
        return Response(int(output.request_id), tokens, log_probs, int(output.num_cached_tokens or 0))

    def score(self, sequences: list[np.ndarray]) -> list[np.ndarray]:
        """Log-probs at temperature 1 of each sequence's tokens after the first: (L - 1,) float32."""
        import vllm

        params = vllm.SamplingParams(
            max_tokens=1, temperature=0.0, prompt_logprobs=0, flat_logprobs=True, detokenize=False
        )
        for number, sequence in enumerate(sequences):
            self._add(f"score-{number}", sequence, params)
        scores: dict[str, np.ndarray] = {}
        while self.engine.has_unfinished_requests():
            for output in self.engine.step():
                if output.finished:
                    scores[output.request_id] = np.asarray(output.prompt_logprobs.logprobs, dtype=np.float32)
        return [scores[f"score-{number}"] for number in range(len(sequences))]

    # --------------------------------------------------------------------------------------------------- weights
    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        self.llm.collective_rpc("init_weight_transfer_engine", args=(init_info,))

    def start_weight_update(self) -> None:
        self.llm.collective_rpc("start_weight_update")

    def update_weights(self, update_info: dict[str, Any]) -> None:
        self.llm.collective_rpc("update_weights", args=(update_info,))

    def finish_weight_update(self) -> None:
        """End the update, and forget the keys and values that the old weights computed."""
        self.llm.collective_rpc("finish_weight_update")
        if not self.llm.reset_prefix_cache():
            raise RuntimeError("vLLM's prefix cache could not be emptied after new weights: it still computes requests")

    def shutdown_weight_transfer_engine(self) -> None:
        self.llm.collective_rpc("shutdown_weight_transfer_engine")

    def checksums(self) -> tuple[dict[str, float], dict[str, list[str]]]:
        """Checksum of each weight by vLLM's name, and what it fuses: see `verl.utils.checksum.mismatches`."""
        shares = self.llm.collective_rpc("riskpo_checksums")
        sums = {name: sum(share[name] for share, _ in shares) for name in shares[0][0]}
        return sums, shares[0][1]

    # ---------------------------------------------------------------------------------------------------- memory
    def sleep(self) -> int:
        """Give the GPU's memory back (weights and cache); returns the bytes freed on this engine's GPUs."""
        before = sum(self.llm.collective_rpc("riskpo_free_bytes"))
        self.llm.sleep(level=2)  # 2: weights are dropped, not copied to the CPU; new ones come before the next use
        return sum(self.llm.collective_rpc("riskpo_free_bytes")) - before

    def wake_up(self, tag: str) -> None:
        """Take the memory of `weights` or `kv_cache` again."""
        self.llm.wake_up(tags=[tag])

    def close(self) -> None:
        self.llm.llm_engine.engine_core.shutdown()


def _build(spec: EngineSpec) -> Any:
    logging.getLogger("torch._library.triton").setLevel(logging.ERROR)  # says on a CPU that there is no Triton
    import vllm
    from vllm.config import WeightTransferConfig

    return vllm.LLM(
        model=spec.model_path,
        dtype=spec.dtype,
        tensor_parallel_size=spec.tensor_parallel_size,
        distributed_executor_backend="mp" if spec.tensor_parallel_size > 1 else "uni",
        max_model_len=spec.max_model_len,
        max_num_seqs=spec.max_num_seqs,
        max_num_batched_tokens=spec.max_num_batched_tokens,
        gpu_memory_utilization=spec.gpu_memory_utilization,
        kv_cache_memory_bytes=spec.kv_cache_memory_bytes,
        enforce_eager=spec.enforce_eager,
        enable_chunked_prefill=spec.enable_chunked_prefill,
        enable_prefix_caching=True,  # the responses to a question share its prompt
        enable_sleep_mode=spec.enable_sleep_mode,
        logprobs_mode="processed_logprobs",  # after temperature: of the distribution sampled from
        weight_transfer_config=WeightTransferConfig(backend=spec.transfer_backend),
        worker_extension_cls=WORKER_EXTENSION,
        generation_config="vllm",  # no sampling defaults from the model's folder
        skip_tokenizer_init=True,
        use_tqdm_on_load=False,
        disable_log_stats=True,
        seed=spec.seed,
    )


def _set_environment(spec: EngineSpec, in_process: bool) -> None:
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0" if in_process else "1"
    os.environ["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"  # weight handles travel between vLLM's own processes
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    if spec.device == "cpu":
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # engines and workers share the cores in turn
