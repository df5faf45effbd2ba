"""TRL's side of `benchmarks/trl_step.py`: its GRPOTrainer, a step at a time. Imports nothing of this project's package.

    python benchmarks/trl_worker.py MODEL DATA THREADS key=value ...

`key=value` are arguments of GRPOConfig, the values as JSON.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

sys.path.append(str(Path(__file__).resolve().parents[1]))  # run as a script, it finds only its own folder

from benchmarks.trl_turns import Turns, compute_score


class TakeTurns(TrainerCallback):
    """Waits at the start of each step, and notes what the step did."""

    def __init__(self, turns: Turns) -> None:
        self.turns = turns
        self.seen = (0, 0)  # updates and tokens before the step

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not self.turns.begin():
            # Nothing is saved or logged after the last step: an ordinary end would train one more step.
            sys.exit()
        self.seen = (state.global_step, state.num_input_tokens_seen)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        facts = self.turns.facts
        facts["updates"] = state.global_step - self.seen[0]
        facts["prompt_tokens"] = int(state.num_input_tokens_seen - self.seen[1]) - sum(facts["lengths"])
        facts["phases"]["update_actor"] = self.turns.elapsed() - sum(facts["phases"].values())


class Reward:
    """The reward function. It also notes when generation was over and how long the responses are."""

    __name__ = "count"

    def __init__(self) -> None:
        self.turns: Turns | None = None

    def __call__(self, completions: list[str], completion_ids: list[list[int]], **columns: Any) -> list[float]:
        assert self.turns is not None
        seconds = self.turns.elapsed()
        scores = [compute_score("", text, "") for text in completions]
        self.turns.facts |= {
            "lengths": [len(ids) for ids in completion_ids],
            "score": sum(scores) / len(scores),
            "phases": {"gen": seconds, "reward": self.turns.elapsed() - seconds},
        }
        return scores


def main(model: str, data: str, threads: str, *settings: str) -> None:
    torch.set_num_threads(int(threads))
    config = {key: json.loads(value) for key, _, value in (setting.partition("=") for setting in settings)}
    tokenizer = AutoTokenizer.from_pretrained(model)
    rows = [json.loads(line)["prompt"] for line in Path(data).read_text().splitlines()]
    prompts = [tokenizer.apply_chat_template(row, add_generation_prompt=True, tokenize=False) for row in rows]
    reward = Reward()
    trainer = GRPOTrainer(
        AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32),
        reward,
        GRPOConfig(**config),
        Dataset.from_dict({"prompt": prompts}),
        processing_class=tokenizer,
    )
    turns = Turns(lambda folder: trainer.model.save_pretrained(folder))
    turns.facts["threads"] = torch.get_num_threads()
    reward.turns = turns
    trainer.add_callback(TakeTurns(turns))
    trainer.train()


if __name__ == "__main__":
    main(*sys.argv[1:])
