"""The worker that trains the policy, samples from it, and scores with the frozen reference policy.

Thin: each method is what one call of the driver does; the work is in the engine, the update and the rollout.
"""

from pathlib import Path

import torch

from verl.protocol import DataProto
from verl.single_controller.dispatch import Dispatch, register
from verl.single_controller.worker import Worker
from verl.trainer.config.schema import ActorRolloutRefConfig
from verl.utils.device import compute_dtype, memory_metrics
from verl.utils.plugins import load_plugins
from verl.utils.tokenizer import load_tokenizer, stop_token_ids
from verl.workers.fsdp_engine import FSDPEngine
from verl.workers.policy_update import PolicyUpdate
from verl.workers.rollout.base import SamplingParams
from verl.workers.rollout.hf import HFRollout
from verl.workers.sequences import MicroBatchSpec

ENGINES = {"fsdp2": FSDPEngine}
ROLLOUTS = {"hf": HFRollout}


class ActorRolloutRefWorker(Worker):
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
        self.actor = engine(
            model.path,
            self.device,
            actor.optim,
            self.total_steps,
            actor.grad_clip,
            model.enable_gradient_checkpointing,
            actor.max_skipped_updates,
        )
        self.reference = engine(model.path, self.device) if self.with_reference else None
        self.policy_update = PolicyUpdate(self.actor, actor, rollout.temperature)
        self.rollout = ROLLOUTS[rollout.name](
            self.actor.config,
            self.device,
            compute_dtype(self.device),
            stop_token_ids(self.tokenizer, self.actor.generation_config),
            self.tokenizer.pad_token_id,
            rollout.max_num_seqs,
        )

    @register(Dispatch.ALL)
    def update_weights(self) -> None:
        """Bring the trained weights to the rollout engine."""
        self.rollout.load_weights(self.actor.full_parameters())

    @register(Dispatch.ROWS)
    def generate_sequences(self, data: DataProto) -> DataProto:
        """One response for each row of `data`: prompts (N, P), prompt_length (N,), uid (N,), row_key (N,) int64 and
        meta_info["sampling"]. Returns responses (N, T), response_mask (N, T), rollout_log_probs (N, T)."""
        params: SamplingParams = data.meta_info["sampling"]
        output = self.rollout.generate(
            data["prompts"], data["prompt_length"], data["uid"], data["row_key"].numpy(), params
        )
        mask = torch.arange(params.max_tokens) < output.lengths[:, None]
        return DataProto.from_dict(
            {"responses": output.responses, "response_mask": mask, "rollout_log_probs": output.log_probs}
        )

    @register(Dispatch.ROWS)
    def compute_log_prob(self, data: DataProto) -> DataProto:
        """old_log_probs and entropy (N, T) of the responses under the policy as it is."""
        rollout = self.config.rollout
        spec = MicroBatchSpec.from_config(
            rollout.log_prob_micro_batch_size_per_gpu,
            rollout.log_prob_use_dynamic_bsz,
            rollout.log_prob_max_token_len_per_gpu,
        )
        log_prob, entropy = self.actor.log_prob(data, rollout.temperature, spec)
        return DataProto.from_dict({"old_log_probs": log_prob, "entropy": entropy})

    @register(Dispatch.ROWS)
    def compute_ref_log_prob(self, data: DataProto) -> DataProto:
        """ref_log_prob (N, T) of the responses under the reference policy."""
        ref = self.config.ref
        spec = MicroBatchSpec.from_config(
            ref.log_prob_micro_batch_size_per_gpu, ref.log_prob_use_dynamic_bsz, ref.log_prob_max_token_len_per_gpu
        )
        assert self.reference is not None, "built without the reference policy"
        log_prob, _ = self.reference.log_prob(data, self.config.rollout.temperature, spec)
        return DataProto.from_dict({"ref_log_prob": log_prob})

    @register(Dispatch.ROWS)
    def update_actor(self, data: DataProto) -> dict[str, float]:
        """One step's policy update; see PolicyUpdate. Every worker returns the metrics of all."""
        return self.policy_update(data) | memory_metrics(self.device)

    @register(Dispatch.ALL)
    def save_checkpoint(self, folder: str) -> None:
        """Write this worker's part of a checkpoint, and from worker 0 a Hugging Face export."""
        self.actor.save(Path(folder) / "actor")
        self.actor.export(Path(folder) / "huggingface", self.tokenizer)

    @register(Dispatch.ALL)
    def load_checkpoint(self, folder: str) -> None:
        """Load what `save_checkpoint` wrote, on this number of workers or another."""
        self.actor.load(Path(folder) / "actor")

    @register(Dispatch.ALL)
    def export(self, folder: str) -> None:
        """Write the policy as a Hugging Face folder."""
        self.actor.export(Path(folder), self.tokenizer)
