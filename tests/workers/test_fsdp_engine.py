"""The engine's checkpoints and exports, its refusals, and its guard against gradients that are not finite."""

import json

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Glm4MoeConfig,
    Glm4MoeForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PhiConfig,
    PhiForCausalLM,
)

from data_processing import make_tiny_model
from verl.single_controller.dispatch import Dispatch, register
from verl.single_controller.worker import Worker
from verl.single_controller.worker_group import LocalWorkerGroup
from verl.trainer.config.schema import OptimConfig
from verl.workers import engine_checkpoint
from verl.workers.fsdp_engine import FSDPEngine, check_gradient_memory
from verl.workers.model import ScoringModel, load_language_model, switch_off_dropout


class EngineWorker(Worker):
    @register(Dispatch.ALL)
    def build(self, model_path: str) -> None:
        optim = OptimConfig(lr=1e-2, lr_scheduler_type="linear", lr_warmup_steps=2)
        self.engine = FSDPEngine(ScoringModel(load_language_model(model_path)), self.device, optim, total_steps=10)

    @register(Dispatch.ALL)
    def step(self, seed: int, poison: bool = False) -> dict[str, float]:
        """One optimizer step on random data, the same on every worker."""
        generator = torch.Generator().manual_seed(seed)
        loss = torch.zeros(())
        for parameter in self.engine.model.parameters():
            full = parameter.full_tensor()
            loss = loss + (full * torch.randn(full.shape, generator=generator)).sum()
        self.engine.backward(loss * (float("nan") if poison else 1.0) / self.world_size)
        return self.engine.step()

    @register(Dispatch.ALL)
    def save(self, folder) -> None:
        engine_checkpoint.save(self.engine, folder)

    @register(Dispatch.ALL)
    def load(self, folder) -> None:
        engine_checkpoint.load(self.engine, folder)

    @register(Dispatch.ALL)
    def export(self, folder, model_path) -> None:
        engine_checkpoint.export(self.engine, folder, AutoTokenizer.from_pretrained(model_path))

    @register(Dispatch.RANK_ZERO)
    def weights(self) -> dict[str, torch.Tensor]:
        return {name: tensor.clone() for name, tensor in self.engine.full_parameters()}


@pytest.fixture
def start(tiny_model):
    groups = []

    def local(model=tiny_model) -> LocalWorkerGroup:
        groups.append(LocalWorkerGroup(EngineWorker, device="cpu"))
        groups[-1].build(str(model))
        return groups[-1]

    yield local
    for group in groups:
        group.shutdown()


def assert_equal(a: dict, b: dict) -> None:
    assert a.keys() == b.keys()
    for name, tensor in a.items():
        assert torch.equal(tensor, b[name]), name


def test_weights_are_those_of_the_folder(start, tiny_model):
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    assert_equal(start().weights(), dict(model.named_parameters()))


def test_a_loaded_checkpoint_continues_bit_for_bit(start, tmp_path):
    one = start()
    one.step(1)
    one.save(tmp_path)
    metrics = one.step(2)
    other = start()
    other.load(tmp_path)
    assert other.step(2) == metrics  # among them the learning rate: the scheduler is loaded as well
    assert_equal(other.weights(), one.weights())


def test_an_export_loads_with_transformers(start, tiny_model, tmp_path):
    group = start()
    group.step(1)
    group.export(tmp_path, str(tiny_model))
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert_equal(dict(model.named_parameters()), group.weights())
    start_config = AutoModelForCausalLM.from_pretrained(tiny_model).generation_config
    assert model.generation_config.eos_token_id == start_config.eos_token_id
    assert AutoTokenizer.from_pretrained(tmp_path).chat_template


def test_a_checkpoint_of_another_model_is_refused(start, tmp_path):
    start().save(tmp_path / "checkpoint")
    make_tiny_model.main(["--output-dir", str(tmp_path / "wide"), "--hidden-size", "48", "--layers", "2"])
    other = start(tmp_path / "wide")
    with pytest.raises(ValueError, match="is of another model: .*: shape \\(.*\\) here, shape \\(.*\\) there"):
        other.load(tmp_path / "checkpoint")


def test_a_checkpoint_of_a_deeper_model_is_refused(start, tmp_path):
    """All of the shallow model's tensors are in it, in the same shapes."""
    sizes = ["--hidden-size", "64", "--heads", "2", "--kv-heads", "1", "--intermediate-size", "64", "--layers", "3"]
    make_tiny_model.main(["--output-dir", str(tmp_path / "deep"), *sizes])
    start(tmp_path / "deep").save(tmp_path / "checkpoint")
    with pytest.raises(ValueError, match="of another model: lm.model.layers.2.*: no such tensor here, shape .* there"):
        start().load(tmp_path / "checkpoint")


def test_a_gradient_that_is_not_finite_moves_nothing(start):
    group = start()
    group.step(1)
    before = group.weights()
    metrics = group.step(2, poison=True)[0]
    assert metrics["skipped_updates"] == 1 and metrics["grad_norm"] != metrics["grad_norm"]
    assert_equal(group.weights(), before)
    assert group.step(3)[0]["skipped_updates"] == 0


def test_a_run_of_gradients_that_are_not_finite_stops(start):
    group = start()
    for seed in range(9):
        group.step(seed, poison=True)
    group.step(9)  # the count starts anew
    for seed in range(9):
        group.step(seed, poison=True)
    with pytest.raises(RuntimeError, match="not finite in 10 updates in a row: .*lower the learning rate"):
        group.step(10, poison=True)


def test_saving_before_the_first_update_changes_nothing(start, tmp_path):
    """As in the steps in which only a critic is trained."""
    saved, loaded, never = start(), start(), start()
    saved.save(tmp_path)
    loaded.load(tmp_path)
    for group in (saved, loaded, never):
        group.step(1)
        group.step(2)
    assert_equal(saved.weights(), never.weights())
    assert_equal(loaded.weights(), never.weights())


def test_whole_gradients_must_fit_beside_the_optimizer(monkeypatch):
    device = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (20 << 30, 80 << 30))
    check_gradient_memory(4 << 30, 1 << 30, device)  # 16 of 16 GiB
    with pytest.raises(ValueError, match=r"reduce_per_mini_batch=True keeps 16\.0 GiB .* 12\.0 GiB free beside"):
        check_gradient_memory(4 << 30, 2 << 30, device)


def test_a_loaded_checkpoint_takes_the_configured_rates(start, tmp_path):
    one = start()
    for seed in range(4):
        one.step(seed)
    one.save(tmp_path)
    other = start()
    other.worker.engine.optim.lr, other.worker.engine.optim.weight_decay = 0.5, 0.3
    other.load(tmp_path)
    expected = one.step(5)[0]["lr"] / 1e-2 * 0.5
    assert other.step(5)[0]["lr"] == pytest.approx(expected)
    assert other.worker.engine.optimizer.param_groups[0]["weight_decay"] == 0.3


def test_a_model_with_more_than_a_head_is_refused(start, tmp_path):
    config = PhiConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, vocab_size=64)
    model = PhiForCausalLM(config)
    model.lm_head.bias.data.normal_()
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="PhiForCausalLM does more to its logits"):
        start(tmp_path)


def test_a_model_with_weights_in_buffers_is_refused(start, tmp_path):
    """The routing bias of a mixture of experts: no parameter, so it would stay behind wherever parameters go."""
    config = Glm4MoeConfig(
        vocab_size=64, hidden_size=16, intermediate_size=16, moe_intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, n_routed_experts=4, num_experts_per_tok=2,
        first_k_dense_replace=0,
    )  # fmt: skip
    Glm4MoeForCausalLM(config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="Glm4MoeForCausalLM keeps weights in buffers .*e_score_correction_bias, 1 in"):
        start(tmp_path)


def test_a_head_of_its_own_under_a_configuration_that_ties_it_is_refused(start, tiny_model, tmp_path):
    lm = AutoModelForCausalLM.from_pretrained(tiny_model, tie_word_embeddings=False)
    lm.lm_head.weight = torch.nn.Parameter(torch.randn_like(lm.lm_head.weight))
    lm.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    with pytest.raises(ValueError, match="config.json says tie_word_embeddings=true, but the weights hold a head"):
        start(tmp_path)


def test_dropout_is_off():
    config = OPTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, ffn_dim=16, vocab_size=64, word_embed_proj_dim=16,
        dropout=0.5,
    )  # fmt: skip
    lm = OPTForCausalLM(config).train()
    ids = torch.arange(2, 12)[None]
    assert not torch.equal(lm(ids).logits, lm(ids).logits)
    switch_off_dropout(lm)
    assert lm.training and torch.equal(lm(ids).logits, lm(ids).logits)
