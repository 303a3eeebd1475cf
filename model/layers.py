"""The pieces that every layer is made of."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..kernels import fused, gemm, moe_gemm, moe_route
from ..kernels.compat import has_wgmma
from ..kernels.fp8_gemm_torch import fp8_gemm_nt_torch
from ..kernels.moe_items import Tables, Tiles
from ..kernels.quant import quantize_1x128


class Quantized(NamedTuple):
    """Activations [T, K] quantised 1x128, for linear maps that multiply in fp8."""

    values: Tensor
    """[T, K] float8_e4m3fn."""
    scale: Tensor
    """[T, ceil(K/128)] float32."""


@dataclass(frozen=True)
class Arithmetic:
    """How linear maps compute; the same for the whole model."""

    dtype: torch.dtype
    """Of activations."""
    fp8: bool
    """The weights are fp8, and activations are quantised 1x128 to be multiplied with them in fp8.
    Else fp8 weights are dequantised as they are used."""
    ue8m0: bool
    """Scales of activations are powers of two."""
    library: bool = False
    """Multiply in fp8 with torch's library instead of our kernels, where the map is dense."""


class Linear:
    """x @ weight^T; fp8 weights carry their scales."""

    def __init__(self, weight: Tensor, scale: Tensor | None, arithmetic: Arithmetic) -> None:
        self.weight = weight
        self.scale = scale
        self._arithmetic = arithmetic

    @classmethod
    def load(cls, weights: Mapping[str, Tensor], name: str, arithmetic: Arithmetic) -> "Linear":
        return cls(weights[name], weights.get(f"{name}.scale"), arithmetic)

    def __call__(self, x: Tensor | Quantized) -> Tensor:
        """x: [T, K] -> [T, N]."""
        mode = self._arithmetic
        if isinstance(x, Quantized):
            assert self.scale is not None
            multiply = fp8_gemm_nt_torch if mode.library else gemm.fp8_gemm_nt
            return multiply(x.values, x.scale, self.weight, self.scale, mode.dtype)
        if mode.library and mode.fp8 and self.scale is not None:
            return self(Quantized(*quantize_1x128(x, mode.ue8m0)))
        return gemm.linear(x, self.weight, self.scale, mode.fp8, mode.ue8m0)

    def grouped(
        self, x: Tensor | Quantized, offsets: Tensor, expected: float, tables: Tables
    ) -> Tensor:
        """For stacked weights [E, N, K]: x [M, K] sorted by expert, offsets [E] as
        `permute_by_expert` gives them, `expected` rows an expert -> [M, N]. `tables` is shared by
        maps of the same rows."""
        mode = self._arithmetic
        if not isinstance(x, Quantized):
            return gemm.grouped_linear(x, self.weight, self.scale, offsets, expected=expected)
        assert self.scale is not None
        return gemm.grouped_fp8_linear(
            *x, self.weight, self.scale, offsets, mode.dtype, expected, tables
        )

    def tiled(self, x: Quantized, tiles: Tiles) -> Tensor:
        """`grouped` of rows that were dispatched, their scales in the tiles' order."""
        assert self.scale is not None
        shape = len(x.values), self.weight.shape[1]
        out = torch.empty(shape, dtype=self._arithmetic.dtype, device=x.values.device)
        return moe_gemm.grouped_fp8_gemm_nt_tiled(*x, self.weight, self.scale, tiles, out)


class RMSNorm:
    def __init__(self, weight: Tensor, eps: float, arithmetic: Arithmetic) -> None:
        self.weight = weight
        self.eps = eps
        self._arithmetic = arithmetic

    def __call__(self, x: Tensor) -> Tensor | Quantized:
        """x: [T, N], for a linear map to take."""
        mode = self._arithmetic
        if not mode.fp8:
            return fused.rms_norm(x, self.weight, self.eps)
        return Quantized(*fused.rms_norm_quant(x, self.weight, self.eps, mode.ue8m0, has_wgmma(x)))

    def add(self, x: Tensor, residual: Tensor) -> tuple[Tensor | Quantized, Tensor, Tensor]:
        """The norm of x + residual, for a linear map to take and as it is; and x + residual."""
        mode = self._arithmetic
        if not mode.fp8:
            normed, total = fused.add_rms_norm(x, residual, self.weight, self.eps)
            return normed, normed, total
        q, scale, normed, total = fused.add_rms_norm_quant(
            x, residual, self.weight, self.eps, mode.ue8m0, has_wgmma(x)
        )
        return Quantized(q, scale), normed, total


def silu_mul(gate_up: Tensor, arithmetic: Arithmetic) -> Tensor | Quantized:
    """gate_up: [T, 2N], gate first -> silu(gate) * up [T, N], for a linear map to take."""
    if not arithmetic.fp8:
        return fused.silu_mul(gate_up)
    return Quantized(*fused.silu_mul_quant(gate_up, arithmetic.ue8m0, has_wgmma(gate_up)))


def gather_rows(
    x: Tensor | Quantized, order: Tensor, offsets: Tensor, top_k: int
) -> Tensor | Quantized:
    """The rows of x [T, K] that pairs sorted by expert take: [T * top_k, K]."""
    if not isinstance(x, Quantized):
        return moe_route.gather_rows(x, order, offsets, top_k)
    k_major = has_wgmma(x.values)
    return Quantized(*moe_route.gather_quantized(*x, order, offsets, top_k, k_major))


class MLP:
    """down(silu(gate(x)) * up(x))."""

    def __init__(self, weights: Mapping[str, Tensor], name: str, arithmetic: Arithmetic) -> None:
        self.gate_up = Linear.load(weights, f"{name}.gate_up", arithmetic)
        self.down = Linear.load(weights, f"{name}.down", arithmetic)
        self._arithmetic = arithmetic

    def __call__(self, x: Tensor | Quantized) -> Tensor:
        return self.down(silu_mul(self.gate_up(x), self._arithmetic))
