import pytest

from verl.utils.plugins import load_plugins


def test_a_plugin_is_imported_once(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(f"open({str(tmp_path / 'log')!r}, 'a').write('x')\n")
    load_plugins([str(file)])
    load_plugins([str(file), str(file)])
    assert (tmp_path / "log").read_text() == "x"


def test_a_plugin_that_cannot_be_imported_is_named(tmp_path):
    file = tmp_path / "broken.py"
    file.write_text("import no_such_module_anywhere\n")
    with pytest.raises(ValueError, match="trainer.plugins: importing .*broken.py raised ModuleNotFoundError"):
        load_plugins([str(file)])
    with pytest.raises(ValueError, match="trainer.plugins: .*missing.py is not a Python file"):
        load_plugins([str(tmp_path / "missing.py")])
