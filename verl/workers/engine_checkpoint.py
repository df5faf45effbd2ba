"""What an engine writes and reads: checkpoints that load on any number of workers, and Hugging Face folders.

Every function is a collective: all workers of the group call it together.
"""

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_optimizer_state_dict, set_state_dict
from transformers import AutoModelForCausalLM

from verl.utils.device import compute_dtype
from verl.workers.fsdp_engine import FSDPEngine


def state_dict(engine: FSDPEngine) -> dict[str, Any]:
    """Sharded state for torch.distributed.checkpoint."""
    return {
        "model": get_model_state_dict(engine.model),
        "optimizer": get_optimizer_state_dict(engine.model, engine.optimizer),
        "scheduler": engine.scheduler.state_dict(),
    }


def save(engine: FSDPEngine, folder: Path) -> None:
    """Write every worker's part of model, optimizer and schedule."""
    dcp.save(state_dict(engine), checkpoint_id=folder)


def load(engine: FSDPEngine, folder: Path) -> None:
    """Load what `save` wrote, on any number of workers. A checkpoint of another model is a ValueError."""
    state = state_dict(engine)
    _check_same_model(folder, state)
    dcp.load(state, checkpoint_id=folder)
    set_state_dict(engine.model, engine.optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    engine.scheduler.load_state_dict(state["scheduler"])
    _apply_configured_rates(engine)


def _apply_configured_rates(engine: FSDPEngine) -> None:
    """Learning rate and weight decay are the configuration's, not those that the checkpoint was written with."""
    assert engine.optim is not None
    engine.scheduler.base_lrs = [engine.optim.lr] * len(engine.optimizer.param_groups)
    factor = engine.scheduler.lr_lambdas[0](engine.scheduler.last_epoch)
    for group in engine.optimizer.param_groups:
        group["initial_lr"], group["weight_decay"] = engine.optim.lr, engine.optim.weight_decay
        group["lr"] = engine.optim.lr * factor


def _check_same_model(folder: Path, state: dict[str, Any]) -> None:
    saved = dcp.FileSystemReader(folder).read_metadata().state_dict_metadata
    for name, tensor in state["model"].items():
        entry = saved.get(f"model.{name}")
        size = tuple(getattr(entry, "size", ())) if entry is not None else None
        if size != tuple(tensor.shape):
            found = "no such tensor" if size is None else f"shape {size}"
            raise ValueError(
                f"checkpoint {folder} is of another model: {name} is {tuple(tensor.shape)} here, {found} there; "
                "give the model it was made from as actor_rollout_ref.model.path, or another "
                "trainer.default_local_dir"
            )


def export(engine: FSDPEngine, folder: Path, tokenizer: Any) -> None:
    """Write a Hugging Face folder (safetensors in the compute dtype, config, tokenizer) from worker 0."""
    dtype = compute_dtype(engine.device)
    rank = dist.get_rank()
    weights = {}
    for name, tensor in engine.full_parameters():
        if rank == 0:
            weights[name] = tensor.to("cpu", dtype, copy=True)
    if rank == 0:
        with torch.device("meta"):
            skeleton = AutoModelForCausalLM.from_config(engine.config, dtype=dtype)
        skeleton.generation_config = engine.generation_config
        skeleton.save_pretrained(folder, state_dict=weights)
        tokenizer.save_pretrained(folder)
