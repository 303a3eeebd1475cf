"""Multi-head latent attention: absorbed for decode, plain for prefill, how slices are merged.

On a GPU decode is split over the keys. What the split needs to know of the lengths is worked out on
the device, once a step if the caller makes the schedule, else in each call.
"""

import torch
from torch import Tensor

from . import (
    mla_dot,
    mla_dot_fp8,
    mla_seesaw,
    mla_seesaw_fp8,
    mla_transposed,
    mla_transposed_fp8,
    reference,
)
from . import mla_prefill as prefill
from .compat import has_wgmma, runs_kernels
from .latent import holds, is_fp8
from .mla_schedule import Schedule, Tiling, combine, make_schedule

MAX_QUERY_LEN = 6
KERNELS = {
    "seesaw": mla_seesaw,
    "transposed": mla_transposed,
    "dot": mla_dot,
    "seesaw_fp8": mla_seesaw_fp8,
    "transposed_fp8": mla_transposed_fp8,
    "dot_fp8": mla_dot_fp8,
}
"""`Tiling.kernel` -> its module."""


def mla_decode(
    q: Tensor,
    cache: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    kv_lora_rank: int,
    scale: float,
    schedule: Schedule | None = None,
) -> Tensor:
    """Absorbed attention of a sequence's last one to six tokens over its latents.

    q: [B, H, R + P], or [B, Sq, H, R + P]: the last Sq tokens, each sees the keys up to its own.
    cache: of either kind that `latent.py` knows. block_table: [B, max_blocks] int32, read up to the
    sequence's length only. seq_lens: [B] int32, the new tokens included; 0: a row of padding, its
    output is zeros. schedule: of `decode_schedule` for the same shapes and lengths. Slots past a
    sequence's end are never used. -> [B, H, R] or [B, Sq, H, R] in q's dtype."""
    assert holds(cache, kv_lora_rank, q.shape[-1] - kv_lora_rank), (q.shape, cache.shape)
    assert q.shape[0] == seq_lens.shape[0], (q.shape, seq_lens.shape)
    if not runs_kernels(q):
        return _decode_reference(q, cache, block_table, seq_lens, kv_lora_rank, scale)
    assert cache.is_contiguous() and block_table.dtype == torch.int32, block_table.dtype
    assert q.dim() == 3 or q.shape[1] <= MAX_QUERY_LEN, q.shape
    out = torch.empty(*q.shape[:-1], kv_lora_rank, dtype=q.dtype, device=q.device)
    if not q.shape[0]:
        return out
    query = (q if q.dim() == 4 else q[:, None]).contiguous()
    if schedule is None:
        schedule = decode_schedule(q, cache, block_table, seq_lens, kv_lora_rank)
    _decode(query, cache, block_table, seq_lens, schedule, out, scale)
    return out


def _decode(
    q: Tensor,
    cache: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    schedule: Schedule,
    out: Tensor,
    scale: float,
) -> None:
    batch, query_len, heads, _ = q.shape
    rows, rank, num_items = query_len * heads, out.shape[-1], schedule.items.shape[0]
    out = out.view(batch, rows, rank)
    slots = num_items if schedule.may_split else 1
    partial = torch.empty(slots, rows, rank, dtype=torch.float32, device=q.device)
    lse = torch.empty(slots, rows, dtype=torch.float32, device=q.device)
    kernel = KERNELS[schedule.tiling.kernel]
    kernel.decode(q, cache, block_table, seq_lens, schedule, out, partial, lse, scale)
    if schedule.may_split:
        combine(schedule, partial, lse, out)


def decode_schedule(
    q: Tensor, cache: Tensor, block_table: Tensor, seq_lens: Tensor, kv_lora_rank: int
) -> Schedule:
    """How `mla_decode` with these arguments shares its work out; the same for all layers."""
    query_len, heads = (1, *q.shape[1:2]) if q.dim() == 3 else q.shape[1:3]
    max_len = block_table.shape[1] * cache.shape[1]
    tiling = decode_tiling(q, cache, query_len, heads, kv_lora_rank)
    return make_schedule(seq_lens, query_len * heads, max_len, tiling)


def decode_tiling(
    q: Tensor, cache: Tensor, query_len: int, heads: int, kv_lora_rank: int
) -> Tiling:
    """Which kernel, and how it cuts rows and tokens."""
    shape = (heads, query_len, kv_lora_rank, q.shape[-1] - kv_lora_rank, cache.shape[1])
    fp8 = is_fp8(cache)
    if has_wgmma(q) and q.dtype == torch.bfloat16 and (fp8 or cache.dtype == q.dtype):
        if mla_seesaw.fits(*shape):
            return (mla_seesaw_fp8 if fp8 else mla_seesaw).tiling(heads, query_len)
        if mla_transposed.fits(*shape):
            return (mla_transposed_fp8 if fp8 else mla_transposed).tiling(heads, query_len)
    if fp8:
        return mla_dot_fp8.tiling(query_len * heads, kv_lora_rank, q.dtype)
    return mla_dot.tiling(query_len * heads, kv_lora_rank, q.dtype, q.device)


def _decode_reference(
    q: Tensor, cache: Tensor, block_table: Tensor, seq_lens: Tensor, rank: int, scale: float
) -> Tensor:
    """The twin knows one query token: each of several is a sequence of its own."""
    if q.dim() == 3:
        return reference.mla_decode(q, cache, block_table, seq_lens, rank, scale)
    behind = torch.arange(q.shape[1] - 1, -1, -1, device=q.device, dtype=seq_lens.dtype)
    lens = (seq_lens[:, None] - behind).clamp(min=0).flatten()
    table = block_table.repeat_interleave(q.shape[1], dim=0)
    out = reference.mla_decode(q.flatten(0, 1), cache, table, lens, rank, scale)
    return out.view(*q.shape[:-1], rank)


def mla_prefill(
    q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool, k_pe: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """q: [Tq, H, D], k: [Tk, H, D], v: [Tk, H, Dv] of one sequence; or k: [Tk, H, D - P] and k_pe:
    [Tk, P], which every head's key ends with. `causal`: both end at the same token. -> out [Tq, H,
    Dv], lse [H, Tq] float32."""
    assert k.shape[0] == v.shape[0] and q.shape[1] == k.shape[1], (q.shape, k.shape, v.shape)
    if not runs_kernels(q):
        return reference.mla_prefill(q, _whole(k, k_pe), v, scale, causal)
    return prefill.attend(q, k, v, scale, causal, k_pe=k_pe)


def mla_prefill_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_q: int,
    scale: float,
    causal: bool,
    k_pe: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The same for sequences one after another: sequence i has queries cu_seqlens_q[i] ...
    cu_seqlens_q[i + 1] - 1 and keys likewise. cu_seqlens: [B + 1] int32 on q's device; max_q: the
    most queries of a sequence, or more. -> out [sum Tq, H, Dv], lse [H, sum Tq] float32."""
    assert cu_seqlens_q.shape == cu_seqlens_k.shape and cu_seqlens_q.dtype == torch.int32
    if runs_kernels(q):
        return prefill.attend(q, k, v, scale, causal, (cu_seqlens_q, cu_seqlens_k), max_q, k_pe)
    spans_q, spans_k = (c.diff().tolist() for c in (cu_seqlens_q, cu_seqlens_k))
    parts = zip(q.split(spans_q), _whole(k, k_pe).split(spans_k), v.split(spans_k), strict=True)
    found = [reference.mla_prefill(*part, scale, causal) for part in parts]
    return torch.cat([out for out, _ in found]), torch.cat([lse for _, lse in found], dim=1)


def _whole(k: Tensor, k_pe: Tensor | None) -> Tensor:
    if k_pe is None:
        return k
    return torch.cat((k, k_pe[:, None].expand(-1, k.shape[1], -1)), dim=-1)


def merge_attention(a: Tensor, a_lse: Tensor, b: Tensor, b_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Joins attention over two disjoint sets of keys: out [T, H, Dv], lse [H, T]."""
    if not runs_kernels(a):
        return reference.merge_attention(a, a_lse, b, b_lse)
    return prefill.merge(a, a_lse, b, b_lse)


def gather_latent(
    cache: Tensor,
    block_table: Tensor,
    start: int,
    stop: int,
    kv_lora_rank: int = 0,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Latents of tokens start ... stop - 1 of the sequence with this block_table:
    [stop - start, R + P] in dtype, the cache's by default. An fp8 cache is dequantised: it needs
    both kv_lora_rank and dtype."""
    assert 0 <= start <= stop, (start, stop)
    assert not is_fp8(cache) or (kv_lora_rank and dtype), (kv_lora_rank, dtype)
    dtype = dtype or cache.dtype
    if not runs_kernels(cache):
        return reference.gather_latent(cache, block_table, start, stop, kv_lora_rank, dtype)
    return prefill.gather(cache, block_table, start, stop, kv_lora_rank, dtype)
