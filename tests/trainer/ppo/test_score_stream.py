"""Scoring that begins while other responses are still generated."""

import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from verl.protocol import DataProto, object_array
from verl.trainer.config.schema import RewardModelConfig
from verl.trainer.ppo.reward import RewardFunction, RewardManager
from verl.trainer.ppo.score_stream import ScoreStream
from verl.workers.rollout.base import GenerationOutput


class Letters:
    """A tokenizer: token 1 is `a`, 2 is `b`, ..."""

    def batch_decode(self, rows: list[list[int]], skip_special_tokens: bool) -> list[str]:
        assert skip_special_tokens
        return ["".join(chr(96 + token) for token in row) for row in rows]


class Function(RewardFunction):
    """A reward function that is given here rather than by its file."""

    @property
    def function(self) -> Callable[..., Any]:
        return self.kwargs["function"]

    def call(self, request: Any) -> Any:
        try:
            return self.function(request)
        except ArithmeticError as error:
            return error


def manager(function: Callable[[Any], Any]) -> RewardManager:
    return RewardManager(Function("own.py", "function", {"function": function}), RewardModelConfig())


def questions(n: int) -> DataProto:
    return DataProto.from_dict(
        {
            "data_source": object_array(["source"] * n),
            "ground_truth": object_array([f"truth {i}" for i in range(n)]),
            "extra_info": object_array([{"index": i} for i in range(n)]),
        }
    )


def responses(n: int) -> GenerationOutput:
    """Row i: i + 1 tokens, all of them i + 1, then the padding of this engine, 9."""
    output = GenerationOutput.empty(n, max_tokens=6, pad_token_id=9)
    for row in range(n):
        output.responses[row, : row + 1] = row + 1
        output.lengths[row] = row + 1
    return output


TEXTS = ["a", "bb", "ccc", "dddd"]


@pytest.mark.parametrize("parts", [[[0, 1, 2, 3]], [[2], [3, 0], [1]], [[3], [2], [1], [0]]])
def test_the_outcomes_are_those_of_the_whole_batch_in_its_order(parts):
    """Row i's score is made of its own question and its own response, in whatever parts they come."""

    def score(request):
        index = request.extra_info["index"]
        assert request.ground_truth == f"truth {index}" and request.data_source == "source"
        return {"score": 10 * index + len(request.solution_str), "pred": request.solution_str}

    reward = manager(score)
    stream = ScoreStream(reward, Letters(), questions(4))
    for rows in parts:
        stream.add(np.array(rows), responses(4))
    texts, outcomes = stream.finish()
    assert texts == TEXTS
    assert [outcome.score for outcome in outcomes] == [1, 12, 23, 34]
    assert outcomes == reward.outcomes(reward.requests(questions(4), TEXTS))


def test_a_response_is_scored_before_the_others_have_come():
    first_is_scored = threading.Event()

    def score(request):
        first_is_scored.set()
        return 1.0

    stream = ScoreStream(manager(score), Letters(), questions(4))
    stream.add(np.array([2]), responses(4))
    assert first_is_scored.wait(timeout=30)
    stream.add(np.array([0, 1, 3]), responses(4))
    assert len(stream.finish()[1]) == 4


def test_handing_in_responses_does_not_wait_for_their_scores():
    """Generation goes on while a slow reward function scores; `finish` waits for it."""
    may_score = threading.Event()

    def score(request):
        assert may_score.wait(timeout=30)
        return 2.0

    stream = ScoreStream(manager(score), Letters(), questions(4))
    for row in range(4):
        stream.add(np.array([row]), responses(4))
    assert not any(future.done() for _, future in stream.scored)
    may_score.set()
    assert [outcome.score for outcome in stream.finish()[1]] == [2.0] * 4


def test_what_is_scored_is_what_had_come():
    """The output goes on being filled: a response is read when it is handed in, without what is not yet a response."""
    output = responses(4)
    stream = ScoreStream(manager(lambda request: len(request.solution_str)), Letters(), questions(4))
    stream.add(np.array([0, 1]), output)
    output.responses[:2] = 5
    stream.add(np.array([2, 3]), output)
    texts, outcomes = stream.finish()
    assert texts == TEXTS and [outcome.score for outcome in outcomes] == [1, 2, 3, 4]


def test_a_reward_that_raises_is_counted_for_its_row():
    def score(request):
        return 1 / (request.extra_info["index"] - 2)

    reward = manager(score)
    stream = ScoreStream(reward, Letters(), questions(4))
    stream.add(np.array([3, 2]), responses(4))
    stream.add(np.array([1, 0]), responses(4))
    texts, outcomes = stream.finish()
    assert [outcome.score for outcome in outcomes] == [-0.5, -1.0, 0.0, 1.0]
    assert [outcome.failure for outcome in outcomes] == [None, None, "exceptions", None]
    mask = responses(4).columns()["response_mask"]
    scores, _, metrics = reward.assemble(mask, texts, outcomes)
    assert metrics["reward/exceptions"] == 1
    torch.testing.assert_close(scores.sum(1), torch.tensor([-0.5, -1.0, 0.0, 1.0]))
    assert [int(row.nonzero()) for row in scores[[0, 1, 3]]] == [0, 1, 3]  # at the last token


def test_an_error_outside_the_reward_function_is_not_hidden():
    def score(request):
        raise MemoryError("no room for a scorer")

    stream = ScoreStream(manager(score), Letters(), questions(1))
    stream.add(np.array([0]), responses(1))
    with pytest.raises(MemoryError, match="no room"):
        stream.finish()


def test_stuck_calls_in_several_parts_are_waited_for_together():
    """With a pool: a part that waits for a stuck call does not keep the next from its turn."""
    everyone_waits = threading.Barrier(3)

    class Pool:
        """Answers when three parts have been handed over."""

        def evaluate(self, calls: list[Any]) -> list[float]:
            everyone_waits.wait(timeout=20)
            return [1.0] * len(calls)

    stream = ScoreStream(
        RewardManager(Function("own.py", "function", {}), RewardModelConfig(), Pool()), Letters(), questions(6)
    )
    for start in (0, 2, 4):
        stream.add(np.arange(start, start + 2), responses(6))
    assert [outcome.score for outcome in stream.finish()[1]] == [1.0] * 6
