import pytest
import torch

from tests.trainer.ppo.batches import make_batch
from verl.trainer.config.schema import ActorConfig, AlgorithmConfig, PolicyLossConfig
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
from verl.trainer.ppo.registry import check_policy_loss, one_thread


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


RESPONSES = [[0.0, 1.0], [0.5, 0.0]]


def outcome_of_verls_form(token_level_rewards, response_mask, index, epsilon=1e-6, config=None):
    assert epsilon == 1e-6 and config.adv_estimator == "mine" and len(index) == len(token_level_rewards)
    return token_level_rewards.sum(1)[:, None] * response_mask, token_level_rewards


def with_config_and_kwargs(token_level_rewards, response_mask, config=None, **kwargs):
    assert kwargs.keys() >= {"index", "question_id"} and not kwargs.keys() & {"token_level_rewards", "config"}
    return outcome_of_verls_form(token_level_rewards, response_mask, kwargs["index"], config=config)


def with_kwargs_alone(**kwargs):
    names = ("token_level_rewards", "response_mask", "index", "config")
    return outcome_of_verls_form(**{name: kwargs[name] for name in names})


def in_another_order(index, response_mask, *, config, token_level_rewards):
    return outcome_of_verls_form(token_level_rewards, response_mask, index, config=config)


def of_this_form(token_level_rewards, response_mask, config, index=None):
    return outcome_of_verls_form(token_level_rewards, response_mask, index, config=config)


def with_names_of_its_own(rewards, mask, settings, index):
    return outcome_of_verls_form(rewards, mask, index, config=settings)


@pytest.mark.parametrize(
    "function",
    [outcome_of_verls_form, with_config_and_kwargs, with_kwargs_alone, in_another_order, of_this_form,
     with_names_of_its_own],
)  # fmt: skip
def test_a_function_is_handed_what_it_names_in_any_order(forget, function):
    register_adv_est("mine")(function)
    estimator = get_adv_estimator("mine", AlgorithmConfig("mine"), 2, 1)
    output = estimator(make_batch(RESPONSES, 2))
    # By hand: each response's reward, at its tokens.
    assert output.advantages[:, 0].tolist() == [0.0, 1.0, 0.5, 0.0]
    with pytest.raises(ValueError, match="estimator_kwargs.config: .*takes none"):
        get_adv_estimator("mine", AlgorithmConfig("mine", estimator_kwargs={"config": 1}), 2, 1)


def runtime_error(token_level_rewards, response_mask, config):
    raise RuntimeError("no\nluck")


def missing_argument(token_level_rewards, response_mask, config, gamma):
    return token_level_rewards, token_level_rewards


def mask_under_another_name(response_mask, rewards):
    return rewards, rewards


def one_result(token_level_rewards, response_mask):
    return token_level_rewards


@pytest.mark.parametrize(
    ("function", "found"),
    [
        (runtime_error, "RuntimeError: no luck"),
        (missing_argument, r"TypeError: missing_argument\(\) missing 1 required positional argument: 'gamma'"),
        (mask_under_another_name, r"TypeError: .* missing 1 required positional argument: 'rewards'"),
        (one_result, r"ValueError: too many values to unpack \(expected 2.*"),
    ],
)
def test_whatever_a_function_raises_on_made_up_rewards_is_one_line(forget, function, found):
    register_adv_est("mine")(function)
    form = r"fn\(token_level_rewards, response_mask, config, index=..., ...\)"
    message = rf"^algorithm\.adv_estimator=mine fails on made-up rewards: {found}; its form is {form}$"
    with pytest.raises(ValueError, match=message):
        get_adv_estimator("mine", AlgorithmConfig("mine"), 2, 1)


@pytest.mark.parametrize(
    ("result", "found"),
    [
        (lambda loss: (loss.mean(), {}), r"a loss of shape \(\): .* of shape \(2, 3\), per token"),
        (lambda loss: (loss.sum(1), {}), r"a loss of shape \(2,\)"),
        (lambda loss: (loss, {"mine/clipped": 0.5}), "a mine/clipped of type float"),
        (lambda loss: (loss, loss, loss, loss), "4 values"),
        (lambda loss: loss, "a Tensor"),
    ],
)
def test_a_policy_loss_that_is_not_per_token_is_refused_wherever_it_is_called(forget, result, found):
    @register_policy_loss("mine")
    def mine(old_log_prob, log_prob, advantages, response_mask, config):
        return result(-advantages * log_prob)

    message = rf"^actor_rollout_ref\.actor\.policy_loss\.loss_mode=mine returns {found}"
    rows = torch.zeros(2, 3)
    with pytest.raises(ValueError, match=message):
        get_policy_loss("mine")(rows, rows, rows, rows.bool(), ActorConfig())
    with pytest.raises(ValueError, match=message):
        check_policy_loss(ActorConfig(policy_loss=PolicyLossConfig("mine")))


def test_a_policy_loss_that_raises_is_refused_before_anything_is_loaded(forget):
    @register_policy_loss("mine")
    def mine(old_log_prob, log_prob, advantages):
        return log_prob, {}

    message = (
        r"^actor_.*loss_mode=mine fails on made-up rows: TypeError: .*; its form is fn\(old_log_prob, log_prob, adv"
    )
    with pytest.raises(ValueError, match=message):
        check_policy_loss(ActorConfig(policy_loss=PolicyLossConfig("mine")))


def test_every_policy_loss_passes_the_trial():
    for name in POLICY_LOSSES:
        check_policy_loss(ActorConfig(policy_loss=PolicyLossConfig(name)))


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
