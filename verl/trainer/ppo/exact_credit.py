"""The expectation of a score's advantage over all pairings of responses, in closed form.

Responses to different questions are independent, so given the batch, response j of question i earns

    a_i(j) = E[A(r_ij + S_-i)],    S_-i the sum of one uniformly chosen response of each other question of the bundle,

the Rao-Blackwellised form of the advantage of one random pairing. It is computed over the possible partial sums, of
which verifiable rewards leave few: a forward pass gives the law of the sum of the first questions, a backward pass the
expected advantage given that sum. The cost is M * B * U * S for M bundles of B questions, U distinct rewards and S
distinct sums, whatever the number of responses. Rewards are (M, B, G) with a mask of those that exist; float64.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from verl.trainer.ppo.risk import score_advantage

# Most distinct sums followed; beyond it `permute` is the practical estimator.
MAX_SUPPORT = 512
# Sums closer than this, relative to the largest possible one, are one point reached by different float additions.
SAME_SUM = 1e-12
# Bundles handled at once, in table entries: bounds the memory beside the batch.
CHUNK_ENTRIES = 1 << 22


@dataclass(frozen=True)
class SumTable:
    """The distinct sums of k rewards out of U distinct ones.

    sums[k]: (S_k,) float64 ascending, for k = 0..B. add[k]: (S_k, U) int64, where in sums[k + 1] the sum stands after
    a reward is added, for k = 0..B-1.
    """

    rewards: torch.Tensor
    sums: list[torch.Tensor]
    add: list[torch.Tensor]

    @classmethod
    def build(cls, rewards: torch.Tensor, bundle_size: int, max_support: int = MAX_SUPPORT) -> "SumTable | None":
        """From the distinct rewards (U,); None if there are more than `max_support` sums."""
        if len(rewards) > max_support:
            return None
        tolerance = SAME_SUM * bundle_size * float(rewards.abs().max())
        sums, add = [torch.zeros(1, dtype=torch.float64)], []
        for _ in range(bundle_size):
            reached = sums[-1][:, None] + rewards  # (S_k, U)
            ascending, order = reached.flatten().sort()
            new = ascending.diff(prepend=ascending[:1] - 1 - 2 * tolerance) > tolerance
            if int(new.sum()) > max_support:
                return None
            position = torch.empty_like(order)
            position[order] = new.cumsum(0) - 1
            sums.append(ascending[new])
            add.append(position.view(reached.shape))
        return cls(rewards, sums, add)

    @property
    def entries(self) -> int:
        return sum(len(s) for s in self.sums)


@dataclass(frozen=True)
class EncodedRewards:
    """Rewards (M, B, G) by their distinct values.

    table: the sums of `bundle_size` of them. code: (M, B, G) int64, which distinct reward, 0 where there is none.
    count: (M, B, U) float64, how many responses of each question have it.
    """

    table: SumTable
    code: torch.Tensor
    count: torch.Tensor

    @classmethod
    def encode(
        cls, rewards: torch.Tensor, valid: torch.Tensor, bundle_size: int, max_support: int = MAX_SUPPORT
    ) -> "EncodedRewards | None":
        """None if the bundle scores have more than `max_support` possible values.

        Rewards stored in float32 are read as the shortest decimals that are stored so where that leaves fewer sums:
        multiples of 0.1 make few, multiples of 0.1f many.
        """
        distinct, inverse = np.unique(rewards.double()[valid].numpy(), return_inverse=True)
        if len(distinct) > max_support:
            return None
        values = torch.from_numpy(distinct)
        tables = [SumTable.build(v, bundle_size, max_support) for v in (values, _as_decimals(values))]
        table = min((t for t in tables if t is not None), key=lambda t: t.entries, default=None)
        if table is None:
            return None
        code = torch.zeros(valid.shape, dtype=torch.int64)
        code[valid] = torch.from_numpy(inverse.astype(np.int64))
        m, b, _ = valid.shape
        question = torch.arange(m * b).view(m, b, 1)
        count = torch.bincount((question * len(distinct) + code)[valid], minlength=m * b * len(distinct))
        return cls(table, code, count.view(m, b, len(distinct)).double())

    def chunks(self, entries_per_bundle: int) -> list[slice]:
        step = max(1, CHUNK_ENTRIES // entries_per_bundle)
        return [slice(start, start + step) for start in range(0, len(self.count), step)]


def _as_decimals(values: torch.Tensor) -> torch.Tensor:
    single = values.numpy().astype(np.float32)
    decimals = np.array([float(str(v)) for v in single])
    return torch.from_numpy(np.where(single.astype(np.float64) == values.numpy(), decimals, values.numpy()))


def _encode(rewards: torch.Tensor, valid: torch.Tensor | None, bundle_size: int, max_support: int) -> EncodedRewards:
    valid = torch.ones(rewards.shape, dtype=torch.bool) if valid is None else valid
    encoded = EncodedRewards.encode(rewards, valid, bundle_size, max_support)
    if encoded is None:
        raise ValueError(
            f"bundle scores have more than {max_support} possible values; use algorithm.risk.pairing=permute"
        )
    return encoded


# ------------------------------------------------------------------------------------ bundles of several questions
def exact_score_distribution(
    rewards: torch.Tensor, valid: torch.Tensor | None = None, max_support: int = MAX_SUPPORT
) -> tuple[torch.Tensor, torch.Tensor]:
    """The law of each bundle's score over all pairings of its responses.

    rewards (M, B, G), valid (M, B, G) bool (default: all). Returns the support (S,) and the probabilities (M, S).
    ValueError if the support would exceed `max_support`.
    """
    return score_distribution(_encode(rewards, valid, rewards.shape[1], max_support))


def exact_credit(
    rewards: torch.Tensor,
    q_alpha: torch.Tensor | float,
    q_beta: torch.Tensor | float,
    region_weights: Sequence[float],
    valid: torch.Tensor | None = None,
    max_support: int = MAX_SUPPORT,
) -> torch.Tensor:
    """E[A(r_ij + S_-i)] of each response, the mean of its advantage over all pairings, (M, B, G) float64.

    rewards (M, B, G), valid (M, B, G) bool (default: all); 0 where not valid. `q_alpha`, `q_beta` and `region_weights`
    define A (`risk.score_advantage`). ValueError if the scores would have more than `max_support` possible values.
    """
    encoded = _encode(rewards, valid, rewards.shape[1], max_support)
    credit = credit_of_rewards(encoded, q_alpha, q_beta, region_weights).gather(2, encoded.code)
    return credit if valid is None else credit * valid


def _forward(table: SumTable, law: torch.Tensor) -> list[torch.Tensor]:
    """Laws of the partial sums, [(S_k, M) for k = 0..B], from those of the rewards, (B, U, M)."""
    partial = [torch.ones(1, law.shape[2], dtype=torch.float64)]
    for k, add in enumerate(table.add):
        reached = torch.zeros(len(table.sums[k + 1]), law.shape[2], dtype=torch.float64)
        for u in range(len(table.rewards)):
            reached.index_add_(0, add[:, u], partial[-1] * law[k, u])
        partial.append(reached)
    return partial


def _reward_laws(count: torch.Tensor) -> torch.Tensor:
    """(M, B, U) counts -> (B, U, M) probabilities."""
    return (count / count.sum(-1, keepdim=True)).permute(1, 2, 0).contiguous()


def score_distribution(encoded: EncodedRewards) -> tuple[torch.Tensor, torch.Tensor]:
    """`exact_score_distribution` of encoded rewards."""
    table = encoded.table
    parts = [_forward(table, _reward_laws(encoded.count[c]))[-1].T for c in encoded.chunks(table.entries)]
    return table.sums[-1], torch.cat(parts)


def credit_of_rewards(
    encoded: EncodedRewards,
    q_alpha: torch.Tensor | float,
    q_beta: torch.Tensor | float,
    region_weights: Sequence[float],
) -> torch.Tensor:
    """Credit of each distinct reward at each place of each bundle, (M, B, U) float64."""
    table = encoded.table
    final = score_advantage(table.sums[-1], q_alpha, q_beta, region_weights)
    credit = torch.empty(encoded.count.shape, dtype=torch.float64)
    for chunk in encoded.chunks(table.entries):
        law = _reward_laws(encoded.count[chunk])
        partial = _forward(table, law)
        # Expected advantage given the sum so far, (S_{k+1}, M), from the last question to the first.
        ahead = final[:, None].expand(-1, law.shape[2])
        for k in range(len(table.add) - 1, -1, -1):
            before = torch.zeros_like(partial[k])
            for u in range(len(table.rewards)):
                after = ahead[table.add[k][:, u]]
                credit[chunk, k, u] = (partial[k] * after).sum(0)
                before += law[k, u] * after
            ahead = before
    return credit


# --------------------------------------------------------------------------------------- bundles within one question
def exact_same_question_distribution(
    rewards: torch.Tensor, bundle_size: int, valid: torch.Tensor | None = None, max_support: int = MAX_SUPPORT
) -> tuple[torch.Tensor, torch.Tensor]:
    """The law of the sum of `bundle_size` of a question's responses, drawn without replacement.

    rewards (Q, G), valid (Q, G) bool (default: all). Returns the support (S,) and the probabilities (Q, S).
    """
    valid = None if valid is None else valid[:, None]
    return same_question_distribution(_encode(rewards[:, None], valid, bundle_size, max_support))


def exact_same_question_credit(
    rewards: torch.Tensor,
    bundle_size: int,
    q_alpha: torch.Tensor | float,
    q_beta: torch.Tensor | float,
    region_weights: Sequence[float],
    valid: torch.Tensor | None = None,
    max_support: int = MAX_SUPPORT,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Credit and baseline of each response when a bundle is B responses of one question, both (Q, G) float64.

    Credit: E[A(r_j + sum of B - 1 of the other responses)]; baseline: E[A(sum of B of the others)], which does not
    depend on response j; nan where there are fewer than B others. Draws are without replacement.
    rewards (Q, G), valid (Q, G) bool (default: all), at least B valid per question.
    """
    encoded = _encode(rewards[:, None], None if valid is None else valid[:, None], bundle_size, max_support)
    credit, baseline = same_question_credit_of_rewards(encoded, q_alpha, q_beta, region_weights)
    return credit.gather(1, encoded.code[:, 0]), baseline.gather(1, encoded.code[:, 0])


def _choose(n: torch.Tensor, k: int) -> torch.Tensor:
    """Binomial coefficients of n (float64), exact as long as they are representable."""
    result = torch.ones_like(n)
    for i in range(k):
        result = result * (n - i).clamp(min=0) / (i + 1)
    return result


def _choices(n: torch.Tensor, bundle_size: int) -> torch.Tensor:
    """Ways to choose k = 0..B out of n (M,), (B + 1, M)."""
    return torch.stack([_choose(n, k) for k in range(bundle_size + 1)])


class _Subsets:
    """Sums over subsets of responses, one distinct reward after the other.

    A table at reward u has one (S_b, M) entry per number b of responses chosen so far. `start[u][b]` counts the choices
    among rewards before u by their sum; `ahead[u][b]` sums the advantage over the choices among rewards from u on that
    complete B responses.
    """

    def __init__(self, table: SumTable, count: torch.Tensor) -> None:
        self.table = table
        self.size = len(table.add)
        self.count = count.T  # (U, M)
        self.total = count.sum(-1)  # (M,)
        self.start = [self._empty()]
        self.start[0][0] += 1
        for u in range(len(table.rewards)):
            self.start.append(self._choose_forward(u))

    def _empty(self) -> list[torch.Tensor]:
        return [torch.zeros(len(s), self.count.shape[1], dtype=torch.float64) for s in self.table.sums]

    def _shift(self, b: int, k: int, u: int) -> torch.Tensor:
        """Where in sums[b + k] each sum of sums[b] stands after k times reward u."""
        position = torch.arange(len(self.table.sums[b]))
        for i in range(k):
            position = self.table.add[b + i][position, u]
        return position

    def _choose_forward(self, u: int) -> list[torch.Tensor]:
        ways = _choices(self.count[u], self.size)
        after = self._empty()
        for b in range(self.size + 1):
            for k in range(self.size - b + 1):
                after[b + k].index_add_(0, self._shift(b, k, u), self.start[u][b] * ways[k])
        return after

    def choose_backward(
        self, u: int, ahead: list[torch.Tensor], ways: torch.Tensor, forced: int = 0
    ) -> list[torch.Tensor]:
        """For each b, sum over k of ways[k] * ahead[b + forced + k] at the sum after forced + k times reward u."""
        before = self._empty()
        for b in range(self.size - forced + 1):
            for k in range(self.size - forced - b + 1):
                before[b] += ways[k] * ahead[b + forced + k][self._shift(b, forced + k, u)]
        return before

    def total_at(self, u: int, values: list[torch.Tensor]) -> torch.Tensor:
        """Sum over all choices before reward u of their count times `values`, (M,)."""
        total = torch.zeros(self.count.shape[1], dtype=torch.float64)
        for start, value in zip(self.start[u], values, strict=True):
            total += (start * value).sum(0)
        return total


def _subset_chunks(encoded: EncodedRewards) -> list[slice]:
    return encoded.chunks(encoded.table.entries * (len(encoded.table.rewards) + 2))


def same_question_distribution(encoded: EncodedRewards) -> tuple[torch.Tensor, torch.Tensor]:
    """`exact_same_question_distribution` of encoded rewards (Q, 1, G)."""
    parts = []
    for chunk in _subset_chunks(encoded):
        subsets = _Subsets(encoded.table, encoded.count[chunk, 0])
        parts.append((subsets.start[-1][-1] / _choose(subsets.total, subsets.size)).T)
    return encoded.table.sums[-1], torch.cat(parts)


def same_question_credit_of_rewards(
    encoded: EncodedRewards,
    q_alpha: torch.Tensor | float,
    q_beta: torch.Tensor | float,
    region_weights: Sequence[float],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Credit and baseline of each distinct reward, (Q, U) float64; see `exact_same_question_credit`."""
    final = score_advantage(encoded.table.sums[-1], q_alpha, q_beta, region_weights)
    credit = torch.empty(encoded.count[:, 0].shape, dtype=torch.float64)
    baseline = torch.empty_like(credit)
    for chunk in _subset_chunks(encoded):
        subsets = _Subsets(encoded.table, encoded.count[chunk, 0])
        size, others = subsets.size, subsets.total - 1
        ahead = subsets._empty()
        ahead[size] += final[:, None]
        for u in range(len(encoded.table.rewards) - 1, -1, -1):
            ways = _choices((subsets.count[u] - 1).clamp(min=0), size)
            with_it = subsets.choose_backward(u, ahead, ways, forced=1)
            without_it = subsets.choose_backward(u, ahead, ways)
            credit[chunk, u] = subsets.total_at(u, with_it) / _choose(others, size - 1)
            baseline[chunk, u] = subsets.total_at(u, without_it) / _choose(others, size)
            ahead = subsets.choose_backward(u, ahead, _choices(subsets.count[u], size))
    return credit, baseline
