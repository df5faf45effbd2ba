"""The presets of recipes/evaluation compose, and read the files that the data scripts write."""

import re
from pathlib import Path

import pytest

from data_processing.download_dapomath import SETS
from verl.trainer.config import load_config
from verl.trainer.config.evaluation_schema import EvalConfig, GenerationConfig
from verl.trainer.main_generation import check
from verl.utils import reward_score

FOLDER = Path(__file__).parents[2] / "recipes" / "evaluation"
SUITES = ("hard_math", "easy_math", "livecodebench")


def commands(module: str) -> list[list[str]]:
    """The words after `python -m module` of each command in the README."""
    text = (FOLDER / "README.md").read_text().replace("\\\n", " ")
    return [line.split() for line in re.findall(rf"^python -m {re.escape(module)} (.*)$", text, re.MULTILINE)]


def overrides(words: list[str]) -> list[str]:
    return [word for word in words if "=" in word]


@pytest.mark.parametrize("suite", SUITES)
def test_the_readme_has_the_commands_of_each_suite(suite):
    [command] = [words for words in commands("verl.trainer.main_generation") if suite in words]
    config = load_config(overrides(command), GenerationConfig, suite, FOLDER)
    check(config)
    assert config.rollout.name == "vllm" and (config.rollout.temperature, config.rollout.top_p) == (0.6, 0.95)
    output = config.data.output_path
    [scoring] = [words for words in commands("verl.trainer.main_eval") if f"data.path={output}" in words]
    load_config(overrides(scoring), EvalConfig, "evaluation")


def test_the_files_are_those_of_the_data_scripts():
    def files(suite: str) -> list[str]:
        config = load_config(["model.path=m", "data.output_path=o"], GenerationConfig, suite, FOLDER)
        return [config.data.path] if isinstance(config.data.path, str) else list(config.data.path)

    test_sets = {name: output for name, output in SETS.items() if name != "dapo-math-17k"}
    assert files("hard_math") == [f"data/dapomath/{name}.parquet" for name in test_sets]
    for output in test_sets.values():
        reward_score.check_data_source(output.data_source)
    written = (FOLDER.parents[1] / "docs" / "data.md").read_text()
    for file in [*files("easy_math"), *files("livecodebench")]:
        assert f"`{Path(file).stem}`" in written
