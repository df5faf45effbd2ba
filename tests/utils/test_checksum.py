"""Checksums tell which weight of an engine is not the trainer's, however the engine stores it."""

import pytest
import torch

from verl.utils.checksum import checksum, mismatches, probe

FUSED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}


def weights(seed: int = 0, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """A trainer's, by Hugging Face name."""
    generator = torch.Generator().manual_seed(seed)
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (50, 16), "model.norm.weight": (16,)}
    for layer in range(2):
        prefix = f"model.layers.{layer}."
        for part, rows in (("q", 16), ("k", 8), ("v", 8)):
            shapes[f"{prefix}self_attn.{part}_proj.weight"] = (rows, 16)
            shapes[f"{prefix}self_attn.{part}_proj.bias"] = (rows,)
        shapes[f"{prefix}self_attn.o_proj.weight"] = (16, 16)
        shapes |= {f"{prefix}mlp.{part}_proj.weight": (24, 16) for part in ("gate", "up")}
        shapes[f"{prefix}mlp.down_proj.weight"] = (16, 24)
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}


def fused(parts: dict[str, torch.Tensor], head: bool = True) -> dict[str, torch.Tensor]:
    """The same as an engine stores them: parts one below the other, and the head beside the embedding it is tied to."""
    stored: dict[str, list[torch.Tensor]] = {}
    for name, tensor in parts.items():
        for whole, names in FUSED.items():
            for part in names:
                name = name.replace(f".{part}.", f".{whole}.")
        stored.setdefault(name, []).append(tensor)
    joined = {name: torch.cat(tensors) for name, tensors in stored.items()}
    return joined | ({"lm_head.weight": parts["model.embed_tokens.weight"]} if head else {})


def engine_sums(tensors: dict[str, torch.Tensor]) -> dict[str, float]:
    return {name: checksum(tensor)[0] for name, tensor in tensors.items()}


def trainer_sums(tensors: dict[str, torch.Tensor]) -> dict[str, tuple[float, float]]:
    return {name: checksum(tensor) for name, tensor in tensors.items()}


def test_the_probe_is_plus_and_minus_one_without_a_short_period():
    x = probe(1000)
    assert x.dtype == torch.float32 and set(x.tolist()) == {-1.0, 1.0} and abs(float(x.sum())) < 20
    assert all(not torch.equal(x[period:], x[:-period]) for period in range(1, 200))
    assert torch.equal(probe(300), x[:300])  # a rank's share of the columns has its share of the probe


def test_a_matrix_is_summed_against_the_probe_and_a_vector_as_it_is():
    matrix = torch.tensor([[1.0, 2.0, 4.0], [8.0, 16.0, 32.0]])
    x = probe(3).tolist()
    assert checksum(matrix) == (sum((a + b) * s for a, b, s in zip(matrix[0], matrix[1], x, strict=True)), 1365**0.5)
    assert checksum(torch.tensor([3.0, -4.0])) == (-1.0, 5.0)


def test_a_transposed_matrix_and_permuted_columns_are_found():
    matrix = torch.randn(16, 16, generator=torch.Generator().manual_seed(0))
    total, norm = checksum(matrix)
    for other in (matrix.T, matrix.roll(1, dims=1), -matrix):
        assert abs(checksum(other)[0] - total) / norm > 0.01


def test_equal_weights_agree_whatever_is_fused_and_tied():
    own = weights()
    assert mismatches(engine_sums(fused(own)), trainer_sums(own), FUSED) == []


@pytest.mark.parametrize(
    "stale, named",
    [
        ("model.layers.1.self_attn.k_proj.weight", "model.layers.1.self_attn.qkv_proj.weight"),
        ("model.layers.0.self_attn.v_proj.bias", "model.layers.0.self_attn.qkv_proj.bias"),
        ("model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.gate_up_proj.weight"),
        ("model.layers.1.mlp.down_proj.weight", "model.layers.1.mlp.down_proj.weight"),
        ("model.norm.weight", "model.norm.weight"),
    ],
)
def test_a_stale_part_names_what_it_is_fused_into(stale, named):
    old, new = weights(), weights()
    new[stale] = new[stale] + 0.01 * weights(seed=1)[stale]
    assert [name for name, _ in mismatches(engine_sums(fused(old)), trainer_sums(new), FUSED)] == [named]


def test_a_stale_head_that_is_tied_is_named_alone():
    old, new = weights(), weights()
    new["model.embed_tokens.weight"] = 1.01 * old["model.embed_tokens.weight"]
    engine = fused(new) | {"lm_head.weight": old["model.embed_tokens.weight"]}
    assert [name for name, _ in mismatches(engine_sums(engine), trainer_sums(new), FUSED)] == ["lm_head.weight"]


def test_a_head_of_its_own_is_compared_with_the_trainers_head():
    own = weights() | {"lm_head.weight": torch.ones(50, 16)}
    engine = fused(own, head=False)
    assert mismatches(engine_sums(engine), trainer_sums(own), FUSED) == []
    engine["lm_head.weight"] = own["model.embed_tokens.weight"]
    assert [name for name, _ in mismatches(engine_sums(engine), trainer_sums(own), FUSED)] == ["lm_head.weight"]


def test_the_worst_comes_first_with_its_difference_relative_to_the_norm():
    own, engine = weights(), engine_sums(fused(weights()))
    norm = {name: float(torch.linalg.norm(tensor)) for name, tensor in own.items()}
    off = {"model.norm.weight": 0.3, "model.layers.0.mlp.down_proj.weight": 0.5, "model.embed_tokens.weight": 0.1}
    for name, share in off.items():
        engine[name] += share * norm[name]
    found = mismatches(engine, trainer_sums(own), FUSED)
    assert [name for name, _ in found] == sorted(off, key=lambda name: -off[name])
    assert [difference for _, difference in found] == pytest.approx([0.5, 0.3, 0.1])


def test_of_fused_parts_the_norm_is_that_of_the_whole():
    own, engine = weights(), engine_sums(fused(weights()))
    name = "model.layers.0.self_attn.qkv_proj.weight"
    engine[name] += 1.0
    whole = float(torch.linalg.norm(fused(own)[name]))
    assert mismatches(engine, trainer_sums(own), FUSED) == [(name, pytest.approx(1 / whole))]


def test_what_the_trainer_does_not_have_is_passed_over():
    engine = engine_sums(fused(weights())) | {"model.layers.0.self_attn.attn.k_scale": 1.0}
    assert mismatches(engine, trainer_sums(weights()), FUSED) == []


def test_bfloat16_rounding_is_told_from_a_stale_weight():
    """An engine in bfloat16 computes W x in bfloat16. That is within the tolerance that the weight check has for it;
    other weights are not."""
    from verl.workers.rollout.weight_check import TOLERANCES

    own, old = weights(dtype=torch.bfloat16), weights(seed=1, dtype=torch.bfloat16)

    def computed(tensor: torch.Tensor) -> float:
        product = tensor @ probe(tensor.shape[1]).bfloat16() if tensor.ndim == 2 else tensor
        assert product.dtype == torch.bfloat16
        return float(product.double().sum())

    tolerance = TOLERANCES[torch.bfloat16]
    engine = {name: computed(tensor) for name, tensor in fused(own).items()}
    found = mismatches(engine, trainer_sums(own), FUSED)
    assert found and max(difference for _, difference in found) < tolerance
    stale = "model.layers.1.self_attn.o_proj.weight"
    engine[stale] = computed(old[stale])
    worst = mismatches(engine, trainer_sums(own), FUSED)
    assert [name for name, difference in worst if difference > tolerance] == [worst[0][0]] == [stale]
