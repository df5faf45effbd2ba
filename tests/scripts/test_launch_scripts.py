"""The run_*.sh scripts: their headers, and the very files on a tiny model and small copies of the data."""

import re
import subprocess
from pathlib import Path

import pytest

from tests.scripts.launches import SCRIPTS, SMALL, environment, make_data, sizes, steps
from verl.workers.reward.outcomes import FAILURES

RUNS = sorted(SCRIPTS.glob("run_*.sh"))


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return make_data(tmp_path_factory.mktemp("data"))


def header(script: Path) -> str:
    return re.match(r"(#.*\n)+", script.read_text()).group()


def test_the_papers_three_runs_and_what_they_are_compared_with_have_a_script():
    riskpo = ["MVaR_dapomath", "MVaR_math", "risky_MVaR_math"]
    others = ["dapo_dapomath", "dapo_math", "grpo_dapomath", "grpo_math"]
    assert [s.name for s in RUNS] == [f"run_qwen2.5_1.5b_{run}.sh" for run in sorted(riskpo + others)]


@pytest.mark.parametrize("script", sorted(SCRIPTS.glob("*.sh")), ids=lambda path: path.stem)
def test_scripts_are_valid_bash(script):
    assert subprocess.run(["bash", "-n", script], capture_output=True, text=True).stderr == ""


@pytest.mark.parametrize("script", RUNS, ids=lambda path: path.stem)
def test_headers_name_the_paper_and_the_published_script(script):
    text = header(script)
    assert "arXiv" in text and "paper's" in text and "published" in text and "MODEL, DATA, GPUS, NODES" in text


@pytest.mark.parametrize("script", RUNS, ids=lambda path: path.stem)
def test_headers_say_whose_settings_they_are_the_hardware_and_the_hours(script):
    text = " ".join(header(script).replace("#", "").split())
    parts = ["no multiples of 5", "Hardware: ", " hours on H100", "an estimate (recipes/README.md), not measured"]
    if "MVaR" in script.name:
        parts += ["arXiv 2510.00911", "SETTINGS=published the published script's", "SETTINGS=paper the paper's"]
    for part in parts:
        assert part in text, part


def test_data_that_is_not_there_is_named_with_the_command_that_makes_it(tmp_path):
    script = SCRIPTS / "run_qwen2.5_1.5b_grpo_math.sh"
    result = subprocess.run(
        ["bash", script], env=environment(DATA=str(tmp_path)), capture_output=True, text=True, cwd=tmp_path
    )
    assert result.returncode == 2 and result.stdout == ""
    command = f"python data_processing/download_easymath.py --output-dir {tmp_path}"
    assert result.stderr == f"error: there are no parquet files in DATA={tmp_path}; make them with {command}\n"


# Each starts an interpreter and trains two steps. SETTINGS=exact is run in test_start_ray.py.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("run", "data_set", "variables", "overrides"),
    [
        ("MVaR_dapomath", "dapomath", {}, []),
        ("MVaR_math", "easymath", {}, ["reward_model.num_workers=2"]),
        ("risky_MVaR_math", "easymath", {}, []),
        ("risky_MVaR_math", "easymath", {"SETTINGS": "paper"}, []),
        ("grpo_math", "easymath", {}, []),
        ("grpo_dapomath", "dapomath", {}, []),
        ("dapo_math", "easymath", {}, []),
        ("dapo_dapomath", "dapomath", {}, []),
    ],
)
def test_a_script_trains_offline_on_data_in_the_published_schema(
    run, data_set, variables, overrides, data, tiny_model, tmp_path
):
    overlong = ["reward_model.reward_kwargs.overlong_buffer_cfg.len=4"] if run.startswith("dapo") else []
    local = ["trainer.worker_group=local", "actor_rollout_ref.rollout.tensor_model_parallel_size=1"]
    run_dir = f"trainer.default_local_dir={tmp_path}"
    variables = environment(MODEL=str(tiny_model), DATA=str(data / data_set), GPUS="1", **variables)
    small = [*SMALL, *sizes(data_set), *overlong, *local, *overrides, run_dir]
    command = ["bash", SCRIPTS / f"run_qwen2.5_1.5b_{run}.sh", *small]
    result = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-2000:]
    logged = steps(tmp_path)
    assert [step["step"] for step in logged] == [1, 2]
    assert all(step["actor/grad_norm"] > 0 for step in logged)
    failures = [f"reward/{kind}" for kind in FAILURES]
    assert [step[name] for step in logged for name in failures] == [0] * 2 * len(failures)
    assert (tmp_path / "checkpoints" / "global_step_2" / "huggingface").is_dir()
