"""Rotary embedding tables, with YaRN (arXiv 2309.00071) as the published model code has them."""

import math

import torch
from torch import Tensor

from .config import RopeConfig, yarn_mscale


def inverse_frequencies(rope: RopeConfig, dim: int) -> Tensor:
    """[dim / 2] float32. With YaRN, slow pairs are interpolated, fast ones kept, with a ramp
    between."""
    exponents = torch.arange(0, dim, 2, dtype=torch.float32) / dim
    extrapolated = 1.0 / rope.theta**exponents
    if rope.factor == 1.0:
        return extrapolated

    def pair(rotations: float) -> float:
        """The pair that turns so often over the original context."""
        wavelength = rope.original_max_position_embeddings / (rotations * 2 * math.pi)
        return dim * math.log(wavelength) / (2 * math.log(rope.theta))

    low = max(math.floor(pair(rope.beta_fast)), 0)
    high = min(math.ceil(pair(rope.beta_slow)), dim - 1)
    ramp = (torch.arange(dim // 2, dtype=torch.float32) - low) / max(high - low, 0.001)
    interpolate = ramp.clamp(0, 1)
    return extrapolated / rope.factor * interpolate + extrapolated * (1 - interpolate)


def tables(
    rope: RopeConfig, dim: int, max_seq_len: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """cos and sin: [max_seq_len, dim / 2] float32, scaled by YaRN's attention factor."""
    positions = torch.arange(max_seq_len, dtype=torch.float32)
    angles = torch.outer(positions, inverse_frequencies(rope, dim))
    factor = yarn_mscale(rope.factor, rope.mscale) / yarn_mscale(rope.factor, rope.mscale_all_dim)
    return (angles.cos() * factor).to(device), (angles.sin() * factor).to(device)
