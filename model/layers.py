"""The pieces that every layer is made of."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from ..kernels import fused, gemm


@dataclass(frozen=True)
class Arithmetic:
    """How linear maps compute; the same for the whole model."""

    act_quant: bool
    """Quantise activations 1x128 and multiply in fp8 where the weight is fp8."""
    ue8m0: bool
    """Scales of activations are powers of two."""


class Linear:
    """x @ weight^T; fp8 weights carry their scales."""

    def __init__(self, weights: Mapping[str, Tensor], name: str, arithmetic: Arithmetic) -> None:
        self.weight = weights[name]
        self.scale = weights.get(f"{name}.scale")
        self._arithmetic = arithmetic

    def __call__(self, x: Tensor) -> Tensor:
        """x: [T, K] -> [T, N]."""
        mode = self._arithmetic
        return gemm.linear(x, self.weight, self.scale, mode.act_quant, mode.ue8m0)

    def grouped(self, x: Tensor, counts: Tensor) -> Tensor:
        """For stacked weights [E, N, K]: x [M, K] sorted by expert, counts [E] -> [M, N]."""
        mode = self._arithmetic
        return gemm.grouped_linear(x, self.weight, self.scale, counts, mode.act_quant, mode.ue8m0)


class RMSNorm:
    def __init__(self, weight: Tensor, eps: float) -> None:
        self.weight = weight
        self.eps = eps

    def __call__(self, x: Tensor) -> Tensor:
        return fused.rms_norm(x, self.weight, self.eps)

    def add(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """The norm of x + residual, and x + residual."""
        return fused.add_rms_norm(x, residual, self.weight, self.eps)


class MLP:
    """down(silu(gate(x)) * up(x))."""

    def __init__(self, weights: Mapping[str, Tensor], name: str, arithmetic: Arithmetic) -> None:
        self.gate_up = Linear(weights, f"{name}.gate_up", arithmetic)
        self.down = Linear(weights, f"{name}.down", arithmetic)

    def __call__(self, x: Tensor) -> Tensor:
        return self.down(fused.silu_mul(self.gate_up(x)))
