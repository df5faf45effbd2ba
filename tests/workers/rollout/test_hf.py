import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from verl.utils.random import row_keys
from verl.workers.rollout.base import SamplingParams
from verl.workers.rollout.hf import HFRollout, sample


@pytest.fixture(scope="module")
def model(tiny_model):
    return AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval()


# Many tokens end a response, so that the rows of a random model end at different times.
EOS = list(range(1, 264, 20))


def rollout(model, max_num_seqs: int = 64) -> HFRollout:
    engine = HFRollout(model.config, torch.device("cpu"), torch.float32, EOS, 0, max_num_seqs)
    engine.load_weights(model.named_parameters())
    return engine


def prompts(n_questions: int, n: int) -> tuple[torch.Tensor, torch.Tensor, np.ndarray, np.ndarray]:
    """Questions of 3 to 6 tokens, each `n` times, with their ids and keys."""
    generator = torch.Generator().manual_seed(3)
    length = torch.randint(3, 7, (n_questions,), generator=generator)
    tokens = torch.randint(5, 60, (n_questions, 6), generator=generator)
    tokens[torch.arange(6) < 6 - length[:, None]] = 0
    uid = np.repeat([f"q{i}" for i in range(n_questions)], n)
    keys = row_keys(1, 1, uid.tolist(), (np.arange(n_questions * n) % n).tolist())
    return tokens.repeat_interleave(n, 0), length.repeat_interleave(n, 0), uid, keys


def real_log_probs(model, ids, length, output, row: int, temperature: float = 1.0) -> torch.Tensor:
    """Log-probabilities of one response by a plain forward pass over the unpadded row."""
    prompt = ids[row, ids.shape[1] - int(length[row]) :]
    response = output.responses[row, : output.lengths[row]]
    with torch.no_grad():
        logits = model(torch.cat([prompt, response])[None]).logits[0] / temperature
    log_p = torch.log_softmax(logits, -1)[len(prompt) - 1 : -1]
    return log_p.gather(1, response[:, None]).squeeze(1)


def test_greedy_responses_equal_those_of_transformers(model):
    ids, length, uid, keys = prompts(20, 1)
    output = rollout(model).generate(ids, length, uid, keys, SamplingParams(24, greedy=True))
    for row in range(20):
        prompt = ids[row : row + 1, 6 - int(length[row]) :]
        expected = model.generate(
            prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=24, eos_token_id=EOS,
            pad_token_id=0,
        )[0, prompt.shape[1] :]  # fmt: skip
        assert output.responses[row, : output.lengths[row]].tolist() == expected.tolist()


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_probs_are_those_of_a_plain_forward_pass(model, temperature):
    ids, length, uid, keys = prompts(10, 4)
    params = SamplingParams(24, temperature=temperature)
    output = rollout(model).generate(ids, length, uid, keys, params)
    assert len(set(output.lengths.tolist())) > 3, "rows must end at different times for the test to mean anything"
    for row in range(40):
        expected = real_log_probs(model, ids, length, output, row, temperature)
        torch.testing.assert_close(output.log_probs[row, : output.lengths[row]], expected, rtol=0, atol=1e-5)
        assert (output.log_probs[row, output.lengths[row] :] == 0).all()


def test_a_response_ends_with_its_first_stop_token(model):
    ids, length, uid, keys = prompts(10, 4)
    output = rollout(model).generate(ids, length, uid, keys, SamplingParams(24))
    for response, n in zip(output.responses.tolist(), output.lengths.tolist(), strict=True):
        assert 1 <= n <= 24
        assert not set(response[: n - 1]) & set(EOS)
        assert n == 24 or response[n - 1] in EOS
        assert response[n:] == [0] * (24 - n)


def test_draws_do_not_depend_on_batch_order_or_group_size(model):
    ids, length, uid, keys = prompts(12, 4)
    params = SamplingParams(24)
    whole = rollout(model).generate(ids, length, uid, keys, params)
    order = np.random.default_rng(0).permutation(48)[:30]
    index = torch.from_numpy(order)
    part = rollout(model, max_num_seqs=7).generate(ids[index], length[index], uid[order], keys[order], params)
    assert torch.equal(part.responses, whole.responses[index])
    torch.testing.assert_close(part.log_probs, whole.log_probs[index], rtol=0, atol=1e-5)


def test_samples_follow_the_distribution():
    logits = torch.tensor([[2.0, 0.0, 1.0, -1.0]]).expand(20000, 4)
    keys = torch.from_numpy(row_keys(0, 0, [str(i) for i in range(20000)], [0] * 20000))
    for params, kept in (
        (SamplingParams(1), [0, 1, 2, 3]),
        (SamplingParams(1, temperature=0.5), [0, 1, 2, 3]),
        (SamplingParams(1, top_k=2), [0, 2]),
        (SamplingParams(1, top_p=0.7), [0, 2]),  # 0.64 < 0.7 <= 0.64 + 0.24
        (SamplingParams(1, top_p=0.6), [0]),
    ):
        weights = torch.zeros(4, dtype=torch.float64)
        weights[kept] = torch.exp(logits[0, kept].double() / params.temperature)
        p = weights / weights.sum()
        token, log_prob = sample(logits, keys, 0, params)
        counts = torch.bincount(token, minlength=4)
        assert (counts[p == 0] == 0).all()
        torch.testing.assert_close(counts / 20000, p.float(), rtol=0, atol=4 * 0.5 / 20000**0.5)
        torch.testing.assert_close(log_prob, p.log().float()[token], rtol=0, atol=1e-6)


def test_missing_weights_are_named(model):
    parameters = dict(model.named_parameters())
    parameters.pop("model.norm.weight")
    with pytest.raises(ValueError, match="no weights for model.norm.weight"):
        rollout(model).load_weights(parameters.items())
