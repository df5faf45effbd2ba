import pytest

from verl.utils.checkpoint import CheckpointFolder


def save(folder: CheckpointFolder, step: int) -> None:
    (folder.begin(step) / "trainer.pt").write_text(str(step))
    folder.commit(step)


def test_the_newest_complete_checkpoint_is_found(tmp_path):
    folder = CheckpointFolder(tmp_path / "checkpoints")
    assert folder.newest() is None
    for step in (2, 10, 9):
        save(folder, step)
    assert folder.newest() == tmp_path / "checkpoints" / "global_step_10"
    (folder.begin(12) / "trainer.pt").write_text("half")  # never committed: the run was killed
    assert folder.newest() == tmp_path / "checkpoints" / "global_step_10"


def test_a_checkpoint_that_lacks_a_part_is_not_committed(tmp_path):
    folder = CheckpointFolder(tmp_path)
    (folder.begin(3) / "trainer.pt").write_text("x")
    with pytest.raises(FileNotFoundError, match="has no actor/.metadata after saving: trainer.default_local_dir"):
        folder.commit(3, required=("trainer.pt", "actor/.metadata"))
    assert folder.newest() is None


def test_checkpoints_are_set_aside_for_a_run_started_anew(tmp_path, capsys):
    folder = CheckpointFolder(tmp_path / "checkpoints")
    folder.set_aside()
    assert capsys.readouterr().out == ""
    for number in (1, 2):
        save(folder, 4)
        folder.set_aside()
        assert folder.newest() is None
        assert (tmp_path / f"checkpoints.before_{number}" / "global_step_4").is_dir()


def test_an_interrupted_save_leaves_nothing_behind_in_the_next(tmp_path):
    folder = CheckpointFolder(tmp_path)
    (folder.begin(3) / "stale").write_text("x")
    save(folder, 3)
    assert sorted(p.name for p in folder.path(3).iterdir()) == ["trainer.pt"]
