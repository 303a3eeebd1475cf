"""Linear maps: `w` is [N, K] as checkpoints store it ("nt": row-major times transposed)."""

from torch import Tensor, float8_e4m3fn

from . import reference
from .quant import quantize_1x128


def linear(
    x: Tensor, w: Tensor, w_scale: Tensor | None, act_quant: bool = False, ue8m0: bool = False
) -> Tensor:
    """x: [T, K] bf16 or f32, w: [N, K] -> [T, N] in x's dtype.

    Without `w_scale` the weight is plain (any float dtype). With it the weight is e4m3 with 128x128
    scales: multiplied in fp8 after 1x128 quantisation of x if `act_quant`, else dequantised.
    """
    assert x.dim() == 2 and x.shape[1] == w.shape[1], (x.shape, w.shape)
    if w_scale is None:
        return reference.gemm_nt(x, w)
    assert w.dtype == float8_e4m3fn, w.dtype
    assert w_scale.shape == tuple(-(-n // reference.BLOCK) for n in w.shape), w_scale.shape
    if not act_quant:
        return reference.dequant_gemm_nt(x, w, w_scale)
    q, q_scale = quantize_1x128(x, ue8m0)
    return reference.fp8_gemm_nt(q, q_scale, w, w_scale, x.dtype)


def grouped_linear(
    x: Tensor,
    w: Tensor,
    w_scale: Tensor | None,
    counts: Tensor,
    act_quant: bool = False,
    ue8m0: bool = False,
) -> Tensor:
    """`linear` of contiguous groups of rows, each with its own weight.

    x: [M, K], the rows of expert 0 first; w: [E, N, K]; w_scale: [E, ceil(N/128), ceil(K/128)] or
    None; counts: [E] int64, summing to M; empty groups are allowed. -> [M, N] in x's dtype.
    """
    assert w.dim() == 3 and counts.shape == (w.shape[0],), (w.shape, counts.shape)
    out = x.new_empty(x.shape[0], w.shape[1])
    start = 0
    for expert, count in enumerate(counts.tolist()):
        if count:
            rows = slice(start, start + count)
            scale = None if w_scale is None else w_scale[expert]
            out[rows] = linear(x[rows], w[expert], scale, act_quant, ue8m0)
            start += count
    assert start == x.shape[0], (start, x.shape)
    return out
