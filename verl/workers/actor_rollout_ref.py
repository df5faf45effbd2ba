"""The worker that trains the policy, samples from it (`hf`), and scores with the frozen reference policy.

Thin: each method is what one call of the driver does; the work is in the engine, the update and the rollout.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from verl.protocol import DataProto
from verl.single_controller.dispatch import Dispatch, register
from verl.trainer.config.schema import ActorRolloutRefConfig
from verl.utils.checksum import checksum
from verl.utils.device import compute_dtype, memory_metrics
from verl.utils.plugins import load_plugins
from verl.utils.tokenizer import load_tokenizer, stop_token_ids
from verl.workers import engine_checkpoint
from verl.workers.checkpointed_worker import CheckpointedWorker
from verl.workers.fsdp_engine import EngineSettings, FSDPEngine
from verl.workers.kernels import use_kernels
from verl.workers.lora import add_adapters, without_adapters
from verl.workers.model import ScoringModel, load_language_model
from verl.workers.policy_update import PolicyUpdate
from verl.workers.profiling import Profiler
from verl.workers.rollout.hf import HFRollout
from verl.workers.rollout.sampling_worker import SamplingWorker
from verl.workers.rollout.weight_transfer import PolicyWeights, TransferPlan, make_sender
from verl.workers.sequences import MicroBatchSpec

ENGINES = {"fsdp2": FSDPEngine}


class ActorRolloutRefWorker(CheckpointedWorker, SamplingWorker):
    """`total_steps`: optimizer steps of the run. `with_reference`: load the reference policy as well.
    `plugins`: files to import."""

    def __init__(
        self, config: ActorRolloutRefConfig, total_steps: int, with_reference: bool, plugins: list[str]
    ) -> None:
        self.config = config
        self.total_steps = total_steps
        self.with_reference = with_reference
        self.plugins = plugins

    @register(Dispatch.ALL)
    def init_model(self) -> None:
        """Load the model, once to train and once to sample from."""
        load_plugins(self.plugins)
        model, actor, rollout = self.config.model, self.config.actor, self.config.rollout
        self.tokenizer = load_tokenizer(model.path)
        engine = ENGINES[actor.strategy]
        settings = EngineSettings.of_actor(self.config)
        with_own_weights = self.with_reference and not model.lora_rank  # with adapters: the actor without them
        # All are loaded before any gets fast kernels: Liger's replace parts of the model's class as well, and what
        # loading tries out, on the CPU, they cannot compute.
        lm, *reference = [
            load_language_model(model.path, model.use_remove_padding) for _ in range(1 + with_own_weights)
        ]
        use_kernels(lm, self.config, self.device)
        if model.lora_rank:
            add_adapters(lm, model.lora_rank, model.lora_alpha)
        self.actor = engine(ScoringModel(lm), self.device, actor.optim, self.total_steps, settings)
        self.reference = None
        if reference:
            use_kernels(reference[0], self.config, self.device)
            settings = replace(settings, param_offload=self.config.ref.fsdp_config.param_offload)
            self.reference = engine(ScoringModel(reference[0]), self.device, settings=settings)
        self.policy_update = PolicyUpdate(self.actor, actor, rollout.temperature)
        self.sender: Any = None  # to engines outside this worker
        if rollout.name == "hf":
            self.rollout = HFRollout(
                self.actor.config,
                self.device,
                compute_dtype(self.device),
                stop_token_ids(self.tokenizer, self.actor.generation_config),
                self.tokenizer.pad_token_id,
                rollout.max_num_seqs,
            )

    @register(Dispatch.RANK_ZERO)
    def stop_token_ids(self) -> list[int]:
        """Ids that end a response."""
        return stop_token_ids(self.tokenizer, self.actor.generation_config)

    @register(Dispatch.ALL)
    def connect_rollout(self, plan: TransferPlan) -> None:
        """From now on `update_weights` goes to the engines of `plan`."""
        if self.sender is not None:
            self.sender.shutdown()
        self.sender = make_sender(plan, self.rank, PolicyWeights(self.actor, plan.dtype))

    @register(Dispatch.ALL)
    def update_weights(self) -> None:
        """Bring the trained weights to the rollout engines."""
        with self.actor.resident():
            if self.config.rollout.name == "hf":
                self.rollout.load_weights(self.actor.full_parameters())
            else:
                self.sender.send_weights()

    @register(Dispatch.RANK_ZERO)
    def weight_checksums(self, dtype: torch.dtype) -> dict[str, tuple[float, float]]:
        """`checksum` of each weight in `dtype`, by Hugging Face name."""
        with self.actor.resident():
            return {name: checksum(tensor) for name, tensor in PolicyWeights(self.actor, dtype)}

    @register(Dispatch.ROWS)
    def compute_log_prob(self, data: DataProto) -> DataProto:
        """old_log_probs and entropy (N, T) of the responses under the policy as it is, at meta_info["temperature"]."""
        rollout = self.config.rollout
        spec = MicroBatchSpec.from_config(
            rollout.log_prob_micro_batch_size_per_gpu,
            rollout.log_prob_use_dynamic_bsz,
            rollout.log_prob_max_token_len_per_gpu,
        )
        with self.actor.resident():
            log_prob, entropy = self.actor.log_prob(data, data.meta_info["temperature"], spec)
        return DataProto.from_dict({"old_log_probs": log_prob, "entropy": entropy})

    @register(Dispatch.ROWS)
    def compute_ref_log_prob(self, data: DataProto) -> DataProto:
        """ref_log_prob (N, T) of the responses under the reference policy."""
        ref = self.config.ref
        spec = MicroBatchSpec.from_config(
            ref.log_prob_micro_batch_size_per_gpu, ref.log_prob_use_dynamic_bsz, ref.log_prob_max_token_len_per_gpu
        )
        temperature = self.config.rollout.temperature
        if self.reference is None:
            with self.actor.resident(), without_adapters(self.actor.lm):
                log_prob, _ = self.actor.log_prob(data, temperature, spec)
        else:
            with self.reference.resident():
                log_prob, _ = self.reference.log_prob(data, temperature, spec)
        return DataProto.from_dict({"ref_log_prob": log_prob})

    @register(Dispatch.ROWS)
    def update_actor(self, data: DataProto) -> tuple[DataProto, dict[str, float]] | dict[str, float]:
        """One step's policy update; see PolicyUpdate. Every worker returns the metrics of all."""
        with self.actor.resident(optimizer=True):
            seen, metrics = self.policy_update(data)
        metrics |= memory_metrics(self.device)
        return metrics if seen is None else (seen, metrics)

    @register(Dispatch.RANK_ZERO)
    def start_profile(self) -> None:
        """Record what worker 0 computes until `stop_profile`."""
        if self.rank == 0:
            self.profiler = Profiler(self.device)
            self.profiler.start()

    @register(Dispatch.RANK_ZERO)
    def stop_profile(self, path: str) -> None:
        """Write the record; see Profiler."""
        if self.rank == 0:
            self.profiler.stop(Path(path))

    @register(Dispatch.ALL)
    def export(self, folder: str) -> None:
        """Write the policy as a Hugging Face folder."""
        with self.actor.resident():
            engine_checkpoint.export(self.actor, Path(folder), self.tokenizer)
