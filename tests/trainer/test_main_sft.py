"""Supervised fine-tuning: its loss is the mean negative log-probability, it learns, and its folder loads."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from verl.trainer.config import load_config
from verl.trainer.config.sft_schema import SFTConfig
from verl.trainer.main_sft import build, run


def config(data, model, folder, *extra: str) -> SFTConfig:
    return load_config(
        [
            f"model.path={model}",
            f"data.train_files={data}/sft.parquet",
            "data.train_batch_size=16",
            "data.max_prompt_length=16",
            "data.max_response_length=32",
            "data.max_token_len_per_gpu=200",
            "optim.lr=3e-3",
            "trainer.device=cpu",
            "trainer.total_training_steps=30",
            "trainer.log_freq=10",
            f"trainer.default_local_dir={folder}",
            *extra,
        ],
        SFTConfig,
        "sft_trainer",
    )


@torch.no_grad()
def reference_loss(model_path, batch) -> float:
    """Mean negative log-probability of the response tokens by a float64 loop over rows."""
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float64)
    total, tokens = 0.0, 0
    for row in range(len(batch)):
        prompt = batch["prompts"][row, batch["prompts"].shape[1] - int(batch["prompt_length"][row]) :]
        response = batch["responses"][row, : int(batch["response_mask"][row].sum())]
        log_p = torch.log_softmax(model(torch.cat([prompt, response])[None]).logits[0], -1)
        total -= float(log_p[len(prompt) - 1 : -1].gather(1, response[:, None]).sum())
        tokens += len(response)
    return total / tokens


def test_the_loss_is_the_mean_over_tokens(arithmetic_data, tiny_model, tmp_path):
    trainer = build(config(arithmetic_data, tiny_model, tmp_path))
    trainer.workers.init_model()
    batch = trainer.data.batch(range(16))
    assert trainer.workers.step(batch)[0]["loss"] == pytest.approx(reference_loss(tiny_model, batch), rel=1e-5)
    trainer.workers.shutdown()


def test_a_folder_that_is_in_use_is_refused(arithmetic_data, tiny_model, tmp_path):
    trainer = build(config(arithmetic_data, tiny_model, tmp_path, "trainer.total_training_steps=1"))
    with pytest.raises(ValueError, match="trainer.default_local_dir=.*in use by another run"):
        build(config(arithmetic_data, tiny_model, tmp_path))
    run(trainer)
    build(config(arithmetic_data, tiny_model, tmp_path)).workers.shutdown()


def test_it_learns_and_writes_a_folder_that_loads(arithmetic_data, tiny_model, tmp_path, capsys):
    run(build(config(arithmetic_data, tiny_model, tmp_path)))
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("sft step")]
    losses = [float(line.split("loss ")[1].split(",")[0]) for line in lines]
    assert len(losses) == 3 and losses[2] < losses[0] - 0.5
    trained = dict(AutoModelForCausalLM.from_pretrained(tmp_path).named_parameters())
    start = dict(AutoModelForCausalLM.from_pretrained(tiny_model).named_parameters())
    assert trained.keys() == start.keys() and not torch.equal(*(d["model.norm.weight"] for d in (trained, start)))


def test_a_budget_below_one_sequence_is_refused(arithmetic_data, tiny_model, tmp_path):
    with pytest.raises(ValueError, match="data.max_token_len_per_gpu=40 is less than one sequence"):
        build(config(arithmetic_data, tiny_model, tmp_path, "data.max_token_len_per_gpu=40"))
