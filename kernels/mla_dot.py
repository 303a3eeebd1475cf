"""MLA decode in plain `tl.dot`: any GPU, any number of heads, any block size, any latent widths.

The fallback of mla_seesaw and mla_transposed, and what they are compared with. Rows of a CTA are
(query token, head) pairs of one sequence; all of them read the same latents.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .mla_schedule import Schedule, Tiling

LARGE_SMEM = 214_000
"""Bytes that the largest tile takes; Hopper and the Blackwell server cards have them."""


@triton.jit
def load_rows(ptr, live, d, width: tl.constexpr, padded: tl.constexpr):
    """ptr: [rows] pointers -> [rows, padded], zeros in dead rows and past `width`."""
    mask = live[:, None]
    if width != padded:
        mask = mask & (d < width)[None, :]
    return tl.load(ptr[:, None] + d[None, :], mask=mask, other=0.0)


@triton.jit
def _attend(
    m, norm, acc, q_n, q_r, k_n, k_r, t, limit, scale_log2, PRECISION: tl.constexpr
):  # fmt: skip
    """One step of the online softmax over keys of positions t; row i sees those below limit[i]."""
    s = tl.dot(q_n, tl.trans(k_n), input_precision=PRECISION)
    s = tl.dot(q_r, tl.trans(k_r), s, input_precision=PRECISION)
    seen = t[None, :] < limit[:, None]
    s = tl.where(seen, s * scale_log2, -1.0e30)
    top = tl.maximum(m, tl.max(s, 1))
    keep = tl.exp2(m - top)
    p = tl.where(seen, tl.exp2(s - top[:, None]), 0.0)
    norm = norm * keep + tl.sum(p, 1)
    acc = tl.dot(p.to(k_n.dtype), k_n, acc * keep[:, None], input_precision=PRECISION)
    return top, norm, acc


@triton.jit
def store_rows(
    m, norm, acc, out, partial, lse, b, slot, row, rows, R: tl.constexpr, RP: tl.constexpr
):  # fmt: skip
    """Where an item's result goes: to `out`, or to its slot of `partial` and `lse`, or nowhere."""
    live = row < rows
    d = tl.arange(0, RP)
    acc = acc / tl.where(norm > 0, norm, 1.0)[:, None]
    inside = live[:, None] & (d < R)[None, :]
    if slot >= 0:
        at = slot.to(tl.int64) * rows + row
        tl.store(partial + at[:, None] * R + d[None, :], acc, mask=inside)
        tl.store(lse + at, tl.where(norm > 0, tl.log2(norm) + m, float("-inf")), mask=live)
    elif slot == -1:
        at = (b * rows + row).to(tl.int64)
        tl.store(out + at[:, None] * R + d[None, :], acc.to(out.dtype.element_ty), mask=inside)


@triton.jit(
    do_not_specialize=["table_stride", "heads", "query_len"],
    do_not_specialize_on_alignment=["table", "seq_lens", "items"],
)
def dot_kernel(
    q, cache, table, table_stride, seq_lens, items, out, partial, lse, scale_log2,
    heads, query_len, R: tl.constexpr, P: tl.constexpr,
    RP: tl.constexpr, PP: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    BH: tl.constexpr, BN: tl.constexpr, PRECISION: tl.constexpr
):  # fmt: skip
    """grid: (rows / BH, items). Tensors as in `decode`; RP, PP: R and P padded to powers of two."""
    rows = query_len * heads
    row = tl.program_id(0) * BH + tl.arange(0, BH)
    item = items + 4 * tl.program_id(1)
    b = tl.load(item)
    begin = tl.load(item + 1)
    end = tl.load(item + 2)
    slot = tl.load(item + 3)
    live = row < rows
    d = tl.arange(0, RP)
    r = tl.arange(0, PP)
    q_ptr = q + (b * rows + row).to(tl.int64) * (R + P)
    q_n = load_rows(q_ptr, live & (begin < end), d, R, RP)
    q_r = load_rows(q_ptr + R, live & (begin < end), r, P, PP)
    limit = tl.load(seq_lens + b) - (query_len - 1 - row // heads)
    m = tl.full((BH,), -1.0e30, tl.float32)
    norm = tl.zeros((BH,), tl.float32)
    acc = tl.zeros((BH, RP), tl.float32)
    for n in range(begin, end, BN):
        t = n + tl.arange(0, BN)
        here = t < end
        page = tl.load(table + b.to(tl.int64) * table_stride + t // BLOCK_SIZE, mask=here, other=0)
        k_ptr = cache + (page.to(tl.int64) * BLOCK_SIZE + t % BLOCK_SIZE) * (R + P)
        k_n = load_rows(k_ptr, here, d, R, RP).to(q_n.dtype)
        k_r = load_rows(k_ptr + R, here, r, P, PP).to(q_n.dtype)
        m, norm, acc = _attend(
            m, norm, acc, q_n, q_r, k_n, k_r, t, tl.minimum(limit, end), scale_log2, PRECISION
        )
    store_rows(m, norm, acc, out, partial, lse, b, slot, row, rows, R, RP)


def tile(rows: int, rank: int, dtype: torch.dtype, smem: int) -> tuple[int, int, int]:
    """Rows, tokens and warps of a CTA, without spills on sm_90 and sm_100; 64 rows use wgmma or
    tcgen05 there."""
    if dtype == torch.float32 or rank > 512:
        return 16, 16, 8
    if rows > 32 and smem >= LARGE_SMEM:
        return 64, 32, 8
    return (32, 32, 8) if rows > 16 else (16, 32, 4)


def max_smem(device: torch.device) -> int:
    if device.type != "cuda":
        return 0
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin


def tiling(rows: int, rank: int, dtype: torch.dtype, device: torch.device) -> Tiling:
    row_tile, _, warps = tile(rows, rank, dtype, max_smem(device))
    return Tiling("dot", row_tile, ctas_per_sm=2 if warps == 4 else 1, unit=64)


def decode(
    q: Tensor, cache: Tensor, block_table: Tensor, seq_lens: Tensor, schedule: Schedule,
    out: Tensor, partial: Tensor, lse: Tensor, scale: float
) -> None:  # fmt: skip
    """q: [B, query_len, H, R + P] contiguous, cache: [num_blocks, block_size, R + P] contiguous,
    block_table: [B, max_blocks] int32, entries past a sequence's length never read, slots of a
    block past it neither; seq_lens: [B] int32, the query_len new tokens included; 0: no sequence.
    -> out: [B, query_len * H, R] of what is not split; of the rest partial: [slots, query_len * H,
    R] float32, normalised, and lse: [slots, query_len * H] float32, base 2."""
    _, query_len, heads, width = q.shape
    rank = out.shape[-1]
    assert q.is_contiguous() and cache.is_contiguous() and block_table.stride(1) == 1
    rows = query_len * heads
    row_tile, tokens, warps = tile(rows, rank, q.dtype, max_smem(q.device))
    pad_rank, pad_rope = (max(16, triton.next_power_of_2(n)) for n in (rank, width - rank))
    dot_kernel[(triton.cdiv(rows, row_tile), schedule.items.shape[0])](
        q, cache, block_table, block_table.stride(0), seq_lens, schedule.items,
        out, partial, lse, scale * 1.4426950408889634, heads, query_len,
        R=rank, P=width - rank, RP=pad_rank, PP=pad_rope,
        BLOCK_SIZE=cache.shape[1], BH=row_tile, BN=tokens,
        PRECISION="ieee" if q.dtype == torch.float32 else "tf32",
        num_warps=warps, num_stages=2,
    )  # fmt: skip
