"""What cannot work is refused before anything is loaded, by a line that names the key, its value and the remedy."""

import pytest

from verl.trainer.config import ConfigError, load_config
from verl.trainer.config.validate import validate

BASE = [
    "data.train_files=a.parquet", "data.val_files=b.parquet", "actor_rollout_ref.model.path=m",
    "data.train_batch_size=60", "actor_rollout_ref.actor.ppo_mini_batch_size=30", "actor_rollout_ref.rollout.n=8",
    "trainer.n_gpus_per_node=2", "algorithm.bundle_size=5",
]  # fmt: skip


def test_a_sound_configuration_passes():
    validate(load_config(BASE))
    validate(load_config([*BASE, "algorithm.adv_estimator=gae", "trainer.critic_warmup=5"]))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["algorithm.bundle_size=7"], "bundle_size.*7"),
        (["algorithm.bundle_size=100"], "bundle_size"),
        (["actor_rollout_ref.actor.ppo_mini_batch_size=25"], "mini_batch_size=25 does not divide .*=60: use 20 or 30"),
        (
            ["actor_rollout_ref.actor.ppo_mini_batch_size=1", "actor_rollout_ref.rollout.n=1",
             "algorithm.adv_estimator=reinforce_plus_plus"],
            "a mini-batch has 1 row .* for 2 training workers",
        ),
        (["actor_rollout_ref.actor.ppo_max_token_len_per_gpu=1000"], "less than one sequence of 1024 tokens"),
        (["algorithm.risk.alpha=0.9"], "algorithm.risk"),
        (["algorithm.risk.beta=1.5"], "algorithm.risk.beta=1.5"),
        (["algorithm.risk.omega=-1"], "algorithm.risk.omega=-1"),
        (["algorithm.risk.pairing=exactly"], "algorithm.risk.pairing=exactly"),
        (["algorithm.adv_estimator=riskop"], "algorithm.adv_estimator=riskop is not registered; did you mean riskpo"),
        (["trainer.critic_warmup=5"], "critic_warmup=5: algorithm.adv_estimator=riskpo has no critic; set it to 0"),
        (
            ["algorithm.adv_estimator=gae", "trainer.critic_warmup=5", "algorithm.rollout_correction.bypass_mode=True"],
            "critic_warmup=5 with .*bypass_mode=True",
        ),
        (["trainer.critic_warmup=-1"], "trainer.critic_warmup=-1 must be 0 or more"),
        (["algorithm.adv_estimator=gae", "critic.cliprange_value=0"], "critic.cliprange_value=0.0 must be greater"),
        (["algorithm.adv_estimator=grpo", "actor_rollout_ref.rollout.n=1"], "rollout.n must be at least 2"),
        (["actor_rollout_ref.actor.policy_loss.loss_mode=ppo"], "loss_mode=ppo is not registered"),
        (["actor_rollout_ref.actor.loss_agg_mode=mean"], "loss_agg_mode=mean: use one of token-mean"),
        (["actor_rollout_ref.rollout.temperature=0"], "rollout.temperature=0.* must be greater than 0"),
        (["actor_rollout_ref.rollout.val_kwargs.n=4"], "greedy responses are all the same"),
        (["actor_rollout_ref.rollout.top_p=0"], "rollout.top_p=0.0 must be in"),
        (["actor_rollout_ref.rollout.name=sglang"], "rollout.name=sglang: use one of hf"),
        (["actor_rollout_ref.rollout.val_kwargs.temperature=-1"], "val_kwargs.temperature=-1.0 must be 0 or more"),
        (["actor_rollout_ref.actor.clip_ratio_c=1"], "clip_ratio_c=1.0 must be greater than 1"),
        (["algorithm.adv_estimator=passk_training", "algorithm.estimator_kwargs.k=64"], "kwargs.k=64 must be .*n=8"),
        (["data.gen_batch_size=30"], "data.gen_batch_size=30 has a meaning under algorithm.filter_groups.enable=True"),
        (
            ["reward_model.reward_manager=dapo", "reward_model.reward_kwargs.overlong_buffer_cfg.enable=True"],
            "overlong_buffer_cfg.len=0 must be in 1..data.max_response_length=512",
        ),
        (
            ["reward_model.reward_kwargs.overlong_buffer_cfg.enable=True"],
            "has no effect under reward_model.reward_manager=naive: set reward_model.reward_manager=dapo",
        ),
        (["reward_model.reward_manager=prime"], "reward_model.reward_manager=prime is not registered; did you mean"),
        (["data.train_weights=[1,1]"], r"train_weights is \[1.0, 1.0\], data.train_files has 1 file: give one weight"),
        (["data.train_files=[a,b]", "data.train_weights=[1,-1]"], r"\[1.0, -1.0\]: give weights of 0 or more"),
        (["data.train_files=[a,b]", "data.train_weights=[1,nan]"], r"\[1.0, nan\]: give weights of 0 or more"),
        (["data.train_files=[a,b]", "data.train_weights=[0,0]"], "one of them must be above 0; null takes every row"),
        (["trainer.logger=[consol]"], "trainer.logger has 'consol'; there are console"),
        (["algorithm.kl_ctrl.type=linear"], "algorithm.kl_ctrl.type=linear"),
        (["trainer.save_freq=0"], "trainer.save_freq=0 must be -1 or 1 or more$"),
        (["trainer.test_freq=0"], "trainer.test_freq=0 must be -1 or 1 or more$"),
        (["trainer.test_freq=-2"], "trainer.test_freq=-2 must be -1 or 1 or more$"),
        (["trainer.total_training_steps=0"], "trainer.total_training_steps=0 must be greater than 0"),
    ],
)  # fmt: skip
def test_what_cannot_work_is_refused(overrides, message):
    with pytest.raises(ConfigError, match=message) as caught:
        validate(load_config([*BASE, *overrides]))
    assert "\n" not in str(caught.value)
