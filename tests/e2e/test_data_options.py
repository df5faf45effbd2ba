"""A run over a mixture of files, with a data set class and a reward manager, and functions, of one's own."""

import json

import pytest

from tests.e2e.runs import config, logged, train
from verl.trainer.main_ppo import build, run

DATA = """
from verl.utils.dataset.rl_dataset import RLHFDataset

class Named(RLHFDataset):
    def row(self, index, record):
        row = super().row(index, record)
        return row | {"file": self.place(index), "extra_info": {"length": len(row["prompt_ids"])}}
"""
REWARD = """
async def compute_score(data_sources, solution_strs, ground_truths, extra_infos):
    return [{"score": len(response) % 5 / 5, "length": extra_info["length"]}
            for response, extra_info in zip(solution_strs, extra_infos, strict=True)]
"""
PLUGIN = """
from verl.trainer.ppo.registry import register_reward_manager
from verl.trainer.ppo.reward import BatchRewardManager, DapoRewardManager

@register_reward_manager("dapo_batch")
class DapoBatch(DapoRewardManager, BatchRewardManager):
    batch_size = 5
"""


@pytest.mark.slow  # trains twice
def test_a_mixture_with_a_class_and_a_manager_of_ones_own_resumes_exactly(arithmetic_data, tiny_model, tmp_path):
    for name, source in (("data", DATA), ("reward", REWARD), ("plugin", PLUGIN)):
        (tmp_path / f"{name}.py").write_text(source)
    files = f"data.train_files=[{arithmetic_data}/train.parquet,{arithmetic_data}/val.parquet]"
    options = [files, "data.train_weights=[3,1]", f"data.custom_cls.path={tmp_path}/data.py"]
    options += ["data.custom_cls.name=Named", f"trainer.plugins=[{tmp_path}/plugin.py]"]
    options += ["reward_model.reward_manager=dapo_batch", f"custom_reward_function.path={tmp_path}/reward.py"]
    options += ["reward_model.reward_kwargs.overlong_buffer_cfg.enable=True"]
    options += ["reward_model.reward_kwargs.overlong_buffer_cfg.len=4", "reward_model.num_workers=1"]
    options += ["trainer.save_freq=2", "trainer.total_training_steps=4", "trainer.log_val_generations=0"]

    def of(folder, *extra):
        return config(arithmetic_data, tiny_model, tmp_path / folder, *options, *extra)

    whole = train(of("whole"))
    assert all(step["reward/overlong_penalty"] < 0 and step["reward_extra/length/mean"] > 0 for step in whole[1:])
    assert all(step["reward/exceptions"] == 0 for step in whole[1:])

    trainer = build(of("stopped"))
    step = trainer.train_step

    def interrupted(*args):
        if trainer.step == 3:
            raise KeyboardInterrupt
        return step(*args)

    trainer.train_step = interrupted
    with pytest.raises(KeyboardInterrupt):
        run(trainer)
    assert len(logged(tmp_path / "stopped")) < len(whole)
    with pytest.raises(ValueError, match=r"data.train_weights.* is \[36, 36\], in the checkpoint it is \[54, 18\]"):
        build(of("stopped", "data.train_weights=[1,1]"))
    assert train(of("stopped")) == whole
    prompts = [
        [json.loads(line)["prompt"] for line in (tmp_path / folder / "samples/train_step_4.jsonl").open()]
        for folder in ("whole", "stopped")
    ]
    assert prompts[0] == prompts[1]
