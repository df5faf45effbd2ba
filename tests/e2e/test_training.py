"""Whole runs on a tiny model: what they log and write, and that they repeat, resume, and agree across worker groups."""

import collections
import gzip
import itertools
import json
import math
import re
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.e2e.runs import config, logged, train
from verl.protocol import DataProto
from verl.trainer.config.schema import AlgorithmConfig
from verl.trainer.main_ppo import build, run
from verl.trainer.ppo import ray_trainer
from verl.trainer.ppo.core_algos import get_adv_estimator
from verl.utils.plugins import load_plugins
from verl.utils.timer import Timer


@pytest.fixture(scope="module")
def files(arithmetic_data, tiny_model):
    return arithmetic_data, tiny_model


def weights(run_dir, step: int) -> dict[str, torch.Tensor]:
    folder = run_dir / "checkpoints" / f"global_step_{step}" / "huggingface"
    return dict(AutoModelForCausalLM.from_pretrained(folder).named_parameters())


def test_a_run_writes_everything_that_the_documents_promise(files, tmp_path, varied_reward):
    steps = train(config(*files, tmp_path, *varied_reward, "trainer.save_freq=3", "trainer.logger=[jsonl,tensorboard]"))
    assert [s["step"] for s in steps] == [0, 1, 2, 3]
    timed = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])
    for name in (
        "actor/entropy", "actor/pg_loss", "actor/grad_norm", "actor/lr", "critic/score/mean", "critic/advantages/max",
        "response_length/mean", "quantile_tracking/0.2_th_quantile", "quantile_baseline/mvar", "actor/cov_logp_adv",
        "timing_s/step", "timing_s/gen", "timing_s/update_actor", "perf/throughput", "training/global_step",
    ):  # fmt: skip
        assert math.isfinite(timed[name]), name
    assert "val-core/arithmetic/acc/mean@1" in steps[0] and "val-aux/arithmetic/level_2/acc/pass@1" in steps[3]
    assert (tmp_path / "config.yaml").is_file() and list((tmp_path / "tensorboard").iterdir())
    sample = json.loads((tmp_path / "samples" / "train_step_2.jsonl").read_text().splitlines()[0])
    assert set(sample) == {"prompt", "response", "reward", "bundle", "advantage"}
    assert weights(tmp_path, 3)


def test_the_first_ratio_of_a_step_is_one(files, tmp_path, varied_reward):
    """The engine sampled with the probabilities that the trainer computes: nothing is clipped in the first update."""
    one_update = ["actor_rollout_ref.actor.ppo_mini_batch_size=12", "actor_rollout_ref.rollout.temperature=0.8"]
    trainer = build(config(*files, tmp_path / "one", *varied_reward, *one_update))
    trainer.start()
    trainer.step = 1
    batch, _ = trainer.train_step(Timer())
    torch.testing.assert_close(batch["rollout_log_probs"], batch["old_log_probs"], rtol=0, atol=1e-5)
    trainer.actor.shutdown()
    for step in train(config(*files, tmp_path, *varied_reward, *one_update))[1:]:
        assert step["training/rollout_probs_diff_max"] < 1e-5
        assert abs(step["actor/ppo_kl"]) < 1e-6 and step["actor/pg_clipfrac"] == 0


def test_equal_seeds_give_equal_runs_and_others_do_not(files, tmp_path, varied_reward):
    one = train(config(*files, tmp_path / "one", *varied_reward))
    assert train(config(*files, tmp_path / "again", *varied_reward)) == one
    assert train(config(*files, tmp_path / "other", *varied_reward, "trainer.seed=2")) != one


@pytest.mark.parametrize(
    "kind",
    [
        ["algorithm.adv_estimator=riskpo"],
        pytest.param(
            ["algorithm.adv_estimator=riskpo", "algorithm.risk.bundling=difficulty", "algorithm.risk.tracker=ema"],
            marks=pytest.mark.slow,  # two whole runs
        ),
        pytest.param(
            ["algorithm.adv_estimator=grpo", "algorithm.use_kl_in_reward=True", "algorithm.kl_ctrl.type=adaptive"],
            marks=pytest.mark.slow,  # two whole runs
        ),
    ],
    ids=["riskpo", "difficulty", "kl"],
)
def test_a_run_stopped_and_resumed_equals_one_never_stopped(files, tmp_path, varied_reward, monkeypatch, kind):
    options = [*varied_reward, *kind, "trainer.total_training_steps=5"]
    options += ["trainer.test_freq=2", "trainer.save_freq=2", "actor_rollout_ref.actor.optim.lr_scheduler_type=cosine"]
    whole = train(config(*files, tmp_path / "whole", *options))

    stopped = config(*files, tmp_path / "stopped", *options)
    trainer = build(stopped)
    step = trainer.train_step
    calls = itertools.count(1)

    def interrupted(*args):
        if next(calls) == 4:  # after the checkpoint of step 2 and one more step
            raise KeyboardInterrupt
        return step(*args)

    monkeypatch.setattr(trainer, "train_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(trainer)
    assert [line["step"] for line in logged(tmp_path / "stopped")] == [0, 1, 2, 3]

    assert train(stopped) == whole
    for name, tensor in weights(tmp_path / "whole", 5).items():
        assert torch.equal(weights(tmp_path / "stopped", 5)[name], tensor), name


def test_a_finished_run_says_so_and_changed_keys_are_named(files, tmp_path, varied_reward, capsys):
    options = [*varied_reward, "trainer.save_freq=3"]
    first = train(config(*files, tmp_path, *options))
    capsys.readouterr()
    again = train(config(*files, tmp_path, *options, "actor_rollout_ref.actor.optim.lr=0.5"))
    assert again == first
    printed = capsys.readouterr().out
    assert "all 3 steps are done already" in printed
    assert "changed since: actor_rollout_ref.actor.optim.lr=0.5 (was 0.001)" in printed


def test_a_run_started_anew_never_resumes_the_one_before(files, tmp_path, varied_reward):
    options = [*varied_reward, "trainer.save_freq=1", "trainer.val_before_train=False"]
    train(config(*files, tmp_path, *options))
    anew = [*options, "trainer.total_training_steps=1"]
    train(config(*files, tmp_path, *anew, "trainer.resume_mode=disable"))
    assert [step["step"] for step in train(config(*files, tmp_path, *anew))] == [1]


def test_the_trackers_quantiles_reach_the_next_steps_advantages(files, tmp_path, varied_reward):
    """Moving the tracker after step 1 changes the advantages of step 2, for the same responses and rewards."""

    def step_two(shift: float) -> tuple[torch.Tensor, torch.Tensor]:
        trainer = build(config(*files, tmp_path / str(shift), *varied_reward))
        trainer.estimator = ShiftsTracker(trainer.estimator, shift)
        run(trainer)
        return trainer.estimator.seen[1]

    responses, plain = step_two(0.0)
    # The first update is the same in both runs, so step 2 has the same responses.
    same_responses, shifted = step_two(-0.3)
    assert torch.equal(responses, same_responses)
    assert not torch.allclose(plain, shifted)


class ShiftsTracker:
    """An estimator that remembers responses and advantages, and moves the tracked quantiles after its first step."""

    def __init__(self, estimator, shift: float) -> None:
        self.estimator, self.shift, self.seen = estimator, shift, []

    def __getattr__(self, name):
        return getattr(self.estimator, name)

    def __call__(self, batch):
        output = self.estimator(batch)
        if not self.seen:
            for parameter in self.estimator.tracker.parameters():
                parameter.data += self.shift
        self.seen.append((batch["responses"], output.advantages))
        return output


@pytest.mark.parametrize(
    "options",
    [
        ["algorithm.adv_estimator=grpo_bundle_RVaR_quantile_tracking"],
        ["algorithm.adv_estimator=remax"],
        ["algorithm.adv_estimator=grpo", "actor_rollout_ref.actor.policy_loss.loss_mode=kl_cov"],
        ["algorithm.adv_estimator=rloo", "actor_rollout_ref.actor.policy_loss.loss_mode=gspo",
         "actor_rollout_ref.actor.loss_agg_mode=seq-mean-token-mean"],
        ["algorithm.adv_estimator=grpo", "algorithm.use_kl_in_reward=True", "algorithm.kl_ctrl.type=adaptive",
         "actor_rollout_ref.actor.use_kl_loss=True"],
    ],
    ids=["published", "remax", "kl_cov", "gspo", "kl"],
)  # fmt: skip
def test_other_estimators_and_losses_run_through_the_trainer(files, tmp_path, varied_reward, options):
    steps = train(config(*files, tmp_path, *varied_reward, "trainer.total_training_steps=2", *options))
    assert steps[-1]["step"] == 2 and steps[-1]["actor/skipped_updates"] == 0
    assert steps[-1]["actor/grad_norm"] > 0
    if "algorithm.use_kl_in_reward=True" in options:
        # The policy starts as the reference.
        assert abs(steps[1]["actor/reward_kl_penalty"]) < 1e-6 < abs(steps[2]["actor/reward_kl_penalty"])
        assert steps[2]["actor/kl_loss"] > 0
        assert steps[2]["actor/reward_kl_penalty_coeff"] < steps[1]["actor/reward_kl_penalty_coeff"]


def test_rollout_correction_runs_through_the_trainer(files, tmp_path, varied_reward):
    """With an engine that agrees with the trainer, weights are 1 and nothing is rejected: the run is the same to
    rounding; and so is the first step of a run that takes the engine's log-probs for the old ones."""
    key = "algorithm.rollout_correction"
    plain = train(config(*files, tmp_path / "plain", *varied_reward))
    weighted = [f"{key}.rollout_is=sequence", f"{key}.rollout_rs=geometric", f"{key}.rollout_rs_threshold=1.01"]
    corrected = train(config(*files, tmp_path / "corrected", *varied_reward, *weighted))
    bypass = train(config(*files, tmp_path / "bypass", *varied_reward, f"{key}.bypass_mode=True"))
    for one, other in zip(plain[1:], corrected[1:], strict=True):
        assert one["critic/score/mean"] == other["critic/score/mean"]
        assert one["actor/pg_loss"] == pytest.approx(other["actor/pg_loss"], abs=1e-5)
        assert other["rollout_corr/rollout_is_mean"] == pytest.approx(1, abs=1e-4)
        assert other["rollout_corr/rollout_rs_seq_masked_fraction"] == 0
    assert plain[1]["actor/pg_loss"] == pytest.approx(bypass[1]["actor/pg_loss"], abs=1e-5)
    assert plain[1]["actor/entropy"] == pytest.approx(bypass[1]["actor/entropy"], abs=0.05)  # measured in the update
    assert "training/rollout_probs_diff_mean" not in bypass[1]


def test_old_log_probs_are_left_to_a_single_update(files, tmp_path, varied_reward, monkeypatch):
    """With one update a step the pass before it is skipped, and nothing that is logged changes but by rounding."""
    one_update = ["actor_rollout_ref.actor.ppo_mini_batch_size=12", "trainer.total_training_steps=2"]
    skipped = train(config(*files, tmp_path / "skipped", *varied_reward, *one_update))
    monkeypatch.setattr(ray_trainer, "old_log_probs_differ", lambda *args: True)
    passed = train(config(*files, tmp_path / "passed", *varied_reward, *one_update))
    for one, other in zip(skipped[1:], passed[1:], strict=True):
        assert one.keys() == other.keys()
        for name, value in one.items():
            assert other[name] == pytest.approx(value, rel=1e-3, abs=2e-6), name
    monkeypatch.undo()
    trainer = build(config(*files, tmp_path / "calls", *varied_reward, *one_update))
    trainer.start()
    monkeypatch.setattr(trainer.actor.worker.actor, "log_prob", None)  # the pass
    trainer.step = 1
    trainer.train_step(Timer())
    trainer.actor.shutdown()


@pytest.mark.slow  # three runs
def test_adapters_train_and_leave_the_engine_merged(files, tmp_path, varied_reward):
    """LoRA: only adapters have moments; the rollout's copy and the export have the merged weights; the reference policy
    is the model without adapters; a resumed run goes on bit for bit."""
    lora = ["actor_rollout_ref.model.lora_rank=4", "algorithm.use_kl_in_reward=True", "trainer.save_freq=1"]
    steps = train(config(*files, tmp_path / "run", *varied_reward, *lora))
    assert steps[1]["actor/reward_kl_penalty"] == pytest.approx(0, abs=1e-6)  # nothing has moved yet
    assert steps[3]["actor/reward_kl_penalty"] != 0
    assert max(step["training/rollout_probs_diff_max"] for step in steps[1:]) < 1e-5
    before = dict(AutoModelForCausalLM.from_pretrained(files[1]).named_parameters())
    after = weights(tmp_path / "run", 3)
    assert before.keys() == after.keys()
    moved = {name for name in after if not torch.equal(before[name], after[name])}
    assert moved and all("_proj.weight" in name for name in moved)
    train(config(*files, tmp_path / "stopped", *varied_reward, *lora, "trainer.total_training_steps=2"))
    assert train(config(*files, tmp_path / "stopped", *varied_reward, *lora))[3] == steps[3]


def test_sync_and_async_scoring_give_the_same_run(files, tmp_path, varied_reward):
    one = train(config(*files, tmp_path / "async", *varied_reward))
    assert train(config(*files, tmp_path / "sync", *varied_reward, "actor_rollout_ref.rollout.mode=sync")) == one


def test_dynamic_sampling_fills_the_batch_with_whole_bundles(files, tmp_path):
    """The reward depends on the first character, so some questions have equal responses. The overlong penalty is on."""
    (tmp_path / "even.py").write_text(
        "def compute_score(data_source, solution_str, ground_truth, extra_info=None):\n"
        "    return float(ord(solution_str[0]) % 4 == 0) if solution_str else 0.0\n"
    )
    options = [f"custom_reward_function.path={tmp_path}/even.py", "algorithm.filter_groups.enable=True"]
    options += ["data.gen_batch_size=6", "+reward_model.reward_kwargs.overlong_buffer_cfg.enable=True"]
    options += ["reward_model.reward_manager=dapo"]
    options += ["reward_model.reward_kwargs.overlong_buffer_cfg.len=4", "actor_rollout_ref.rollout.n=2"]
    steps = train(config(*files, tmp_path / "run", *options))
    assert any(step["filter_groups/num_gen_batches"] > 2 for step in steps[1:])
    assert all(0 < step["filter_groups/kept_share"] < 1 for step in steps[1:])
    assert all(step["reward/overlong_penalty"] < 0 for step in steps[1:])
    for number in (1, 2, 3):
        rows = (tmp_path / "run" / "samples" / f"train_step_{number}.jsonl").read_text().splitlines()
        bundles = collections.Counter(json.loads(row)["bundle"] for row in rows)
        assert list(bundles.values()) == [3 * 2] * 4
    with pytest.raises(RuntimeError, match="step 1: 1 batches of questions .* rows: the questions are too easy or too"):
        train(config(*files, tmp_path / "short", *options, "algorithm.filter_groups.max_num_gen_batches=1"))


def test_the_readmes_estimator_and_reward_work(files, tmp_path):
    blocks = re.findall(
        r"```python\n(.*?)```", (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8"), re.DOTALL
    )
    for name, block in zip(("reward.py", "function.py", "estimator.py"), blocks, strict=True):
        (tmp_path / name).write_text(block)
    plugins = f"trainer.plugins=[{tmp_path}/function.py,{tmp_path}/estimator.py]"
    options = [f"custom_reward_function.path={tmp_path}/reward.py", plugins]
    load_plugins([str(tmp_path / "function.py")])
    function = get_adv_estimator("centred", AlgorithmConfig("centred"), rollout_n=2, seed=1)
    batch = {"token_level_rewards": [[0.0, 1.0], [0.0, 0.0]], "response_mask": [[True, True], [True, False]]}
    batch = DataProto.from_dict({name: torch.tensor(rows) for name, rows in batch.items()} | {"uid": ["a", "a"]})
    assert function(batch).advantages.tolist() == [[0.5, 0.5], [-0.5, 0.0]]
    options += ["algorithm.adv_estimator=running_mean", "trainer.save_freq=3"]
    steps = train(config(*files, tmp_path / "run", *options))
    state = torch.load(tmp_path / "run/checkpoints/global_step_3/trainer.pt", weights_only=False)
    assert state["estimator"] == {"mean": steps[-1]["running_mean/value"]}


def test_padded_rows_give_the_same_first_step(files, tmp_path, varied_reward):
    packed = train(config(*files, tmp_path / "packed", *varied_reward))
    padding = ["actor_rollout_ref.model.use_remove_padding=False"]
    assert_agree(train(config(*files, tmp_path / "padded", *varied_reward, *padding))[1], packed[1])


@pytest.mark.slow  # writes and reads a trace of everything
def test_chosen_steps_are_profiled(files, tmp_path, varied_reward, capsys):
    steps = train(config(*files, tmp_path, *varied_reward, "trainer.profile_steps=[2]"))
    assert len(steps) == 4 and "profile of step 2" in capsys.readouterr().out
    assert sorted(path.name for path in (tmp_path / "profile").iterdir()) == ["step_2.json.gz", "step_2.txt"]
    events = json.loads(gzip.decompress((tmp_path / "profile" / "step_2.json.gz").read_bytes()))["traceEvents"]
    assert any(event.get("name") == "aten::addmm" or event.get("name") == "aten::mm" for event in events)
    assert "Self CPU" in (tmp_path / "profile" / "step_2.txt").read_text()


@pytest.mark.slow  # starts Ray workers
def test_workers_that_share_packed_rows_give_the_same_first_step(ray_cluster, files, tmp_path, varied_reward):
    """Ulysses: two workers, two attention heads, one key-value head."""
    local = train(config(*files, tmp_path / "local", *varied_reward, "actor_rollout_ref.actor.use_kl_loss=True"))
    two = ["trainer.worker_group=ray", "trainer.n_gpus_per_node=2", "actor_rollout_ref.actor.use_kl_loss=True"]
    two += ["actor_rollout_ref.actor.ulysses_sequence_parallel_size=2", "trainer.profile_steps=[1]"]
    assert_agree(train(config(*files, tmp_path / "shared", *varied_reward, *two))[1], local[1])
    assert gzip.decompress((tmp_path / "shared" / "profile" / "step_1.json.gz").read_bytes())  # worker 0's alone


def assert_agree(step: dict, expected: dict) -> None:
    """To rounding."""
    for name, value in expected.items():
        if name.startswith(("actor/", "critic/", "riskpo/", "quantile")):
            assert step[name] == pytest.approx(value, rel=1e-3, abs=1e-6), name


@pytest.mark.slow  # starts Ray workers
def test_ray_equals_local_bit_for_bit_and_two_workers_to_rounding(ray_cluster, files, tmp_path, varied_reward):
    local = train(config(*files, tmp_path / "local", *varied_reward))
    ray = train(config(*files, tmp_path / "ray", *varied_reward, "trainer.worker_group=ray"))
    assert ray == local
    two = train(
        config(*files, tmp_path / "two", *varied_reward, "trainer.worker_group=ray", "trainer.n_gpus_per_node=2")
    )
    assert_agree(two[1], local[1])


@pytest.mark.slow  # starts Ray workers
def test_two_ray_workers_resume_bit_for_bit(ray_cluster, files, tmp_path, varied_reward):
    options = [*varied_reward, "trainer.worker_group=ray", "trainer.n_gpus_per_node=2", "trainer.save_freq=2"]
    options += ["trainer.test_freq=2", "trainer.total_training_steps=4"]
    whole = train(config(*files, tmp_path / "whole", *options))
    train(config(*files, tmp_path / "parts", *options, "trainer.total_training_steps=2"))
    assert train(config(*files, tmp_path / "parts", *options)) == whole
    for name, tensor in weights(tmp_path / "whole", 4).items():
        assert torch.equal(weights(tmp_path / "parts", 4)[name], tensor), name
