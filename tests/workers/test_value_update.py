"""The critic's update against an independent float64 loop, and its independence of how a mini-batch is split."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.workers.rows import N, P, T, random_rows
from verl.protocol import DataProto
from verl.single_controller.dispatch import Dispatch, register
from verl.single_controller.worker import Worker
from verl.single_controller.worker_group import LocalWorkerGroup
from verl.trainer.config.schema import ActorConfig, OptimConfig
from verl.workers import engine_checkpoint, sharding, value_update
from verl.workers.fsdp_engine import EngineSettings, FSDPEngine
from verl.workers.model import load_value_model
from verl.workers.sequences import MicroBatchSpec
from verl.workers.value_update import ValueUpdate, compute_values, value_loss


def head_weight(hidden_size: int) -> torch.Tensor:
    return torch.randn(1, hidden_size, generator=torch.Generator().manual_seed(1)) / hidden_size**0.5


class CriticWorker(Worker):
    """Holds a critic; computes the gradient of a batch without moving the weights, or moves them."""

    def __init__(self, model_path: str, new_head: bool = False) -> None:
        self.model_path = model_path
        self.new_head = new_head

    @register(Dispatch.ALL)
    def build(self) -> None:
        model = load_value_model(self.model_path)
        if not self.new_head:
            head = model.lm.get_output_embeddings()
            head.weight.data = head_weight(head.in_features)
        self.engine = FSDPEngine(model, self.device, OptimConfig(lr=1e-2), settings=EngineSettings(grad_clip=1e9))

    @register(Dispatch.ROWS)
    def gradient(self, data: DataProto, config: ActorConfig, cliprange: float) -> dict:
        gradients = {}

        def keep_gradients(usable: bool) -> dict[str, float]:
            for name, parameter in self.engine.model.lm.named_parameters():
                gradients[name] = parameter.grad.full_tensor().clone()
            self.engine.optimizer.zero_grad()
            return {"grad_norm": 0.0, "lr": 0.0, "skipped_updates": 0.0}

        step, self.engine.step = self.engine.step, keep_gradients
        metrics = ValueUpdate(self.engine, config, cliprange)(data)
        self.engine.step = step
        return {"metrics": metrics, "gradients": gradients}

    @register(Dispatch.ROWS)
    def update(self, data: DataProto, config: ActorConfig, cliprange: float) -> dict[str, float]:
        return ValueUpdate(self.engine, config, cliprange)(data)

    @register(Dispatch.ROWS)
    def values(self, data: DataProto, max_tokens: int) -> DataProto:
        return DataProto.from_dict({"values": compute_values(self.engine, data, MicroBatchSpec(None, max_tokens))})

    @register(Dispatch.ALL)
    def save(self, folder: str) -> None:
        engine_checkpoint.save(self.engine, folder)

    @register(Dispatch.ALL)
    def load(self, folder: str) -> None:
        engine_checkpoint.load(self.engine, folder)


@pytest.fixture(scope="module")
def batch() -> DataProto:
    generator = torch.Generator().manual_seed(0)
    return DataProto.from_dict(
        {
            **random_rows(generator),
            "values": torch.randn(N, T, generator=generator),
            "returns": torch.randn(N, T, generator=generator),
        },
        {"n_mini_batches": 1},
    )


@pytest.fixture(scope="module")
def worker(tiny_model):
    group = LocalWorkerGroup(CriticWorker, (str(tiny_model),), device="cpu")
    group.build()
    yield group
    group.shutdown()


@pytest.fixture
def new_critic(tiny_model):
    """Starts critics whose head is as it is at first; weights may be moved."""
    groups = []

    def start() -> LocalWorkerGroup:
        groups.append(LocalWorkerGroup(CriticWorker, (str(tiny_model), True), device="cpu"))
        groups[-1].build()
        return groups[-1]

    yield start
    for group in groups:
        group.shutdown()


class Reference(torch.nn.Module):
    """The critic in float64, one row at a time; parameters under the names of the one that is tested."""

    def __init__(self, model_path) -> None:
        super().__init__()
        self.model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float64).model
        self.lm_head = torch.nn.Linear(self.model.config.hidden_size, 1, bias=False, dtype=torch.float64)
        self.lm_head.weight.data = head_weight(self.model.config.hidden_size).double()

    def values(self, batch: DataProto, row: int) -> torch.Tensor:
        """The value of prompt and response so far, before each token of the response."""
        prompt = batch["prompts"][row, P - int(batch["prompt_length"][row]) :]
        response = batch["responses"][row, : int(batch["response_mask"][row].sum())]
        hidden = self.model(torch.cat([prompt, response[:-1]])[None]).last_hidden_state[0]
        return torch.cat([self.lm_head(hidden[len(prompt) + t - 1]) for t in range(len(response))])

    def loss(self, batch: DataProto, cliprange: float) -> tuple[torch.Tensor, float]:
        """Mean clipped loss of the tokens that count, and the share of clipped ones, by plain loops."""
        total, clipped, tokens = torch.zeros((), dtype=torch.float64), 0, 0
        for row in range(N):
            if "loss_mask" in batch and not batch["loss_mask"][row].any():
                continue
            for t, value in enumerate(self.values(batch, row)):
                old, goal = batch["values"][row, t].double(), batch["returns"][row, t].double()
                near = min(max(value, old - cliprange), old + cliprange)
                error, near_error = (value - goal) ** 2, (near - goal) ** 2
                total = total + max(error, near_error) / 2
                clipped += int(near_error > error)
                tokens += 1
        return total / tokens, clipped / tokens


def test_the_value_of_a_state_is_read_where_its_next_token_is_predicted(tiny_model, worker, batch):
    values, reference = worker.values(batch, 10_000)["values"], Reference(tiny_model)
    assert values.dtype == torch.float32
    for row in range(N):
        expected = torch.zeros(T, dtype=torch.float64)
        expected[: int(batch["response_mask"][row].sum())] = reference.values(batch, row).detach()
        torch.testing.assert_close(values[row].double(), expected, rtol=0, atol=1e-5)


def test_a_new_critic_values_everything_at_zero(new_critic, batch):
    assert not new_critic().values(batch, 10_000)["values"].any()


def test_values_are_not_rounded_to_the_bfloat16_that_a_gpu_computes_in(tiny_model, worker, batch, monkeypatch):
    monkeypatch.setattr(sharding, "compute_dtype", lambda device: torch.bfloat16)
    group = LocalWorkerGroup(CriticWorker, (str(tiny_model),), device="cpu")
    group.build()
    values = group.values(batch, 10_000)["values"][batch["response_mask"]]
    assert (values != values.bfloat16().float()).float().mean() > 0.9
    torch.testing.assert_close(values, worker.values(batch, 10_000)["values"][batch["response_mask"]], rtol=0, atol=0.1)
    gradients = group.gradient(batch, ActorConfig(), 0.2)[0]["gradients"]
    assert all(gradient.dtype == torch.float32 for gradient in gradients.values())
    group.shutdown()


@pytest.mark.parametrize("cliprange", [0.2, 100.0])
def test_loss_and_gradient_equal_a_float64_loop(tiny_model, worker, batch, cliprange):
    reference = Reference(tiny_model)
    loss, clipped = reference.loss(batch, cliprange)
    loss.backward()
    assert 0.1 < clipped < 0.9 if cliprange < 1 else clipped == 0
    result = worker.gradient(batch, ActorConfig(), cliprange)[0]
    assert result["metrics"]["critic/vf_loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert result["metrics"]["critic/vf_clipfrac"] == pytest.approx(clipped)
    for name, parameter in reference.named_parameters():
        torch.testing.assert_close(result["gradients"][name].double(), parameter.grad, rtol=1e-4, atol=1e-6)
    assert result["gradients"].keys() == dict(reference.named_parameters()).keys()


def test_rejected_responses_are_left_out(tiny_model, worker, batch):
    keep = torch.arange(N) % 3 != 1
    corrected = batch.with_columns(loss_mask=batch["response_mask"] & keep[:, None])
    reference = Reference(tiny_model)
    reference.loss(corrected, 0.2)[0].backward()
    result = worker.gradient(corrected, ActorConfig(ppo_micro_batch_size_per_gpu=5), 0.2)[0]
    for name, parameter in reference.named_parameters():
        torch.testing.assert_close(result["gradients"][name].double(), parameter.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("value", "loss", "slope"),
    [
        (0.1, 0.5 * 0.9**2, -0.9),  # has come closer, within the range
        (0.4, 0.5 * 0.8**2, 0.0),  # closer by more than the range: counted as if at its end
        (-0.4, 0.5 * 1.4**2, -1.4),  # further away, however far: not clipped
        (2.5, 0.5 * 1.5**2, 1.5),  # past the return and further away than the end of the range
    ],
)
def test_a_value_is_held_back_only_on_its_way_to_the_return(value, loss, slope):
    """v_old 0, return 1, range 0.2."""
    v = torch.tensor(value, dtype=torch.float64, requires_grad=True)
    ours, clipped = value_loss(v, torch.zeros_like(v), torch.ones_like(v), 0.2)
    ours.backward()
    assert (ours.item(), v.grad.item()) == pytest.approx((loss, slope))
    assert clipped.item() == (slope == 0)


def assert_same(part: dict, whole: dict) -> None:
    for name, gradient in whole["gradients"].items():
        torch.testing.assert_close(part["gradients"][name], gradient, rtol=2e-4, atol=2e-7)
    assert part["metrics"].keys() == whole["metrics"].keys()
    for name, value in whole["metrics"].items():
        assert part["metrics"][name] == pytest.approx(value, rel=1e-4, abs=1e-6), name


@pytest.mark.parametrize("mode", ["token-mean", "seq-mean-token-mean"])
def test_the_gradient_does_not_depend_on_the_micro_batches(worker, batch, mode):
    whole = worker.gradient(batch, ActorConfig(loss_agg_mode=mode, ppo_micro_batch_size_per_gpu=N), 0.2)[0]
    for split in (
        ActorConfig(loss_agg_mode=mode, ppo_micro_batch_size_per_gpu=1),
        ActorConfig(loss_agg_mode=mode, ppo_micro_batch_size_per_gpu=5),
        ActorConfig(loss_agg_mode=mode, ppo_max_token_len_per_gpu=P + T + 3),
    ):
        assert_same(worker.gradient(batch, split, 0.2)[0], whole)


def test_values_do_not_depend_on_the_micro_batches(worker, batch):
    part, whole = worker.values(batch, P + T)["values"], worker.values(batch, 10_000)["values"]
    torch.testing.assert_close(part, whole, rtol=0, atol=1e-6)


def test_every_mini_batch_is_a_step_and_a_loaded_critic_continues_bit_for_bit(new_critic, batch, tmp_path):
    two = batch.with_columns(mini_batch=torch.arange(N) % 2)
    two.meta_info["n_mini_batches"] = 2
    config = ActorConfig(ppo_epochs=3)
    one, other = new_critic(), new_critic()
    first = one.update(two, config, 0.5)[0]
    assert one.worker.engine.scheduler.last_epoch == 2 * 3
    assert first["critic/lr"] == 1e-2 and first["critic/skipped_updates"] == 0 and first["critic/grad_norm"] > 0
    one.save(str(tmp_path))
    other.load(str(tmp_path))
    assert torch.equal(one.values(batch, 10_000)["values"], other.values(batch, 10_000)["values"])
    assert one.update(two, config, 0.5) == other.update(two, config, 0.5)
    assert torch.equal(one.values(batch, 10_000)["values"], other.values(batch, 10_000)["values"])


def test_a_gradient_that_is_not_finite_moves_nothing_and_is_counted(new_critic, batch):
    critic = new_critic()
    poisoned = batch.with_columns(returns=torch.full((N, T), torch.nan))
    assert critic.update(poisoned, ActorConfig(ppo_epochs=2), 0.5)[0]["critic/skipped_updates"] == 2
    assert not critic.values(batch, 10_000)["values"].any()


def test_a_loss_that_is_not_finite_moves_nothing_though_its_gradient_is(new_critic, batch, monkeypatch):
    def infinite(*args):
        loss, clipped = value_loss(*args)
        return loss + torch.inf, clipped

    monkeypatch.setattr(value_update, "value_loss", infinite)
    critic = new_critic()
    metrics = critic.update(batch, ActorConfig(), 0.5)[0]
    assert metrics["critic/skipped_updates"] == 1 and 0 < metrics["critic/grad_norm"] < torch.inf
    assert not critic.values(batch, 10_000)["values"].any()


@pytest.mark.slow  # starts two Ray workers
def test_two_workers_give_the_gradient_of_one(ray_cluster, tiny_model, worker, batch):
    from verl.single_controller.ray_worker_group import RayWorkerGroup

    whole = worker.gradient(batch, ActorConfig(), 0.2)[0]
    values = worker.values(batch, 10_000)["values"]
    with RayWorkerGroup(CriticWorker, (str(tiny_model),), n_workers_per_node=2, device="cpu") as group:
        group.build()
        for rows in (None, [list(range(9)), [9, 10, 11]], [list(range(N)), []]):
            for result in group.gradient(batch, ActorConfig(ppo_max_token_len_per_gpu=2 * (P + T)), 0.2, rows=rows):
                assert_same(result, whole)
        two = group.values(batch, 10_000, rows=[[3, 1, 2], [0, *range(4, N)]])["values"]
        torch.testing.assert_close(two, values, rtol=0, atol=1e-6)
