"""A worker whose engines are saved and loaded: its part of a checkpoint, written at once or beside the training.

A checkpoint of step k holds, below `global_step_{k}`:

    {name}/                  of each engine that trains, `self.{name}`: model, optimizer, schedule, in shards
    huggingface/             the policy, from worker 0
    generators/rank_{r}.pt   states of worker r's global random generators
    trainer.pt               the driver's part; it writes manifest.json too (`verl.trainer.ppo.checkpointing`)
"""

import socket
from collections.abc import Callable
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

from verl.single_controller.dispatch import Dispatch, register
from verl.single_controller.worker import COLLECTIVE_TIMEOUT, Worker
from verl.utils.checkpoint import FileRecord, find_fault, missing, read_manifest, record
from verl.utils.generators import generator_states, restore_generators, seed_generators
from verl.workers import engine_checkpoint
from verl.workers.fsdp_engine import FSDPEngine

Files = dict[str, FileRecord]  # by path below the checkpoint's folder


class AtOnce(Executor):
    """Runs what is submitted there and then, in the caller's thread."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future:
        future: Future = Future()
        future.set_result(fn(*args, **kwargs))
        return future


class CheckpointedWorker(Worker):
    """Every attribute that is an engine with an optimizer is saved under its name. `actor` is exported as well, with
    `tokenizer`."""

    actor: FSDPEngine
    tokenizer: Any
    # Writing beside the training has a thread of its own, and a group of its own for that thread's collectives: in the
    # default group they would mix with the training's.
    _background: tuple[ThreadPoolExecutor, dist.ProcessGroup] | None = None
    _writes: list[Future]  # of the checkpoint begun last, the last one gives this worker's `Files`

    @register(Dispatch.ALL)
    def seed_generators(self, seed: int) -> None:
        """Seed the global random generators, each worker's differently."""
        seed_generators(seed, "worker", self.rank)

    @register(Dispatch.ALL)
    def sign(self, folder: str) -> str:
        """Leave a file `rank_{r}` in `folder`, if this node sees it. Returns the node's name."""
        if not missing([Path(folder)]):
            (Path(folder) / f"rank_{self.rank}").touch()
        return socket.gethostname()

    @register(Dispatch.ALL)
    def write_checkpoint(self, folder: str, in_background: bool) -> None:
        """Write this worker's part of a checkpoint; or copy it to the CPU, and write it while training goes on."""
        root = Path(folder)
        thread: Executor = AtOnce()
        group: dist.ProcessGroup | None = None
        if in_background:
            thread, group = self._background = self._background or start_background()
        self._writes = []
        for name, engine in self._trained_engines().items():
            with engine.resident(optimizer=True):
                state = engine_checkpoint.state_dict(engine)
                state = on_cpu(state) if in_background else state
                self._writes.append(
                    thread.submit(named, root / name, engine_checkpoint.write, state, root / name, group)
                )
        with self.actor.resident():
            export = engine_checkpoint.make_export(self.actor, self.tokenizer)
        if export is not None:
            self._writes.append(thread.submit(named, root / "huggingface", export.write, root / "huggingface"))
        own = root / "generators" / f"rank_{self.rank}.pt"
        self._writes.append(thread.submit(named, own, write_generators, generator_states(), own))
        self._writes.append(thread.submit(named, root, record_files, root, self.rank))

    @register(Dispatch.ALL)
    def checkpoint_files(self, wait: bool) -> Files | None:
        """This worker's files of the checkpoint begun last; None while it is being written, unless told to wait. A
        write that failed is a RuntimeError that names the checkpoint."""
        if not wait and not all(write.done() for write in self._writes):
            return None
        return [write.result() for write in self._writes][-1]

    @register(Dispatch.ALL)
    def find_checkpoint_fault(self, folder: str) -> str | None:
        """How the contents of a checkpoint's files differ from its manifest: each worker reads its share of them."""
        files = read_manifest(Path(folder))
        by_size = sorted(files, key=lambda name: (files[name].size, name))
        return find_fault(Path(folder), contents_of=by_size[self.rank :: self.world_size])

    @register(Dispatch.ALL)
    def load_checkpoint(self, folder: str) -> None:
        """Load what `write_checkpoint` wrote, on this number of workers or another."""
        for name, engine in self._trained_engines().items():
            with engine.resident(optimizer=True):
                engine_checkpoint.load(engine, Path(folder) / name)
        generators = Path(folder) / "generators" / f"rank_{self.rank}.pt"
        if generators.is_file():  # else there are more workers than there were
            restore_generators(torch.load(generators, weights_only=False))

    def close(self) -> None:
        if self._background is not None:
            self._background[0].shutdown()  # before its process group goes
        super().close()

    def _trained_engines(self) -> dict[str, FSDPEngine]:
        found = {name: value for name, value in vars(self).items() if isinstance(value, FSDPEngine)}
        return {name: engine for name, engine in found.items() if engine.optim is not None}


def start_background() -> tuple[ThreadPoolExecutor, dist.ProcessGroup]:
    """A thread and its process group. A collective."""
    return ThreadPoolExecutor(1, thread_name_prefix="checkpoint"), dist.new_group(
        backend="gloo", timeout=COLLECTIVE_TIMEOUT
    )


def on_cpu(state: dict[str, Any]) -> dict[str, Any]:
    """A copy that later updates do not change, in the CPU's memory."""
    stager = DefaultStager(StagingOptions(False, False, False, False))
    copy = stager.stage(state)
    stager.close()
    assert isinstance(copy, dict)  # not a future: staging was asked to be synchronous
    return copy


def named(path: Path, write: Callable[..., Any], *args: Any) -> Any:
    """write(*args); an error says what was being written."""
    try:
        return write(*args)
    except Exception as error:
        raise RuntimeError(f"checkpoint {path} was not written: {type(error).__name__}: {error}") from error


def write_generators(states: dict[str, Any], path: Path) -> None:
    path.parent.mkdir(exist_ok=True)
    torch.save(states, path)


def record_files(root: Path, rank: int) -> Files:
    """Make the files that worker `rank` wrote durable, and record them."""
    patterns = [f"*/__{rank}_*.distcp", f"generators/rank_{rank}.pt"]  # torch.distributed.checkpoint names them so
    patterns += ["*/.metadata", "huggingface/**/*"] if rank == 0 else []
    files = [path for pattern in patterns for path in sorted(root.glob(pattern)) if path.is_file()]
    return {str(path.relative_to(root)): record(path) for path in files}
