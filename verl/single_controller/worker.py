"""A worker: one process of the group that trains, or the driver itself when the group is `local`."""

from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from verl.utils.device import BACKENDS, bind_device, share_cores

# A rank may wait long for the slowest rollout. Ray notices a dead rank at once, so this only ends a deadlock.
COLLECTIVE_TIMEOUT = timedelta(hours=2)


@dataclass(frozen=True)
class Place:
    """Where a worker stands: its rank among all workers and among those on its node, and the device's type."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    device: str  # `cpu` or `cuda`


class Worker:
    """Base of worker classes. A constructor stays cheap: `rank`, `world_size` and `device` are set after it, and what
    needs them (building a model) belongs in a registered method that the driver calls first."""

    rank: int
    world_size: int
    device: torch.device

    def setup_distributed(self, place: Place, store: dist.Store | None = None) -> None:
        """Take the place: threads, device, and the default process group, through `store` (None: a group of one)."""
        self.rank, self.world_size = place.rank, place.world_size
        share_cores(place.local_world_size)
        self.device = bind_device(place.device, place.local_rank)
        _join_process_group(place, store)

    def close(self) -> None:
        """Called once at a regular end of the run. Override to stop what the worker started, and call this last."""
        _leave_process_group()


# Workers in one process (an actor and a critic in `local` groups) share its default process group.
_members = 0


def _join_process_group(place: Place, store: dist.Store | None) -> None:
    global _members
    if not dist.is_initialized():
        dist.init_process_group(
            BACKENDS[place.device],
            store=store or dist.HashStore(),
            rank=place.rank,
            world_size=place.world_size,
            timeout=COLLECTIVE_TIMEOUT,
        )
        _members = 1
    elif dist.get_world_size() != place.world_size:
        raise RuntimeError(
            f"this process is in a process group of {dist.get_world_size()}, the worker needs one of {place.world_size}"
        )
    elif _members:  # else somebody else's group: used, never destroyed
        _members += 1


def _leave_process_group() -> None:
    global _members
    if _members:
        _members -= 1
        # A vLLM engine in this process ends the default group when it is closed, which is before the workers are.
        if _members == 0 and dist.is_initialized():
            dist.destroy_process_group()
