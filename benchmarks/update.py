"""The policy update of a model of 1.5 billion random parameters: tokens/s, MFU, peak memory; the result is JSON.

    python benchmarks/update.py [--rows N] [--prompt P] [--response T] [--budget TOKENS] [--steps N] [--output FILE]
                                [--layers L --hidden H ...] [key=value ...]

One worker in this process, on the GPU (a CPU takes small shapes alone). The model has Qwen2.5-1.5B's shape; rows are
full, no prompt occurs twice, and a step is one mini-batch. `key=value` overrides the training configuration, as in
`actor_rollout_ref.actor.use_torch_compile=True`. MFU counts, per token, 6 operations for each parameter of the layers
and of the head, and causal attention; recomputation is not counted (`verl/utils/flops.py`). It is given over the
datasheet's peak, and over what a large matrix product reaches in the same run.
"""

import argparse
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from transformers import AutoModelForCausalLM, Qwen2Config

sys.path.append(str(Path(__file__).resolve().parents[1]))  # run as a script, it finds only its own folder

from benchmarks.report import machine, write_report
from verl.protocol import DataProto
from verl.single_controller.dispatch import Dispatch, register
from verl.single_controller.worker import Worker
from verl.single_controller.worker_group import LocalWorkerGroup
from verl.trainer.config import PPOConfig, load_config
from verl.utils.device import compute_dtype
from verl.utils.flops import matrix_parameters, peak_flops, training_flops
from verl.workers.attention import use_packed_attention
from verl.workers.fsdp_engine import EngineSettings, FSDPEngine
from verl.workers.kernels import use_kernels
from verl.workers.model import ScoringModel
from verl.workers.policy_update import PolicyUpdate
from verl.workers.sequences import sequence_lengths

MATRIX = 8192  # side of the product that shows what the device reaches


class UpdateWorker(Worker):
    """A policy with random weights, and its update."""

    def __init__(self, config: PPOConfig, model_config: Qwen2Config) -> None:
        self.config = config.actor_rollout_ref
        self.model_config = model_config

    @register(Dispatch.ALL)
    def init_model(self) -> None:
        torch.manual_seed(0)
        lm = AutoModelForCausalLM.from_config(self.model_config, dtype=torch.float32)
        if self.config.model.use_remove_padding:
            use_packed_attention(lm, "random weights")
        use_kernels(lm, self.config, self.device)
        settings = EngineSettings.of_actor(self.config)
        engine = FSDPEngine(ScoringModel(lm), self.device, self.config.actor.optim, settings=settings)
        self.update = PolicyUpdate(engine, self.config.actor, temperature=1.0)

    @register(Dispatch.ALL)
    def time_update(self, data: DataProto) -> float:
        """Seconds of one update."""
        _synchronize(self.device)
        start = time.perf_counter()
        self.update(data)
        _synchronize(self.device)
        return time.perf_counter() - start


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def make_batch(rows: int, prompt: int, response: int, vocabulary: int) -> DataProto:
    """Full rows of random tokens with random advantages; old log-probs are those of the update's own pass."""
    generator = torch.Generator().manual_seed(0)
    return DataProto.from_dict(
        {
            "prompts": torch.randint(vocabulary, (rows, prompt), generator=generator),
            "prompt_length": torch.full((rows,), prompt),
            "responses": torch.randint(vocabulary, (rows, response), generator=generator),
            "response_mask": torch.ones(rows, response, dtype=torch.bool),
            "advantages": torch.randn(rows, 1, generator=generator).expand(rows, response).contiguous(),
            "mini_batch": torch.zeros(rows, dtype=torch.int64),
        },
        {"n_mini_batches": 1, "with_entropy": True},
    )


@torch.no_grad()
def matrix_flops(device: torch.device, side: int) -> float:
    """FLOP/s of a product of two square matrices in the compute dtype, the best of 10."""
    a = torch.randn(side, side, device=device, dtype=compute_dtype(device))
    best = float("inf")
    for _ in range(10):
        _synchronize(device)
        start = time.perf_counter()
        a @ a
        _synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 2 * side**3 / best


def measure(options: argparse.Namespace) -> dict[str, Any]:
    config: PPOConfig = load_config(
        [
            "data.train_files=none",
            "data.val_files=none",
            "actor_rollout_ref.model.path=none",
            f"actor_rollout_ref.actor.ppo_max_token_len_per_gpu={options.budget}",
            *options.overrides,
        ]
    )
    model_config = Qwen2Config(
        hidden_size=options.hidden,
        num_hidden_layers=options.layers,
        num_attention_heads=options.heads,
        num_key_value_heads=options.kv_heads,
        intermediate_size=options.intermediate,
        vocab_size=options.vocabulary,
        max_position_embeddings=options.prompt + options.response,
        tie_word_embeddings=True,
    )
    batch = make_batch(options.rows, options.prompt, options.response, options.vocabulary)
    with LocalWorkerGroup(UpdateWorker, (config, model_config)) as workers:
        device = workers.worker.device
        workers.init_model()
        workers.time_update(batch)  # compiles, allocates
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        seconds = [workers.time_update(batch)[0] for _ in range(options.steps)]
        memory = torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else None
    lengths, parameters = sequence_lengths(batch), matrix_parameters(model_config)
    operations = float(training_flops(model_config, parameters, lengths).sum())
    rate = operations / median(seconds)
    peak, reached = peak_flops(device), matrix_flops(device, MATRIX if device.type == "cuda" else 512)
    return {
        "machine": machine() | {"device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"},
        "matrix_parameters": parameters,
        "tokens": int(lengths.sum()),
        "operations": operations,
        "sequence": options.prompt + options.response,
        "budget": options.budget,
        "overrides": options.overrides,
        "seconds": [round(s, 4) for s in seconds],
        "tokens_per_s": round(lengths.sum() / median(seconds)),
        "tflops": round(rate / 1e12, 2),
        "mfu": None if peak is None else round(rate / peak, 4),
        "share_of_matrix_product": round(rate / reached, 4),
        "matrix_product_tflops": round(reached / 1e12, 1),
        "peak_memory_gib": None if memory is None else round(memory, 1),
    }


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (
        ("rows", 32),
        ("prompt", 1024),
        ("response", 3072),
        ("budget", 16384),
        ("steps", 5),
        ("layers", 28),
        ("hidden", 1536),
        ("heads", 12),
        ("kv-heads", 2),
        ("intermediate", 8960),
        ("vocabulary", 151_936),
    ):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--output", type=Path, help="a file for the JSON, which is printed otherwise")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="of the training configuration")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available() and options.layers * options.hidden > 4096:
        parser.error("this shape needs a GPU; on a CPU try --layers 2 --hidden 64 --intermediate 128 --vocabulary 512")
    write_report(measure(options), options.output)


if __name__ == "__main__":
    main()
