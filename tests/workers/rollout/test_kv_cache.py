import torch
from transformers import DynamicCache, LlamaConfig, MistralConfig
from transformers.cache_utils import DynamicLayer

from verl.workers.rollout.kv_cache import MIN_ROOM, RoomyLayer, make_cache


def test_it_holds_what_a_joined_cache_holds():
    """A prompt, rows for its responses, tokens beyond the room there is, rows that leave, several tokens at once."""
    generator = torch.Generator().manual_seed(0)
    ours, expected = RoomyLayer(), DynamicLayer()
    rows = 3

    def append(tokens: int) -> None:
        keys, values = (torch.randn(rows, 2, tokens, 4, generator=generator) for _ in range(2))
        for a, b in zip(ours.update(keys, values), expected.update(keys, values), strict=True):
            assert torch.equal(a, b)
        assert ours.get_seq_length() == expected.get_seq_length()

    append(5)
    for chosen in ([0, 0, 1, 2, 2, 2], [0, 2, 3, 5], [1, 3]):
        for layer in (ours, expected):
            layer.batch_select_indices(torch.tensor(chosen))
        rows = len(chosen)
        for _ in range(MIN_ROOM + 3):
            append(1)
    append(200)
    append(1)


def test_room_grows_with_the_length_so_that_copies_are_few():
    layer = RoomyLayer()
    buffers = set()
    for _ in range(4000):
        layer.update(torch.zeros(1, 1, 1, 1), torch.zeros(1, 1, 1, 1))
        buffers.add(layer.buffers[0].data_ptr())
    assert len(buffers) <= 14  # 64 * 1.5^11 > 4000, and a few at the beginning


def test_layers_with_a_window_keep_their_own_cache():
    assert all(type(layer) is RoomyLayer for layer in make_cache(LlamaConfig(num_hidden_layers=2)).layers)
    config = MistralConfig(num_hidden_layers=2, sliding_window=8)
    assert [type(layer) for layer in make_cache(config).layers] == [type(x) for x in DynamicCache(config=config).layers]
