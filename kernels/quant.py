"""Block quantisation of activations and weights to e4m3."""

import torch
import triton
import triton.language as tl
from torch import Tensor, dtype

from . import reference
from .compat import has_fp8, overlap, runs_kernels, wait_previous

GROUPS = 16
"""Blocks of 128 that one program quantises."""
DEQUANT_ROWS = 64
"""Rows of a 128x128 block that one program dequantises."""


def quantize_1x128(
    x: Tensor, ue8m0: bool = False, scale_k_major: bool = False
) -> tuple[Tensor, Tensor]:
    """Quantises activations to e4m3 with one scale for 128 neighbours of a token; x ~ q * scale.

    x: [T, K] float, rows of unit stride (GPU)
    q: [T, K] float8_e4m3fn, contiguous
    scale: [T, ceil(K/128)] float32, contiguous, or `empty_scale`'s other layout
    """
    assert x.dim() == 2 and x.is_floating_point(), (x.shape, x.dtype)
    if not (runs_kernels(x) and has_fp8(x)):
        return reference.quantize_1x128(x, ue8m0)
    assert x.stride(1) == 1, x.stride()
    num_tokens, width = x.shape
    q = torch.empty(x.shape, dtype=torch.float8_e4m3fn, device=x.device)
    scale = empty_scale(x, width, scale_k_major)
    grid = (num_tokens, triton.cdiv(scale.shape[1], GROUPS))
    _quantize[grid](
        x, q, scale, x.stride(0), *scale.stride(), WIDTH=width, GROUPS=GROUPS, UE8M0=ue8m0,
        **overlap(x)
    )  # fmt: skip
    return q, scale


def empty_scale(x: Tensor, width: int, k_major: bool) -> Tensor:
    """Scales of [len(x), width]: [T, ceil(width/128)] float32, contiguous; or, `k_major`, a view
    with stride (1, T rounded up to 4), as TMA reads them: what pads the columns is never read."""
    num_tokens, num_groups = x.shape[0], -(-width // reference.BLOCK)
    if not k_major:
        return torch.empty(num_tokens, num_groups, dtype=torch.float32, device=x.device)
    padded = -(-num_tokens // 4) * 4
    scale = torch.empty(num_groups, padded, dtype=torch.float32, device=x.device)
    return scale.t()[:num_tokens]


def quantize_128x128(w: Tensor) -> tuple[Tensor, Tensor]:
    """w: [N, K] float -> q [N, K] float8_e4m3fn, scale [ceil(N/128), ceil(K/128)] float32. Torch on
    every device: weights are quantised once, if at all."""
    assert w.dim() == 2, w.shape
    return reference.quantize_128x128(w)


def dequantize_128x128(q: Tensor, scale: Tensor, out_dtype: dtype) -> Tensor:
    """The reverse of `quantize_128x128`; also for stacked weights.

    q: [..., N, K] float8_e4m3fn; scale: [..., ceil(N/128), ceil(K/128)] float32 -> [..., N, K]
    out_dtype; what is not contiguous is copied
    """
    assert q.dim() == scale.dim(), (q.shape, scale.shape)
    if not (runs_kernels(q) and has_fp8(q)):
        return reference.dequantize_128x128(q, scale, out_dtype)
    assert q.dtype == torch.float8_e4m3fn and scale.dtype == torch.float32, (q.dtype, scale.dtype)
    q, scale = q.contiguous(), scale.contiguous()
    n, k = q.shape[-2:]
    blocks = (-(-n // reference.BLOCK), -(-k // reference.BLOCK))
    assert scale.shape == (*q.shape[:-2], *blocks), (q.shape, scale.shape)
    out = torch.empty(q.shape, dtype=out_dtype, device=q.device)
    parts = triton.cdiv(n, DEQUANT_ROWS)
    grid = (parts * blocks[1], q.shape[:-2].numel())
    _dequantize[grid](q, scale, out, N=n, K=k, ROWS=DEQUANT_ROWS)
    return out


@triton.jit
def block_scale(largest, UE8M0: tl.constexpr):
    """The scale of blocks by their largest magnitude; divided as IEEE says, like the twin."""
    scale = tl.div_rn(tl.maximum(largest, 1e-4), 448.0)
    if UE8M0:  # up to a power of two, by bits: a logarithm would be rounded
        bits = scale.to(tl.int32, bitcast=True)
        scale = ((bits + 0x7FFFFF) & 0x7F800000).to(tl.float32, bitcast=True)
    return scale


@triton.jit
def divided(x, by):
    """x / by as IEEE says, for one `by` to many x: with its reciprocal, and one step that corrects
    the last bit (Markstein). A division proper is thirty instructions."""
    inverse = tl.div_rn(1.0, by)
    quotient = x * inverse
    exact = tl.fma(tl.fma(-quotient, by, x), inverse, quotient)
    return tl.where(quotient == 0, quotient, exact)  # or -0 would become 0


@triton.jit
def store_quantized(x, group, q, scale, scale_stride, WIDTH: tl.constexpr, UE8M0: tl.constexpr):
    """Quantises x: [GROUPS, 128] float32, zero behind WIDTH, into a token's q and scale. `group`:
    [GROUPS] which blocks these are."""
    at = group[:, None] * 128 + tl.arange(0, 128)[None, :]
    scales = block_scale(tl.max(tl.abs(x), axis=1), UE8M0)
    # The conversion saturates at 448.
    tl.store(q + at, divided(x, scales[:, None]).to(tl.float8e4nv), at < WIDTH)
    tl.store(scale + group * scale_stride, scales, group * 128 < WIDTH)


@triton.jit(do_not_specialize=["scale_token_stride", "scale_group_stride"])
def _quantize(
    x, q, scale, x_stride, scale_token_stride, scale_group_stride, WIDTH: tl.constexpr,
    GROUPS: tl.constexpr, UE8M0: tl.constexpr, PDL: tl.constexpr
):  # fmt: skip
    wait_previous(PDL)
    token = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)
    at = group[:, None] * 128 + tl.arange(0, 128)[None, :]
    value = tl.load(x + token * x_stride + at, at < WIDTH, 0.0).to(tl.float32)
    scale += token * scale_token_stride
    store_quantized(value, group, q + token * WIDTH, scale, scale_group_stride, WIDTH, UE8M0)


@triton.jit
def _dequantize(q, scale, out, N: tl.constexpr, K: tl.constexpr, ROWS: tl.constexpr):
    """ROWS rows of one 128x128 block of one matrix."""
    columns: tl.constexpr = (K + 127) // 128
    matrix = tl.program_id(1).to(tl.int64)
    first = tl.program_id(0) // columns * ROWS
    column = tl.program_id(0) % columns
    row = first + tl.arange(0, ROWS)[:, None]
    k = column * 128 + tl.arange(0, 128)[None, :]
    at = matrix * N * K + row.to(tl.int64) * K + k
    mask = (row < N) & (k < K)
    rows: tl.constexpr = (N + 127) // 128
    factor = tl.load(scale + (matrix * rows + first // 128) * columns + column)
    value = tl.load(q + at, mask, 0.0).to(tl.float32) * factor
    tl.store(out + at, value.to(out.dtype.element_ty), mask)
