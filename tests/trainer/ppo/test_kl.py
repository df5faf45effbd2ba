import pytest
import torch

from verl.trainer.config.schema import KLCtrlConfig
from verl.trainer.ppo.kl import KL_KINDS, apply_kl_penalty, get_kl_controller, kl_penalty


def policies():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 7, generator=generator, dtype=torch.float64)
    return logits[0].log_softmax(-1), logits[1].log_softmax(-1)


@pytest.mark.parametrize("kind", ["kl", "low_var_kl"])
def test_unbiased_estimators_have_the_divergence_as_their_mean(kind):
    policy, ref = policies()
    exact = (policy.exp() * (policy - ref)).sum()
    ours = (policy.exp() * kl_penalty(policy, ref, kind)).sum()
    torch.testing.assert_close(ours, exact, rtol=0, atol=1e-12)


def test_estimators_agree_with_their_formulas():
    policy, ref = policies()
    d = policy - ref
    expected = {"kl": d, "abs": d.abs(), "mse": d**2 / 2, "low_var_kl": torch.exp(-d) + d - 1}
    for kind in KL_KINDS:
        torch.testing.assert_close(kl_penalty(policy, ref, kind), expected[kind], rtol=0, atol=1e-12)
    assert (kl_penalty(policy, ref, "low_var_kl") >= 0).all()
    with pytest.raises(ValueError, match="'k4' is unknown"):
        kl_penalty(policy, ref, "k4")


def test_mse_has_the_gradient_of_the_divergence():
    logits = torch.randn(7, generator=torch.Generator().manual_seed(1), dtype=torch.float64, requires_grad=True)
    _, ref = policies()
    policy = logits.log_softmax(-1)
    (exact,) = torch.autograd.grad((policy.exp() * (policy - ref)).sum(), logits, retain_graph=True)
    (ours,) = torch.autograd.grad((policy.detach().exp() * kl_penalty(policy, ref, "mse")).sum(), logits)
    torch.testing.assert_close(ours, exact, rtol=0, atol=1e-12)


def test_low_variance_estimate_stays_finite():
    far = torch.tensor([1e4, -1e4], requires_grad=True)
    penalty = kl_penalty(far, torch.zeros(2), "low_var_kl")
    penalty.sum().backward()
    assert penalty.isfinite().all() and far.grad.isfinite().all()


def test_penalty_in_the_reward_is_taken_at_response_tokens():
    scores = torch.tensor([[0.0, 1.0, 0.0], [0.0, 0.0, 2.0]])
    log_prob = torch.tensor([[-1.0, -2.0, 77.0], [-0.5, -1.0, -1.5]])
    mask = torch.tensor([[True, True, False], [True, True, True]])
    rewards, mean = apply_kl_penalty(scores, log_prob, torch.full((2, 3), -1.25), mask, 0.1, "kl")
    expected = [[-0.025, 1.075, 0.0], [-0.075, -0.025, 2.025]]
    torch.testing.assert_close(rewards, torch.tensor(expected))
    assert mean == pytest.approx((0.25 - 0.75 + 0.75 + 0.25 - 0.25) / 5)


def test_fixed_controller_stays():
    controller = get_kl_controller(KLCtrlConfig(kl_coef=0.3))
    controller.update(10.0, 1000)
    assert controller.value == 0.3


def test_adaptive_controller_follows_its_target_by_limited_steps():
    controller = get_kl_controller(KLCtrlConfig(type="adaptive", kl_coef=0.5, horizon=1000, target_kl=0.1))
    value = 0.5
    for kl, error in ((0.11, 0.1), (5.0, 0.2), (0.0, -0.2), (0.1, 0.0)):
        controller.update(kl, 50)
        value *= 1 + error * 50 / 1000
        assert controller.value == pytest.approx(value)
    resumed = get_kl_controller(KLCtrlConfig(type="adaptive"))
    resumed.load_state_dict(controller.state_dict())
    assert resumed.value == controller.value


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"type": "linear"}, "type=linear"),
        ({"type": "adaptive", "target_kl": 0.0}, r"target_kl=0\.0"),
        ({"type": "adaptive", "horizon": 0}, "horizon=0"),
    ],
)
def test_meaningless_controllers_are_refused(config, message):
    with pytest.raises(ValueError, match=message):
        get_kl_controller(KLCtrlConfig(**config))
