import pytest

from verl.trainer.config import ConfigError, load_config

REQUIRED = ["data.train_files=a.parquet", "data.val_files=[b.parquet,c.parquet]", "actor_rollout_ref.model.path=m"]


def test_overrides_become_a_typed_configuration():
    config = load_config([*REQUIRED, "data.train_batch_size=8", "actor_rollout_ref.actor.optim.lr=1e-4"])
    assert config.data.train_batch_size == 8 and config.data.val_files == ["b.parquet", "c.parquet"]
    assert config.actor_rollout_ref.actor.optim.lr == 1e-4
    assert config.actor_rollout_ref.actor.clip_ratio_c == 3.0  # the schema's default


def test_keys_follow_others_unless_set():
    config = load_config([*REQUIRED, "actor_rollout_ref.actor.ppo_max_token_len_per_gpu=99", "trainer.seed=7"])
    assert config.actor_rollout_ref.rollout.log_prob_max_token_len_per_gpu == 99
    assert config.data.seed == 7
    config = load_config([*REQUIRED, "actor_rollout_ref.ref.log_prob_max_token_len_per_gpu=5"])
    assert config.actor_rollout_ref.ref.log_prob_max_token_len_per_gpu == 5


def test_plus_prefixes_are_allowed_and_change_nothing():
    for prefix in ("", "+", "++"):
        assert load_config([*REQUIRED, f"{prefix}trainer.nnodes=2"]).trainer.nnodes == 2


def test_free_dictionaries_take_any_entry():
    config = load_config([*REQUIRED, "+custom_reward_function.reward_kwargs.weights.length=0.5"])
    assert config.custom_reward_function.reward_kwargs == {"weights": {"length": 0.5}}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.train_batch_sise=4", "unknown key data.train_batch_sise; did you mean data.train_batch_size"),
        ("+data.train_batch_sise=4", "unknown key data.train_batch_sise; did you mean data.train_batch_size"),
        ("actor_rollout_ref.lr=1", "unknown key actor_rollout_ref.lr; did you mean actor_rollout_ref.actor.optim.lr?"),
        ("algorithm.risk=1", "unknown key algorithm.risk: it is a section; its keys are algorithm.risk.alpha"),
        ("data.train_batch_size=many", "data.train_batch_size: Value 'many' .* could not be converted to Integer"),
        ("trainer.logger=console", "trainer.logger: .*; give a list: trainer.logger=\\[console\\]$"),
        ("+trainer.plugins=a/my.py", "trainer.plugins: .*; give a list: trainer.plugins=\\[a/my.py\\]$"),
        ("data.train_weights=0.5", "data.train_weights: .*; give a list: data.train_weights=\\[0.5\\]$"),
        ("~trainer.seed", "'~trainer.seed' is not of the form key=value"),
        ("~trainer.seed=1", "~trainer.seed: keys cannot be deleted"),
        ("trainer.seed", "'trainer.seed' is not of the form key=value"),
        ("trainer.seed=[1", "cannot be read"),
    ],
)
def test_a_bad_override_is_one_line_that_names_the_key(override, message):
    with pytest.raises(ConfigError, match=message) as caught:
        load_config([*REQUIRED, override])
    assert "\n" not in str(caught.value)


def test_a_preset_is_checked_like_an_override(tmp_path):
    (tmp_path / "bare.yaml").write_text("trainer:\n  nnodes: 2\n")
    with pytest.raises(ConfigError, match="bare.yaml does not start from the schema"):
        load_config(REQUIRED, preset="bare", preset_dir=tmp_path)
    (tmp_path / "typo.yaml").write_text("defaults: [schema, _self_]\ntrainer:\n  nodes: 2\n")
    with pytest.raises(ConfigError, match="preset typo: unknown key trainer.nodes; did you mean trainer.nnodes"):
        load_config(REQUIRED, preset="typo", preset_dir=tmp_path)


def test_missing_keys_and_presets_are_named():
    with pytest.raises(ConfigError, match="data.train_files is required: add data.train_files=..."):
        load_config([o for o in REQUIRED if "train_files" not in o])
    with pytest.raises(ConfigError, match="--config-name=nope: no such preset .*; there are .*quickstart"):
        load_config(REQUIRED, preset="nope")
