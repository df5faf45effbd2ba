"""Every key of the schema is read by the code, documented, and there are not too many."""

import ast
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from verl.single_controller.worker_group import WorkerGroupConfig
from verl.trainer.config.document import config_markdown
from verl.trainer.config.evaluation_schema import EvalConfig, GenerationConfig
from verl.trainer.config.schema import PPOConfig, leaf_keys
from verl.trainer.config.sft_schema import SFTConfig

ROOT = Path(__file__).parents[3]


def without_keys(source: str) -> str:
    """A schema file whose sections have lost their keys (but not their sub-sections)."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef):
            node.body = [statement for statement in node.body if not is_key(statement)] or [ast.Pass()]
    return ast.unparse(tree)


def is_key(statement: ast.stmt) -> bool:
    call = statement.value if isinstance(statement, ast.AnnAssign) else None
    return isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id == "key"


@pytest.mark.slow  # a run of mypy over the package
def test_every_key_is_read_by_the_code(tmp_path):
    """Without its key, every place that reads one is a type error: a key without an error is read nowhere.

    Reading by name (`getattr(section, name)`) does not count, so validating a key is not enough.
    """
    shutil.copytree(ROOT / "verl", tmp_path / "verl", ignore=shutil.ignore_patterns("__pycache__"))
    keys = {}
    for file in ("schema.py", "sft_schema.py", "evaluation_schema.py"):
        path = tmp_path / "verl" / "trainer" / "config" / file
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ClassDef):
                keys |= {(node.name, s.target.id): file for s in node.body if is_key(s)}
        path.write_text(without_keys(path.read_text()))
    command = [sys.executable, "-m", "mypy", "--no-site-packages", "--ignore-missing-imports", "--check-untyped-defs"]
    command += ["--cache-dir", str(tmp_path / "cache"), "-p", "verl"]
    output = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True).stdout
    read = set(re.findall(r'"(\w+)" has no attribute "(\w+)"', output))
    assert len(read) > 50, output
    # What takes any section with certain keys reads those keys.
    for name in re.findall(r'incompatible type "(\w+)"; expected "WorkerGroupConfig"', output):
        read |= {(name, member) for member in WorkerGroupConfig.__annotations__}
    # The published estimator takes a dictionary as well as a configuration: it reads by name, through `option`.
    published = (ROOT / "verl/trainer/ppo/published_riskpo.py").read_text()
    read |= {("AlgorithmConfig", name) for name in re.findall(r'option\("(\w+)"', published)}
    unread = sorted(keys.keys() - read)
    assert not unread, f"keys that nothing reads: {unread}"


def test_the_documentation_is_up_to_date():
    written = (ROOT / "docs" / "config.md").read_text()
    assert written == config_markdown(), "run `python -m verl.trainer.config.document`"


def test_every_key_has_a_description_and_there_are_at_most_160():
    for schema in (PPOConfig, SFTConfig, GenerationConfig, EvalConfig):
        for name, field in leaf_keys(schema).items():
            assert field.metadata["help"].endswith((".", ")", ";")), name
    assert len(leaf_keys(PPOConfig)) <= 160
