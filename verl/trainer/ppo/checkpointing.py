"""The driver's side of checkpoints: when they count, which are kept, and from which one a run goes on."""

import secrets
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

import torch

from verl.single_controller.worker_group import WorkerGroup
from verl.trainer.config.schema import PPOConfig
from verl.trainer.ppo.core_algos import get_adv_estimator
from verl.utils.checkpoint import CheckpointFolder, FileRecord, find_fault, missing, record
from verl.utils.dataset.loader import StatefulLoader
from verl.utils.generators import generator_states, restore_generators
from verl.utils.run_folder import CHECKPOINTS, set_aside

DRIVER_FILE = "trainer.pt"


class Stateful(Protocol):
    """A part of the driver that goes into the checkpoint."""

    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class Checkpointing:
    """Writes and resumes the run of `workers`, a group of CheckpointedWorkers, and the driver's `parts`, by name.

    `write`, log the step, `commit`: only with its name does a checkpoint count, and then what it has done is logged.
    """

    def __init__(self, config: PPOConfig, workers: WorkerGroup, parts: Mapping[str, Stateful]) -> None:
        self.config = config
        self.workers = workers
        self.parts = parts
        self.folder = checkpoint_folder(config)
        self.begun: tuple[int, dict[str, FileRecord]] | None = None  # step, and the driver's files

    def write(self, step: int) -> None:
        """Write a checkpoint, or (`trainer.async_save`) begin to. One still being written is waited for first."""
        self.commit(wait=True)
        folder = self.folder.begin(step)
        self.workers.write_checkpoint(str(folder), self.config.trainer.async_save)
        state = {
            "step": step,
            "config": asdict(self.config),
            **{name: part.state_dict() for name, part in self.parts.items()},
            "generators": generator_states(),
        }
        torch.save(state, folder / DRIVER_FILE)
        self.begun = step, {DRIVER_FILE: record(folder / DRIVER_FILE)}

    def commit(self, wait: bool = False) -> None:
        """Give the checkpoint last begun its name if all workers have written their part (wait: once they have), and
        delete the oldest beyond `trainer.max_actor_ckpt_to_keep`. A write that failed is an error that names it."""
        if self.begun is None:
            return
        step, files = self.begun
        parts = self.workers.checkpoint_files(wait)
        if any(part is None for part in parts):
            return
        for part in parts:
            files |= part
        self.folder.commit(step, files)
        self.begun = None
        if (keep := self.config.trainer.max_actor_ckpt_to_keep) is not None:
            self.folder.prune(keep)

    def resume(self) -> int:
        """Take up the newest checkpoint that is undamaged. Returns its step, 0 if there is none.

        Damaged ones are named, renamed, and passed over; if there are no others: ValueError.
        """
        if self.config.trainer.resume_mode == "disable":
            set_aside(self.folder.root.parent, checkpoints=True)
            return 0
        folder, damaged = newest_undamaged(self.folder, self._find_fault)
        self._warn(folder, damaged)
        if folder is None:
            return 0
        print(f"resuming from {folder}")
        state = torch.load(folder / DRIVER_FILE, weights_only=False)
        for key, (then, now) in changed_keys(state["config"], asdict(self.config)).items():
            kept = " (the weights are the checkpoint's)" if key == "actor_rollout_ref.model.path" else ""
            print(f"  changed since: {key}={now} (was {then}){kept}")
        for name, part in self.parts.items():
            part.load_state_dict(state[name])
        self.workers.load_checkpoint(str(folder))
        restore_generators(state["generators"])
        return int(state["step"])

    def prospect(self) -> str:
        """What becomes of the run, once it is stopped, when it is started again."""
        steps = self.folder.steps()
        if not steps:
            return "started again, the run begins anew: it has no checkpoint yet"
        how = " with trainer.resume_mode=auto" if self.config.trainer.resume_mode == "disable" else ""
        return f"started again{how}, the run goes on from {self.folder.path(steps[0]).name}"

    def _find_fault(self, folder: Path) -> str | None:
        if (fault := find_driver_fault(folder)) is not None:
            return fault
        return next(filter(None, self.workers.find_checkpoint_fault(str(folder))), None)

    def _warn(self, folder: Path | None, damaged: dict[Path, str]) -> None:
        onward = f"going on from {folder}" if folder else "starting from the first step"
        for path in self.folder.unfinished():
            print(f"warning: {path} is not complete, the run ended while it was written: {onward}")
        for path, fault in damaged.items():
            # Renamed, it can never pass for the newest one again, as when the older are deleted.
            aside = self.folder.put_aside(path)
            print(f"warning: checkpoint {path} is damaged ({fault}): {onward}; it is kept as {aside.name}")


def checkpoint_folder(config: PPOConfig) -> CheckpointFolder:
    return CheckpointFolder(Path(config.trainer.default_local_dir) / CHECKPOINTS)


def find_driver_fault(folder: Path) -> str | None:
    """What the driver alone can find: files that are missing or have another size, and a damaged file of its own."""
    return find_fault(folder, contents_of=[DRIVER_FILE])


def newest_undamaged(
    folder: CheckpointFolder, inspect: Callable[[Path], str | None]
) -> tuple[Path | None, dict[Path, str]]:
    """The newest checkpoint in which `inspect` finds no fault (None: there are no checkpoints), and the newer ones with
    theirs. ValueError if each has one."""
    damaged: dict[Path, str] = {}
    for step in folder.steps():
        path = folder.path(step)
        fault = inspect(path)
        if fault is None:
            return path, damaged
        damaged[path] = fault
    if damaged:
        faults = "; ".join(f"{path.name}: {fault}" for path, fault in damaged.items())
        raise ValueError(
            f"no checkpoint in {folder.root} is undamaged ({faults}): restore one, or start anew with "
            "trainer.resume_mode=disable"
        )
    return None, damaged


def check_resumable(config: PPOConfig, loader: StatefulLoader) -> None:
    """Before workers start: ValueError if the newest checkpoint's driver state does not fit this configuration."""
    if config.trainer.resume_mode == "disable":
        return
    folder, _ = newest_undamaged(checkpoint_folder(config), find_driver_fault)
    if folder is None:
        return
    state = torch.load(folder / DRIVER_FILE, weights_only=False)
    algorithm, actor_rollout_ref = config.algorithm, config.actor_rollout_ref
    loader.load_state_dict(state["loader"])
    model, path = state["config"]["actor_rollout_ref"]["model"]["path"], actor_rollout_ref.model.path
    if path != model and (algorithm.use_kl_in_reward or actor_rollout_ref.actor.use_kl_loss):
        raise ValueError(
            f"actor_rollout_ref.model.path={path} would be another reference for the KL term than before: checkpoint "
            f"{folder} is of {model}; restore it, set another trainer.experiment_name, or start anew with "
            "trainer.resume_mode=disable"
        )
    then = state["config"]["algorithm"]["adv_estimator"]
    if then != algorithm.adv_estimator:
        raise ValueError(
            f"algorithm.adv_estimator is {algorithm.adv_estimator}, in checkpoint {folder} it is {then}: restore it, "
            "set another trainer.experiment_name, or start anew with trainer.resume_mode=disable"
        )
    estimator = get_adv_estimator(algorithm.adv_estimator, algorithm, actor_rollout_ref.rollout.n, config.trainer.seed)
    estimator.load_state_dict(state["estimator"])
    if estimator.needs_critic and not (folder / "critic" / ".metadata").is_file():
        raise ValueError(
            f"checkpoint {folder} has no critic, which algorithm.adv_estimator={algorithm.adv_estimator} needs: set "
            "another trainer.experiment_name, or start anew with trainer.resume_mode=disable"
        )


def check_shared(config: PPOConfig, workers: WorkerGroup) -> None:
    """Where checkpoints are written or read, every worker must see the run's folder: each leaves a file where the
    driver says, and the driver looks for them all. ValueError, the workers ended, if one is missing."""
    if config.trainer.save_freq <= 0 and not checkpoint_folder(config).steps():
        return
    run_dir = Path(config.trainer.default_local_dir)
    meeting = run_dir / f".shared_{secrets.token_hex(8)}"
    meeting.mkdir(parents=True)
    nodes = workers.sign(str(meeting))
    signatures = [meeting / f"rank_{rank}" for rank in range(len(nodes))]
    absent = missing(signatures)
    apart = sorted({node for node, signature in zip(nodes, signatures, strict=True) if signature in absent})
    shutil.rmtree(meeting)
    if apart:
        workers.shutdown()
        raise ValueError(
            f"trainer.default_local_dir={run_dir} is not shared: what is written there on the driver's node is not "
            f"seen on {', '.join(apart)}, or the other way round; give a folder that all nodes share"
        )


def changed_keys(then: dict[str, Any], now: dict[str, Any], prefix: str = "") -> dict[str, tuple[Any, Any]]:
    """Dotted key -> (value then, value now), of the keys of two nested configurations that differ."""
    changed: dict[str, tuple[Any, Any]] = {}
    for name in sorted(then.keys() | now.keys()):
        a, b = then.get(name), now.get(name)
        if isinstance(a, dict) and isinstance(b, dict):
            changed |= changed_keys(a, b, f"{prefix}{name}.")
        elif a != b:
            changed[prefix + name] = (a, b)
    return changed
