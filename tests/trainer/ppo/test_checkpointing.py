"""The driver's side of checkpoints, with workers that write a line of text."""

import os
import random
from pathlib import Path

import numpy as np
import pytest
import torch

from verl.trainer.config import load_config
from verl.trainer.ppo.checkpointing import Checkpointing, check_resumable, check_shared
from verl.trainer.ppo.core_algos import get_adv_estimator
from verl.utils import checkpoint
from verl.utils.checkpoint import find_fault, record


class Counter:
    """A part of the driver."""

    value = 0

    def state_dict(self):
        return {"value": self.value}

    def load_state_dict(self, state):
        self.value = state["value"]


class FakeWorkers:
    """Two workers. `behind` of them are still writing; `elsewhere` sees another folder in the place of the run's."""

    def __init__(self, behind: int = 0, error: Exception | None = None, elsewhere: Path | None = None) -> None:
        self.behind, self.error, self.elsewhere, self.weights, self.ended = behind, error, elsewhere, 0, False

    def write_checkpoint(self, folder, in_background):
        self.folder, self.in_background = Path(folder), in_background
        for rank in range(2):
            (self.folder / f"weights_{rank}").write_text(str(self.weights))

    def checkpoint_files(self, wait):
        if self.error:
            raise self.error
        behind = 0 if wait else self.behind
        names = [f"weights_{rank}" for rank in range(2)]
        return [None if rank < behind else {name: record(self.folder / name)} for rank, name in enumerate(names)]

    def find_checkpoint_fault(self, folder):
        return [find_fault(Path(folder), contents_of=[f"weights_{rank}"]) for rank in range(2)]

    def load_checkpoint(self, folder):
        self.weights = int((Path(folder) / "weights_0").read_text())

    def sign(self, folder):
        for rank, root in enumerate((Path(folder), self.elsewhere or Path(folder))):
            if root.is_dir():
                (root / f"rank_{rank}").touch()
        return ["node-a", "node-b"]

    def shutdown(self):
        self.ended = True


def config(run_dir: Path, *extra: str):
    required = ["data.train_files=t", "data.val_files=v", "actor_rollout_ref.model.path=m"]
    return load_config([*required, f"trainer.default_local_dir={run_dir}", "trainer.save_freq=1", *extra])


def make(run_dir: Path, *extra: str, workers: FakeWorkers | None = None) -> Checkpointing:
    return Checkpointing(config(run_dir, *extra), workers or FakeWorkers(), {"counter": Counter()})


def run(checkpoints: Checkpointing, steps) -> None:
    for step in steps:
        checkpoints.parts["counter"].value = checkpoints.workers.weights = step
        checkpoints.write(step)
        checkpoints.commit()


def resumed(run_dir: Path, *extra: str) -> tuple[int, int, int]:
    """Step, and the states of driver and workers, of a run started again."""
    checkpoints = make(run_dir, *extra)
    return checkpoints.resume(), checkpoints.parts["counter"].value, checkpoints.workers.weights


def names(run_dir: Path) -> list[str]:
    return sorted(path.name for path in (run_dir / "checkpoints").iterdir())


def test_a_run_goes_on_from_its_newest_checkpoint(tmp_path, capsys):
    assert resumed(tmp_path) == (0, 0, 0)
    run(make(tmp_path), [2, 10])
    assert resumed(tmp_path) == (10, 10, 10)
    assert "warning" not in capsys.readouterr().out
    assert resumed(tmp_path, "trainer.resume_mode=disable") == (0, 0, 0)


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def test_a_run_started_anew_keeps_the_checkpoints_with_their_metrics(tmp_path):
    run(make(tmp_path), [2])
    (tmp_path / "metrics.jsonl").write_text("a line")
    assert resumed(tmp_path, "trainer.resume_mode=disable") == (0, 0, 0)
    assert [path.name for path in tmp_path.iterdir()] == ["before_1"]
    assert sorted(path.name for path in (tmp_path / "before_1").iterdir()) == ["checkpoints", "metrics.jsonl"]


def test_where_a_stopped_run_goes_on_is_known(tmp_path):
    checkpoints = make(tmp_path)
    assert checkpoints.prospect() == "started again, the run begins anew: it has no checkpoint yet"
    run(checkpoints, [2, 10])
    checkpoints.write(12)  # not committed
    assert checkpoints.prospect() == "started again, the run goes on from global_step_10"
    anew = make(tmp_path, "trainer.resume_mode=disable")
    assert "again with trainer.resume_mode=auto, the run goes on from global_step_10" in anew.prospect()


OTHER_MODEL = "actor_rollout_ref.model.path=other"


def test_another_models_name_does_not_bring_its_weights(tmp_path, capsys):
    run(make(tmp_path), [2])
    assert resumed(tmp_path, OTHER_MODEL) == (2, 2, 2)
    line = "changed since: actor_rollout_ref.model.path=other (was m) (the weights are the checkpoint's)\n"
    assert line in capsys.readouterr().out


class Loader:
    def load_state_dict(self, state):
        pass


@pytest.mark.parametrize("term", ["algorithm.use_kl_in_reward", "actor_rollout_ref.actor.use_kl_loss"])
def test_another_reference_is_refused(tmp_path, term):
    estimator = get_adv_estimator("grpo", config(tmp_path).algorithm, 2, 1)
    keys = ["algorithm.adv_estimator=grpo", "actor_rollout_ref.rollout.n=2"]
    checkpoints = Checkpointing(config(tmp_path, *keys), FakeWorkers(), {"estimator": estimator, "loader": Counter()})
    checkpoints.write(2)
    checkpoints.commit()
    check_resumable(config(tmp_path, *keys, OTHER_MODEL), Loader())
    check_resumable(config(tmp_path, *keys, f"{term}=True"), Loader())
    with pytest.raises(ValueError, match=r"^actor_rollout_ref.model.path=other would be another reference .*is of m; "):
        check_resumable(config(tmp_path, *keys, f"{term}=True", OTHER_MODEL), Loader())


DAMAGES = [
    ("weights_1", truncate, "weights_1 has 0 bytes instead of 1"),
    ("weights_1", flip, "weights_1 is not what was written"),
    ("weights_0", Path.unlink, "weights_0 is missing"),
    ("trainer.pt", lambda path: path.write_bytes(b""), "trainer.pt has 0 bytes instead of"),
    ("trainer.pt", flip, "trainer.pt is not what was written"),
    ("manifest.json", Path.unlink, "it has no manifest.json"),
]


@pytest.mark.parametrize(("name", "damage", "fault"), DAMAGES)
def test_a_damaged_checkpoint_is_passed_over_and_named(tmp_path, capsys, name, damage, fault):
    run(make(tmp_path), [2, 4, 6])
    damage(tmp_path / "checkpoints" / "global_step_6" / name)
    assert resumed(tmp_path) == (4, 4, 4)
    said = capsys.readouterr().out
    assert f"warning: checkpoint {tmp_path}/checkpoints/global_step_6 is damaged ({fault}" in said
    assert f"going on from {tmp_path}/checkpoints/global_step_4; it is kept as global_step_6.damaged" in said
    assert names(tmp_path) == ["global_step_2", "global_step_4", "global_step_6.damaged"]
    # Neither does it pass for the newest one when the older ones are deleted.
    run(make(tmp_path, "trainer.max_actor_ckpt_to_keep=1"), [5])
    assert names(tmp_path) == ["global_step_5", "global_step_6.damaged"]


def test_one_that_was_never_finished_is_named(tmp_path, capsys):
    make(tmp_path).write(1)
    assert resumed(tmp_path) == (0, 0, 0)
    assert "global_step_1.incomplete is not complete" in (said := capsys.readouterr().out) and "first step" in said
    run(make(tmp_path), [2])
    make(tmp_path).write(3)
    assert resumed(tmp_path) == (2, 2, 2)
    said = capsys.readouterr().out
    assert "global_step_3.incomplete is not complete" in said and "global_step_1" not in said


@pytest.mark.parametrize(("name", "damage", "fault"), DAMAGES)
def test_a_run_without_an_undamaged_checkpoint_is_an_error_that_stays_one(tmp_path, name, damage, fault):
    run(make(tmp_path), [2])
    damage(tmp_path / "checkpoints" / "global_step_2" / name)
    for _ in range(2):
        with pytest.raises(ValueError, match=rf"is undamaged \(global_step_2: {fault}.*\): restore one, or start anew"):
            resumed(tmp_path)
    if "weights" not in name or "bytes" in fault or "missing" in fault:  # the driver sees it before workers start
        with pytest.raises(ValueError, match="is undamaged"):
            check_resumable(config(tmp_path), loader=None)


def test_in_the_background_a_checkpoint_has_its_name_when_all_workers_have_written(tmp_path):
    workers = FakeWorkers(behind=1)
    checkpoints = make(tmp_path, "trainer.async_save=True", workers=workers)
    checkpoints.write(1)
    assert workers.in_background
    checkpoints.commit()
    checkpoints.commit()
    assert names(tmp_path) == ["global_step_1.incomplete"]
    workers.behind = 0
    checkpoints.commit()  # polled
    assert names(tmp_path) == ["global_step_1"]
    workers.behind = 2
    checkpoints.write(2)
    checkpoints.write(3)  # waits for the one before
    assert names(tmp_path) == ["global_step_1", "global_step_2", "global_step_3.incomplete"]
    checkpoints.commit(wait=True)  # at the end
    assert names(tmp_path) == ["global_step_1", "global_step_2", "global_step_3"]


def test_a_write_that_fails_is_raised_and_leaves_the_checkpoint_before(tmp_path):
    run(make(tmp_path), [1])
    error = RuntimeError("checkpoint global_step_2.incomplete/actor was not written: no space left")
    with pytest.raises(RuntimeError, match="global_step_2"):
        run(make(tmp_path, workers=FakeWorkers(error=error)), [2])
    assert resumed(tmp_path) == (1, 1, 1)


def test_the_newest_are_kept(tmp_path):
    run(make(tmp_path, "trainer.max_actor_ckpt_to_keep=2"), range(1, 5))
    assert names(tmp_path) == ["global_step_3", "global_step_4"]


def draws() -> tuple[float, float, float]:
    return random.random(), float(np.random.rand()), float(torch.rand(()))  # noqa: NPY002


def test_what_the_driver_draws_continues(tmp_path):
    run(make(tmp_path), [1])
    expected = draws()
    assert draws() != expected
    resumed(tmp_path)
    assert draws() == expected


def test_a_folder_that_nodes_do_not_share_is_refused_at_the_start(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "VISIBLE_AFTER_S", 0.0)
    (tmp_path / "other").mkdir()
    for elsewhere in ("other", "not there"):
        workers = FakeWorkers(elsewhere=tmp_path / elsewhere)
        with pytest.raises(ValueError, match=r"trainer.default_local_dir=.*run is not shared: .* on node-b, or"):
            check_shared(config(tmp_path / "run"), workers)
        assert workers.ended
    assert list((tmp_path / "run").iterdir()) == []


def test_a_shared_folder_is_not_refused_nor_one_that_no_worker_uses(tmp_path):
    workers = FakeWorkers()
    check_shared(config(tmp_path / "run"), workers)
    assert list((tmp_path / "run").iterdir()) == [] and not workers.ended
    check_shared(config(tmp_path / "none", "trainer.save_freq=-1"), FakeWorkers(elsewhere=tmp_path / "not there"))
