"""The worker of supervised fine-tuning."""

from pathlib import Path

import torch

from verl.protocol import DataProto
from verl.single_controller.dispatch import Dispatch, register
from verl.single_controller.worker import Worker
from verl.trainer.config.sft_schema import SFTConfig
from verl.utils.tokenizer import load_tokenizer
from verl.workers import engine_checkpoint
from verl.workers.fsdp_engine import EngineSettings, FSDPEngine
from verl.workers.model import ScoringModel, load_language_model
from verl.workers.sequences import MicroBatchSpec, dummy_row, micro_batches


class SFTWorker(Worker):
    """Maximises the log-probability of the responses, averaged over the tokens of each batch."""

    def __init__(self, config: SFTConfig) -> None:
        self.config = config

    @register(Dispatch.ALL)
    def init_model(self) -> None:
        config = self.config
        self.tokenizer = load_tokenizer(config.model.path, "model.path")
        self.engine = FSDPEngine(
            ScoringModel(load_language_model(config.model.path, config.model.use_remove_padding)),
            self.device,
            config.optim,
            config.trainer.total_training_steps,
            EngineSettings(
                config.grad_clip, config.model.enable_gradient_checkpointing, packed=config.model.use_remove_padding
            ),
        )

    @register(Dispatch.ROWS)
    def step(self, data: DataProto) -> dict[str, float]:
        """One optimizer step on the batch; every worker returns the metrics of all: loss (nats per token) and so on."""
        data, _ = self.engine.rows_of_group(data)
        tokens = float(self.engine.sum_over_workers(data["response_mask"].sum().double()))
        loss_sum = torch.zeros((), dtype=torch.float64)
        spec = MicroBatchSpec(None, self.config.data.max_token_len_per_gpu)
        for rows in micro_batches(data, spec, self.engine.layout):
            micro = data.select_rows(rows) if len(rows) else dummy_row(data)
            log_prob, _ = self.engine.forward(micro, temperature=1.0)
            mask = (micro["response_mask"] & (len(rows) > 0)).to(self.engine.device)
            loss = -(log_prob * mask).sum() / tokens
            self.engine.backward(loss)
            loss_sum += loss.detach().cpu()
        return {"loss": float(self.engine.sum_over_workers(loss_sum))} | self.engine.step()

    @register(Dispatch.ALL)
    def export(self, folder: str) -> None:
        """Write the model as a Hugging Face folder."""
        engine_checkpoint.export(self.engine, Path(folder), self.tokenizer)
