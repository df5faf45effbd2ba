"""The training engine: a causal language model sharded by FSDP2, its optimizer, and its checkpoints.

Every method is a collective: all workers of the group call it together.
"""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_optimizer_state_dict, set_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils.logging import disable_progress_bar

from verl.protocol import DataProto
from verl.trainer.config.schema import OptimConfig
from verl.utils.device import compute_dtype
from verl.utils.torch_functional import log_prob_and_entropy
from verl.workers.lr_schedule import lr_schedule
from verl.workers.sequences import MicroBatchSpec, Sequences, dummy_row, micro_batches


class ScoringModel(nn.Module):
    """A causal language model whose forward pass gives log-probabilities and entropies of response tokens.

    The language-model head is applied here, a chunk at a time, rather than outside: FSDP2 gathers the head's weight for
    the forward and the backward pass of the module it wraps, and this is that module.
    """

    def __init__(self, lm: PreTrainedModel) -> None:
        super().__init__()
        self.lm = lm

    def forward(self, sequences: Sequences, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
        """log_prob and entropy, (M,) float32, of the M response tokens of `sequences`."""
        hidden = self.lm.get_decoder()(input_ids=sequences.input_ids, use_cache=False).last_hidden_state
        hidden = hidden[sequences.token_rows, sequences.hidden_positions]
        return log_prob_and_entropy(hidden, self.lm.get_output_embeddings().weight, sequences.labels, temperature)


class FSDPEngine:
    """See the module's docstring. `optim=None` builds a frozen model (the reference policy)."""

    def __init__(
        self,
        model_path: str,
        device: torch.device,
        optim: OptimConfig | None = None,
        total_steps: int = -1,
        grad_clip: float = 1.0,
        gradient_checkpointing: bool = False,
        max_skipped_updates: int = 10,
    ) -> None:
        self.device = device
        self.optim = optim
        self.grad_clip = grad_clip
        self.max_skipped_updates = max_skipped_updates
        self.skipped_in_a_row = 0
        self.mesh = init_device_mesh(device.type, (dist.get_world_size(),))
        disable_progress_bar()
        lm = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)
        check_head(lm, model_path)
        switch_off_dropout(lm)
        self.config, self.generation_config = lm.config, lm.generation_config
        if gradient_checkpointing and optim is not None:
            lm.gradient_checkpointing_enable({"use_reentrant": False})
        lm.train(optim is not None)
        self.model = shard(ScoringModel(lm).requires_grad_(optim is not None), self.mesh, device)
        if optim is not None:
            self.optimizer = torch.optim.AdamW(
                self.model.parameters(), lr=optim.lr, weight_decay=optim.weight_decay, betas=(0.9, 0.999)
            )
            self.scheduler = lr_schedule(self.optimizer, optim, total_steps)

    # ------------------------------------------------------------------------------------------------- computing
    def forward(self, data: DataProto, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
        """log_prob and entropy, (R, T) float32 on the engine's device, 0 outside the responses; differentiable."""
        sequences = Sequences.from_batch(data, self.device)
        log_prob, entropy = self.model(sequences, temperature)
        return sequences.to_rows(log_prob), sequences.to_rows(entropy)

    @torch.no_grad()
    def log_prob(self, data: DataProto, temperature: float, spec: MicroBatchSpec) -> tuple[torch.Tensor, torch.Tensor]:
        """log_prob and entropy, (N, T) float32 on the CPU, of this worker's rows."""
        log_prob = torch.zeros(data["responses"].shape, dtype=torch.float32)
        entropy = torch.zeros_like(log_prob)
        for rows in micro_batches(data, spec):
            micro = data.select_rows(rows) if len(rows) else dummy_row(data)
            log_p, ent = self.forward(micro, temperature)
            if len(rows):
                log_prob[rows], entropy[rows] = log_p.cpu(), ent.cpu()
        assert isinstance(self.model, FSDPModule)
        self.model.reshard()  # without a backward pass after it, the root would stay gathered
        return log_prob, entropy

    def backward(self, loss: torch.Tensor) -> None:
        """Add the gradient of `loss`, this worker's share of a sum over all workers."""
        # FSDP2 averages gradients over workers: scaled by their number, the average is the sum.
        (loss * dist.get_world_size()).backward()

    def step(self) -> dict[str, float]:
        """Clip the gradient, move the weights, and forget the gradient.

        A non-finite gradient moves nothing; `max_skipped_updates` of them in a row are a RuntimeError.
        """
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.grad_clip)
        grad_norm = float(norm.full_tensor() if isinstance(norm, DTensor) else norm)
        finite = math.isfinite(grad_norm)
        self.skipped_in_a_row = 0 if finite else self.skipped_in_a_row + 1
        if self.skipped_in_a_row >= self.max_skipped_updates:
            raise RuntimeError(
                f"the gradient was not finite in {self.skipped_in_a_row} updates in a row: look at the rewards, lower "
                "the learning rate, or raise actor_rollout_ref.actor.max_skipped_updates"
            )
        lr = self.optimizer.param_groups[0]["lr"]
        if finite:
            self.optimizer.step()
            self.scheduler.step()
        self.optimizer.zero_grad()
        return {"actor/grad_norm": grad_norm, "actor/lr": lr, "actor/skipped_updates": float(not finite)}

    def sum_over_workers(self, values: torch.Tensor) -> torch.Tensor:
        """The elementwise sum of a small CPU tensor over all workers."""
        if dist.get_world_size() > 1:
            dist.all_reduce(values)
        return values

    # --------------------------------------------------------------------------------------------------- weights
    def full_parameters(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Hugging Face name and whole tensor of each parameter, one at a time; tied weights come once."""
        for name, parameter in self.model.lm.named_parameters():
            tensor = parameter.detach()
            yield name, tensor.full_tensor() if isinstance(tensor, DTensor) else tensor

    def parameter_shapes(self) -> dict[str, torch.Size]:
        """The whole shape of each tensor of `full_parameters`, in its order."""
        return {name: parameter.shape for name, parameter in self.model.lm.named_parameters()}

    def state_dict(self) -> dict[str, Any]:
        """Sharded state for torch.distributed.checkpoint."""
        return {
            "model": get_model_state_dict(self.model),
            "optimizer": get_optimizer_state_dict(self.model, self.optimizer),
            "scheduler": self.scheduler.state_dict(),
        }

    def save(self, folder: Path) -> None:
        dcp.save(self.state_dict(), checkpoint_id=folder)

    def load(self, folder: Path) -> None:
        """Load what `save` wrote, on any number of workers. A checkpoint of another model is a ValueError."""
        state = self.state_dict()
        self._check_same_model(folder, state)
        dcp.load(state, checkpoint_id=folder)
        set_state_dict(self.model, self.optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        self._apply_configured_rates()

    def _apply_configured_rates(self) -> None:
        """Learning rate and weight decay are the configuration's, not those that the checkpoint was written with."""
        assert self.optim is not None
        self.scheduler.base_lrs = [self.optim.lr] * len(self.optimizer.param_groups)
        factor = self.scheduler.lr_lambdas[0](self.scheduler.last_epoch)
        for group in self.optimizer.param_groups:
            group["initial_lr"], group["weight_decay"] = self.optim.lr, self.optim.weight_decay
            group["lr"] = self.optim.lr * factor

    def _check_same_model(self, folder: Path, state: dict[str, Any]) -> None:
        saved = dcp.FileSystemReader(folder).read_metadata().state_dict_metadata
        for name, tensor in state["model"].items():
            entry = saved.get(f"model.{name}")
            size = tuple(getattr(entry, "size", ())) if entry is not None else None
            if size != tuple(tensor.shape):
                found = "no such tensor" if size is None else f"shape {size}"
                raise ValueError(
                    f"checkpoint {folder} is of another model: {name} is {tuple(tensor.shape)} here, {found} there; "
                    "give the model it was made from as actor_rollout_ref.model.path, or another "
                    "trainer.default_local_dir"
                )

    def export(self, folder: Path, tokenizer: Any) -> None:
        """Write a Hugging Face folder (safetensors in the compute dtype, config, tokenizer) from worker 0."""
        dtype = compute_dtype(self.device)
        rank = dist.get_rank()
        weights = {}
        for name, tensor in self.full_parameters():
            if rank == 0:
                weights[name] = tensor.to("cpu", dtype, copy=True)
        if rank == 0:
            with torch.device("meta"):
                skeleton = AutoModelForCausalLM.from_config(self.config, dtype=dtype)
            skeleton.generation_config = self.generation_config
            skeleton.save_pretrained(folder, state_dict=weights)
            tokenizer.save_pretrained(folder)


@torch.no_grad()
def check_head(lm: PreTrainedModel, model_path: str) -> None:
    """Refuse a model whose logits are not last hidden state times head: one with a bias, a scale or a soft cap."""
    ids = torch.arange(4)[None] % lm.config.get_text_config().vocab_size
    hidden = lm.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state
    log_probs = torch.log_softmax(hidden @ lm.get_output_embeddings().weight.T, dim=-1)
    expected = torch.log_softmax(lm(input_ids=ids, use_cache=False).logits, dim=-1)
    difference = float((log_probs - expected).abs().max())
    if not difference < 1e-3:
        raise ValueError(
            f"actor_rollout_ref.model.path={model_path}: {type(lm).__name__} does more to its logits than multiply by "
            f"the head (log-probs differ by {difference:.2g}), which this engine does not compute; use another model"
        )


def switch_off_dropout(lm: PreTrainedModel) -> None:
    """Dropout would make the log-probs of two passes differ, and with them the first ratio of a step from 1."""
    for module in lm.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name in ("dropout", "attention_dropout", "activation_dropout", "hidden_dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)


def shard(model: ScoringModel, mesh: DeviceMesh, device: torch.device) -> ScoringModel:
    """Shard every decoder layer, then the rest, over `mesh`: fp32 masters, computing in the device's dtype."""
    policy = MixedPrecisionPolicy(param_dtype=compute_dtype(device), reduce_dtype=torch.float32)
    for layer in model.lm.get_decoder().layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    return model
