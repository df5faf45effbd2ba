"""The presets of recipes/: valid at full size, and the published numbers one by one."""

from dataclasses import asdict
from pathlib import Path

import pytest
from transformers import Qwen2Config

from verl.trainer.config import PPOConfig, load_config
from verl.trainer.config.validate import validate, value_of
from verl.trainer.main_ppo import check_context_length, check_sequence_parallel
from verl.trainer.ppo.checkpointing import changed_keys
from verl.workers.rollout.vllm_checks import check_lengths, check_parallel

RECIPES = Path(__file__).parents[2] / "recipes"
SETTINGS = ("published", "paper", "exact")
RUNS = [f"riskpo/{settings}/{run}" for settings in SETTINGS for run in ("math", "dapomath", "risky_math")]
RUNS += [f"{algorithm}/{task}" for algorithm in ("grpo", "dapo") for task in ("math", "dapomath")]

ACTOR, ROLLOUT = "actor_rollout_ref.actor", "actor_rollout_ref.rollout"
PUBLISHED = {
    "algorithm.adv_estimator": "grpo_bundle_RVaR_quantile_tracking",
    "algorithm.bundle_size": 5,
    "algorithm.quantile_down": 0.2,
    "algorithm.lr_q": 0.1,
    "algorithm.use_kl_in_reward": False,
    f"{ACTOR}.use_kl_loss": False,
    f"{ACTOR}.optim.lr": 1e-6,
    f"{ACTOR}.clip_ratio_low": 0.2,
    f"{ACTOR}.clip_ratio_high": 0.2,
    f"{ACTOR}.entropy_coeff": 0,
    f"{ACTOR}.policy_loss.loss_mode": "vanilla",
    f"{ROLLOUT}.name": "vllm",
    f"{ROLLOUT}.tensor_model_parallel_size": 2,
    "actor_rollout_ref.model.use_remove_padding": True,
    "actor_rollout_ref.model.enable_gradient_checkpointing": True,
    "data.max_prompt_length": 1024,
    "trainer.nnodes": 1,
    "trainer.test_freq": 5,
    "trainer.save_freq": 10,
}
DAPOMATH = PUBLISHED | {
    "algorithm.quantile_up": 0.8,
    "algorithm.credit_assign_mode": "sum-mean",
    "algorithm.use_mixing_risk_measure": True,
    "algorithm.w_mix": 1.5,
    "algorithm.natural_baseline_adv": False,
    "actor_rollout_ref.model.path": "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B",
    "data.train_files": ["data/dapo-math-17k.parquet"],
    "data.train_batch_size": 500,  # 512, rounded to a multiple of 5
    f"{ACTOR}.ppo_mini_batch_size": 125,  # 128, likewise
    f"{ROLLOUT}.n": 10,
    "data.max_response_length": 3072,
    f"{ACTOR}.ulysses_sequence_parallel_size": 4,
    f"{ACTOR}.fsdp_config.param_offload": True,
    "trainer.n_gpus_per_node": 8,
    "trainer.total_training_steps": 500,
}
MATH = PUBLISHED | {
    "algorithm.quantile_up": 0.9,
    "algorithm.credit_assign_mode": "std",
    "algorithm.use_mixing_risk_measure": True,
    "algorithm.w_mix": 1.5,
    "actor_rollout_ref.model.path": "Qwen/Qwen2.5-1.5B-Instruct",
    "data.train_files": ["data/math_train.parquet", "data/gsm8k_train.parquet"],
    "data.train_batch_size": 1000,  # 1024
    f"{ACTOR}.ppo_mini_batch_size": 500,  # 512
    f"{ROLLOUT}.n": 5,
    "data.max_response_length": 1024,
    "trainer.n_gpus_per_node": 4,
    "trainer.total_training_steps": 200,
}
RISKY = MATH | {
    "algorithm.quantile_up": 0.8,
    "algorithm.use_mixing_risk_measure": False,
    "algorithm.risk_seeking_upper_tail": True,
    "algorithm.upper_weight": 1.5,
}
PAPER = {
    "algorithm.adv_estimator": "riskpo",
    "algorithm.bundle_size": 5,
    "algorithm.risk.alpha": 0.2,
    "algorithm.risk.beta": 0.8,
    "algorithm.risk.omega": 0.5,
}


@pytest.fixture(autouse=True)
def data_folder(monkeypatch):
    monkeypatch.setenv("DATA", "data")


def preset(name: str, *overrides: str) -> PPOConfig:
    return load_config(list(overrides), preset=name, preset_dir=RECIPES)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """The configuration of a model with the sizes of Qwen2.5-1.5B."""
    folder = tmp_path_factory.mktemp("qwen")
    sizes = {"hidden_size": 1536, "num_hidden_layers": 28, "num_attention_heads": 12, "num_key_value_heads": 2}
    Qwen2Config(**sizes, max_position_embeddings=32768).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", RUNS)
def test_every_preset_passes_the_checks_at_full_size_on_4_and_8_gpus(name, model):
    config = preset(name, f"actor_rollout_ref.model.path={model}")
    for config.trainer.n_gpus_per_node in (4, 8):
        validate(config)
        check_context_length(config, str(model))
        check_sequence_parallel(config)
        check_parallel(config, "cuda")
        check_lengths(config, "cuda")


def test_the_list_above_is_complete():
    parts = {"base", "estimator"}
    files = {p for folder in ("riskpo", "grpo", "dapo") for p in (RECIPES / folder).rglob("*.yaml")}
    assert sorted(RUNS) == sorted(str(p.relative_to(RECIPES).with_suffix("")) for p in files if p.stem not in parts)


@pytest.mark.parametrize(("run", "expected"), [("dapomath", DAPOMATH), ("math", MATH), ("risky_math", RISKY)])
def test_the_published_settings(run, expected):
    config = preset(f"riskpo/published/{run}")
    assert {key: value_of(config, key) for key in expected} == expected


@pytest.mark.parametrize("settings", ["paper", "exact"])
def test_the_papers_settings(settings):
    for run in ("math", "dapomath", "risky_math"):
        config = preset(f"riskpo/{settings}/{run}")
        assert {key: value_of(config, key) for key in PAPER} == PAPER
        assert config.algorithm.risk.region_weights == ([0.0, 1.0, 1.5] if run == "risky_math" else None)


@pytest.mark.parametrize(("run", "workers"), [("math", 4), ("dapomath", 2)])  # data-parallel: 4, and 8 by fours
def test_batches_divide_by_bundles_mini_batches_and_workers(run, workers):
    config = preset(f"riskpo/published/{run}")
    questions, mini = config.data.train_batch_size, config.actor_rollout_ref.actor.ppo_mini_batch_size
    assert questions % 5 == mini % 5 == questions % mini == 0
    assert mini * config.actor_rollout_ref.rollout.n % workers == 0


def test_the_published_batch_can_be_had_under_the_published_estimator_alone():
    batch = ["data.train_batch_size=1024", "actor_rollout_ref.actor.ppo_mini_batch_size=512"]
    validate(preset("riskpo/published/math", *batch))
    with pytest.raises(ValueError, match="data.train_batch_size=1024 is not a multiple of algorithm.bundle_size=5"):
        validate(preset("riskpo/paper/math", *batch))


@pytest.mark.parametrize("task", ["math", "dapomath"])
@pytest.mark.parametrize("other", ["riskpo/paper", "riskpo/exact", "grpo", "dapo"])
def test_runs_on_the_same_data_differ_in_the_algorithm_alone(task, other):
    names = changed_keys(asdict(preset(f"riskpo/published/{task}")), asdict(preset(f"{other}/{task}")))
    of_the_loss = [f"{ACTOR}.{key}" for key in ("policy_loss.", "loss_agg_mode", "clip_ratio_")]
    of_the_run = ["trainer.experiment_name", "trainer.default_local_dir"]
    assert names
    assert [n for n in names if not n.startswith(("algorithm.", "reward_model.", *of_the_loss, *of_the_run))] == []


def test_an_unknown_preset_is_refused_with_those_there_are():
    with pytest.raises(ValueError, match="there are base, dapo/dapomath, .*riskpo/published/math"):
        preset("riskpo/papers/math")
