"""MLA decode over an fp8 cache in plain `tl.dot`: any GPU, any number of heads, any block size, any
latent widths. The fallback of the Gluon kernels, and what they are compared with.

Values are multiplied as fp16 (as float32 under float32 queries), unscaled. A token's scale belongs
to its key and to its value, so with S its score and s its scale

    out = sum(exp(S) s value) / sum(exp(S)) = sum(P value) / sum(P / s),  P = exp(S + log s)

and P, relative to its greatest, is at most 1 whatever the scales are.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .compat import has_fp8
from .latent import as_words, half_of_e4m3, holds, rope_at, scale_at, value_at
from .mla_dot import load_rows, store_rows
from .mla_schedule import Schedule, Tiling

QUERY_SCALE = 2.0**-4
"""What queries are multiplied with as they become fp16: bf16 ones up to 2^20 stay what they are."""


@triton.jit
def _query(x, SCALE: tl.constexpr, HALF: tl.constexpr):
    if HALF:
        scaled = tl.maximum(x.to(tl.float32) * SCALE, -65504.0)
        x = tl.minimum(scaled, 65504.0).to(tl.float16)
    return x


@triton.jit
def _attend(
    m, norm, acc, q_n, q_r, k_n, k_r, scale, t, limit, scale_log2, PRECISION: tl.constexpr
):  # fmt: skip
    """One step of the online softmax over keys k_n * scale, k_r of positions t; row i sees those
    below limit[i]."""
    s = tl.dot(q_n, tl.trans(k_n), input_precision=PRECISION) * scale[None, :]
    s = tl.dot(q_r, tl.trans(k_r), s, input_precision=PRECISION)
    seen = t[None, :] < limit[:, None]
    s = tl.where(seen, s * scale_log2 + tl.log2(scale)[None, :], -1.0e30)
    top = tl.maximum(m, tl.max(s, 1))
    keep = tl.exp2(m - top)
    p = tl.where(seen, tl.exp2(s - top[:, None]), 0.0)
    norm = norm * keep + tl.sum(p * (1.0 / scale)[None, :], 1)
    acc = tl.dot(p.to(k_n.dtype), k_n, acc * keep[:, None], input_precision=PRECISION)
    return top, norm, acc


@triton.jit(
    do_not_specialize=["table_stride", "heads", "query_len"],
    do_not_specialize_on_alignment=["table", "seq_lens", "items"],
)
def dot_fp8_kernel(
    q, values, ropes, scales, table, table_stride, seq_lens, items, out, partial, lse, scale_log2,
    heads, query_len, R: tl.constexpr, P: tl.constexpr, RP: tl.constexpr, PP: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, ENTRY: tl.constexpr, BH: tl.constexpr, BN: tl.constexpr,
    QUERY_SCALE: tl.constexpr, NATIVE: tl.constexpr, PRECISION: tl.constexpr
):  # fmt: skip
    """grid: (rows / BH, items). Tensors as in `decode`, values, ropes, scales: the whole cache in
    words of these types; RP, PP: R and P padded to powers of two."""
    rows = query_len * heads
    row = tl.program_id(0) * BH + tl.arange(0, BH)
    item = items + 4 * tl.program_id(1)
    b = tl.load(item)
    begin = tl.load(item + 1)
    end = tl.load(item + 2)
    slot = tl.load(item + 3)
    live = (row < rows) & (begin < end)
    d = tl.arange(0, RP)
    r = tl.arange(0, PP)
    half: tl.constexpr = q.dtype.element_ty != tl.float32
    q_ptr = q + (b * rows + row).to(tl.int64) * (R + P)
    q_n = _query(load_rows(q_ptr, live, d, R, RP), QUERY_SCALE, half)
    q_r = _query(load_rows(q_ptr + R, live, r, P, PP), QUERY_SCALE, half)
    limit = tl.load(seq_lens + b) - (query_len - 1 - row // heads)
    m = tl.full((BH,), -1.0e30, tl.float32)
    norm = tl.zeros((BH,), tl.float32)
    acc = tl.zeros((BH, RP), tl.float32)
    for n in range(begin, end, BN):
        t = n + tl.arange(0, BN)
        here = t < end
        page = tl.load(table + b.to(tl.int64) * table_stride + t // BLOCK_SIZE, mask=here, other=0)
        page = page.to(tl.int64)
        at = t % BLOCK_SIZE
        k_ptr = values + value_at(page, at, R, P, BLOCK_SIZE, ENTRY)
        k_n = half_of_e4m3(load_rows(k_ptr, here, d, R, RP), NATIVE).to(q_n.dtype)
        k_ptr = ropes + rope_at(page, at, P, BLOCK_SIZE, ENTRY)
        k_r = load_rows(k_ptr, here, r, P, PP).to(q_n.dtype)
        scale = tl.load(scales + scale_at(page, at, BLOCK_SIZE, ENTRY), mask=here, other=1.0)
        m, norm, acc = _attend(
            m, norm, acc, q_n, q_r, k_n, k_r, scale, t, tl.minimum(limit, end), scale_log2,
            PRECISION
        )  # fmt: skip
    store_rows(m, norm, acc, out, partial, lse, b, slot, row, rows, R, RP)


def tile(rows: int, rank: int, dtype: torch.dtype) -> tuple[int, int]:
    """Rows and tokens of a CTA of 8 warps, without spills on sm_90 and sm_100; 64 rows spill."""
    if dtype == torch.float32 or rank > 512:
        return 16, 16
    return (32, 32) if rows > 16 else (16, 32)


def tiling(rows: int, rank: int, dtype: torch.dtype) -> Tiling:
    return Tiling("dot_fp8", tile(rows, rank, dtype)[0], ctas_per_sm=1, unit=64)


def decode(
    q: Tensor, cache: Tensor, block_table: Tensor, seq_lens: Tensor, schedule: Schedule,
    out: Tensor, partial: Tensor, lse: Tensor, scale: float
) -> None:  # fmt: skip
    """As `mla_dot.decode` for the fp8 layout of `latent.py`."""
    _, query_len, heads, width = q.shape
    rank, rope = out.shape[-1], width - out.shape[-1]
    assert q.is_contiguous() and cache.is_contiguous() and block_table.stride(1) == 1
    assert holds(cache, rank, rope), (cache.shape, rank, rope)
    rows = query_len * heads
    row_tile, tokens = tile(rows, rank, q.dtype)
    pad_rank, pad_rope = (max(16, triton.next_power_of_2(n)) for n in (rank, rope))
    values, ropes, scales = as_words(cache)
    query_scale = 1.0 if q.dtype == torch.float32 else QUERY_SCALE
    dot_fp8_kernel[(triton.cdiv(rows, row_tile), schedule.items.shape[0])](
        q, values if has_fp8(cache) else cache, ropes, scales, block_table, block_table.stride(0),
        seq_lens, schedule.items, out, partial, lse, scale * 1.4426950408889634 / query_scale,
        heads, query_len, R=rank, P=rope, RP=pad_rank, PP=pad_rope,
        BLOCK_SIZE=cache.shape[1], ENTRY=cache.shape[2], BH=row_tile, BN=tokens,
        QUERY_SCALE=query_scale, NATIVE=has_fp8(cache),
        PRECISION="ieee" if q.dtype == torch.float32 else "tf32",
        num_warps=8, num_stages=2,
    )  # fmt: skip
