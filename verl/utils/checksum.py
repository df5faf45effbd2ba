"""Checksums of weights that two engines can compare although they store the weights differently."""

from collections.abc import Mapping

import torch


def probe(size: int) -> torch.Tensor:
    """(size,) float32 input of a matrix's checksum: +1 and -1, exact in every dtype, without a short period."""
    index = torch.arange(size, dtype=torch.float64)
    return torch.where(torch.frac(index * 0.6180339887498949) < 0.5, 1.0, -1.0).to(torch.float32)


def checksum(weight: torch.Tensor) -> tuple[float, float]:
    """The sum of W x for a matrix W (out, in) and the probe x, or the sum of a vector; and the Frobenius norm."""
    values = weight.detach().double()
    total = (values @ probe(values.shape[1]).to(values)).sum() if values.ndim == 2 else values.sum()
    return float(total), float(values.norm())


def mismatches(
    engine: Mapping[str, float],
    trainer: Mapping[str, tuple[float, float]],
    fused: Mapping[str, list[str]],
) -> list[tuple[str, float]]:
    """The engine's weights whose checksum differs from the trainer's, worst first.

    Args:
        engine: checksum by the engine's name.
        trainer: (checksum, norm) by Hugging Face name.
        fused: module that the engine makes of several ones, such as qkv_proj: [q_proj, k_proj, v_proj].

    Returns:
        (name, difference relative to the norm), above 1e-6. A head that the trainer has not is the input embedding.
    """
    found = []
    for name, value in engine.items():
        parts = [trainer[part] for part in _parts(name, fused) if part in trainer]
        if not parts and name.endswith("lm_head.weight"):
            parts = [entry for part, entry in trainer.items() if part.endswith("embed_tokens.weight")]
        if not parts:
            continue
        expected, norm = sum(p[0] for p in parts), sum(p[1] ** 2 for p in parts) ** 0.5
        difference = abs(value - expected) / max(norm, 1e-30)
        if difference > 1e-6:
            found.append((name, difference))
    return sorted(found, key=lambda entry: -entry[1])


def _parts(name: str, fused: Mapping[str, list[str]]) -> list[str]:
    for whole, parts in fused.items():
        if f".{whole}." in name:
            return [name.replace(f".{whole}.", f".{part}.") for part in parts]
    return [name]
