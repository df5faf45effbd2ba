"""The policy update against an independent float64 loop, and its independence of how a mini-batch is split."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.workers.rows import N, P, T, random_rows
from verl.protocol import DataProto
from verl.single_controller.dispatch import Dispatch, register
from verl.single_controller.worker import Worker
from verl.single_controller.worker_group import LocalWorkerGroup
from verl.trainer.config.schema import ActorConfig
from verl.workers.fsdp_engine import EngineSettings, FSDPEngine
from verl.workers.model import ScoringModel, load_language_model
from verl.workers.policy_update import PolicyUpdate
from verl.workers.sequences import MicroBatchSpec


class UpdateWorker(Worker):
    """Computes the gradient of one mini-batch without moving the weights."""

    def __init__(self, model_path: str) -> None:
        self.model_path = model_path

    @register(Dispatch.ALL)
    def build(self, **settings) -> None:
        """An engine, in place of the one before; padded, unless `settings` says otherwise."""
        engine_settings = EngineSettings(grad_clip=1e9, **settings)
        model = ScoringModel(load_language_model(self.model_path, engine_settings.packed))
        self.engine = FSDPEngine(model, self.device, ActorConfig().optim, settings=engine_settings)

    @register(Dispatch.ROWS)
    def gradient(self, data: DataProto, config: ActorConfig, temperature: float) -> dict:
        gradients = {}

        def keep_gradients(usable: bool) -> dict[str, float]:
            for name, parameter in self.engine.model.lm.named_parameters():
                gradients[name] = parameter.grad.full_tensor().clone()
            self.engine.optimizer.zero_grad()
            return {}

        self.engine.step = keep_gradients
        _, metrics = PolicyUpdate(self.engine, config, temperature)(data)
        return {"metrics": metrics, "gradients": gradients}

    @register(Dispatch.ROWS)
    def log_prob(self, data: DataProto, temperature: float, max_tokens: int) -> DataProto:
        log_prob, entropy = self.engine.log_prob(data, temperature, MicroBatchSpec(None, max_tokens))
        return DataProto.from_dict({"log_prob": log_prob, "entropy": entropy})


@pytest.fixture(scope="module")
def batch() -> DataProto:
    generator = torch.Generator().manual_seed(0)
    return DataProto.from_dict(
        {
            **random_rows(generator),
            "old_log_probs": -3 - torch.rand(N, T, generator=generator) * 4,
            "ref_log_prob": -3 - torch.rand(N, T, generator=generator) * 4,
            "advantages": torch.randn(N, 1, generator=generator).expand(N, T).contiguous(),
        },
        {"n_mini_batches": 1, "with_entropy": False},
    )


@pytest.fixture(scope="module")
def worker(tiny_model):
    group = LocalWorkerGroup(UpdateWorker, (str(tiny_model),), device="cpu")
    group.build()
    yield group
    group.shutdown()


def reference_loss(model, batch, config: ActorConfig, temperature: float) -> torch.Tensor:
    """The clipped loss by plain loops over rows and tokens, in float64: token mean, entropy bonus, low-variance KL; the
    policy loss times `rollout_is_weights`, and rows outside `loss_mask` left out, where the batch has them."""
    total, tokens = torch.zeros((), dtype=torch.float64), 0
    for i in range(N):
        if "loss_mask" in batch and not batch["loss_mask"][i].any():
            continue
        prompt = batch["prompts"][i, P - int(batch["prompt_length"][i]) :]
        response = batch["responses"][i, : int(batch["response_mask"][i].sum())]
        logits = model(torch.cat([prompt, response])[None]).logits[0, len(prompt) - 1 : -1] / temperature
        for t, token in enumerate(response):
            p = torch.softmax(logits[t], -1)
            ratio = p[token] / torch.exp(batch["old_log_probs"][i, t].double())
            advantage = batch["advantages"][i, t].double()
            low, high = 1 - config.clip_ratio_low, 1 + config.clip_ratio_high
            objective = torch.minimum(ratio * advantage, torch.clamp(ratio, low, high) * advantage)
            if advantage < 0:
                objective = torch.maximum(objective, config.clip_ratio_c * advantage)
            if "rollout_is_weights" in batch:
                objective = objective * batch["rollout_is_weights"][i, t].double()
            entropy = -(p * p.log()).sum()
            difference = batch["ref_log_prob"][i, t].double() - p[token].log()
            kl = difference.exp() - difference - 1
            total = total - objective - config.entropy_coeff * entropy + config.kl_loss_coef * kl
            tokens += 1
    return total / tokens


def test_loss_and_gradient_equal_a_float64_loop(tiny_model, worker, batch):
    config = ActorConfig(entropy_coeff=0.01, use_kl_loss=True, kl_loss_coef=0.1)
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float64)
    reference_loss(model, batch, config, 0.7).backward()
    result = worker.gradient(batch, config, 0.7)[0]
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(result["gradients"][name].double(), parameter.grad, rtol=1e-4, atol=1e-6)


def test_rollout_correction_weighs_the_policy_loss_and_leaves_responses_out(tiny_model, worker, batch):
    config = ActorConfig(entropy_coeff=0.01, use_kl_loss=True, kl_loss_coef=0.1, ppo_micro_batch_size_per_gpu=5)
    keep = torch.arange(N) % 3 != 1
    corrected = batch.with_columns(
        rollout_is_weights=0.5 + torch.rand(N, T, generator=torch.Generator().manual_seed(3)),
        loss_mask=batch["response_mask"] & keep[:, None],
    )
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float64)
    reference_loss(model, corrected, config, 0.7).backward()
    result = worker.gradient(corrected, config, 0.7)[0]
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(result["gradients"][name].double(), parameter.grad, rtol=1e-4, atol=1e-6)


def test_a_batch_of_rejected_responses_gives_no_gradient(worker, batch):
    result = worker.gradient(batch.with_columns(loss_mask=torch.zeros(N, T, dtype=torch.bool)), ActorConfig(), 1.0)[0]
    assert all(not gradient.any() for gradient in result["gradients"].values())


@pytest.mark.parametrize("mode", ["token-mean", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm"])
def test_the_gradient_does_not_depend_on_the_micro_batches(worker, batch, mode):
    whole = worker.gradient(batch, ActorConfig(loss_agg_mode=mode, ppo_micro_batch_size_per_gpu=N), 1.0)[0]
    for split in (
        ActorConfig(loss_agg_mode=mode, ppo_micro_batch_size_per_gpu=1),
        ActorConfig(loss_agg_mode=mode, ppo_micro_batch_size_per_gpu=5),
        ActorConfig(loss_agg_mode=mode, ppo_max_token_len_per_gpu=P + T + 3),
    ):
        part = worker.gradient(batch, split, 1.0)[0]
        assert_same(part, whole)


def assert_same(part: dict, whole: dict) -> None:
    for name, gradient in whole["gradients"].items():
        torch.testing.assert_close(part["gradients"][name], gradient, rtol=2e-4, atol=2e-7)
    assert part["metrics"].keys() == whole["metrics"].keys()
    for name, value in whole["metrics"].items():
        assert part["metrics"][name] == pytest.approx(value, rel=1e-4, abs=1e-6), name


def test_activation_checkpointing_changes_nothing(tiny_model, worker, batch):
    group = LocalWorkerGroup(UpdateWorker, (str(tiny_model),), device="cpu")
    group.build(gradient_checkpointing=True)
    config = ActorConfig()
    assert_same(group.gradient(batch, config, 1.0)[0], worker.gradient(batch, config, 1.0)[0])
    group.shutdown()


@pytest.fixture(scope="module")
def grouped(batch) -> DataProto:
    """The batch with three prompts, of four rows each."""
    prompt = torch.arange(N) % 3
    return batch.with_columns(prompts=batch["prompts"][prompt], prompt_length=batch["prompt_length"][prompt])


@pytest.mark.parametrize("checkpointing", [False, True])
def test_packing_changes_nothing(tiny_model, worker, batch, grouped, checkpointing):
    packed = LocalWorkerGroup(UpdateWorker, (str(tiny_model),), device="cpu")
    packed.build(packed=True, gradient_checkpointing=checkpointing)
    for data in (batch, grouped):
        whole = worker.gradient(data, ActorConfig(ppo_micro_batch_size_per_gpu=N), 0.7)[0]
        log_prob = worker.log_prob(data, 0.7, 10_000)
        for split in (
            ActorConfig(ppo_micro_batch_size_per_gpu=N),
            ActorConfig(ppo_micro_batch_size_per_gpu=1),
            ActorConfig(ppo_micro_batch_size_per_gpu=5),
            ActorConfig(ppo_max_token_len_per_gpu=3 * (P + T)),
        ):
            assert_same(packed.gradient(data, split, 0.7)[0], whole)
        part = packed.log_prob(data, 0.7, 2 * (P + T))
        torch.testing.assert_close(part["log_prob"], log_prob["log_prob"], rtol=0, atol=1e-5)
        torch.testing.assert_close(part["entropy"], log_prob["entropy"], rtol=0, atol=1e-5)
    packed.shutdown()


def test_log_probs_do_not_depend_on_the_micro_batches(worker, batch):
    whole = worker.log_prob(batch, 1.0, 10_000)
    part = worker.log_prob(batch, 1.0, P + T)
    torch.testing.assert_close(part["log_prob"], whole["log_prob"], rtol=0, atol=1e-5)
    torch.testing.assert_close(part["entropy"], whole["entropy"], rtol=0, atol=1e-5)


LAYOUTS = [{"packed": packed, "gradient_checkpointing": again} for packed in (False, True) for again in (False, True)]
HYBRID = {"fsdp_size": 2, "reduce_per_mini_batch": True, "param_offload": True, "optimizer_offload": True}
SHARED = {"packed": True, "sequence_parallel_size": 2}  # two workers share each row


@pytest.mark.slow  # starts Ray workers
@pytest.mark.parametrize(
    ("workers", "settings"),
    [(2, [*LAYOUTS, SHARED]), (4, [*LAYOUTS, HYBRID, SHARED, SHARED | {"gradient_checkpointing": True}])],
)
def test_several_workers_give_the_gradient_of_one(ray_cluster, tiny_model, worker, grouped, workers, settings):
    """However rows are divided, also where a worker has none."""
    from verl.single_controller.ray_worker_group import RayWorkerGroup

    whole = worker.gradient(grouped, ActorConfig(), 1.0)[0]
    log_prob = worker.log_prob(grouped, 1.0, 10_000)["log_prob"]
    divisions = {
        2: (None, [list(range(9)), [9, 10, 11]], [list(range(N)), []]),
        4: (None, [[0], [1, 2, 3, 4, 5], [], [6, 7, 8, 9, 10, 11]], [[], [], list(range(N)), []]),
    }
    with RayWorkerGroup(UpdateWorker, (str(tiny_model),), n_workers_per_node=workers, device="cpu") as group:
        for chosen in settings:
            group.build(**chosen)
            for rows in divisions[workers]:
                results = group.gradient(grouped, ActorConfig(ppo_max_token_len_per_gpu=2 * (P + T)), 1.0, rows=rows)
                for result in results:
                    assert_same(result, whole)
                several = group.log_prob(grouped, 1.0, 2 * (P + T), rows=rows)
                torch.testing.assert_close(several["log_prob"], log_prob, rtol=0, atol=1e-5)
