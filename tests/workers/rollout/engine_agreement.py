"""What the modules with a real engine check: does vLLM compute what transformers does with the trainer's weights?"""

from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from verl.protocol import DataProto, object_array
from verl.trainer.ppo.generation import expand
from verl.trainer.ppo.ray_trainer import RayPPOTrainer
from verl.utils.timer import Timer
from verl.workers.rollout.base import GenerationOutput, SamplingParams, ignore
from verl.workers.rollout.hf import HFRollout

NEW_TOKENS = 12


def prompts_of(count: int, longest: int = 16, seed: int = 0) -> DataProto:
    """Random prompts of 1 to `longest` byte tokens, as questions with a uid."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, longest + 1, (count,), generator=generator)
    prompts = torch.randint(5, 261, (count, longest), generator=generator)
    names = object_array([f"q{i}" for i in range(count)])
    return DataProto.from_dict({"prompts": prompts, "prompt_length": lengths, "uid": names, "question_id": names})


def engine_output(trainer: RayPPOTrainer, questions: DataProto, params: SamplingParams, n: int = 1) -> GenerationOutput:
    return trainer.rollout.generate(expand(questions, n, seed=1, step=0), params, n, ignore)[0]


def assert_engines_agree(trainer: RayPPOTrainer, folder: Path) -> None:
    """Greedy responses to 200 prompts are equal, and log-probs to 1e-4, with the trainer's weights as they are now."""
    trainer.actor.export(str(folder))
    params = SamplingParams(NEW_TOKENS, greedy=True)
    questions = expand(prompts_of(200), 1, seed=1, step=0)
    vllm = engine_output(trainer, prompts_of(200), params)
    hf_model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    stops = trainer.actor.stop_token_ids()
    hf = HFRollout(hf_model.config, torch.device("cpu"), torch.float32, stops, 0, max_num_seqs=256)
    hf.load_weights(hf_model.named_parameters())
    expected = hf.generate(
        questions["prompts"], questions["prompt_length"], questions["uid"], questions["row_key"].numpy(), params
    )
    torch.testing.assert_close(vllm.lengths, expected.lengths)
    torch.testing.assert_close(vllm.responses, expected.responses)
    torch.testing.assert_close(vllm.log_probs, expected.log_probs, rtol=0, atol=1e-4)


def train_steps(trainer: RayPPOTrainer, count: int) -> list[dict[str, float]]:
    metrics = []
    for _ in range(count):
        trainer.step += 1
        metrics.append(trainer.train_step(Timer())[1])
    return metrics


def weights_of(folder: Path) -> dict[str, np.ndarray]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return {name: tensor.detach().numpy() for name, tensor in model.named_parameters()}
