import itertools
import json
import os
import shutil
from pathlib import Path

import pytest

from verl.utils import checkpoint
from verl.utils.checkpoint import CheckpointFolder, find_fault, missing, record


def write(folder: CheckpointFolder, step: int, text: str = "") -> dict:
    """Files of a checkpoint of `step`, two of them in a folder of their own; returns their records."""
    root = folder.begin(step)
    files = {"trainer.pt": text or f"step {step}", "actor/.metadata": "m", "actor/__0_0.distcp": "weights" * 100}
    (root / "actor").mkdir()
    for name, content in files.items():
        (root / name).write_text(content)
    return {name: record(root / name) for name in files}


def save(folder: CheckpointFolder, step: int, text: str = "") -> Path:
    return folder.commit(step, write(folder, step, text))


def whole(path: Path) -> str | None:
    """What is wrong with a checkpoint, every file read."""
    return find_fault(path, contents_of=["trainer.pt", "actor/.metadata", "actor/__0_0.distcp"])


def test_a_name_means_complete(tmp_path):
    folder = CheckpointFolder(tmp_path / "checkpoints")
    assert folder.steps() == [] and folder.unfinished() == []
    for step in (2, 10, 9):
        assert whole(save(folder, step)) is None
    write(folder, 5)  # never committed: runs were killed here, the first before the others came
    write(folder, 12)
    assert folder.steps() == [10, 9, 2]
    assert folder.unfinished() == [tmp_path / "checkpoints" / "global_step_12.incomplete"]


def test_an_interrupted_save_leaves_nothing_behind_in_the_next(tmp_path):
    folder = CheckpointFolder(tmp_path)
    (folder.begin(3) / "stale").write_text("x")
    save(folder, 3)
    assert sorted(p.name for p in folder.path(3).iterdir()) == ["actor", "manifest.json", "trainer.pt"]


def test_what_another_node_wrote_elsewhere_is_not_committed(tmp_path):
    folder = CheckpointFolder(tmp_path)
    files = write(folder, 3)
    (folder.begin(3) / "trainer.pt").write_text("step 3")
    with pytest.raises(FileNotFoundError, match=r"actor/.metadata is missing; trainer.default_local_dir must be"):
        folder.commit(3, files)
    assert folder.steps() == []


def truncate(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


def empty(file: Path) -> None:
    file.write_bytes(b"")


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    file.write_bytes(content)


@pytest.mark.parametrize(
    ("name", "damage", "fault"),
    [
        ("actor/__0_0.distcp", truncate, "actor/__0_0.distcp has 350 bytes instead of 700"),
        ("actor/__0_0.distcp", flip, "actor/__0_0.distcp is not what was written (its checksum differs)"),
        ("actor/.metadata", Path.unlink, "actor/.metadata is missing"),
        ("actor", shutil.rmtree, "actor/.metadata is missing"),
        ("trainer.pt", empty, "trainer.pt has 0 bytes instead of 6"),
        ("manifest.json", Path.unlink, "it has no manifest.json"),
        ("manifest.json", empty, "its manifest.json cannot be read"),
        ("manifest.json", truncate, "its manifest.json cannot be read"),
    ],
)
def test_damage_is_found_and_named(tmp_path, name, damage, fault):
    path = save(CheckpointFolder(tmp_path), 1)
    assert whole(path) is None
    damage(path / name)
    assert whole(path) == fault


def test_every_flipped_bit_is_found(tmp_path):
    """An altered record in the manifest contradicts its file; flips in its white space do no harm and are not tried."""
    path = save(CheckpointFolder(tmp_path), 1)
    for name in ("trainer.pt", "manifest.json"):
        content = (path / name).read_bytes()
        places = [place for place, byte in enumerate(content) if name == "trainer.pt" or byte in b"0123456789"]
        for place, bit in itertools.product(places, range(8)):
            altered = bytearray(content)
            altered[place] ^= 1 << bit
            (path / name).write_bytes(altered)
            assert whole(path) is not None, (name, place, bit)
        (path / name).write_bytes(content)
    assert whole(path) is None


def test_only_the_files_asked_for_are_looked_at(tmp_path):
    path = save(CheckpointFolder(tmp_path), 1)
    (path / "trainer.pt").unlink()
    assert find_fault(path, ["actor/.metadata"], ["actor/.metadata"]) is None
    assert find_fault(path) == "trainer.pt is missing"


def test_the_newest_are_kept(tmp_path):
    folder = CheckpointFolder(tmp_path)
    for step in (2, 4, 6, 8):
        save(folder, step)
    folder.prune(3)
    assert folder.steps() == [8, 6, 4]
    folder.prune(1)
    assert folder.steps() == [8] and [p.name for p in tmp_path.iterdir()] == ["global_step_8"]


def test_a_damaged_checkpoint_does_not_count_as_kept(tmp_path):
    folder = CheckpointFolder(tmp_path)
    for step in (2, 4, 6):
        save(folder, step)
    (folder.path(6) / "trainer.pt").write_text("")
    folder.prune(1)
    assert folder.steps() == [6, 4]  # the newest complete one stays, the damaged one is nobody's to delete
    aside = folder.put_aside(folder.path(6))
    assert folder.steps() == [4] and (aside / "trainer.pt").is_file()


class Killed(BaseException):
    pass


def kill_at(monkeypatch, number: int) -> None:
    """End the process, as it were, at the `number`-th operation on the file system."""
    calls = itertools.count(1)

    def counted(operation):
        def call(*args, **kwargs):
            if next(calls) == number:
                raise Killed
            return operation(*args, **kwargs)

        return call

    for owner, name in ((os, "fsync"), (Path, "rename"), (Path, "write_text"), (Path, "unlink"), (os, "unlink")):
        monkeypatch.setattr(owner, name, counted(getattr(owner, name)))
    monkeypatch.setattr(os, "rmdir", counted(os.rmdir))


@pytest.mark.parametrize("replaced", [False, True])
def test_killed_at_any_moment_of_a_save_a_whole_checkpoint_is_left_and_the_next_save_works(
    tmp_path, monkeypatch, replaced
):
    """Saves of steps 2, 4 and 6, one kept; the last is killed at its 1st, 2nd, ... operation. `replaced`: there is a
    checkpoint of step 6 already, from before the run went back to step 4."""
    for number in itertools.count(1):
        folder = CheckpointFolder(tmp_path / str(number))
        save(folder, 2)
        save(folder, 4)
        if replaced:
            save(folder, 6, "older")
        kill_at(monkeypatch, number)
        try:
            save(folder, 6)
            folder.prune(1)
            survived = True
        except Killed:
            survived = False
        monkeypatch.undo()
        assert folder.steps() and all(whole(folder.path(step)) is None for step in folder.steps()), number
        assert folder.steps()[0] in (4, 6)
        save(folder, 8)
        folder.prune(1)
        assert folder.steps() == [8] and whole(folder.path(8)) is None
        if survived:
            break
    assert number > 10  # it was killed that often


def test_a_manifest_says_what_it_is(tmp_path):
    path = save(CheckpointFolder(tmp_path), 1)
    # zlib's CRC-32 of "123456789" is 0xCBF43926, the check value of the polynomial's catalogue entry.
    (path / "trainer.pt").write_text("123456789")
    assert record(path / "trainer.pt") == checkpoint.FileRecord(9, 0xCBF43926)
    assert json.loads((path / "manifest.json").read_text())["files"]["actor/.metadata"]["size"] == 1


def test_a_file_that_comes_late_is_waited_for(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint.time, "sleep", lambda seconds: (tmp_path / "late").touch())
    assert missing([tmp_path / "late"]) == []
    monkeypatch.setattr(checkpoint, "VISIBLE_AFTER_S", 0.0)
    assert missing([tmp_path / "late", tmp_path / "never"]) == [tmp_path / "never"]
