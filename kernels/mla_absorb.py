"""Absorbed attention's maps by head: queries into the latent space, and values out of it.

    absorb     [q_nope ; q_pe] -> [W_UK^T q_nope ; rotated q_pe], what `mla.mla_decode` takes
    expand     what it gives -> W_UV latent, quantised for the output projection

A block of threads has one head and a few tokens; its part of the weight, which no kernel writes, is
under way before the kernel ahead has ended.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor, float32

from . import reference
from .compat import has_fp8, overlap, prefetch_l2, runs_kernels, wait_previous
from .fused import rotate_pairs
from .quant import block_scale, divided, empty_scale, quantize_1x128

MAX_TOKENS = 64
"""Of a block of threads."""
COLUMNS = 64
"""Of the latent space, of a block of threads of `absorb`."""
DEPTH = 64
"""Of the latent space, that `expand` multiplies at once."""


def absorb(q: Tensor, w_uk: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Queries over latents.

    q: [T, H, N + P], unit stride in the last dimension
    w_uk: [H, N, R] in q's dtype, unit stride in R; constant (see `wait_previous`)
    cos, sin: [T, P/2] float32, contiguous
    -> [T, H, R + P] in q's dtype: q[..., :N] @ w_uk, and q[..., N:] rotated
    """
    num_tokens, heads, width = q.shape
    _, nope, rank = w_uk.shape
    rope = width - nope
    assert w_uk.shape[0] == heads and w_uk.dtype == q.dtype, (q.shape, w_uk.shape, w_uk.dtype)
    assert cos.dtype == float32 and cos.shape == sin.shape == (num_tokens, rope // 2), cos.shape
    if not (runs_kernels(q) and suits(q)):
        return reference.absorb(q, w_uk, cos, sin)
    assert q.stride(2) == w_uk.stride(2) == 1, (q.stride(), w_uk.stride())
    assert cos.is_contiguous() and sin.is_contiguous(), (cos.stride(), sin.stride())
    out = torch.empty(num_tokens, heads, rank + rope, dtype=q.dtype, device=q.device)
    tokens = tile_of(num_tokens)
    grid = (heads, triton.cdiv(rank, COLUMNS) + 1, triton.cdiv(num_tokens, tokens))
    _absorb[grid](
        q, w_uk, cos, sin, out, num_tokens, *q.stride()[:2], *w_uk.stride()[:2], NOPE=nope,
        RANK=rank, ROPE=rope, TOKENS=tokens, COLUMNS=COLUMNS,
        NOPE_BLOCK=max(16, triton.next_power_of_2(nope)),
        PAIRS=triton.next_power_of_2(rope // 2), **overlap(q)
    )  # fmt: skip
    return out


def expand(latent: Tensor, w_uv: Tensor) -> Tensor:
    """Values of heads.

    latent: [T, H, R], contiguous (GPU); w_uv: [H, R, V] in its dtype, unit stride in R; constant
    (see `wait_previous`) -> [T, H, V] in latent's dtype
    """
    check_values(latent, w_uv)
    if not (runs_kernels(latent) and suits(latent)):
        return reference.expand(latent, w_uv)
    return _launch_expand(latent, w_uv, None, False)


def expand_quant(
    latent: Tensor, w_uv: Tensor, ue8m0: bool = False, scale_k_major: bool = False
) -> tuple[Tensor, Tensor]:
    """`expand`, as a token's heads behind one another and quantised 1x128; V is a multiple of 128.
    -> q [T, H * V] float8_e4m3fn, scale [T, H * V / 128] float32, as of `empty_scale`"""
    check_values(latent, w_uv)
    width = w_uv.shape[0] * w_uv.shape[2]
    assert w_uv.shape[2] % reference.BLOCK == 0, w_uv.shape
    if not (runs_kernels(latent) and suits(latent) and has_fp8(latent)):
        return quantize_1x128(expand(latent, w_uv).flatten(1), ue8m0, scale_k_major)
    scale = empty_scale(latent, width, scale_k_major)
    return _launch_expand(latent, w_uv, scale, ue8m0).flatten(1), scale


def check_values(latent: Tensor, w_uv: Tensor) -> None:
    assert latent.shape[1:] == w_uv.shape[:2], (latent.shape, w_uv.shape)
    assert latent.dtype == w_uv.dtype, (latent.dtype, w_uv.dtype)


def _launch_expand(latent: Tensor, w_uv: Tensor, scale: Tensor | None, ue8m0: bool) -> Tensor:
    num_tokens, heads, rank = latent.shape
    value = w_uv.shape[2]
    assert latent.is_contiguous() and w_uv.stride(1) == 1, (latent.stride(), w_uv.stride())
    dtype = latent.dtype if scale is None else torch.float8_e4m3fn
    out = torch.empty(num_tokens, heads, value, dtype=dtype, device=latent.device)
    tokens = tile_of(num_tokens)
    columns = min(reference.BLOCK, max(16, triton.next_power_of_2(value)))
    grid = (heads, triton.cdiv(value, columns), triton.cdiv(num_tokens, tokens))
    _expand[grid](
        latent, w_uv, out, scale, num_tokens, heads, w_uv.stride(0), w_uv.stride(2),
        *((0, 0) if scale is None else scale.stride()), RANK=rank, VALUE=value, TOKENS=tokens,
        COLUMNS=columns, DEPTH=min(DEPTH, max(16, triton.next_power_of_2(rank))), UE8M0=ue8m0,
        **overlap(latent)
    )  # fmt: skip
    return out


def suits(x: Tensor) -> bool:
    """Tiles of float32 would need twice the registers and shared memory; the library takes it."""
    return x.dtype != float32


def tile_of(num_tokens: int) -> int:
    """Tokens of a block of threads: 16, 32 or 64."""
    return min(max(16, triton.next_power_of_2(num_tokens)), MAX_TOKENS)


@triton.jit(
    do_not_specialize=["num_tokens"], do_not_specialize_on_alignment=["cos", "sin"]
)  # fmt: skip
def _absorb(
    q, w, cos, sin, out, num_tokens, q_token, q_head, w_head, w_row, NOPE: tl.constexpr,
    RANK: tl.constexpr, ROPE: tl.constexpr, TOKENS: tl.constexpr, COLUMNS: tl.constexpr,
    NOPE_BLOCK: tl.constexpr, PAIRS: tl.constexpr, PDL: tl.constexpr
):  # fmt: skip
    """Grid: (heads, tiles of latent columns and one that rotates, tiles of tokens)."""
    head = tl.program_id(0).to(tl.int64)
    token = (tl.program_id(2) * TOKENS + tl.arange(0, TOKENS)).to(tl.int64)[:, None]
    live = token < num_tokens
    q += token * q_token + head * q_head
    out += (token * tl.num_programs(0) + head) * (RANK + ROPE)
    first = tl.program_id(1) * COLUMNS
    if first < RANK:
        k = tl.arange(0, NOPE_BLOCK)
        column = first + tl.arange(0, COLUMNS)[None, :]
        inside = (k[:, None] < NOPE) & (column < RANK)
        weight = tl.load(w + head * w_head + k[:, None] * w_row + column, inside, 0.0)
        wait_previous(PDL)
        nope = tl.load(q + k[None, :], live & (k[None, :] < NOPE), 0.0)
        absorbed = tl.dot(nope, weight)
        tl.store(out + column, absorbed.to(out.dtype.element_ty), live & (column < RANK))
    else:
        wait_previous(PDL)
        pair = tl.arange(0, PAIRS)[None, :]
        known = live & (pair < ROPE // 2)
        cosine = tl.load(cos + token * (ROPE // 2) + pair, known, 0.0)
        sine = tl.load(sin + token * (ROPE // 2) + pair, known, 0.0)
        at = tl.arange(0, 2 * PAIRS)[None, :]
        rope = tl.load(q + NOPE + at, live & (at < ROPE), 0.0).to(tl.float32)
        rotated = rotate_pairs(rope, cosine, sine, TOKENS, PAIRS)
        tl.store(out + RANK + at, rotated.to(out.dtype.element_ty), live & (at < ROPE))


@triton.jit(
    do_not_specialize=["num_tokens", "heads", "scale_token", "scale_group"],
)
def _expand(
    latent, w, out, scale, num_tokens, heads, w_head, w_column, scale_token, scale_group,
    RANK: tl.constexpr, VALUE: tl.constexpr, TOKENS: tl.constexpr, COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr, UE8M0: tl.constexpr, PDL: tl.constexpr
):  # fmt: skip
    """Grid: (heads, tiles of value columns, tiles of tokens). w: columns of RANK elements."""
    head = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    token = (tl.program_id(2) * TOKENS + tl.arange(0, TOKENS)).to(tl.int64)[:, None]
    live = token < num_tokens
    w += head * w_head + column[None, :] * w_column
    real = column[None, :] < VALUE
    if PDL and RANK % 64 == 0:  # lines of 128 bytes
        lines = tl.arange(0, 8)[:, None] * 64
        for first in tl.static_range(0, RANK, 512):
            line = tl.where(real & (lines + first < RANK), w + lines + first, w)
            prefetch_l2(line.to(tl.int64, bitcast=True))
    wait_previous(PDL)
    latent += (token * heads + head) * RANK
    acc = tl.zeros((TOKENS, COLUMNS), tl.float32)
    for first in tl.range(0, RANK, DEPTH, num_stages=4):
        k = first + tl.arange(0, DEPTH)
        x = tl.load(latent + k[None, :], live & (k[None, :] < RANK), 0.0)
        weight = tl.load(w + k[:, None], (k[:, None] < RANK) & real, 0.0)
        acc = tl.dot(x, weight, acc)
    value = acc.to(latent.dtype.element_ty)
    out += (token * heads + head) * VALUE + column[None, :]
    if scale is None:
        tl.store(out, value, live & real)
    else:
        wide = value.to(tl.float32)
        scales = block_scale(tl.max(tl.abs(wide), axis=1), UE8M0)[:, None]
        tl.store(out, divided(wide, scales).to(tl.float8e4nv), live & real)
        group = head * (VALUE // 128) + tl.program_id(1)
        tl.store(scale + token * scale_token + group * scale_group, scales, live)
