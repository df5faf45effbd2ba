import pytest
import torch

from tests.trainer.ppo.batches import make_batch
from verl.trainer.config.schema import AlgorithmConfig
from verl.trainer.ppo.core_algos import (
    ADV_ESTIMATORS,
    POLICY_LOSSES,
    AdvantageEstimator,
    AdvantageOutput,
    get_adv_estimator,
    get_policy_loss,
    register_adv_est,
    register_policy_loss,
)
from verl.trainer.ppo.registry import one_thread


@pytest.fixture
def forget():
    """Registrations of a test are undone."""
    before = dict(ADV_ESTIMATORS), dict(POLICY_LOSSES)
    yield
    for registry, content in zip((ADV_ESTIMATORS, POLICY_LOSSES), before, strict=True):
        registry.clear()
        registry.update(content)


def test_a_plain_function_is_handed_the_columns_it_names(forget):
    seen = {}

    @register_adv_est("mine")
    def mine(token_level_rewards, response_mask, config, index=None, old_log_probs=None):
        seen.update(config=config, index=index, old_log_probs=old_log_probs)
        return torch.ones_like(token_level_rewards), 2 * torch.ones_like(token_level_rewards)

    batch = make_batch([[0.0, 1.0]], 1, lengths=[1, 3]).with_columns(old_log_probs=torch.zeros(2, 3))
    config = AlgorithmConfig()
    output = get_adv_estimator("mine", config, 2, 1)(batch)
    assert seen["config"] is config and (seen["index"] == batch["uid"]).all() and seen["old_log_probs"].shape == (2, 3)
    assert output.advantages.dtype == torch.float32 and output.advantages.tolist() == [[1, 0, 0], [1, 1, 1]]
    assert output.returns.tolist() == [[2, 0, 0], [2, 2, 2]] and output.metrics == {}


def test_a_plain_function_with_kwargs_is_handed_all_optional_columns_there_are(forget):
    seen = {}

    @register_adv_est("mine")
    def mine(token_level_rewards, response_mask, config, index=None, **kwargs):
        seen.update(kwargs)
        return token_level_rewards, token_level_rewards

    estimator = get_adv_estimator("mine", AlgorithmConfig(), 2, 1)
    seen.clear()
    estimator(make_batch([[0.0, 1.0]], 1))
    assert seen.keys() == {"bundle_uid", "sample_index", "question_id"}


def test_a_functions_own_parameters_come_from_the_configuration(forget):
    seen = []

    @register_adv_est("mine")
    def mine(token_level_rewards, response_mask, config, index=None, *, sharpness=1.0, old_log_probs=None):
        seen.append(sharpness)
        return token_level_rewards, token_level_rewards

    get_adv_estimator("mine", AlgorithmConfig("mine", estimator_kwargs={"sharpness": 3.0}), 2, 1)
    assert seen == [3.0]
    for unknown in ("sharp", "old_log_probs", "config"):
        message = rf"^algorithm\.estimator_kwargs\.{unknown}: algorithm\.adv_estimator=mine takes sharpness$"
        with pytest.raises(ValueError, match=message):
            get_adv_estimator("mine", AlgorithmConfig("mine", estimator_kwargs={unknown: 3.0}), 2, 1)
    with pytest.raises(ValueError, match=r"estimator_kwargs\.k: algorithm\.adv_estimator=riskpo takes none"):
        get_adv_estimator("riskpo", AlgorithmConfig(estimator_kwargs={"k": 3}), 2, 1)


def test_a_function_that_cannot_work_fails_before_anything_is_sampled(forget):
    @register_adv_est("one_each")
    def one_each(token_level_rewards, response_mask, config, index=None):
        return token_level_rewards.sum(1), token_level_rewards

    with pytest.raises(ValueError, match=r"one_each gives advantages of shape \(8,\) for rewards of shape \(8, 2\)"):
        get_adv_estimator("one_each", AlgorithmConfig("one_each"), 4, 1)


def test_a_class_is_built_with_its_configuration(forget):
    @register_adv_est("mine")
    class Mine(AdvantageEstimator):
        needs_critic = True

        def __call__(self, batch):
            return AdvantageOutput(batch["token_level_rewards"], batch["token_level_rewards"])

    estimator = get_adv_estimator("mine", AlgorithmConfig(gamma=0.5), 7, 3)
    assert isinstance(estimator, Mine) and estimator.needs_critic and not estimator.needs_bundles
    assert (estimator.config.gamma, estimator.rollout_n, estimator.seed) == (0.5, 7, 3)
    estimator.load_state_dict(estimator.state_dict())
    with pytest.raises(ValueError, match="has no state"):
        estimator.load_state_dict({"tracker": 1})


def test_unknown_names_are_refused_with_the_nearest():
    with pytest.raises(ValueError, match=r"algorithm\.adv_estimator=risk_po is not registered; did you mean riskpo"):
        get_adv_estimator("risk_po", AlgorithmConfig(), 8, 1)
    with pytest.raises(ValueError, match=r"policy_loss\.loss_mode=vanila .*vanilla"):
        get_policy_loss("vanila")


def test_a_name_is_given_once(forget):
    with pytest.raises(ValueError, match="'grpo' is registered already"):
        register_adv_est("grpo")(lambda: None)
    with pytest.raises(ValueError, match="'vanilla' is registered already"):
        register_policy_loss("vanilla")(lambda: None)
    with pytest.raises(ValueError, match="must be a function or an AdvantageEstimator"):
        register_adv_est("mine")(dict)


def test_every_method_of_the_comparison_is_registered():
    estimators = "riskpo grpo_bundle_RVaR_quantile_tracking grpo dr_grpo rloo reinforce_plus_plus remax opo gae gpg qae"
    estimators += " reinforce_plus_plus_baseline rs_grpo grpo_passk passk_training"
    assert set(estimators.split()) <= ADV_ESTIMATORS.keys()
    assert {"vanilla", "gspo", "gmpo", "clip_cov", "kl_cov", "cispo", "gpg"} <= POLICY_LOSSES.keys()


def test_one_thread_restores_the_number_of_threads():
    before = torch.get_num_threads()
    with pytest.raises(RuntimeError), one_thread():
        assert torch.get_num_threads() == 1
        raise RuntimeError
    assert torch.get_num_threads() == before
