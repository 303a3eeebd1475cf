"""Plain multi-head attention for prefill, how slices of it are merged, and the way from the paged
cache to a slice. Triton, any GPU.

Causal slices end together: of num_q queries and num_k keys, query i is token num_k - num_q + i and
sees keys up to its own. A head's width is cut into a power of two and a padded rest (192 = 128 +
64), so that little is multiplied by zeros; the rest of the keys may be a tensor of its own (k_pe,
which all heads share), so that nobody copies keys together.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .compat import has_fp8
from .latent import (
    as_words,
    half_of_e4m3,
    is_fp8,
    rope_at,
    rope_width,
    scale_at,
    value_at,
)
from .mla_dot import load_rows, max_smem

LOG2_E = 1.4426950408889634
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _load_tile(ptr, stride, rows, num_rows, d, width: tl.constexpr, padded: tl.constexpr):
    """[rows, padded] of a matrix with `stride` between rows; zeros past its edges."""
    mask = (rows < num_rows)[:, None]
    if width != padded:
        mask = mask & (d < width)[None, :]
    return tl.load(ptr + rows.to(tl.int64)[:, None] * stride + d[None, :], mask=mask, other=0.0)


@triton.jit
def _step(
    m, norm, acc, q_a, q_b, k, k_stride, k_rest, rest_stride, v, v_stride, token, start, num_k,
    scale_log2, WA: tl.constexpr, WB: tl.constexpr, DA: tl.constexpr, DB: tl.constexpr,
    DV: tl.constexpr, DVP: tl.constexpr, BN: tl.constexpr, MASKED: tl.constexpr,
    CAUSAL: tl.constexpr, PRECISION: tl.constexpr
):  # fmt: skip
    """One tile of keys of the online softmax. token: [BM], where among the keys each is."""
    n = start + tl.arange(0, BN)
    end = num_k if MASKED else start + BN
    k_a = _load_tile(k, k_stride, n, end, tl.arange(0, DA), WA, DA)
    s = tl.dot(q_a, tl.trans(k_a), input_precision=PRECISION)
    if DB > 0:
        k_b = _load_tile(k_rest, rest_stride, n, end, tl.arange(0, DB), WB, DB)
        s = tl.dot(q_b, tl.trans(k_b), s, input_precision=PRECISION)
    s = s * scale_log2
    if MASKED:
        seen = (n < num_k)[None, :]
        if CAUSAL:
            seen = seen & (n[None, :] <= token[:, None])
        s = tl.where(seen, s, float("-inf"))
    # Finite, so that a row which has seen no key yet subtracts no infinities.
    top = tl.maximum(m, tl.max(s, 1))
    keep = tl.exp2(m - top)
    p = tl.exp2(s - top[:, None])
    norm = norm * keep + tl.sum(p, 1)
    values = _load_tile(v, v_stride, n, end, tl.arange(0, DVP), DV, DVP)
    acc = tl.dot(p.to(values.dtype), values, acc * keep[:, None], input_precision=PRECISION)
    return top, norm, acc


@triton.jit
def _bounds(cu_seqlens, num, VARLEN: tl.constexpr):
    """First row and number of rows of this program's sequence."""
    first = 0
    count = num
    if VARLEN:
        first = tl.load(cu_seqlens + tl.program_id(2))
        count = tl.load(cu_seqlens + tl.program_id(2) + 1) - first
    return first, count


@triton.jit(
    do_not_specialize=["num_q", "num_k", "lse_stride"],
    do_not_specialize_on_alignment=["cu_seqlens_q", "cu_seqlens_k", "lse"],
)
def prefill_kernel(
    q, k, k_rest, v, out, lse, cu_seqlens_q, cu_seqlens_k, num_q, num_k, scale_log2, lse_stride,
    q_row, q_head, k_row, k_head, rest_row, rest_head, v_row, v_head, out_row, out_head,
    WA: tl.constexpr, WB: tl.constexpr, DA: tl.constexpr, DB: tl.constexpr, DV: tl.constexpr,
    DVP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, CAUSAL: tl.constexpr,
    VARLEN: tl.constexpr, PRECISION: tl.constexpr
):  # fmt: skip
    """Keys are [WA of k | WB of k_rest]. grid: (queries / BM, heads, sequences); the longest causal
    tiles come first."""
    first_q, num_q = _bounds(cu_seqlens_q, num_q, VARLEN)
    first_k, num_k = _bounds(cu_seqlens_k, num_k, VARLEN)
    start_q = (tl.num_programs(0) - 1 - tl.program_id(0)) * BM
    if start_q >= num_q:
        return
    head = tl.program_id(1).to(tl.int64)
    row = start_q + tl.arange(0, BM)
    q += first_q.to(tl.int64) * q_row + head * q_head if VARLEN else head * q_head
    k += first_k.to(tl.int64) * k_row + head * k_head if VARLEN else head * k_head
    k_rest += first_k.to(tl.int64) * rest_row + head * rest_head if VARLEN else head * rest_head
    v += first_k.to(tl.int64) * v_row + head * v_head if VARLEN else head * v_head
    q_a = _load_tile(q, q_row, row, num_q, tl.arange(0, DA), WA, DA)
    q_b = q_a
    if DB > 0:
        q_b = _load_tile(q + WA, q_row, row, num_q, tl.arange(0, DB), WB, DB)
    token = num_k - num_q + row
    m = tl.full((BM,), -1.0e30, tl.float32)
    norm = tl.zeros((BM,), tl.float32)
    acc = tl.zeros((BM, DVP), tl.float32)
    # Whole tiles that every row sees, then those with an edge in them.
    stop = num_k
    whole = num_k // BN * BN
    if CAUSAL:
        stop = tl.minimum(num_k, num_k - num_q + start_q + BM)
        whole = tl.maximum(tl.minimum(num_k, num_k - num_q + start_q + 1), 0) // BN * BN
    for start in range(0, whole, BN):
        m, norm, acc = _step(
            m, norm, acc, q_a, q_b, k, k_row, k_rest, rest_row, v, v_row, token, start, num_k,
            scale_log2, WA, WB, DA, DB, DV, DVP, BN, False, CAUSAL, PRECISION
        )  # fmt: skip
    for start in range(whole, stop, BN):
        m, norm, acc = _step(
            m, norm, acc, q_a, q_b, k, k_row, k_rest, rest_row, v, v_row, token, start, num_k,
            scale_log2, WA, WB, DA, DB, DV, DVP, BN, True, CAUSAL, PRECISION
        )  # fmt: skip
    acc = acc / tl.where(norm > 0, norm, 1.0)[:, None]
    d = tl.arange(0, DVP)
    at = (first_q + row).to(tl.int64)
    inside = (row < num_q)[:, None] & (d < DV)[None, :]
    out_ptr = out + head * out_head + at[:, None] * out_row + d[None, :]
    tl.store(out_ptr, acc.to(out.dtype.element_ty), mask=inside)
    found = tl.where(norm > 0, (tl.log2(norm) + m) * LN_2, float("-inf"))
    tl.store(lse + head * lse_stride + at, found, mask=row < num_q)


class Split(NamedTuple):
    """How a head's width is multiplied: two parts, each padded to a power of two."""

    a: int
    b: int
    """Widths; b may be 0."""
    padded_a: int
    padded_b: int


def split_width(width: int, rest: int = 0) -> Split:
    """Of a width that lies in one tensor (rest 0): 192 -> 128, 64; 40 -> 32, 8 (padded to 16); 24
    -> 24 (padded to 32), 0. Else of [width | rest] in two."""
    large = 1 << (width.bit_length() - 1)
    if not rest and large != width and large >= 32:
        width, rest = large, width - large
    padded = max(16, triton.next_power_of_2(width))
    return Split(width, rest, padded, max(16, triton.next_power_of_2(rest)) if rest else 0)


def tile(dtype: torch.dtype, width: int, smem: int) -> tuple[int, int, int, int]:
    """Queries, keys, warps and stages of a CTA; no spills on sm_90 and sm_100."""
    if dtype == torch.float32:
        return 16, 16, 8, 1
    if width > 256:
        return 32, 16, 8, 2
    if smem < 132_000 or (width > 192 and smem < 198_000):
        return 64, 32, 4, 2
    return 128, 64, 8, 3 if width <= 192 and smem > 174_000 else 2


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    causal: bool,
    cu_seqlens: tuple[Tensor, Tensor] | None = None,
    max_q: int = 0,
    k_pe: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """q: [Tq, H, D], k: [Tk, H, D] (or [Tk, H, D - P] and k_pe: [Tk, P] for all heads), v: [Tk, H,
    Dv], any strides but the last; without cu_seqlens one sequence. -> out [Tq, H, Dv] in q's dtype,
    lse [H, Tq] float32; rows that see no key: zeros and -inf."""
    num_q, heads, width = q.shape
    num_k, _, v_width = v.shape
    rest = 0 if k_pe is None else k_pe.shape[1]
    assert k.shape == (num_k, heads, width - rest) and v.shape[1] == heads, (q.shape, k.shape)
    assert q.dtype == k.dtype == v.dtype, (q.dtype, k.dtype, v.dtype)
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    out = torch.empty(num_q, heads, v_width, dtype=q.dtype, device=q.device)
    lse = torch.empty(heads, num_q, dtype=torch.float32, device=q.device)
    if num_q == 0:
        return out, lse
    bm, bn, warps, stages = tile(q.dtype, max(width, v_width), max_smem(q.device))
    split = split_width(width - rest, rest)
    if k_pe is None:
        k_rest, rest_strides = k[..., split.a :] if split.b else k, k.stride()[:2]
    else:
        assert k_pe.shape == (num_k, rest) and k_pe.stride(1) == 1, (k_pe.shape, k_pe.stride())
        k_rest, rest_strides = k_pe, (k_pe.stride(0), 0)
    cu_q, cu_k = cu_seqlens or (lse, lse)
    grid = (triton.cdiv(max_q or num_q, bm), heads, cu_q.shape[0] - 1 if cu_seqlens else 1)
    prefill_kernel[grid](
        q, k, k_rest, v, out, lse, cu_q, cu_k, num_q, num_k, scale * LOG2_E, lse.stride(0),
        q.stride(0), q.stride(1), k.stride(0), k.stride(1), *rest_strides, v.stride(0), v.stride(1),
        out.stride(0), out.stride(1),
        WA=split.a, WB=split.b, DA=split.padded_a, DB=split.padded_b, DV=v_width,
        DVP=max(32, triton.next_power_of_2(v_width)), BM=bm, BN=bn, CAUSAL=causal,
        VARLEN=cu_seqlens is not None,
        PRECISION="ieee" if q.dtype == torch.float32 else "tf32",
        num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return out, lse


@triton.jit(
    do_not_specialize=["num_tokens", "a_lse_head", "b_lse_head"],
    do_not_specialize_on_alignment=["a_lse", "b_lse", "lse"],
)
def merge_kernel(
    a, a_lse, b, b_lse, out, lse, num_tokens, a_row, a_head, b_row, b_head, a_lse_head, b_lse_head,
    H: tl.constexpr, DV: tl.constexpr, DVP: tl.constexpr, BT: tl.constexpr
):  # fmt: skip
    """grid: (tokens / BT, H)."""
    t = tl.program_id(0) * BT + tl.arange(0, BT)
    head = tl.program_id(1)
    d = tl.arange(0, DVP)
    live = t < num_tokens
    x = tl.load(a_lse + head * a_lse_head + t, mask=live, other=0.0)
    y = tl.load(b_lse + head * b_lse_head + t, mask=live, other=0.0)
    top = tl.maximum(tl.maximum(x, y), -1.0e30)
    weight_a = tl.exp(x - top)
    weight_b = tl.exp(y - top)
    norm = weight_a + weight_b
    inverse = tl.where(norm > 0, 1.0 / norm, 0.0)
    inside = live[:, None] & (d < DV)[None, :]
    wide = t.to(tl.int64)[:, None]
    part_a = tl.load(a + wide * a_row + head * a_head + d[None, :], mask=inside, other=0.0)
    part_b = tl.load(b + wide * b_row + head * b_head + d[None, :], mask=inside, other=0.0)
    joined = part_a.to(tl.float32) * (weight_a * inverse)[:, None]
    joined += part_b.to(tl.float32) * (weight_b * inverse)[:, None]
    out_ptr = out + (wide * H + head) * DV + d[None, :]
    tl.store(out_ptr, joined.to(out.dtype.element_ty), mask=inside)
    both = tl.where(norm > 0, tl.log(norm) + top, float("-inf"))
    tl.store(lse + head * num_tokens + t, both, mask=live)


def merge(a: Tensor, a_lse: Tensor, b: Tensor, b_lse: Tensor) -> tuple[Tensor, Tensor]:
    """a, b: [T, H, Dv] of one dtype, any strides but the last; lse: [H, T] float32, last stride 1,
    -inf where no key was seen: that part's values must be finite, they count nothing."""
    num_tokens, heads, width = a.shape
    assert a.shape == b.shape and a.dtype == b.dtype, (a.shape, b.shape, a.dtype, b.dtype)
    assert a_lse.shape == b_lse.shape == (heads, num_tokens), (a_lse.shape, b_lse.shape)
    assert a_lse.dtype == b_lse.dtype == torch.float32, (a_lse.dtype, b_lse.dtype)
    assert a.stride(2) == b.stride(2) == a_lse.stride(1) == b_lse.stride(1) == 1
    out = torch.empty(num_tokens, heads, width, dtype=a.dtype, device=a.device)
    lse = torch.empty(heads, num_tokens, dtype=torch.float32, device=a.device)
    if num_tokens:
        merge_kernel[(triton.cdiv(num_tokens, 16), heads)](
            a, a_lse, b, b_lse, out, lse, num_tokens, a.stride(0), a.stride(1),
            b.stride(0), b.stride(1), a_lse.stride(0), b_lse.stride(0),
            H=heads, DV=width, DVP=triton.next_power_of_2(width), BT=16, num_warps=4,
        )  # fmt: skip
    return out, lse


@triton.jit(
    do_not_specialize=["start", "num_tokens", "table_stride"],
    do_not_specialize_on_alignment=["table"],
)
def gather_kernel(
    cache, table, table_stride, out, start, num_tokens,
    BLOCK_SIZE: tl.constexpr, WIDTH: tl.constexpr, BT: tl.constexpr, BW: tl.constexpr
):  # fmt: skip
    """grid: (tokens / BT, WIDTH / BW)."""
    row = tl.program_id(0) * BT + tl.arange(0, BT)
    column = tl.program_id(1) * BW + tl.arange(0, BW)
    live = row < num_tokens
    token = start + row
    page = tl.load(table + (token // BLOCK_SIZE) * table_stride, mask=live, other=0).to(tl.int64)
    at = (page * BLOCK_SIZE + token % BLOCK_SIZE)[:, None] * WIDTH + column[None, :]
    inside = live[:, None] & (column < WIDTH)[None, :]
    latent = tl.load(cache + at, mask=inside)
    out_ptr = out + row.to(tl.int64)[:, None] * WIDTH + column[None, :]
    tl.store(out_ptr, latent.to(out.dtype.element_ty), mask=inside)


@triton.jit(
    do_not_specialize=["start", "num_tokens", "table_stride"],
    do_not_specialize_on_alignment=["table"],
)
def gather_fp8_kernel(
    values, ropes, scales, table, table_stride, out, start, num_tokens,
    R: tl.constexpr, P: tl.constexpr, RP: tl.constexpr, PP: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, ENTRY: tl.constexpr, NATIVE: tl.constexpr, BT: tl.constexpr
):  # fmt: skip
    """grid: (tokens / BT,). values, ropes, scales: the whole cache in words of these types."""
    row = tl.program_id(0) * BT + tl.arange(0, BT)
    live = row < num_tokens
    token = start + row
    page = tl.load(table + (token // BLOCK_SIZE) * table_stride, mask=live, other=0).to(tl.int64)
    slot = token % BLOCK_SIZE
    d = tl.arange(0, RP)
    r = tl.arange(0, PP)
    scale = tl.load(scales + scale_at(page, slot, BLOCK_SIZE, ENTRY), mask=live, other=1.0)
    value = load_rows(values + value_at(page, slot, R, P, BLOCK_SIZE, ENTRY), live, d, R, RP)
    latent = half_of_e4m3(value, NATIVE).to(tl.float32) * scale[:, None]
    rope = load_rows(ropes + rope_at(page, slot, P, BLOCK_SIZE, ENTRY), live, r, P, PP)
    out_ptr = out + row.to(tl.int64)[:, None] * (R + P)
    dtype: tl.constexpr = out.dtype.element_ty
    tl.store(out_ptr + d[None, :], latent.to(dtype), mask=live[:, None] & (d < R)[None, :])
    rope = rope.to(tl.float32).to(dtype)
    tl.store(out_ptr + R + r[None, :], rope, mask=live[:, None] & (r < P)[None, :])


def gather(
    cache: Tensor,
    block_table: Tensor,
    start: int,
    stop: int,
    kv_lora_rank: int,
    dtype: torch.dtype,
) -> Tensor:
    """cache: of either kind that `latent.py` knows, contiguous, block_table: [num_blocks_of_it]
    int32; what is outside of tokens start ... stop - 1 is not read. -> [stop - start, R + P]."""
    assert cache.is_contiguous() and block_table.dim() == 1, block_table.shape
    block_size, rope = cache.shape[1], rope_width(cache, kv_lora_rank)
    width = kv_lora_rank + rope
    out = torch.empty(stop - start, width, dtype=dtype, device=cache.device)
    if stop > start and is_fp8(cache):
        native = has_fp8(cache)
        values, ropes, scales = as_words(cache)
        gather_fp8_kernel[(triton.cdiv(stop - start, 8),)](
            values if native else cache, ropes, scales, block_table, block_table.stride(0), out,
            start, stop - start, R=kv_lora_rank, P=rope, RP=triton.next_power_of_2(kv_lora_rank),
            PP=triton.next_power_of_2(rope), BLOCK_SIZE=block_size, ENTRY=cache.shape[2],
            NATIVE=native, BT=8, num_warps=4,
        )  # fmt: skip
    elif stop > start:
        grid = (triton.cdiv(stop - start, 32), triton.cdiv(width, 128))
        gather_kernel[grid](
            cache, block_table, block_table.stride(0), out, start, stop - start,
            BLOCK_SIZE=block_size, WIDTH=width, BT=32, BW=128, num_warps=4,
        )  # fmt: skip
    return out
