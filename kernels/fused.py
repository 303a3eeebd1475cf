"""Per-token work between the GEMMs: norms, activation, rope, embedding.

On the GPU every tensor of tokens has rows of unit stride; the rows may lie apart, so slices of
wider tensors are read where they are. Arithmetic is float32, rounded where the twins round. A
`*_quant` function equals its namesake followed by `quantize_1x128`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor, dtype, float32

from . import reference
from .compat import has_fp8, overlap, runs_kernels, wait_previous
from .quant import empty_scale, quantize_1x128, store_quantized

SILU_GROUPS = 8
"""Blocks of 128 of one token that one program activates, at most."""
ROPE_HEADS = 16
"""Heads of one token that one program rotates, at most."""
EMBED_BLOCK = 2048


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x: [T, N] -> [T, N] in x's dtype; weight: [N] float."""
    assert x.shape[-1] == weight.shape[0], (x.shape, weight.shape)
    if not runs_kernels(x):
        return reference.rms_norm(x, weight, eps)
    return _launch_norm(x, None, weight, eps)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x, residual: [T, N] -> rms_norm(x + residual), x + residual."""
    assert x.shape == residual.shape, (x.shape, residual.shape)
    if not runs_kernels(x):
        return reference.add_rms_norm(x, residual, weight, eps)
    total = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    return _launch_norm(x, residual, weight, eps, total), total


def rms_norm_quant(
    x: Tensor, weight: Tensor, eps: float, ue8m0: bool = False, scale_k_major: bool = False
) -> tuple[Tensor, Tensor]:
    """x: [T, N] -> q [T, N] float8_e4m3fn, scale [T, ceil(N/128)] float32 of its `rms_norm`."""
    if not (runs_kernels(x) and has_fp8(x)):
        return quantize_1x128(rms_norm(x, weight, eps), ue8m0, scale_k_major)
    scale = empty_scale(x, x.shape[1], scale_k_major)
    return _launch_norm(x, None, weight, eps, None, scale, ue8m0), scale


def add_rms_norm_quant(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    eps: float,
    ue8m0: bool = False,
    scale_k_major: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, residual: [T, N] -> q [T, N] float8_e4m3fn, scale [T, ceil(N/128)] float32 of
    rms_norm(x + residual), that norm itself, and x + residual."""
    if not (runs_kernels(x) and has_fp8(x)):
        normed, total = add_rms_norm(x, residual, weight, eps)
        return *quantize_1x128(normed, ue8m0, scale_k_major), normed, total
    total = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    normed = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    scale = empty_scale(x, x.shape[1], scale_k_major)
    q = _launch_norm(x, residual, weight, eps, total, scale, ue8m0, normed)
    return q, scale, normed, total


def _launch_norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    eps: float,
    total: Tensor | None = None,
    scale: Tensor | None = None,
    ue8m0: bool = False,
    normed: Tensor | None = None,
) -> Tensor:
    """One program a token. Adds and writes `total` where there is a residual; quantises where there
    is a scale, and writes `normed` besides where that is given."""
    assert x.dim() == 2 and x.stride(1) == 1, (x.shape, x.stride())
    assert weight.is_contiguous() and weight.shape == x.shape[1:], (weight.shape, x.shape)
    if residual is not None:
        assert residual.shape == x.shape and residual.dtype == x.dtype, (residual.dtype, x.dtype)
        assert residual.stride(1) == 1, residual.stride()
    width = x.shape[1]
    groups = triton.next_power_of_2(triton.cdiv(width, reference.BLOCK))
    out_dtype = x.dtype if scale is None else torch.float8_e4m3fn
    out = torch.empty(x.shape, dtype=out_dtype, device=x.device)
    _norm[(x.shape[0],)](
        x, residual, weight, out, total, scale, normed, eps, x.stride(0),
        0 if residual is None else residual.stride(0),
        *((0, 0) if scale is None else scale.stride()), WIDTH=width, GROUPS=groups,
        UE8M0=ue8m0, num_warps=norm_warps(groups), **overlap(x)
    )  # fmt: skip
    return out


def norm_warps(groups: int) -> int:
    """Warps of a program that reduces so many blocks of 128: 16 elements a thread. The norm of one
    token is pure latency, and dividing takes most of it."""
    return min(max(groups // 4, 1), 16)


def silu_mul(gate_up: Tensor) -> Tensor:
    """gate_up: [T, 2N], gate first -> [T, N]."""
    assert gate_up.dim() == 2 and gate_up.shape[1] % 2 == 0, gate_up.shape
    if not runs_kernels(gate_up):
        return reference.silu_mul(gate_up)
    return _launch_silu(gate_up, None, False)


def silu_mul_quant(
    gate_up: Tensor, ue8m0: bool = False, scale_k_major: bool = False
) -> tuple[Tensor, Tensor]:
    """gate_up: [T, 2N], gate first -> q [T, N] float8_e4m3fn, scale [T, ceil(N/128)] float32."""
    assert gate_up.dim() == 2 and gate_up.shape[1] % 2 == 0, gate_up.shape
    if not (runs_kernels(gate_up) and has_fp8(gate_up)):
        return quantize_1x128(silu_mul(gate_up), ue8m0, scale_k_major)
    scale = empty_scale(gate_up, gate_up.shape[1] // 2, scale_k_major)
    return _launch_silu(gate_up, scale, ue8m0), scale


def _launch_silu(gate_up: Tensor, scale: Tensor | None, ue8m0: bool) -> Tensor:
    assert gate_up.stride(1) == 1, gate_up.stride()
    num_tokens, width = gate_up.shape[0], gate_up.shape[1] // 2
    out_dtype = gate_up.dtype if scale is None else torch.float8_e4m3fn
    out = torch.empty(num_tokens, width, dtype=out_dtype, device=gate_up.device)
    groups = silu_groups(width)
    _silu_mul[(num_tokens, triton.cdiv(width, groups * reference.BLOCK))](
        gate_up, out, scale, gate_up.stride(0),
        *((0, 0) if scale is None else scale.stride()), WIDTH=width, GROUPS=groups,
        UE8M0=ue8m0, num_warps=max(groups // 2, 1), **overlap(gate_up)
    )  # fmt: skip
    return out


def silu_groups(width: int) -> int:
    """Blocks of 128 that one program activates of so wide a token."""
    return min(triton.next_power_of_2(triton.cdiv(width, reference.BLOCK)), SILU_GROUPS)


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor, out: Tensor | None = None) -> Tensor:
    """Rotates neighbouring pairs of the last dimension.

    x: [T, H, P] or [T, P], unit stride in P, other strides free
    cos, sin: [T, P/2] float32, contiguous
    out: x's shape and dtype; x itself (then it is rotated in place), or apart from x; made if None
    """
    assert cos.dtype == float32 and cos.shape == (x.shape[0], x.shape[-1] // 2), (
        cos.shape,
        x.shape,
    )
    assert sin.dtype == float32 and sin.shape == cos.shape, (sin.shape, cos.shape)
    if not runs_kernels(x):
        rotated = reference.apply_rope(x, cos, sin)
        return rotated if out is None else out.copy_(rotated)
    if out is None:
        out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    assert out.shape == x.shape and out.dtype == x.dtype, (out.shape, x.shape, out.dtype)
    assert x.stride(-1) == 1 and out.stride(-1) == 1, (x.stride(), out.stride())
    assert cos.is_contiguous() and sin.is_contiguous(), (cos.stride(), sin.stride())
    heads = x.shape[1] if x.dim() == 3 else 1
    tile = min(triton.next_power_of_2(heads), ROPE_HEADS)
    _rope[(x.shape[0], triton.cdiv(heads, tile))](
        x, cos, sin, out, x.stride(0), x.stride(1) if x.dim() == 3 else 0, out.stride(0),
        out.stride(1) if x.dim() == 3 else 0, num_heads=heads, WIDTH=x.shape[-1],
        HEADS=tile, PAIRS=triton.next_power_of_2(x.shape[-1] // 2),
        num_warps=max(tile // 4, 1), **overlap(x)
    )  # fmt: skip
    return out


def embedding(weight: Tensor, ids: Tensor, out_dtype: dtype) -> Tensor:
    """weight: [V, N], contiguous, ids: [T] integer, all < V -> [T, N] out_dtype."""
    assert ids.dim() == 1, ids.shape
    if not runs_kernels(weight):
        return reference.embedding(weight, ids, out_dtype)
    assert weight.is_contiguous() and ids.is_contiguous(), (weight.stride(), ids.stride())
    width = weight.shape[1]
    out = torch.empty(ids.shape[0], width, dtype=out_dtype, device=weight.device)
    grid = (ids.shape[0], triton.cdiv(width, EMBED_BLOCK))
    _embedding[grid](weight, ids, out, WIDTH=width, BLOCK=EMBED_BLOCK, **overlap(weight))
    return out


def joined(
    weight: Tensor,
    ids: Tensor,
    enorm: Tensor,
    hidden: Tensor,
    hnorm: Tensor,
    eps: float,
    out_dtype: dtype,
) -> Tensor:
    """What the MTP layer is made of: `embedding` normed by enorm, beside hidden normed by hnorm.

    weight: [V, N], contiguous, ids: [T] integer, all < V; hidden: [T, N] out_dtype
    enorm, hnorm: [N] float, constant (see `wait_previous`)
    -> [T, 2N] out_dtype
    """
    num_tokens, width = hidden.shape
    assert ids.shape == (num_tokens,) and weight.shape[1] == width, (ids.shape, hidden.shape)
    assert enorm.shape == hnorm.shape == (width,), (enorm.shape, hnorm.shape)
    assert hidden.dtype == out_dtype, (hidden.dtype, out_dtype)
    if not runs_kernels(hidden):
        return reference.joined(weight, ids, enorm, hidden, hnorm, eps, out_dtype)
    assert weight.is_contiguous() and ids.is_contiguous(), (weight.stride(), ids.stride())
    assert enorm.is_contiguous() and hnorm.is_contiguous(), (enorm.stride(), hnorm.stride())
    assert hidden.stride(1) == 1, hidden.stride()
    out = torch.empty(num_tokens, 2 * width, dtype=out_dtype, device=hidden.device)
    groups = triton.next_power_of_2(triton.cdiv(width, reference.BLOCK))
    _joined[(num_tokens, 2)](
        weight, ids, enorm, hidden, hnorm, out, eps, hidden.stride(0), WIDTH=width, GROUPS=groups,
        num_warps=norm_warps(groups), **overlap(hidden)
    )  # fmt: skip
    return out


@triton.jit
def rms_weighted(x, weight, eps, WIDTH: tl.constexpr, dtype: tl.constexpr):
    """x: float32, zero behind WIDTH -> x / rms(x) * weight, rounded before and after it."""
    normed = (x * tl.rsqrt(tl.sum(x * x) / WIDTH + eps)).to(dtype).to(tl.float32)
    return (normed * weight.to(dtype).to(tl.float32)).to(dtype)


@triton.jit(do_not_specialize=["scale_token_stride", "scale_group_stride"])
def _norm(
    x, residual, weight, out, total, scale, plain, eps, x_stride, residual_stride,
    scale_token_stride, scale_group_stride, WIDTH: tl.constexpr, GROUPS: tl.constexpr,
    UE8M0: tl.constexpr, PDL: tl.constexpr
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    group = tl.arange(0, GROUPS)
    at = group[:, None] * 128 + tl.arange(0, 128)[None, :]
    mask = at < WIDTH
    dtype: tl.constexpr = x.dtype.element_ty
    factor = tl.load(weight + at, mask, 0.0)  # no kernel writes it: it may come early
    wait_previous(PDL)
    value = tl.load(x + token * x_stride + at, mask, 0.0).to(tl.float32)
    if residual is not None:
        value += tl.load(residual + token * residual_stride + at, mask, 0.0).to(tl.float32)
        rounded = value.to(dtype)
        tl.store(total + token * WIDTH + at, rounded, mask)
        value = rounded.to(tl.float32)
    normed = rms_weighted(value, factor, eps, WIDTH, dtype)
    out += token * WIDTH
    if scale is None:
        tl.store(out + at, normed, mask)
    else:
        if plain is not None:
            tl.store(plain + token * WIDTH + at, normed, mask)
        scale += token * scale_token_stride
        store_quantized(normed.to(tl.float32), group, out, scale, scale_group_stride, WIDTH, UE8M0)


@triton.jit
def activated(gate_up, group, WIDTH: tl.constexpr):
    """silu(gate) * up of a row: its blocks of 128 in `group`, [GROUPS, 128], zero behind WIDTH."""
    at = group[:, None] * 128 + tl.arange(0, 128)[None, :]
    mask = at < WIDTH
    dtype: tl.constexpr = gate_up.dtype.element_ty
    gate = tl.load(gate_up + at, mask, 0.0).to(tl.float32)
    up = tl.load(gate_up + WIDTH + at, mask, 0.0).to(tl.float32)
    active = (gate / (1.0 + tl.exp(-gate))).to(dtype).to(tl.float32)
    return (active * up).to(dtype)


@triton.jit(do_not_specialize=["scale_token_stride", "scale_group_stride"])
def _silu_mul(
    gate_up, out, scale, stride, scale_token_stride, scale_group_stride, WIDTH: tl.constexpr,
    GROUPS: tl.constexpr, UE8M0: tl.constexpr, PDL: tl.constexpr
):  # fmt: skip
    wait_previous(PDL)
    token = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)
    value = activated(gate_up + token * stride, group, WIDTH)
    out += token * WIDTH
    if scale is None:
        at = group[:, None] * 128 + tl.arange(0, 128)[None, :]
        tl.store(out + at, value, at < WIDTH)
    else:
        scale += token * scale_token_stride
        store_quantized(value.to(tl.float32), group, out, scale, scale_group_stride, WIDTH, UE8M0)


@triton.jit
def rotate_pairs(x, cos, sin, HEADS: tl.constexpr, PAIRS: tl.constexpr):
    """x: [HEADS, 2 * PAIRS] float32; cos, sin: [1, PAIRS]."""
    even, odd = tl.split(tl.reshape(x, (HEADS, PAIRS, 2)))
    return tl.reshape(tl.join(even * cos - odd * sin, even * sin + odd * cos), (HEADS, 2 * PAIRS))


@triton.jit
def load_angles(cos, sin, token, WIDTH: tl.constexpr, PAIRS: tl.constexpr):
    """A token's row of the tables, each [1, PAIRS]."""
    pair = tl.arange(0, PAIRS)[None, :]
    at = token * (WIDTH // 2) + pair
    mask = pair < WIDTH // 2
    return tl.load(cos + at, mask, 0.0), tl.load(sin + at, mask, 0.0)


@triton.jit(do_not_specialize_on_alignment=["cos", "sin"])
def _rope(
    x, cos, sin, out, x_token_stride, x_head_stride, out_token_stride, out_head_stride,
    num_heads, WIDTH: tl.constexpr, HEADS: tl.constexpr, PAIRS: tl.constexpr, PDL: tl.constexpr
):  # fmt: skip
    wait_previous(PDL)
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)[:, None]
    column = tl.arange(0, 2 * PAIRS)[None, :]
    mask = (head < num_heads) & (column < WIDTH)
    value = tl.load(x + token * x_token_stride + head * x_head_stride + column, mask, 0.0)
    cosine, sine = load_angles(cos, sin, token, WIDTH, PAIRS)
    rotated = rotate_pairs(value.to(tl.float32), cosine, sine, HEADS, PAIRS)
    at = token * out_token_stride + head * out_head_stride + column
    tl.store(out + at, rotated.to(value.dtype), mask)


@triton.jit(do_not_specialize_on_alignment=["ids"])
def _embedding(weight, ids, out, WIDTH: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):
    wait_previous(PDL)
    token = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    row = tl.load(ids + token).to(tl.int64)
    value = tl.load(weight + row * WIDTH + at, at < WIDTH)
    tl.store(out + token * WIDTH + at, value.to(out.dtype.element_ty), at < WIDTH)


@triton.jit(do_not_specialize_on_alignment=["ids"])
def _joined(
    weight, ids, enorm, hidden, hnorm, out, eps, stride, WIDTH: tl.constexpr, GROUPS: tl.constexpr,
    PDL: tl.constexpr
):  # fmt: skip
    """Grid: (tokens, 2), the first of each for the embedding. Arithmetic and order are `_norm`'s,
    of rows that `_embedding` wrote."""
    token = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, GROUPS)[:, None] * 128 + tl.arange(0, 128)[None, :]
    mask = at < WIDTH
    dtype: tl.constexpr = out.dtype.element_ty
    out += token * 2 * WIDTH
    if tl.program_id(1) == 0:
        factor = tl.load(enorm + at, mask, 0.0)  # no kernel writes it: it may come early
        wait_previous(PDL)
        row = tl.load(ids + token).to(tl.int64)
        value = tl.load(weight + row * WIDTH + at, mask, 0.0).to(dtype).to(tl.float32)
        tl.store(out + at, rms_weighted(value, factor, eps, WIDTH, dtype), mask)
    else:
        factor = tl.load(hnorm + at, mask, 0.0)
        wait_previous(PDL)
        value = tl.load(hidden + token * stride + at, mask, 0.0).to(tl.float32)
        tl.store(out + WIDTH + at, rms_weighted(value, factor, eps, WIDTH, dtype), mask)
