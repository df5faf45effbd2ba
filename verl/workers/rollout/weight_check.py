"""Do the engines compute with the weights that were trained? Their log-probs of a few sequences, compared with ours."""

import numpy as np
import torch

from verl.protocol import DataProto, object_array
from verl.single_controller.worker_group import WorkerGroup
from verl.trainer.ppo.generation import expand
from verl.utils.checksum import mismatches
from verl.workers.rollout.base import SamplingParams, ignore
from verl.workers.rollout.engine_rollout import EngineRollout

MIN_TOKENS = 1000
MAX_TOKENS = 256  # of a response: the engines hold most of the memory meanwhile
THRESHOLDS = {torch.float32: 1e-3, torch.bfloat16: 0.05, torch.float16: 0.05}
TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 0.02, torch.float16: 0.01}  # of a checksum, relative to the norm
MAX_NAMES = 8


class StaleWeights(RuntimeError):
    """An engine computes with other weights than the trainer's. One line names it and the weights that differ."""


class WeightCheck:
    """`prepare` before the first transfer, then call it after any.

    The sequences are sampled once from the model as it was loaded. Engine and trainer compute in different ways, so a
    mean difference is there from the start; what counts is how much larger it has become.
    """

    def __init__(self, rollout: EngineRollout, actor: WorkerGroup, seed: int, max_tokens: int) -> None:
        self.rollout = rollout
        self.actor = actor
        self.seed = seed
        self.max_tokens = min(max_tokens, MAX_TOKENS)

    def prepare(self, questions: DataProto) -> None:
        """Choose the sequences, at least 1,000 tokens, as responses to these questions, and measure the difference
        between engines and trainer that both have loaded the same weights."""
        names = object_array([f"weight-check-{i}" for i in range(len(questions))])
        questions = questions.with_columns(uid=names)
        n = -(-MIN_TOKENS // int(questions["prompt_length"].sum()))  # a response has at least one token
        batch = expand(questions, n, self.seed, step=0)
        output, _ = self.rollout.generate(batch, SamplingParams(self.max_tokens), n, ignore)
        width, lengths = batch["prompts"].shape[1], batch["prompt_length"].tolist()
        self.sequences = [
            np.concatenate([prompt[width - length :].numpy(), response[:end].numpy()])
            for prompt, length, response, end in zip(
                batch["prompts"], lengths, output.responses, output.lengths.tolist(), strict=True
            )
        ]
        self.baseline = self._differences()

    def __call__(self) -> dict[str, float]:
        """`rollout/weight_check_diff`: the largest increase of an engine's mean difference. StaleWeights if it is above
        the threshold of the engines' dtype."""
        increase = [now - then for now, then in zip(self._differences(), self.baseline, strict=True)]
        worst = int(np.argmax(increase))
        if not increase[worst] < THRESHOLDS[self.rollout.dtype]:
            raise StaleWeights(self._explain(worst, increase[worst]))
        return {"rollout/weight_check_diff": increase[worst]}

    def _differences(self) -> list[float]:
        """Of each engine: mean absolute difference of its log-probs from the trainer's."""
        ours = self._trainer_log_probs()
        return [
            float(np.abs(np.concatenate(theirs) - ours).mean())
            for theirs in self.rollout.pool.call_all("score", self.sequences)
        ]

    def _trainer_log_probs(self) -> np.ndarray:
        """Log-probs of every token after a sequence's first, one after the other."""
        tokens = [torch.from_numpy(sequence) for sequence in self.sequences]
        responses = torch.nn.utils.rnn.pad_sequence([t[1:] for t in tokens], batch_first=True)
        lengths = torch.tensor([len(t) - 1 for t in tokens])
        mask = torch.arange(responses.shape[1]) < lengths[:, None]
        batch = DataProto.from_dict(
            {
                "prompts": torch.stack([t[:1] for t in tokens]),
                "prompt_length": torch.ones(len(tokens), dtype=torch.int64),
                "responses": responses,
                "response_mask": mask,
            },
            {"temperature": 1.0},
        )
        return self.actor.compute_log_prob(batch)["old_log_probs"][mask].numpy()

    def _explain(self, engine: int, increase: float) -> str:
        sums, fused = self.rollout.pool.call_all("checksums")[engine]
        found = mismatches(sums, self.actor.weight_checksums(self.rollout.dtype), fused)
        named = [f"{name} ({off:.2g})" for name, off in found if off > TOLERANCES[self.rollout.dtype]]
        more = f" and {len(named) - MAX_NAMES} more" if len(named) > MAX_NAMES else ""
        which = f"{', '.join(named[:MAX_NAMES])}{more} differ from the trainer's" if named else "every checksum agrees"
        return (
            f"vLLM engine {engine} does not compute with the trained weights: on average its log-probs differ from the "
            f"trainer's by {increase:.3g} more than after loading (limit {THRESHOLDS[self.rollout.dtype]:g}); {which}"
        )
