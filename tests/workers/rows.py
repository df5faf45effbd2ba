"""Random rows for the tests of updates."""

import torch

N, P, T = 12, 5, 7  # rows, longest prompt, longest response


def random_rows(generator: torch.Generator) -> dict[str, torch.Tensor]:
    """The columns from which a model computes, of one mini-batch: prompts padded on the left, responses of 1 to T."""
    prompt_length = torch.randint(1, P + 1, (N,), generator=generator)
    response_length = torch.randint(1, T + 1, (N,), generator=generator)
    prompts = torch.randint(5, 60, (N, P), generator=generator)
    return {
        "prompts": prompts * (torch.arange(P) >= P - prompt_length[:, None]),
        "prompt_length": prompt_length,
        "responses": torch.randint(5, 60, (N, T), generator=generator),
        "response_mask": torch.arange(T) < response_length[:, None],
        "mini_batch": torch.zeros(N, dtype=torch.int64),
    }
