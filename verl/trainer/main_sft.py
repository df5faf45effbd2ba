"""`python -m verl.trainer.main_sft key=value ...`: supervised fine-tuning on prompts and responses."""

import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from verl.single_controller.worker_group import WorkerGroup, create_worker_group
from verl.trainer.cli import run_cli
from verl.trainer.config.sft_schema import SFTConfig
from verl.utils.dataset.sft_dataset import SFTDataset
from verl.utils.run_folder import LOCK, RunLock
from verl.utils.tokenizer import load_tokenizer
from verl.workers.sft import SFTWorker


@dataclass
class SFTTrainer:
    config: SFTConfig
    data: SFTDataset
    workers: WorkerGroup
    lock: RunLock

    def fit(self) -> None:
        """Train for `trainer.total_training_steps` and write the model."""
        trainer, size = self.config.trainer, self.config.data.train_batch_size
        self.workers.init_model()
        start, losses = time.perf_counter(), []
        for step in range(1, trainer.total_training_steps + 1):
            losses.append(self.workers.step(self.data.batch(self._indices(step, size)))[0]["loss"])
            if step % trainer.log_freq == 0 or step == trainer.total_training_steps:
                seconds = (time.perf_counter() - start) / len(losses)
                print(f"sft step {step}: loss {np.mean(losses):.4f}, {seconds:.3f} s/step", flush=True)
                start, losses = time.perf_counter(), []
        self.workers.export(trainer.default_local_dir)
        print(f"model written to {trainer.default_local_dir}")

    def _indices(self, step: int, size: int) -> np.ndarray:
        """The demonstrations of a step: epoch after epoch, each in an order of its own."""
        positions = np.arange((step - 1) * size, step * size)
        epochs = (positions // len(self.data)).tolist()
        orders = {
            e: np.random.default_rng([self.config.trainer.seed, e]).permutation(len(self.data)) for e in set(epochs)
        }
        return np.array([orders[e][p % len(self.data)] for e, p in zip(epochs, positions, strict=True)])


def build(config: SFTConfig) -> SFTTrainer:
    """Everything up to the first step. Raises ValueError for what the user can mend."""
    data, trainer = config.data, config.trainer
    if data.max_token_len_per_gpu < data.max_prompt_length + data.max_response_length:
        raise ValueError(
            f"data.max_token_len_per_gpu={data.max_token_len_per_gpu} is less than one sequence "
            "(data.max_prompt_length + data.max_response_length): raise it"
        )
    tokenizer = load_tokenizer(config.model.path, "model.path")
    dataset = SFTDataset(data.train_files, tokenizer, data.max_prompt_length, data.max_response_length)
    folder = trainer.default_local_dir
    lock = RunLock(Path(folder) / LOCK, f"trainer.default_local_dir={folder}", "set another trainer.default_local_dir")
    try:
        return SFTTrainer(config, dataset, create_worker_group(trainer, SFTWorker, config), lock)
    except BaseException:
        lock.release()
        raise


def run(trainer: SFTTrainer) -> None:
    try:
        trainer.fit()
    finally:
        trainer.workers.shutdown()
        trainer.lock.release()


if __name__ == "__main__":
    sys.exit(run_cli(build, run, SFTConfig, "sft_trainer"))
