"""From a padded batch to what the model computes: sequences, right-padded or packed, split into micro-batches."""

from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.functional import pad

from verl.protocol import DataProto
from verl.utils.seqlen_balancing import runs, split_by_rows, split_by_sum, split_by_tokens
from verl.utils.torch_functional import response_lengths
from verl.workers.packing import Packing, Placement, make_packing
from verl.workers.ulysses import KEY as ULYSSES_KEY
from verl.workers.ulysses import Ulysses, sum_over_group


@dataclass(frozen=True)
class Layout:
    """How the sequences of a micro-batch lie in memory; results do not depend on it.

    packed: side by side in one row, with prompts that are alike only once. Otherwise a row each, right-padded to the
    longest. group: the workers that share a packed row (Ulysses); None: this one has it alone.
    """

    packed: bool = False
    group: dist.ProcessGroup | None = None

    def __post_init__(self) -> None:
        if self.group is not None and not self.packed:
            raise ValueError(f"{ULYSSES_KEY} above 1 needs actor_rollout_ref.model.use_remove_padding=True")

    @property
    def workers(self) -> int:
        return 1 if self.group is None else self.group.size()


PADDED = Layout()


@dataclass(frozen=True)
class MicroBatchSpec:
    """How rows become micro-batches: `rows` of them each, or (rows is None) as many as `max_tokens` a worker allows."""

    rows: int | None
    max_tokens: int

    @classmethod
    def from_config(cls, rows: int | None, dynamic: bool, max_tokens: int) -> "MicroBatchSpec":
        return cls(None if dynamic else rows, max_tokens)


@dataclass
class Sequences:
    """R sequences of prompt and response as a model takes them. The last token of each is left out: it predicts none.

    input_ids: (R, L) int64, right-padded: causal attention never looks right, so no mask is needed. Or packed: (1, n),
    this worker's part of the row; `position_ids`, alike, and `packing` belong to it.
    predictors: (m,) where, in the flattened input_ids, a response token is predicted. labels: (m,) these tokens.
    rows, steps: (m,) their row and response position. response_shape: (R, T).
    group: other workers have the other response tokens; None: these are all.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor | None
    packing: Packing | None
    predictors: torch.Tensor
    labels: torch.Tensor
    rows: torch.Tensor
    steps: torch.Tensor
    response_shape: tuple[int, ...]
    group: dist.ProcessGroup | None = None

    @classmethod
    def from_batch(cls, data: DataProto, device: torch.device, layout: Layout = PADDED) -> "Sequences":
        """`data` has prompts (R, P) left-padded, prompt_length (R,), responses (R, T), response_mask (R, T)."""
        responses, prompt_length = data["responses"], data["prompt_length"]
        response_length = response_lengths(data["response_mask"])
        rows, steps = (torch.arange(responses.shape[1]) < response_length[:, None]).nonzero(as_tuple=True)
        lengths = prompt_length + (response_length - 1).clamp(min=0)
        input_ids = _without_gaps(data, int(lengths.max()))  # (R, L)
        slots = torch.arange(input_ids.numel()).view(input_ids.shape)  # of each row's tokens
        position_ids, packing = None, None
        if layout.packed:
            placement = _side_by_side(lengths, prompt_length, alike_prompts(data), layout.workers)
            input_ids, position_ids = _packed(input_ids, placement)
            slots, packing = placement.slots, make_packing(placement, device)
            position_ids = position_ids.to(device)
        whole = cls(
            input_ids.to(device),
            position_ids,
            packing,
            slots[rows, prompt_length[rows] + steps - 1].to(device),
            responses[rows, steps].to(device),
            rows.to(device),
            steps.to(device),
            tuple(responses.shape),
        )
        return whole if layout.group is None else whole.share(layout.group)

    def share(self, group: dist.ProcessGroup) -> "Sequences":
        """This worker's part of a packed row, which the workers of `group` all have."""
        assert self.packing is not None and self.position_ids is not None
        size = self.input_ids.shape[1] // group.size()
        first = group.rank() * size
        own = (self.predictors >= first) & (self.predictors < first + size)
        return Sequences(
            self.input_ids[:, first : first + size],
            self.position_ids[:, first : first + size],
            Ulysses(self.packing, group),
            self.predictors[own] - first,
            self.labels[own],
            self.rows[own],
            self.steps[own],
            self.response_shape,
            group,
        )

    def to_rows(self, values: torch.Tensor) -> torch.Tensor:
        """(m,) values of this worker's response tokens as (R, T) of all of them, 0 elsewhere; differentiable."""
        out = values.new_zeros(self.response_shape).index_put((self.rows, self.steps), values)
        return out if self.group is None else sum_over_group(out, self.group)


def _without_gaps(data: DataProto, longest: int) -> torch.Tensor:
    """(R, longest) prompt and response of each row without the padding between them; at the end, anything."""
    prompts, responses = data["prompts"], data["responses"]
    # The real tokens of a row are neighbours in [prompt | response]: shift each row left by its prompt's padding.
    columns = (prompts.shape[1] - data["prompt_length"])[:, None] + torch.arange(longest)
    both = torch.cat([prompts, responses], dim=1)
    return both.gather(1, columns.clamp(max=both.shape[1] - 1))


def alike_prompts(data: DataProto) -> torch.Tensor:
    """(R,) int64: for each row the first row with the same prompt."""
    prompts = torch.cat([data["prompt_length"][:, None], data["prompts"]], dim=1).numpy()
    first: dict[bytes, int] = {}
    return torch.tensor([first.setdefault(prompt.tobytes(), row) for row, prompt in enumerate(prompts)])


def _side_by_side(
    lengths: torch.Tensor, prompt_length: torch.Tensor, first_alike: torch.Tensor, multiple: int
) -> Placement:
    """The rows' tokens one row after the other, prompts only where they first occur. Sequences of one token fill up to
    a `multiple` of tokens."""
    borrowed = torch.where(first_alike == torch.arange(len(lengths)), 0, prompt_length)
    fill = int(-(lengths - borrowed).sum() % multiple)
    lengths, borrowed = pad(lengths, (0, fill), value=1), pad(borrowed, (0, fill))
    placement = Placement(torch.zeros(len(lengths), int(lengths.max()), dtype=torch.int64), lengths, borrowed)
    own = placement.own()
    placement.slots[own] = torch.arange(int(own.sum()))
    lenders = torch.cat([first_alike, torch.arange(len(first_alike), len(lengths))])
    placement.slots = torch.where(placement.within() & ~own, placement.slots[lenders], placement.slots)
    return placement


def _packed(input_ids: torch.Tensor, placement: Placement) -> tuple[torch.Tensor, torch.Tensor]:
    """input_ids and position_ids (1, N) of a packed row, from the (R, L) input_ids of its sequences but the fillers."""
    own = placement.own()
    positions = torch.arange(own.shape[1]).expand(own.shape)
    return pad(input_ids, (0, 0, 0, len(own) - len(input_ids)))[own][None], positions[own][None]


def sequence_lengths(data: DataProto) -> np.ndarray:
    """(N,) int64 tokens of each row, prompt and response."""
    return (data["prompt_length"] + response_lengths(data["response_mask"])).numpy()


def micro_batches(data: DataProto, spec: MicroBatchSpec, layout: Layout = PADDED) -> list[np.ndarray]:
    """Row indices of the micro-batches of this worker's rows, the same NUMBER of them on every worker.

    Every forward and backward pass is a collective of the sharded model; a worker with fewer micro-batches than
    another gets empty ones at the end, which the engine fills with a dummy row of weight 0.
    """
    parts = _split(data, spec, layout) if len(data) else []
    if dist.get_world_size() > 1:
        count = torch.tensor(len(parts))
        dist.all_reduce(count, op=dist.ReduceOp.MAX)
        parts += [np.empty(0, dtype=np.int64)] * (int(count) - len(parts))
    return parts


def _split(data: DataProto, spec: MicroBatchSpec, layout: Layout) -> list[np.ndarray]:
    lengths = sequence_lengths(data)
    if not layout.packed:
        return split_by_tokens(lengths, spec.max_tokens) if spec.rows is None else split_by_rows(lengths, spec.rows)
    first_alike = alike_prompts(data).numpy()
    order = np.argsort(first_alike, kind="stable")  # rows that share a prompt, together
    if spec.rows is None:
        shared = np.where(first_alike == np.arange(len(data)), 0, data["prompt_length"].numpy())
        return split_by_sum(lengths, spec.max_tokens * layout.workers, order, shared)
    return runs(order, spec.rows)


def dummy_row(data: DataProto) -> DataProto:
    """One row of two tokens and no response mask, with the columns of `data` filled with zeros."""
    columns = {
        name: torch.zeros(1, *value.shape[1:], dtype=value.dtype)
        for name, value in data.columns().items()
        if isinstance(value, torch.Tensor)
    }
    columns["prompt_length"] = torch.ones(1, dtype=torch.int64)
    columns["response_mask"] = torch.zeros_like(columns["response_mask"])
    columns["response_mask"][:, :1] = 1
    return DataProto.from_dict(columns, data.meta_info)
