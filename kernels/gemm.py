"""Linear maps: `w` is [N, K] as checkpoints store it ("nt": row-major times transposed).

Which kernel computes a map is decided here and in `moe_gemm.launch`, by shapes and card alone.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, float8_e4m3fn

from . import moe_gemm, reference
from .bf16_gemm import gemm_nt
from .compat import has_wgmma, runs_kernels
from .fp8_gemm import fp8_gemm_nt_dense, tma_ready
from .fp8_gemm_dot import dequant_gemm_nt, fp8_gemm_nt_dot
from .fp8_gemm_swap import choose_plan, fp8_gemm_nt_swap
from .fp8_gemm_work import choose_work
from .moe_items import Tables
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
        return gemm_nt(x, w)
    assert w.dtype == float8_e4m3fn, w.dtype
    assert w_scale.shape == tuple(-(-n // reference.BLOCK) for n in w.shape), w_scale.shape
    x = adjacent(x)
    if not act_quant:
        return dequant_gemm_nt(x, w, w_scale)
    q, q_scale = quantize_1x128(x, ue8m0, scale_k_major=has_wgmma(x))
    return fp8_gemm_nt(q, q_scale, w, w_scale, x.dtype)


def fp8_gemm_nt(
    x: Tensor, x_scale: Tensor, w: Tensor, w_scale: Tensor, out_dtype: torch.dtype
) -> Tensor:
    """e4m3 x e4m3, partial sums of 128 promoted to float32 with both scales.

    x: [T, K] float8_e4m3fn, x_scale: [T, ceil(K/128)] float32 (fastest as a view of [G, T], see
    `fp8_gemm.k_major`), w: [N, K] float8_e4m3fn, w_scale: [ceil(N/128), ceil(K/128)] float32
    -> [T, N] out_dtype.
    """
    if not runs_kernels(x):
        return reference.fp8_gemm_nt(x, x_scale, w, w_scale, out_dtype)
    (m, n), fast = (x.shape[0], w.shape[0]), has_wgmma(x) and out_dtype == torch.bfloat16
    out = torch.empty(m, n, dtype=out_dtype, device=x.device)
    if not out.numel():
        return out
    if not (fast and tma_ready(x) and tma_ready(w) and tma_ready(out)):
        return fp8_gemm_nt_dot(x, x_scale, w, w_scale, out)
    run = fp8_gemm_nt_swap if streams_weight(m, n) else fp8_gemm_nt_dense
    return run(x, x_scale, w, w_scale, out)


def streams_weight(m: int, n: int) -> bool:
    """Few tokens, or a weight so small that the dense kernel's tiles would leave SMs idle."""
    return m <= 64 or (m <= 256 and n <= 1024)


def warm_up_tokens(maps: Iterable[tuple[int, int]], most: int, sms: int) -> list[int]:
    """A few numbers of tokens with which fp8 maps of these (N, K) use, on Hopper, every kernel that
    they use with 1 ... most tokens: after them, none is compiled."""

    def kernel(m: int, n: int, k: int) -> object:
        if streams_weight(m, n):
            return choose_plan(m, n, k, sms)
        tile, _, pieces = choose_work(m, n, k, sms)
        return tile, pieces > 1

    maps, met, counts = list(maps), set(), []
    # Between these nothing changes.
    for m in (1, 9, 17, 33, *range(65, most + 1, 64)):
        used = {kernel(m, n, k) for n, k in maps}
        if not used <= met:
            met |= used
            counts.append(m)
    return counts


def adjacent(x: Tensor) -> Tensor:
    """Rows may be strided; what is within a row may not."""
    return x if x.stride(1) == 1 else x.contiguous()


def grouped_linear(
    x: Tensor,
    w: Tensor,
    w_scale: Tensor | None,
    offsets: Tensor,
    act_quant: bool = False,
    ue8m0: bool = False,
    expected: float | None = None,
) -> Tensor:
    """`linear` of contiguous groups of rows, each with its own weight.

    x: [M, K], the rows of expert 0 first; w: [E, N, K]; w_scale: [E, ceil(N/128), ceil(K/128)] or
    None; offsets: [E] int64, the row behind each expert's last, at most M; expected: rows that an
    expert has on average, for speed only. -> [M, N] in x's dtype; rows behind the last offset are
    not written.
    """
    assert w.dim() == 3 and offsets.shape == (w.shape[0],), (w.shape, offsets.shape)
    x = adjacent(x)
    if w_scale is not None and act_quant:
        q, q_scale = quantize_1x128(x, ue8m0, scale_k_major=has_wgmma(x))
        return grouped_fp8_linear(q, q_scale, w, w_scale, offsets, x.dtype, expected)
    out = torch.empty(x.shape[0], w.shape[1], dtype=x.dtype, device=x.device)
    w = w.to(x.dtype) if w_scale is None else w
    return moe_gemm.grouped_gemm_nt_contiguous(x, w, offsets, out, w_scale)


def grouped_fp8_linear(
    q: Tensor,
    q_scale: Tensor,
    w: Tensor,
    w_scale: Tensor,
    offsets: Tensor,
    out_dtype: torch.dtype,
    expected: float | None = None,
    tables: Tables | None = None,
) -> Tensor:
    """`grouped_linear` of rows that are quantised already: q [M, K] float8_e4m3fn, q_scale [M,
    ceil(K/128)] float32, any layout. tables: shared by maps over the same offsets and M."""
    out = torch.empty(q.shape[0], w.shape[1], dtype=out_dtype, device=q.device)
    return moe_gemm.grouped_fp8_gemm_nt_contiguous(
        q, q_scale, w, w_scale, offsets, out, expected, tables
    )


def linear_float32(x: Tensor, w: Tensor, out: Tensor | None = None) -> Tensor:
    """x: [T, K] of any float dtype, w: [N, K] -> [T, N] float32, in `out` if it is given. On a GPU
    bf16 operands are multiplied as they are, exactly, and summed in float32; on a CPU in x's dtype,
    and widened."""
    if x.is_cuda and x.dtype == w.dtype == torch.bfloat16:
        return torch.mm(x, w.t(), out_dtype=torch.float32, out=out)
    wide = gemm_nt(x, w).float()
    return wide if out is None else out.copy_(wide)
