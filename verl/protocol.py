"""The batch that driver and workers pass to each other.

A `DataProto` holds N rows: tensors in a `TensorDict`, everything else (ids, strings, dicts) in numpy arrays, and facts
about the whole batch in `meta_info`. Every operation returns a new `DataProto` and refuses what does not fit, naming
the field. Pickled, tensors become plain numpy buffers, which Ray's object store keeps without a copy; as what arrives
from there is shared memory, workers take their rows with `select_rows`, which copies.
"""

import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from tensordict import TensorDict

Column = torch.Tensor | np.ndarray
Rows = Sequence[int] | np.ndarray | torch.Tensor


def _as_index(rows: Rows, n_rows: int) -> np.ndarray:
    index = np.asarray(rows)
    if index.dtype == bool:
        if index.shape != (n_rows,):
            raise ValueError(f"a mask over {n_rows} rows must have that shape, this one has {index.shape}")
        return np.flatnonzero(index)
    index = index.astype(np.int64, copy=False)
    if index.size and (index.min() < -n_rows or index.max() >= n_rows):
        raise IndexError(f"row {index.min() if index.min() < -n_rows else index.max()} of a batch of {n_rows} rows")
    return index


@dataclass
class DataProto:
    batch: TensorDict
    non_tensor_batch: dict[str, np.ndarray] = field(default_factory=dict)
    meta_info: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, array in self.non_tensor_batch.items():
            if len(array) != len(self):
                raise ValueError(f"field {name!r} has {len(array)} rows, the batch has {len(self)}")

    @classmethod
    def from_dict(cls, columns: dict[str, Any], meta_info: dict[str, Any] | None = None) -> "DataProto":
        """Sort `columns` into tensors (N, ...) and arrays (N, ...) by type; a list becomes an array of objects."""
        tensors = {k: v for k, v in columns.items() if isinstance(v, torch.Tensor)}
        arrays = {
            k: v if isinstance(v, np.ndarray) else object_array(v)
            for k, v in columns.items()
            if not isinstance(v, torch.Tensor)
        }
        sizes = {k: len(v) for k, v in (tensors | arrays).items()}
        n_rows = next(iter(sizes.values()), 0)
        for name, size in sizes.items():
            if size != n_rows:
                first = next(iter(sizes))
                raise ValueError(f"field {name!r} has {size} rows, field {first!r} has {n_rows}")
        return cls(TensorDict(tensors, batch_size=[n_rows]), arrays, dict(meta_info or {}))

    # ------------------------------------------------------------------------------------------------- reading
    def __len__(self) -> int:
        return self.batch.batch_size[0]

    def __contains__(self, name: str) -> bool:
        return name in self.batch.keys() or name in self.non_tensor_batch

    def __getitem__(self, name: str) -> Any:
        if name in self.batch.keys():
            return self.batch[name]
        if name in self.non_tensor_batch:
            return self.non_tensor_batch[name]
        raise KeyError(f"no field {name!r}; there are {', '.join(self.columns())}")

    def columns(self) -> dict[str, Column]:
        return {**{str(name): self.batch[name] for name in self.batch.keys()}, **self.non_tensor_batch}

    # ------------------------------------------------------------------------------------------------- columns
    def union(self, other: "DataProto") -> "DataProto":
        """The columns of both; a name in both must hold the same values."""
        if len(self) != len(other):
            raise ValueError(f"cannot unite {len(self)} rows (fields {list(self.columns())}) with {len(other)} rows")
        for name in self.columns().keys() & other.columns().keys():
            if not _equal(self[name], other[name]):
                raise ValueError(f"field {name!r} is in both batches with different values")
        for name in self.meta_info.keys() & other.meta_info.keys():
            if self.meta_info[name] != other.meta_info[name]:
                raise ValueError(f"meta_info {name!r} is {self.meta_info[name]!r} and {other.meta_info[name]!r}")
        return DataProto.from_dict(self.columns() | other.columns(), self.meta_info | other.meta_info)

    def with_columns(self, **columns: Any) -> "DataProto":
        """These columns added, or replaced where the name exists."""
        return DataProto.from_dict(self.columns() | columns, self.meta_info)

    def select(self, names: Iterable[str]) -> "DataProto":
        """Only the named columns."""
        return DataProto.from_dict({name: self[name] for name in names}, self.meta_info)

    def pop(self, names: Iterable[str]) -> "DataProto":
        """Take the named columns out of this batch, in place; they are returned as a batch of their own."""
        taken = self.select(names)
        for name in taken.columns():
            if name in self.batch.keys():
                del self.batch[name]
            else:
                del self.non_tensor_batch[name]
        return taken

    # ---------------------------------------------------------------------------------------------------- rows
    def select_rows(self, rows: Rows) -> "DataProto":
        """The rows of an index (in its order) or of a mask, copied."""
        index = _as_index(rows, len(self))
        tensor_index = torch.from_numpy(index)
        columns = {
            name: value[tensor_index] if isinstance(value, torch.Tensor) else value[index]
            for name, value in self.columns().items()
        }
        tensors = {k: v for k, v in columns.items() if isinstance(v, torch.Tensor)}
        arrays = {k: v for k, v in columns.items() if isinstance(v, np.ndarray)}
        return DataProto(TensorDict(tensors, batch_size=[len(index)]), arrays, dict(self.meta_info))

    def reorder(self, order: Rows) -> "DataProto":
        """The rows in another order: row i of the result is row `order[i]` of this batch."""
        index = _as_index(order, len(self))
        if not np.array_equal(np.sort(index), np.arange(len(self))):
            raise ValueError(f"an order of {len(self)} rows must be a permutation of 0..{len(self) - 1}")
        return self.select_rows(index)

    def repeat(self, times: int, interleave: bool = True) -> "DataProto":
        """Each row `times` times: next to each other (`interleave`), or the whole batch over and over."""
        if times < 1:
            raise ValueError(f"repeat takes at least 1, not {times}")
        index = np.arange(len(self))
        return self.select_rows(np.repeat(index, times) if interleave else np.tile(index, times))

    def chunk(self, chunks: int) -> list["DataProto"]:
        """`chunks` batches of equal size, in order; the rows must divide (`pad_to_divisor` makes them)."""
        if chunks < 1 or len(self) % chunks:
            raise ValueError(f"{len(self)} rows do not divide into {chunks} chunks")
        return [self.select_rows(index) for index in np.arange(len(self)).reshape(chunks, -1)]

    @staticmethod
    def concat(parts: Sequence["DataProto"]) -> "DataProto":
        """The rows of all parts, in order; they have the same columns and trailing shapes. meta_info is the first's."""
        if not parts:
            raise ValueError("nothing to concatenate")
        names = list(parts[0].columns())
        columns: dict[str, Column] = {}
        for name in names:
            values = [_column_of(part, name, i) for i, part in enumerate(parts)]
            shapes = {tuple(value.shape[1:]) for value in values}
            if len(shapes) > 1:
                raise ValueError(f"field {name!r} has rows of different shapes: {sorted(shapes)}")
            columns[name] = torch.cat(values) if isinstance(values[0], torch.Tensor) else np.concatenate(values)
        for i, part in enumerate(parts):
            if extra := part.columns().keys() - set(names):
                raise ValueError(f"part {i} has field {sorted(extra)[0]!r}, part 0 does not")
        return DataProto.from_dict(columns, parts[0].meta_info)

    def pad_to_divisor(self, divisor: int) -> tuple["DataProto", int]:
        """Rows repeated from the front until `divisor` divides their number, and how many were added (see `unpad`)."""
        if len(self) == 0:
            raise ValueError("an empty batch cannot be padded")
        pad = -len(self) % divisor
        if pad == 0:
            return self, 0
        return self.select_rows(np.arange(len(self) + pad) % len(self)), pad

    def unpad(self, pad: int) -> "DataProto":
        """Without the last `pad` rows."""
        if not 0 <= pad <= len(self):
            raise ValueError(f"cannot take {pad} rows off a batch of {len(self)}")
        return self.select_rows(np.arange(len(self) - pad)) if pad else self

    def __iter__(self) -> Iterator[dict[str, Any]]:
        columns = self.columns()
        return ({name: column[i] for name, column in columns.items()} for i in range(len(self)))

    # ------------------------------------------------------------------------------------------------- pickling
    def __getstate__(self) -> dict[str, Any]:
        tensors = {name: _to_buffer(self.batch[name]) for name in self.batch.keys()}
        return {
            "n_rows": len(self),
            "tensors": tensors,
            "non_tensor_batch": self.non_tensor_batch,
            "meta_info": self.meta_info,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        tensors = {name: _from_buffer(*buffer) for name, buffer in state["tensors"].items()}
        self.batch = TensorDict(tensors, batch_size=[state["n_rows"]])
        self.non_tensor_batch = state["non_tensor_batch"]
        self.meta_info = state["meta_info"]


def object_array(values: Sequence[Any]) -> np.ndarray:
    """A one-dimensional array of Python objects, whatever the objects are (lists are not unpacked)."""
    array = np.empty(len(values), dtype=object)
    for i, value in enumerate(values):
        array[i] = value
    return array


def _column_of(part: DataProto, name: str, i: int) -> Any:
    if name not in part:
        raise ValueError(f"part {i} lacks field {name!r}")
    return part[name]


def _equal(a: Column, b: Column) -> bool:
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return a.shape == b.shape and torch.equal(a, b)
    if isinstance(a, np.ndarray) and isinstance(b, np.ndarray):
        return a.shape == b.shape and all(x is y or np.array_equal(x, y) for x, y in zip(a, b, strict=True))
    return False


def _to_buffer(tensor: torch.Tensor) -> tuple[np.ndarray, torch.dtype]:
    tensor = tensor.detach().cpu().contiguous()
    # numpy has no bfloat16: its bits travel as int16.
    return (tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor).numpy(), tensor.dtype


def _from_buffer(array: np.ndarray, dtype: torch.dtype) -> torch.Tensor:
    with warnings.catch_warnings():
        # Shared memory arrives read-only, which torch cannot express and warns of; `select_rows` copies before use.
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        tensor = torch.from_numpy(array)
    return tensor.view(torch.bfloat16) if dtype == torch.bfloat16 else tensor
