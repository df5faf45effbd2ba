"""RiskPO's side of `benchmarks/trl_step.py`: the trainer of `verl.trainer.main_ppo`, a step at a time.

python benchmarks/trl_ours.py key=value ...
"""

import contextlib
import sys
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).resolve().parents[1]))  # run as a script, it finds only its own folder

from benchmarks.trl_turns import Turns
from verl.protocol import DataProto
from verl.trainer.config import load_config
from verl.trainer.main_ppo import build, run
from verl.utils.timer import Timer


class OverError(Exception):
    """The measurement is over: the only way out of `fit` before its last step, which would validate."""


def main(overrides: list[str]) -> None:
    trainer = build(load_config(overrides))
    train_step = trainer.train_step
    turns = Turns(trainer.actor.export)
    if trainer.config.trainer.worker_group == "local":
        turns.facts["threads"] = torch.get_num_threads()

    def step(timer: Timer) -> tuple[DataProto, dict[str, float]]:
        if not turns.begin():
            raise OverError
        batch, metrics = train_step(timer)
        turns.facts |= {
            "lengths": batch["response_mask"].sum(1).tolist(),
            "prompt_tokens": int(batch["prompt_length"].sum()),
            "updates": batch.meta_info["n_mini_batches"] - int(metrics["actor/skipped_updates"]),
            "score": metrics["critic/score/mean"],
            "phases": {name: seconds for name, seconds in timer.seconds.items() if name != "step"},
        }
        return batch, metrics

    setattr(trainer, "train_step", step)  # noqa: B010 - mypy refuses to assign a method
    with contextlib.suppress(OverError):
        run(trainer)


if __name__ == "__main__":
    main(sys.argv[1:])
