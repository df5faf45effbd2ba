"""A key-value cache with room for the tokens to come.

transformers' own joins old and new tensors at every token, which copies the whole cache into new memory each time: on a
CPU that took more than half of decoding.
"""

import torch
from transformers import DynamicCache, PreTrainedConfig
from transformers.cache_utils import DynamicLayer

MIN_ROOM = 64  # tokens; where more than 128 are cached, half as many again


class RoomyLayer(DynamicLayer):
    """Keys and values (R, heads, L, D) of a layer: the first L tokens of larger buffers."""

    keys: torch.Tensor
    values: torch.Tensor
    buffers: list[torch.Tensor]

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append the new tokens' keys and values; returns all."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.keys, self.values = key_states[:, :, :0], value_states[:, :, :0]
            self.buffers = [self.keys, self.values]
        length, total = self.keys.shape[2], self.keys.shape[2] + key_states.shape[2]
        if total > self.buffers[0].shape[2]:
            self._move(None, total)
        for buffer, states in zip(self.buffers, (key_states, value_states), strict=True):
            buffer[:, :, length:total] = states
        self.keys, self.values = (buffer[:, :, :total] for buffer in self.buffers)
        return self.keys, self.values

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep the rows at `indices`, in that order; one may occur several times."""
        self._move(indices, self.keys.shape[2])

    def _move(self, rows: torch.Tensor | None, tokens: int) -> None:
        """Into new buffers with room for more than `tokens`."""
        room = tokens + max(MIN_ROOM, tokens // 2)
        filled = (self.keys, self.values)
        self.buffers = []
        for old in filled:
            buffer = old.new_empty(len(old) if rows is None else len(rows), old.shape[1], room, old.shape[3])
            target = buffer[:, :, : old.shape[2]]
            if rows is None:
                target.copy_(old)
            else:
                torch.index_select(old, 0, rows, out=target)
            self.buffers.append(buffer)
        self.keys, self.values = (buffer[:, :, : filled[0].shape[2]] for buffer in self.buffers)


def make_cache(config: PreTrainedConfig) -> DynamicCache:
    """An empty cache for a model. Layers that look back a fixed number of tokens keep transformers' own."""
    cache = DynamicCache(config=config)
    cache.layers = [RoomyLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache
