"""`mla_transposed` over an fp8 cache: 16 or 32 rows (query token, head) a CTA, Hopper, Gluon.

Two warpgroups convert, each its 256 columns of every block; one multiplies:

    convert   0 | 1 |     2 |                3 |
    multiply    | QK softmax PV 0 | QK softmax PV 1 | ...

Between them lie two blocks of fp16; each converting warpgroup holds the next two tiles of its own
in registers, or has them under way: 64 KB an SM. Rope parts come by TMA two blocks ahead.
"""

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.language.extra.cuda import gdc_launch_dependents

from . import mla_transposed
from .compat import LOW_REGISTERS, barrier
from .latent import holds
from .mla_dot_fp8 import QUERY_SCALE
from .mla_fp8 import (
    biased_scores,
    describe,
    describe_rope,
    load_rope,
    load_scales,
    load_values,
    scale_tokens,
    store_query,
    store_scales,
    store_values,
    tiles_as_words,
)
from .mla_schedule import Schedule, Tiling
from .mla_transposed import finish, fits

ROPES = gl.constexpr(4)
"""Rope parts in shared memory: of two blocks that are there as fp16, and of the next two."""


@gluon.jit
def _load_block(words, table, j, num_blocks, tokens, WG: gl.constexpr):
    """Of block j this warpgroup's half, and the scales."""
    wanted = j < num_blocks
    page = gl.load(table + j, mask=wanted, other=0)
    last_row = tokens - j * 64 - 1
    raw = load_values(words, page, WG * 256, last_row, wanted)
    return raw, load_scales(words, page, last_row, wanted)


@gluon.jit
def _load_rope(rope_desc, ropes, rope_ready, table, j, num_blocks, WG: gl.constexpr):
    if (j < num_blocks) & (WG == 0):
        slot = j % ROPES
        load_rope(rope_desc, gl.load(table + j), rope_ready.index(slot), ropes.index(slot))


@gluon.jit
def _store_block(
    raw, scale, rope_desc, tiles, ropes, scales, free, ready, rope_ready, table, j, num_blocks,
    STAGE: gl.constexpr, WG: gl.constexpr
):  # fmt: skip
    mbarrier.wait(free.index(STAGE), ((j // 2) & 1) ^ 1)
    # Block j - 2 has been read, so there is room for the rope part of j + 2.
    _load_rope(rope_desc, ropes, rope_ready, table, j + 2, num_blocks, WG)
    if WG == 0:
        store_scales(scale, scales, STAGE)
    store_values(raw, tiles.index(2 * STAGE + WG))
    mbarrier.arrive(ready.index(STAGE), count=1)


@gluon.jit
def _convert(
    words, rope_desc, latents, ropes, scales, free, ready, rope_ready, table, num_blocks, tokens,
    WG: gl.constexpr
):  # fmt: skip
    """table: from the item's first block on. tokens: of the item."""
    tiles = tiles_as_words(latents, 4)
    raw0, scale0 = _load_block(words, table, 0, num_blocks, tokens, WG)
    raw1, scale1 = _load_block(words, table, 1, num_blocks, tokens, WG)
    _load_rope(rope_desc, ropes, rope_ready, table, 0, num_blocks, WG)
    _load_rope(rope_desc, ropes, rope_ready, table, 1, num_blocks, WG)
    for j in range(0, num_blocks, 2):
        _store_block(
            raw0, scale0, rope_desc, tiles, ropes, scales, free, ready, rope_ready, table, j,
            num_blocks, 0, WG
        )  # fmt: skip
        raw0, scale0 = _load_block(words, table, j + 2, num_blocks, tokens, WG)
        if j + 1 < num_blocks:
            _store_block(
                raw1, scale1, rope_desc, tiles, ropes, scales, free, ready, rope_ready, table,
                j + 1, num_blocks, 1, WG
            )  # fmt: skip
        raw1, scale1 = _load_block(words, table, j + 3, num_blocks, tokens, WG)
    gdc_launch_dependents()  # the combine may start under the tail


@gluon.jit
def _softmax_step(s, m, norm, seen, weight):
    top = gl.maximum(m, gl.max(s, 0))
    keep = gl.exp2(m - top)
    p = gl.where(seen, gl.exp2(s - gl.expand_dims(top, 0)), 0.0)
    return p, top, norm * keep + gl.sum(p * gl.expand_dims(weight, 1), 0), keep


@gluon.jit
def _multiply(
    q, qn, qr, latents, ropes, scales, probs, ready, rope_ready, free, out_desc, partial_desc,
    lse_ptr, out_row, partial_row, slot, seq_len, begin, end, row0, scale_log2, heads, query_len
):  # fmt: skip
    N: gl.constexpr = qn.type.shape[0]
    S_T: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, N, 16])
    COLUMN: gl.constexpr = gl.SliceLayout(0, S_T)
    TOKEN: gl.constexpr = gl.SliceLayout(1, S_T)
    m = gl.full((N,), -1.0e30, gl.float32, COLUMN)
    norm = gl.full((N,), 0.0, gl.float32, COLUMN)
    o = gl.zeros((512, N), gl.float32, S_T)
    s = gl.zeros((64, N), gl.float32, S_T)
    r = gl.zeros((64, N), gl.float32, S_T)
    offs = gl.arange(0, 64, TOKEN)
    limit = gl.minimum(seq_len - (query_len - 1 - (row0 + gl.arange(0, N, COLUMN)) // heads), end)
    num_blocks = gl.cdiv(end - begin, 64)
    if num_blocks > 0:
        store_query(q, out_row, 0, qn)
        store_query(q, out_row, 512, qr)
        barrier()
    for j in range(num_blocks):
        stage = j % 2
        rope = ropes.index(j % ROPES)
        token = begin + j * 64 + offs
        mbarrier.wait(rope_ready.index(j % ROPES), (j // ROPES) & 1)
        mbarrier.wait(ready.index(stage), (j // 2) & 1)
        v = latents.index(stage)
        s = warpgroup_mma(v, qn.permute((1, 0)), s, use_acc=False, is_async=True)
        r = warpgroup_mma(rope, qr.permute((1, 0)), r, use_acc=False, is_async=True)
        s, r = warpgroup_mma_wait(0, deps=(s, r))
        x = biased_scores(r + scale_tokens(s, scales, stage, 0), scales, stage, scale_log2, 0)
        seen = gl.expand_dims(token, 1) < gl.expand_dims(limit, 0)
        x = gl.where(seen, x, -1.0e30)
        weight = scales.index(4 * stage + 2).load(TOKEN)
        p, m, norm, keep = _softmax_step(x, m, norm, seen, weight)
        o = o * gl.expand_dims(keep, 0)
        probs.store(p.to(gl.float16))
        fence_async_shared()
        barrier()
        o = warpgroup_mma(v.permute((1, 0)), probs, o, is_async=True)
        o = warpgroup_mma_wait(0, deps=(o,))
        mbarrier.arrive(free.index(stage), count=1)
    finish(o, m, norm, latents, out_desc, partial_desc, lse_ptr, out_row, partial_row, slot)


@gluon.jit(
    do_not_specialize=["table_stride", "heads", "query_len"],
    do_not_specialize_on_alignment=["table", "seq_lens", "items"],
)
def transposed_fp8_kernel(
    q, words, rope_desc, table, table_stride, seq_lens, items, out_desc, partial_desc,
    lse, scale_log2, heads, query_len, N: gl.constexpr
):  # fmt: skip
    """grid: (rows / N, items). Tensors as in `mla_dot.decode`; words: the whole cache as int32."""
    BARRIER: gl.constexpr = mbarrier.MBarrierLayout()
    FLAT: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    LATENT: gl.constexpr = gl.NVMMASharedLayout.get_default_for([64, 512], gl.float16)
    QUERY: gl.constexpr = gl.NVMMASharedLayout.get_default_for([N, 64], gl.float16)
    PROBS: gl.constexpr = gl.NVMMASharedLayout.get_default_for([64, N], gl.float16)
    rows = heads * query_len
    row0 = gl.program_id(0) * N
    item = items + gl.program_id(1) * 4
    qn = gl.allocate_shared_memory(gl.float16, [N, 512], QUERY)
    qr = gl.allocate_shared_memory(gl.float16, [N, 64], QUERY)
    latents = gl.allocate_shared_memory(gl.float16, [2, 64, 512], LATENT)
    ropes = gl.allocate_shared_memory(gl.float16, [ROPES, 64, 64], rope_desc.layout)
    scales = gl.allocate_shared_memory(gl.float32, [8, 64], FLAT)
    probs = gl.allocate_shared_memory(gl.float16, [64, N], PROBS)
    ready = gl.allocate_shared_memory(gl.int64, [2, 1], BARRIER)
    free = gl.allocate_shared_memory(gl.int64, [2, 1], BARRIER)
    rope_ready = gl.allocate_shared_memory(gl.int64, [ROPES, 1], BARRIER)
    for i in gl.static_range(2):
        mbarrier.init(ready.index(i), count=2)  # both halves
        mbarrier.init(free.index(i), count=1)
    for i in gl.static_range(ROPES):
        mbarrier.init(rope_ready.index(i), count=1)
    fence_async_shared()
    b = gl.load(item)
    begin = gl.load(item + 1)
    end = gl.load(item + 2)
    slot = gl.load(item + 3)
    seq_len = gl.load(seq_lens + b)
    table += b.to(gl.int64) * table_stride + begin // 64
    num_blocks = gl.cdiv(end - begin, 64)
    gl.warp_specialize([
        (_multiply, (q, qn, qr, latents, ropes, scales, probs, ready, rope_ready, free, out_desc,
                     partial_desc, lse, b * rows + row0, slot * rows + row0, slot, seq_len, begin,
                     end, row0, scale_log2, heads, query_len)),
        (_convert, (words, rope_desc, latents, ropes, scales, free, ready, rope_ready,
                    table, num_blocks, end - begin, 0)),
        (_convert, (words, rope_desc, latents, ropes, scales, free, ready, rope_ready,
                    table, num_blocks, end - begin, 1)),
    ], [4, 4], [136, 136])  # fmt: skip


def tiling(heads: int, query_len: int) -> Tiling:
    rows = mla_transposed.tiling(heads, query_len).row_tile
    return Tiling("transposed_fp8", rows, ctas_per_sm=1, unit=64)


def plan(
    q: Tensor, cache: Tensor, block_table: Tensor, seq_lens: Tensor, schedule: Schedule,
    out: Tensor, partial: Tensor, lse: Tensor, scale: float
) -> tuple[tuple[int, ...], dict[str, object], dict[str, object]]:  # fmt: skip
    """Grid, arguments and options of the launch."""
    _, query_len, heads, _ = q.shape
    n = tiling(heads, query_len).row_tile
    args = {
        "q": q, "words": cache.view(torch.int32), "rope_desc": describe_rope(cache),
        "table": block_table, "table_stride": block_table.stride(0),
        "seq_lens": seq_lens, "items": schedule.items,
        "out_desc": describe(out.view(-1, 512), [n, 512]),
        "partial_desc": describe(partial.view(-1, 512), [n, 512]),
        "lse": lse, "scale_log2": scale * 1.4426950408889634 / QUERY_SCALE,
        "heads": heads, "query_len": query_len, "N": n,
    }  # fmt: skip
    grid = (triton.cdiv(query_len * heads, n), schedule.items.shape[0])
    return grid, args, {"num_warps": 4, "ptx_options": LOW_REGISTERS}


def decode(
    q: Tensor, cache: Tensor, block_table: Tensor, seq_lens: Tensor, schedule: Schedule,
    out: Tensor, partial: Tensor, lse: Tensor, scale: float
) -> None:  # fmt: skip
    """As `mla_dot_fp8.decode`, bfloat16 queries, R = 512, P = 64, blocks of 64 tokens, 16 or 32
    heads."""
    assert q.is_contiguous() and cache.is_contiguous() and block_table.stride(1) == 1
    assert q.dtype == out.dtype == torch.bfloat16 and holds(cache, 512, 64), (q.dtype, cache.shape)
    assert fits(q.shape[2], q.shape[1], out.shape[-1], q.shape[-1] - out.shape[-1], cache.shape[1])
    grid, args, options = plan(q, cache, block_table, seq_lens, schedule, out, partial, lse, scale)
    transposed_fp8_kernel[grid](**args, **options)
