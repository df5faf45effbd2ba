import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from data_processing import make_tiny_model

SMALL = ["--hidden-size", "32", "--layers", "2", "--heads", "4", "--kv-heads", "2", "--intermediate-size", "64"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    make_tiny_model.main(["--output-dir", str(path), *SMALL])
    return path


def test_model_loads_with_the_asked_sizes_and_tied_embeddings(folder):
    model = AutoModelForCausalLM.from_pretrained(folder)
    config = model.config
    assert (config.model_type, config.hidden_size, config.num_hidden_layers) == ("qwen2", 32, 2)
    assert (config.num_attention_heads, config.num_key_value_heads, config.intermediate_size) == (4, 2, 64)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert all(p.dtype == torch.float32 for p in model.parameters())


def test_any_text_survives_the_loaded_tokenizer(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for text in ("47+85=", "two  spaces\nand a line", "é ∑ 你好 \t", " leading and trailing "):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert tokenizer.decode(ids) == text
        assert len(ids) == len(text.encode())


def test_chat_template_writes_roles_and_ends_answers(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    messages = [{"role": "user", "content": "1+1="}]
    asked = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert asked == "<|user|>1+1=<|assistant|>"
    answered = [*messages, {"role": "assistant", "content": "20 #2"}]
    assert tokenizer.apply_chat_template(answered, tokenize=False) == asked + "20 #2<|end|>"
    ids = tokenizer(asked, add_special_tokens=False)["input_ids"]
    assert len(ids) == len("1+1=") + 2


def test_model_tokenizer_and_generation_agree_on_special_tokens(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    for config in (model.config, model.generation_config):
        assert (config.pad_token_id, config.eos_token_id) == (tokenizer.pad_token_id, tokenizer.eos_token_id)
    assert len(tokenizer) <= model.config.vocab_size


def test_equal_seeds_give_equal_weights_and_leave_the_global_generator_alone():
    tokenizer = make_tiny_model.build_tokenizer()
    state = torch.random.get_rng_state()
    one, again, other = (make_tiny_model.build_model(tokenizer, 32, 1, 2, 1, 32, seed=s) for s in (1, 1, 2))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), again.parameters(), strict=True))
    assert not torch.equal(one.lm_head.weight, other.lm_head.weight)


@pytest.mark.parametrize(
    ("options", "named"),
    [(["--hidden-size", "100"], "--hidden-size"), (["--kv-heads", "3"], "--kv-heads"), (["--layers", "0"], "--layers")],
)
def test_impossible_sizes_are_refused_by_name(tmp_path, options, named):
    with pytest.raises(ValueError, match=f"^{named} is .*: give"):
        make_tiny_model.main(["--output-dir", str(tmp_path), *options])
