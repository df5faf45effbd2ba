"""A file written in parts: it goes on where it stopped, under the same settings only, and is never half there."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from verl.trainer.evaluation import parts
from verl.trainer.evaluation.parts import PartedFile, read_settings

SETTINGS = {"model.path": "/m", "data.path": ["a.parquet"], "rollout.temperature": 0.6}


def table(part: int) -> pa.Table:
    return pa.table({"question": [2 * part, 2 * part + 1], "responses": [["a", "b"], ["c", str(part)]]})


def begun(path, n_parts=3, settings=SETTINGS) -> PartedFile:
    file = PartedFile(path, settings, n_parts)
    file.begin()
    return file


def test_parts_become_one_file_with_its_settings(tmp_path):
    path = tmp_path / "new" / "out.parquet"
    file = begun(path)
    for part in (2, 0, 1):  # in any order
        assert not file.finished and part in file.missing()
        file.write(part, table(part))
    file.finish()
    assert file.finished and pq.read_table(path).to_pylist() == [row for p in range(3) for row in table(p).to_pylist()]
    assert read_settings(path) == SETTINGS
    assert [p.name for p in path.parent.iterdir()] == ["out.parquet"]
    assert PartedFile(path, SETTINGS, 3).finished


def test_what_is_there_is_kept(tmp_path):
    path = tmp_path / "out.parquet"
    begun(path).write(1, table(1))
    assert begun(path).missing() == [0, 2]


def test_a_part_that_was_being_written_is_not_there(tmp_path, monkeypatch):
    path = tmp_path / "out.parquet"
    file = begun(path)

    def killed(where, schema):
        where.write_bytes(b"PAR1 half of a fi")
        raise KeyboardInterrupt

    monkeypatch.setattr(parts.pq, "ParquetWriter", killed)
    with pytest.raises(KeyboardInterrupt):
        file.write(0, table(0))
    monkeypatch.undo()
    again = begun(path)
    assert again.missing() == [0, 1, 2]
    for part in again.missing():
        again.write(part, table(part))
    again.finish()
    assert len(pq.read_table(path)) == 6


def test_row_groups_are_bounded_by_bytes_not_by_rows(tmp_path, monkeypatch):
    """Text below a struct of which a row group holds more than 2 GiB cannot be read."""
    monkeypatch.setattr(parts, "GROUP_BYTES", 10_000)
    sizes = [3000] * 9 + [50_000] + [10] * 30
    rows = [{"reward_model": {"ground_truth": "x" * size}, "responses": [str(i)]} for i, size in enumerate(sizes)]
    file = begun(tmp_path / "out.parquet", n_parts=2)
    file.write(0, pa.Table.from_pylist(rows[:35]))
    file.write(1, pa.Table.from_pylist(rows[35:]))
    written = pq.ParquetFile(parts.parts_folder(file.path) / "part_00000.parquet")
    assert written.metadata.num_row_groups > 4
    file.finish()
    joined = pq.ParquetFile(file.path)
    groups = [joined.read_row_group(i) for i in range(joined.num_row_groups)]
    assert len(groups) == written.metadata.num_row_groups + 1
    assert all(group.nbytes <= 10_000 or len(group) == 1 for group in groups)
    assert sum(len(group) == 1 for group in groups) < 5 and pq.read_table(file.path).to_pylist() == rows


@pytest.mark.parametrize("finished", [False, True])
def test_other_settings_are_refused_and_named(tmp_path, finished):
    path = tmp_path / "out.parquet"
    file = begun(path, n_parts=1)
    file.write(0, table(0))
    if finished:
        file.finish()
    what = path if finished else parts.parts_folder(path)
    with pytest.raises(ValueError, match=rf"other settings: rollout.temperature was 0.6, is 1.0; .* or delete {what}$"):
        PartedFile(path, {**SETTINGS, "rollout.temperature": 1.0}, 1)
    with pytest.raises(ValueError, match=r"data.path was \['a.parquet'\], is \['b.parquet'\]; rollout.top_p was None"):
        PartedFile(path, {**SETTINGS, "data.path": ["b.parquet"], "rollout.top_p": 1.0}, 1)


def test_a_file_of_another_origin_is_not_overwritten(tmp_path):
    path = tmp_path / "mine.parquet"
    pq.write_table(table(0), path)
    with pytest.raises(ValueError, match="mine.parquet is a file of another origin"):
        PartedFile(path, SETTINGS, 1)
