"""What `benchmarks/rollout.py` measures on: a worker that samples itself and times its transfers, engines, models."""

import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from verl.single_controller.dispatch import Dispatch, register
from verl.single_controller.worker_group import WorkerGroup, create_worker_group
from verl.trainer.config import PPOConfig, load_config
from verl.trainer.main_ppo import cluster_device
from verl.utils.device import compute_dtype
from verl.utils.timer import Timer
from verl.utils.tokenizer import load_tokenizer
from verl.workers.actor_rollout_ref import ActorRolloutRefWorker
from verl.workers.rollout.engine_rollout import EngineRollout
from verl.workers.rollout.hf import HFRollout
from verl.workers.rollout.vllm_checks import check_vllm
from verl.workers.rollout.weight_transfer import PolicyWeights, TransferPlan

MAKE_MODEL = Path(__file__).resolve().parents[1] / "data_processing" / "make_tiny_model.py"


class Timed:
    """A sender's client, or its source of weights: calls to the one and steps through the other are timed."""

    def __init__(self, inner: Any, timer: Timer) -> None:
        self.inner = inner
        self.timer = timer

    def __getattr__(self, name: str) -> Any:
        value = getattr(self.inner, name)
        if not callable(value):
            return value

        def call(*args: Any, **kwargs: Any) -> Any:
            with self.timer(name):
                return value(*args, **kwargs)

        return call

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        items = iter(self.inner)
        while True:
            with self.timer("gather"):
                item = next(items, None)
                _synchronize()
            if item is None:
                return
            yield item


class MeasuredWorker(ActorRolloutRefWorker):
    """The trainer's worker beside vLLM engines. It can also sample (`hf`), and it times what it sends."""

    @register(Dispatch.ALL)
    def init_hf(self) -> None:
        self.rollout = HFRollout(
            self.actor.config,
            self.device,
            compute_dtype(self.device),
            [],
            self.tokenizer.pad_token_id,
            self.config.rollout.max_num_seqs,
        )
        self.rollout.load_weights(self.actor.full_parameters())

    @register(Dispatch.ALL)
    def set_hf_stops(self, token_ids: list[int]) -> None:
        self.rollout.eos_token_ids = torch.tensor(token_ids, dtype=torch.int64, device=self.device)

    @register(Dispatch.RANK_ZERO)
    def threads(self) -> int:
        return torch.get_num_threads()

    @register(Dispatch.ALL)
    def connect_rollout(self, plan: TransferPlan) -> None:
        super().connect_rollout(plan)
        self.timer = Timer()
        self.sender.client = Timed(self.sender.client, self.timer)
        self.sender.source = Timed(PolicyWeights(self.actor, plan.dtype), self.timer)

    @register(Dispatch.RANK_ZERO)
    def time_transfer(self) -> dict[str, float]:
        """Seconds of one `send_weights` and of its parts, as rank 0 sees them. `pack`: what is left, on a CPU the copy
        into shared memory; under NCCL the parts run at the same time and mean little."""
        self.timer.seconds.clear()
        start = time.perf_counter()
        self.sender.send_weights()
        _synchronize()
        total = time.perf_counter() - start
        seconds = self.timer.seconds
        parts = {
            "gather": seconds["gather"],
            "engine_start": seconds["start_weight_update"],
            "engine_load": seconds["update_weights"],
            "engine_finish": seconds["finish_weight_update"],
        }
        return {"total": total, **parts, "pack": total - sum(parts.values())}

    @register(Dispatch.RANK_ZERO)
    def time_copy(self, n_bytes: int) -> float:
        """Seconds of a plain copy of so many bytes on this worker's device, between two tensors used before."""
        source = torch.ones(n_bytes // 4, device=self.device)
        target = torch.zeros_like(source)
        _synchronize()
        start = time.perf_counter()
        target.copy_(source)
        _synchronize()
        return time.perf_counter() - start

    @register(Dispatch.RANK_ZERO)
    def transferred_bytes(self, dtype: torch.dtype) -> int:
        shapes = (meta.shape for meta in PolicyWeights(self.actor, dtype).metadata())
        return sum(torch.Size(shape).numel() for shape in shapes) * dtype.itemsize


def _synchronize() -> None:
    """Wait until a GPU has done what it was told: else times say when it was told."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()


def make_model(folder: Path, sizes: dict[str, int]) -> Path:
    """A random model in float32; without sizes, that of the quickstart."""
    arguments = [f"--{name}={value}" for name, value in sizes.items()]
    subprocess.run([sys.executable, str(MAKE_MODEL), "--output-dir", str(folder), *arguments], check=True)
    return folder


def model_sizes(hidden_size: int, layers: int) -> dict[str, int]:
    """Of the larger model, with heads of 64."""
    heads = hidden_size // 64
    sizes = {"hidden-size": hidden_size, "layers": layers, "heads": heads, "kv-heads": 2 - heads % 2}
    return sizes | {"intermediate-size": 3 * hidden_size}


def without_stops(model: Path, folder: Path) -> Path:
    """The model in a new folder, without tokens that end a response: vLLM would always add those of the old one."""
    folder.mkdir()
    for file in model.resolve().iterdir():
        (folder / file.name).symlink_to(file)
    (folder / "generation_config.json").unlink(missing_ok=True)
    (folder / "generation_config.json").write_text("{}")
    return folder


def configuration(model: Path, max_prompt: int, max_tokens: int, overrides: list[str]) -> PPOConfig:
    """One worker and one engine beside it, in Ray actors, both of which decode up to 512 responses together.

    ValueError for what cannot run."""
    config: PPOConfig = load_config(
        [
            f"actor_rollout_ref.model.path={model}",
            "actor_rollout_ref.rollout.name=vllm",
            "actor_rollout_ref.rollout.max_num_seqs=512",
            "actor_rollout_ref.rollout.enforce_eager=True",
            "data.train_files=none",
            "data.val_files=none",
            f"data.max_prompt_length={max_prompt}",
            f"data.max_response_length={max_tokens}",
            "trainer.n_gpus_per_node=1",
            *overrides,
        ]
    )
    check_vllm(config, cluster_device(config))
    return config


@contextmanager
def engines(config: PPOConfig) -> Iterator[tuple[WorkerGroup, EngineRollout]]:
    """Workers with their model, and vLLM engines connected to them."""
    pad_token_id = load_tokenizer(config.actor_rollout_ref.model.path).pad_token_id
    actor = create_worker_group(config.trainer, MeasuredWorker, config.actor_rollout_ref, 1, False, [])
    try:
        actor.init_model()
        rollout = EngineRollout(config, actor, pad_token_id)
        rollout.start()
        try:
            yield actor, rollout
        finally:
            rollout.shutdown()
    finally:
        actor.shutdown()
