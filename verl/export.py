"""`python -m verl.export CHECKPOINT DIR`: the policy of a checkpoint as a Hugging Face folder.

CHECKPOINT is a folder `global_step_k`, or a run's folder: its newest checkpoint. One process reads what any number of
workers wrote. A checkpoint's own `huggingface/` holds the weights in the dtype that was computed in; this writes them
as they were trained, in float32, or in the dtype asked for.
"""

import argparse
import shutil
import sys
import warnings
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from transformers import AutoConfig, AutoTokenizer, GenerationConfig, PreTrainedModel
from transformers.utils.logging import disable_progress_bar

from verl.utils.checkpoint import CheckpointFolder, find_fault, read_manifest
from verl.workers.engine_checkpoint import Export, skeleton_of, tensor_shapes
from verl.workers.lora import add_adapters, merged_parameters

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
PREFIX = "lm."  # of the language model within what the engine trains


def find_checkpoint(path: Path) -> Path:
    """`path` itself if it is a checkpoint, else the newest of the run's folder `path`. ValueError without one."""
    if (path / "actor").is_dir():
        return path
    for root in (path / "checkpoints", path):
        folder = CheckpointFolder(root)
        if steps := folder.steps():
            return folder.path(steps[0])
    raise ValueError(f"{path} is no checkpoint (a folder global_step_k), nor a run's folder with one")


def check_checkpoint(checkpoint: Path) -> None:
    """ValueError if a file that the export reads is missing or damaged."""
    try:
        files = read_manifest(checkpoint)
    except ValueError as error:
        raise ValueError(f"{checkpoint} is not a complete checkpoint: {error}") from error
    needed = [
        name
        for name in files
        if name.startswith(("actor/", "trainer.pt")) or (name.startswith("huggingface/") and ".safetensors" not in name)
    ]
    if (fault := find_fault(checkpoint, needed, needed)) is not None:
        raise ValueError(f"{checkpoint} is damaged: {fault}; take another checkpoint")


def load_policy(checkpoint: Path) -> PreTrainedModel:
    """The policy with its trained weights in float32, on the CPU; adapters are still beside them."""
    shapes = {
        name.removeprefix(PREFIX): shape
        for name, shape in tensor_shapes(checkpoint / "actor").items()
        if name.startswith(PREFIX)
    }
    described = checkpoint / "huggingface"
    lm = skeleton_of(
        AutoConfig.from_pretrained(described), GenerationConfig.from_pretrained(described), dtype=torch.float32
    )
    if ranks := {shape[0] for name, shape in shapes.items() if ".lora_A." in name}:
        config = torch.load(checkpoint / "trainer.pt", weights_only=False)["config"]
        with torch.device("meta"):
            add_adapters(lm, ranks.pop(), config["actor_rollout_ref"]["model"]["lora_alpha"])
    lm.to_empty(device="cpu")
    lm.tie_weights()  # which each have got memory of their own
    for name, parameter in lm.named_parameters():
        if shapes.get(name) != tuple(parameter.shape):
            raise ValueError(
                f"{checkpoint} contradicts its huggingface/config.json: {name} is {tuple(parameter.shape)} by that, "
                f"{shapes.get(name, 'missing')} in actor/"
            )
    tensors = {f"model.{PREFIX}{name}": tensor for name, tensor in lm.state_dict().items() if name in shapes}
    with warnings.catch_warnings(action="ignore", category=UserWarning):  # that it loads in a single process
        dcp.load(tensors, checkpoint_id=checkpoint / "actor", no_dist=True)
    return lm


def export(checkpoint: Path, folder: Path, dtype: torch.dtype = torch.float32) -> None:
    """Write the policy of `checkpoint` to `folder`, which must be empty or not there yet. ValueError, one line, for
    what the caller can mend."""
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder} is not empty: name a new folder")
    check_checkpoint(checkpoint)
    lm = load_policy(checkpoint)
    weights = {name: tensor.to(dtype) for name, tensor in merged_parameters(lm)}
    skeleton = skeleton_of(lm.config, lm.generation_config, dtype)
    partial = folder.with_name(f"{folder.name}.incomplete")
    if partial.is_dir():  # of an export that did not end
        shutil.rmtree(partial)
    Export(skeleton, weights, AutoTokenizer.from_pretrained(checkpoint / "huggingface")).write(partial)
    partial.replace(folder)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Write the policy of a checkpoint as a Hugging Face folder.")
    parser.add_argument("checkpoint", type=Path, help="a folder global_step_k, or a run's folder: its newest one")
    parser.add_argument("folder", type=Path, help="the folder to write")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of the weights (default: %(default)s)")
    arguments = parser.parse_args(argv)
    disable_progress_bar()
    try:
        checkpoint = find_checkpoint(arguments.checkpoint)
        export(checkpoint, arguments.folder, DTYPES[arguments.dtype])
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    print(f"{checkpoint} written to {arguments.folder} in {arguments.dtype}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
