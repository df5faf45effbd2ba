"""Generated folders that are made once: a manifest says what they were made from."""

import json
from pathlib import Path
from typing import Any

NAME = "manifest.json"


def is_made(folder: Path, arguments: dict[str, Any]) -> bool:
    """Whether `folder` was made from equal `arguments` (JSON values), completely, and its files have their sizes."""
    path = folder / NAME
    if not path.exists():
        return False
    manifest = json.loads(path.read_text())
    return manifest["arguments"] == json.loads(json.dumps(arguments)) and all(
        (folder / name).is_file() and (folder / name).stat().st_size == size for name, size in manifest["bytes"].items()
    )


def begin(folder: Path) -> None:
    """Make `folder` and take an older manifest away, so that an interrupted run does not look complete."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / NAME).unlink(missing_ok=True)


def finish(folder: Path, arguments: dict[str, Any], files: list[str]) -> None:
    """Write the manifest, last of all."""
    manifest = {"arguments": arguments, "bytes": {name: (folder / name).stat().st_size for name in files}}
    (folder / NAME).write_text(json.dumps(manifest, indent=2) + "\n")
