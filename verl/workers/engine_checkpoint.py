"""What an engine writes and reads: checkpoints that load on any number of workers, and Hugging Face folders.

Every function is a collective, unless it says otherwise: all workers of the group call it together.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_optimizer_state_dict, set_state_dict
from transformers import AutoModelForCausalLM, PreTrainedModel

from verl.utils.device import compute_dtype
from verl.workers.fsdp_engine import FSDPEngine


def state_dict(engine: FSDPEngine) -> dict[str, Any]:
    """Sharded state for torch.distributed.checkpoint."""
    stepped = bool(engine.optimizer.state)
    optimizer = get_optimizer_state_dict(engine.model, engine.optimizer)
    if not stepped:
        # To have something to return, torch has taken a step, at a learning rate of 0. It must not count.
        for moments in engine.optimizer.state.values():
            moments["step"].zero_()
    return {
        "model": get_model_state_dict(engine.model),
        "optimizer": optimizer,
        "scheduler": engine.scheduler.state_dict(),
        "engine": {"skipped_in_a_row": engine.skipped_in_a_row},
    }


def save(engine: FSDPEngine, folder: Path) -> None:
    """Write every worker's part of model, optimizer and schedule."""
    write(state_dict(engine), folder)


def write(state: dict[str, Any], folder: Path, group: dist.ProcessGroup | None = None) -> None:
    """Write a `state_dict`, the workers agreeing through `group` (None: the default one). OSError if one fails."""
    with _failures(f"{folder} could not be written"):
        dcp.save(state, checkpoint_id=folder, process_group=group)


def load(engine: FSDPEngine, folder: Path) -> None:
    """Load what `save` wrote, on any number of workers. A checkpoint of another model is a ValueError."""
    state = state_dict(engine)
    _check_same_model(folder, state)
    with _failures(f"{folder} could not be read"):
        dcp.load(state, checkpoint_id=folder)
    set_state_dict(engine.model, engine.optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    engine.scheduler.load_state_dict(state["scheduler"])
    engine.skipped_in_a_row = state["engine"]["skipped_in_a_row"]
    _apply_configured_rates(engine)


@contextmanager
def _failures(what: str) -> Iterator[None]:
    """One line with the ranks' causes, in place of an exception that is no Exception and would pass every handler."""
    try:
        yield
    except dcp.CheckpointException as error:
        causes = (f"rank {rank}: {type(cause).__name__}: {cause}" for rank, (cause, _) in error.failures.items())
        raise OSError(f"{what}: {'; '.join(causes)}") from error


def _apply_configured_rates(engine: FSDPEngine) -> None:
    """Learning rate and weight decay are the configuration's, not those that the checkpoint was written with."""
    assert engine.optim is not None
    engine.scheduler.base_lrs = [engine.optim.lr] * len(engine.optimizer.param_groups)
    factor = engine.scheduler.lr_lambdas[0](engine.scheduler.last_epoch)
    for group in engine.optimizer.param_groups:
        group["initial_lr"], group["weight_decay"] = engine.optim.lr, engine.optim.weight_decay
        group["lr"] = engine.optim.lr * factor


def _check_same_model(folder: Path, state: dict[str, Any]) -> None:
    saved = tensor_shapes(folder)
    here = {name: tuple(tensor.shape) for name, tensor in state["model"].items()}
    for name in sorted(saved.keys() | here.keys()):
        if saved.get(name) != here.get(name):
            found, expected = (
                "no such tensor" if shape is None else f"shape {shape}" for shape in (saved.get(name), here.get(name))
            )
            raise ValueError(
                f"checkpoint {folder} is of another model: {name}: {expected} here, {found} there; "
                "start from the model it was made from (actor_rollout_ref.model.path; critic.model.path), or set "
                "another trainer.default_local_dir"
            )


def tensor_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Name and whole shape of each tensor of the model in a checkpoint. No collective."""
    metadata = dcp.FileSystemReader(folder).read_metadata().state_dict_metadata
    return {
        name.removeprefix("model."): tuple(entry.size)
        for name, entry in metadata.items()
        if name.startswith("model.") and isinstance(entry, TensorStorageMetadata)
    }


# ---------------------------------------------------------------------------------------------- Hugging Face folders
@dataclass(frozen=True)
class Export:
    """A model's weights at one moment, whole and on the CPU, and what turns them into a Hugging Face folder."""

    skeleton: PreTrainedModel  # without weights
    weights: dict[str, torch.Tensor]
    tokenizer: Any

    def write(self, folder: Path) -> None:
        """Write safetensors, configuration and tokenizer. No collective."""
        self.skeleton.save_pretrained(folder, state_dict=self.weights)
        self.tokenizer.save_pretrained(folder)


def skeleton_of(config: Any, generation_config: Any, dtype: torch.dtype) -> PreTrainedModel:
    """The model of a configuration, without weights. No collective."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.generation_config = generation_config
    return model


def make_export(engine: FSDPEngine, tokenizer: Any) -> Export | None:
    """The weights as they are now, in the compute dtype, on worker 0; None on the others."""
    dtype, first = compute_dtype(engine.device), dist.get_rank() == 0
    weights = {}
    for name, tensor in engine.full_parameters():
        if first:
            weights[name] = tensor.to("cpu", dtype, copy=True)
    return Export(skeleton_of(engine.config, engine.generation_config, dtype), weights, tokenizer) if first else None


def export(engine: FSDPEngine, folder: Path, tokenizer: Any) -> None:
    """Write a Hugging Face folder (safetensors in the compute dtype, config, tokenizer) from worker 0."""
    if (made := make_export(engine, tokenizer)) is not None:
        made.write(folder)
