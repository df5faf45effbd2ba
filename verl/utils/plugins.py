"""Python files of the user's own, imported by the driver and by every worker: estimators, policy losses."""

import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path

from verl.utils.random import hash_key


def load_plugins(files: Sequence[str]) -> None:
    """Import each file once per process. Raises ValueError for one that is missing or cannot be imported."""
    for file in files:
        path = Path(file).resolve()
        name = f"verl_plugin_{path.stem}_{hash_key(path) & 0xFFFFFFFF:x}"
        if name in sys.modules:
            continue
        if path.suffix != ".py" or not path.is_file():
            raise ValueError(f"trainer.plugins: {file} is not a Python file")
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None and spec.loader is not None  # it ends in .py
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        try:
            spec.loader.exec_module(module)
        except Exception as error:  # importing a user's file may raise anything
            del sys.modules[name]
            message = " ".join(str(error).split())
            raise ValueError(f"trainer.plugins: importing {file} raised {type(error).__name__}: {message}") from error
