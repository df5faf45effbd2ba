import torch

from verl.trainer.ppo.generation import decode_responses
from verl.utils.tokenizer import load_tokenizer


def test_texts_are_what_the_tokenizer_makes_of_each_response(tiny_model):
    tokenizer = load_tokenizer(str(tiny_model))
    generator = torch.Generator().manual_seed(0)
    responses = torch.randint(len(tokenizer), (20, 9), generator=generator)
    responses[0, 1] = tokenizer.eos_token_id
    mask = torch.arange(9) < torch.randint(0, 10, (20, 1), generator=generator)
    expected = [
        tokenizer.decode(row[kept].tolist(), skip_special_tokens=True)
        for row, kept in zip(responses, mask, strict=True)
    ]
    assert decode_responses(tokenizer, responses, mask) == expected
    tokenizer.clean_up_tokenization_spaces = True  # no effect on byte pairs, but another way
    assert decode_responses(tokenizer, responses, mask) == expected
