"""Block quantisation of activations and weights to e4m3."""

from torch import Tensor, dtype

from . import reference


def quantize_1x128(x: Tensor, ue8m0: bool = False) -> tuple[Tensor, Tensor]:
    """x: [T, K] float -> q [T, K] float8_e4m3fn, scale [T, ceil(K/128)] float32; x ~ q * scale."""
    assert x.dim() == 2, x.shape
    return reference.quantize_1x128(x, ue8m0)


def quantize_128x128(w: Tensor) -> tuple[Tensor, Tensor]:
    """w: [N, K] float -> q [N, K] float8_e4m3fn, scale [ceil(N/128), ceil(K/128)] float32."""
    assert w.dim() == 2, w.shape
    return reference.quantize_128x128(w)


def dequantize_128x128(q: Tensor, scale: Tensor, out_dtype: dtype) -> Tensor:
    """q: [..., N, K] float8_e4m3fn, scale: [..., ceil(N/128), ceil(K/128)] -> [..., N, K]
    out_dtype."""
    assert q.dim() == scale.dim(), (q.shape, scale.shape)
    return reference.dequantize_128x128(q, scale, out_dtype)
