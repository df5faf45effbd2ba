"""The presets of recipes/evaluation compose, read the files that the data scripts write, and one is run."""

import json
import re
from pathlib import Path

import pytest

from data_processing import download_dapomath
from data_processing.download_dapomath import SETS
from tests.data_processing import copies
from verl.trainer import main_eval, main_generation
from verl.trainer.config import load_config
from verl.trainer.config.evaluation_schema import EvalConfig, GenerationConfig
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
    main_generation.check(config)
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


# Samples and scores the six test sets.
@pytest.mark.slow
def test_the_hard_maths_suite_runs_on_files_in_the_published_schema(tiny_model, tmp_path, monkeypatch):
    copies.aime_2024(tmp_path / "copies")
    copies.hard_sets(tmp_path / "copies")
    monkeypatch.chdir(tmp_path)  # the preset's files are relative to the repository
    sets = [name for name in SETS if name != "dapo-math-17k"]
    download_dapomath.main(["--output-dir", "data/dapomath", "--source", "copies", "--sets", *sets])
    [command] = [words for words in commands("verl.trainer.main_generation") if "hard_math" in words]
    small = ["data.n_samples=2", "rollout.response_length=16", "rollout.name=hf"]
    local = ["trainer.worker_group=local", "trainer.n_gpus_per_node=1", "trainer.device=cpu"]
    words = [*overrides(command), f"model.path={tiny_model}", *small, *local]
    main_generation.run(main_generation.build(load_config(words, GenerationConfig, "hard_math", FOLDER)))
    [scoring] = [words for words in commands("verl.trainer.main_eval") if "hard_math" in words[0]]
    main_eval.run(main_eval.build(load_config(overrides(scoring), EvalConfig, "evaluation")))
    report = json.loads((tmp_path / "outputs" / "evaluation" / "hard_math.json").read_text())
    assert set(report["data_sources"]) == {SETS[name].data_source for name in sets}
    for name in sets:
        questions = len(copies.read(tmp_path / "data" / "dapomath" / f"{name}.parquet"))
        assert report["data_sources"][SETS[name].data_source]["questions"] == questions
