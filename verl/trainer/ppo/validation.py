"""Measures the policy on the validation questions."""

from verl.trainer.config.schema import PPOConfig
from verl.trainer.evaluation.statistics import process_validation_metrics
from verl.trainer.ppo.generation import sample_to_measure
from verl.trainer.ppo.reward import RewardManager
from verl.utils.dataset.rl_dataset import RLHFDataset
from verl.utils.tracking import Tracking
from verl.workers.rollout.base import Rollout, SamplingParams


class Validator:
    """Called with a step: samples `val_kwargs.n` responses to every validation question and scores them.

    Returns the metrics; the samples go to the run's samples/ folder.
    """

    def __init__(
        self,
        config: PPOConfig,
        rollout: Rollout,
        dataset: RLHFDataset,
        reward: RewardManager,
        tracking: Tracking,
    ) -> None:
        self.config = config
        self.rollout = rollout
        self.dataset = dataset
        self.reward = reward
        self.tracking = tracking

    def __call__(self, step: int) -> dict[str, float]:
        sampling = self.config.actor_rollout_ref.rollout.val_kwargs
        params = SamplingParams(
            self.config.data.max_response_length,
            sampling.temperature,
            sampling.top_p,
            sampling.top_k,
            greedy=not sampling.do_sample or sampling.temperature == 0,
        )
        trainer, indices = self.config.trainer, range(len(self.dataset))
        batch, texts, rollout_metrics = sample_to_measure(
            self.rollout, self.dataset, indices, sampling.n, params, trainer.seed, step
        )
        _, extras, metrics = self.reward(batch, texts)
        self.tracking.log_samples(
            step,
            [
                {"prompt": prompt, "response": text, "reward": float(score), "answer": pred}
                for prompt, text, score, pred in zip(
                    batch["prompt_text"], texts, extras["score"], extras["pred"], strict=True
                )
            ],
            "val",
        )
        measured = process_validation_metrics(
            batch["data_source"], batch["question_id"], batch["level"], extras["acc"], extras["pred"].tolist()
        )
        metrics |= rollout_metrics
        return measured | {f"val-aux/{name}": value for name, value in metrics.items()}
