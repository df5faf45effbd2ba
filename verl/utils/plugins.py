"""Python files of the user's own: estimators, policy losses, reward managers, data set classes."""

import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

from verl.utils.random import hash_key


def load_plugins(files: Sequence[str]) -> None:
    """Import each of `trainer.plugins`; the driver and every worker do. Errors as `import_file`'s."""
    for file in files:
        import_file(file, "trainer.plugins")


def import_file(file: str, key: str) -> ModuleType:
    """The module in `file`, imported once per process. Raises ValueError, naming the configuration key, for a file that
    is missing or cannot be imported."""
    path = Path(file).resolve()
    name = f"verl_plugin_{path.stem}_{hash_key(path) & 0xFFFFFFFF:x}"
    if name in sys.modules:
        return sys.modules[name]
    if path.suffix != ".py" or not path.is_file():
        raise ValueError(f"{key}: {file} is not a Python file")
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None  # it ends in .py
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # importing a user's file may raise anything
        del sys.modules[name]
        message = " ".join(str(error).split())
        raise ValueError(f"{key}: importing {file} raised {type(error).__name__}: {message}") from error
    return module
