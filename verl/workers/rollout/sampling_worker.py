"""What a worker does for sampling: says where it is, and decodes (`hf`). The worker of generation does nothing else."""

import os
from dataclasses import dataclass
from typing import Any

import ray
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig
from transformers.utils.logging import disable_progress_bar

from verl.protocol import DataProto
from verl.single_controller.dispatch import Dispatch, register
from verl.single_controller.worker import Worker
from verl.utils.device import compute_dtype
from verl.utils.flops import peak_flops
from verl.utils.tokenizer import load_tokenizer, stop_token_ids
from verl.workers.rollout.base import SamplingParams
from verl.workers.rollout.hf import HFRollout


@dataclass(frozen=True)
class Location:
    """Where a worker is. `node_id`: Ray's, None without Ray. `gpus`: its GPUs, as CUDA_VISIBLE_DEVICES names them.
    `peak_flops`: what its device could do, None where that is not known."""

    device: str
    node_id: str | None
    gpus: str
    peak_flops: float | None = None


class SamplingWorker(Worker):
    """`rollout`: what decodes, with `hf`."""

    rollout: HFRollout

    @register(Dispatch.ALL)
    def locate(self) -> Location:
        """Where this worker is, so that an engine can be put beside it."""
        node_id, gpus = None, os.environ.get("CUDA_VISIBLE_DEVICES", "")
        if ray.is_initialized():
            context = ray.get_runtime_context()
            node_id, gpus = context.get_node_id(), ",".join(context.get_accelerator_ids().get("GPU", []))
        return Location(self.device.type, node_id, gpus, peak_flops(self.device))

    @register(Dispatch.ROWS)
    def generate_sequences(self, data: DataProto) -> DataProto:
        """One response for each row of `data`: prompts (N, P), prompt_length (N,), uid (N,), row_key (N,) int64 and
        meta_info["sampling"]. Returns the columns of GenerationOutput."""
        params: SamplingParams = data.meta_info["sampling"]
        output = self.rollout.generate(
            data["prompts"], data["prompt_length"], data["uid"], data["row_key"].numpy(), params
        )
        return DataProto.from_dict(output.columns())


class GenerationWorker(SamplingWorker):
    """Samples from the model as it is in its folder. With `vllm` the engines load that themselves: the worker holds
    their place, and has no weights to send."""

    def __init__(self, model_path: str, engine: str, max_num_seqs: int) -> None:
        self.model_path = model_path
        self.engine = engine
        self.max_num_seqs = max_num_seqs

    @register(Dispatch.ALL)
    def init_model(self) -> None:
        """Load what is needed."""
        self.tokenizer = load_tokenizer(self.model_path, "model.path")
        if self.engine == "hf":
            disable_progress_bar()
            dtype = compute_dtype(self.device)
            model = AutoModelForCausalLM.from_pretrained(self.model_path, dtype=dtype)
            self.rollout = HFRollout(
                model.config, self.device, dtype, self.stop_token_ids(), self.tokenizer.pad_token_id, self.max_num_seqs
            )
            self.rollout.load_weights(model.named_parameters())

    @register(Dispatch.RANK_ZERO)
    def stop_token_ids(self) -> list[int]:
        """Ids that end a response."""
        try:
            generation: Any = GenerationConfig.from_pretrained(self.model_path)
        except OSError:  # the folder has none: the model's own configuration says it then
            generation = GenerationConfig.from_model_config(AutoConfig.from_pretrained(self.model_path))
        return stop_token_ids(self.tokenizer, generation)

    @register(Dispatch.ALL)
    def connect_rollout(self, plan: Any) -> None:
        """An engine has been started again. It has loaded the model."""

    @register(Dispatch.ALL)
    def update_weights(self) -> None:
        """Likewise."""
