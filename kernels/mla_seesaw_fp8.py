"""`mla_seesaw` over an fp8 cache: 64 rows (query token, head) a CTA, Hopper, Gluon.

The two multiplying warpgroups do what they do there, in fp16. The producer converts: it has the
next half tile (64 tokens, 256 columns) in registers when its place in shared memory falls free,
and keeps the blocks of the next round on their way to the L2 cache. Rope parts come by TMA, with
the half tile that holds the rest of their block.
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

from .compat import LOW_REGISTERS
from .latent import holds
from .mla_dot_fp8 import QUERY_SCALE
from .mla_fp8 import (
    biased_scores,
    describe,
    describe_rope,
    load_rope,
    load_scales,
    load_values,
    prefetch_block,
    scale_tokens,
    store_query,
    store_scales,
    store_values,
    tiles_as_words,
)
from .mla_schedule import Schedule, Tiling
from .mla_seesaw import O_LAYOUT, S_LAYOUT, finish, fits, round0, round1

AHEAD = gl.constexpr(3)
"""A block is fetched into the L2 cache so many blocks before its first values are loaded."""


@gluon.jit
def _page(table, j, tokens):
    """Of block j; one after the last is loaded as a copy of the last, and masked."""
    return gl.load(table + gl.minimum(j, (tokens - 1) // 64))


@gluon.jit
def _convert(words, rope_desc, halves, ropes, scales, free, ready, table, tokens):
    """Tile 2w: block w of a round, the columns of WG w; tile 2w + 1: block w, the other columns.
    table: from the item's first block on. tokens: of the item that this CTA's rows see."""
    tiles = tiles_as_words(halves, 4)
    page = _page(table, 0, tokens)
    raw = load_values(words, page, 0, tokens - 1, tokens > 0)
    scale = load_scales(words, page, tokens - 1, tokens > 0)
    for j in range(gl.cdiv(tokens, 128) * 2):
        prefetch_block(words, _page(table, j + AHEAD, tokens))
        w = j & 1
        phase = ((j >> 1) & 1) ^ 1
        row = gl.maximum(tokens - j * 64 - 1, 0)
        mbarrier.wait(free.index(2 * w), phase)
        store_scales(scale, scales, w)
        store_values(raw, tiles.index(2 * w))
        mbarrier.arrive(ready.index(2 * w), count=1)
        raw = load_values(words, page, 256 - w * 256, row, True)
        far = ready.index(2 * w + 1)
        mbarrier.wait(free.index(2 * w + 1), phase)
        load_rope(rope_desc, page, far, ropes.index(w))
        store_values(raw, tiles.index(2 * w + 1))
        mbarrier.arrive(far, count=1)
        page = _page(table, j + 1, tokens)
        row = gl.maximum(row - 64, 0)
        raw = load_values(words, page, 256 - w * 256, row, True)  # once more than is used
        scale = load_scales(words, page, row, True)
    gdc_launch_dependents()  # the combine may start under the tail


@gluon.jit
def _scores(
    s, qn, qr, halves, ropes, scales, ready, phase, left, scale_log2, WG: gl.constexpr
):  # fmt: skip
    """Of this warpgroup's block, as `biased_scores` says, masked past its first `left` tokens."""
    NEAR: gl.constexpr = 2 * WG
    FAR: gl.constexpr = 2 * WG + 1
    mbarrier.wait(ready.index(NEAR), phase)
    near = halves.index(NEAR).permute((1, 0))
    s = warpgroup_mma(qn.index(WG), near, s, use_acc=False, is_async=True)
    mbarrier.wait(ready.index(FAR), phase)
    s = warpgroup_mma(qn.index(1 - WG), halves.index(FAR).permute((1, 0)), s, is_async=True)
    s = warpgroup_mma_wait(0, deps=(s,))
    s = scale_tokens(s, scales, WG, 1)
    s = warpgroup_mma(qr, ropes.index(WG).permute((1, 0)), s, is_async=True)
    s = warpgroup_mma_wait(0, deps=(s,))
    x = biased_scores(s, scales, WG, scale_log2, 1)
    seen = gl.arange(0, 64, gl.SliceLayout(0, S_LAYOUT)) < left
    return gl.where(gl.expand_dims(seen, 0), x, -1.0e30)


@gluon.jit
def _consume(
    q, qn, qr, halves, ropes, scales, shared, ready, free, summed, handed, q_bar, out_desc,
    partial_desc, lse_ptr, out_row, partial_row, slot, tokens, scale_log2, WG: gl.constexpr
):  # fmt: skip
    ROW: gl.constexpr = gl.SliceLayout(1, S_LAYOUT)
    if tokens > 0:
        store_query(q, out_row, WG * 256, qn.index(WG))
        if WG == 0:
            store_query(q, out_row, 512, qr)
        mbarrier.arrive(q_bar, count=1)
        mbarrier.wait(q_bar, 0)
    m = gl.full((64,), -1.0e30, gl.float32, ROW)
    norm = gl.full((64,), 0.0, gl.float32, ROW)
    o = gl.zeros((64, 256), gl.float32, O_LAYOUT)
    s = gl.zeros((64, 64), gl.float32, S_LAYOUT)
    for it in range(gl.cdiv(tokens, 128)):
        phase = it & 1
        left = tokens - (it * 2 + WG) * 64
        x = _scores(s, qn, qr, halves, ropes, scales, ready, phase, left, scale_log2, WG)
        weights = scales.index(4 * WG + 2)
        if WG == 0:
            o, m, norm = round0(
                x,
                weights,
                o,
                m,
                norm,
                halves,
                ropes,
                shared,
                ready,
                free,
                handed,
                phase,
            )
        else:
            o, m, norm = round1(
                x,
                weights,
                o,
                m,
                norm,
                halves,
                ropes,
                shared,
                ready,
                free,
                handed,
                phase,
            )
    finish(
        o, m, norm, halves, shared, summed, out_desc, partial_desc, lse_ptr, out_row, partial_row,
        slot, WG
    )  # fmt: skip


@gluon.jit(
    do_not_specialize=["table_stride", "heads", "query_len"],
    do_not_specialize_on_alignment=["table", "seq_lens", "items"],
)
def seesaw_fp8_kernel(
    q, words, rope_desc, table, table_stride, seq_lens, items, out_desc, partial_desc,
    lse, scale_log2, heads, query_len, REGISTERS: gl.constexpr
):  # fmt: skip
    """grid: (rows / 64, items). Tensors as in `mla_dot.decode`; words: the whole cache as int32."""
    BARRIER: gl.constexpr = mbarrier.MBarrierLayout()
    FLAT: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    TILE: gl.constexpr = gl.NVMMASharedLayout.get_default_for([64, 256], gl.float16)
    rows = heads * query_len
    row0 = gl.program_id(0) * 64
    item = items + gl.program_id(1) * 4
    qn = gl.allocate_shared_memory(gl.float16, [2, 64, 256], TILE)
    qr = gl.allocate_shared_memory(gl.float16, [64, 64], rope_desc.layout)
    halves = gl.allocate_shared_memory(gl.float16, [4, 64, 256], TILE)
    ropes = gl.allocate_shared_memory(gl.float16, [2, 64, 64], rope_desc.layout)
    scales = gl.allocate_shared_memory(gl.float32, [8, 64], FLAT)
    shared = gl.allocate_shared_memory(gl.float32, [4, 64], FLAT)
    ready = gl.allocate_shared_memory(gl.int64, [4, 1], BARRIER)
    free = gl.allocate_shared_memory(gl.int64, [4, 1], BARRIER)
    summed = gl.allocate_shared_memory(gl.int64, [2, 1], BARRIER)
    handed = gl.allocate_shared_memory(gl.int64, [2, 1], BARRIER)
    q_bar = gl.allocate_shared_memory(gl.int64, [1], BARRIER)
    for i in gl.static_range(2):
        mbarrier.init(ready.index(2 * i), count=1)
        mbarrier.init(ready.index(2 * i + 1), count=2)  # converted, and by TMA
        mbarrier.init(free.index(2 * i), count=1)  # read by its own warpgroup only
        mbarrier.init(free.index(2 * i + 1), count=2)  # and the rope tile that holds P: by both
        mbarrier.init(summed.index(i), count=1)
        mbarrier.init(handed.index(i), count=1)
    mbarrier.init(q_bar, count=2)
    fence_async_shared()
    b = gl.load(item)
    begin = gl.load(item + 1)
    end = gl.load(item + 2)
    slot = gl.load(item + 3)
    limit = gl.minimum(end, gl.load(seq_lens + b) - (query_len - 1 - row0 // heads))
    tokens = gl.maximum(limit - begin, 0)
    out_row = b * rows + row0
    partial_row = slot * rows + row0
    table += b.to(gl.int64) * table_stride + begin // 64
    gl.warp_specialize([
        (_convert, (words, rope_desc, halves, ropes, scales, free, ready, table, tokens)),
        (_consume, (q, qn, qr, halves, ropes, scales, shared, ready, free, summed, handed, q_bar,
                    out_desc, partial_desc, lse, out_row, partial_row, slot, tokens, scale_log2,
                    0)),
        (_consume, (q, qn, qr, halves, ropes, scales, shared, ready, free, summed, handed, q_bar,
                    out_desc, partial_desc, lse, out_row, partial_row, slot, tokens, scale_log2,
                    1)),
    ], [4, 4], [REGISTERS, REGISTERS])  # fmt: skip


def tiling(heads: int, query_len: int) -> Tiling:
    assert heads * query_len % 64 == 0, (heads, query_len)
    return Tiling("seesaw_fp8", 64, ctas_per_sm=1, unit=128)


def plan(
    q: Tensor, cache: Tensor, block_table: Tensor, seq_lens: Tensor, schedule: Schedule,
    out: Tensor, partial: Tensor, lse: Tensor, scale: float
) -> tuple[tuple[int, ...], dict[str, object], dict[str, object]]:  # fmt: skip
    """Grid, arguments and options of the launch."""
    _, query_len, heads, _ = q.shape
    args = {
        "q": q, "words": cache.view(torch.int32), "rope_desc": describe_rope(cache),
        "table": block_table, "table_stride": block_table.stride(0),
        "seq_lens": seq_lens, "items": schedule.items,
        "out_desc": describe(out.view(-1, 512), [64, 256]),
        "partial_desc": describe(partial.view(-1, 512), [64, 256]),
        "lse": lse, "scale_log2": scale * 1.4426950408889634 / QUERY_SCALE,
        "heads": heads, "query_len": query_len, "REGISTERS": 216,
    }  # fmt: skip
    grid = (triton.cdiv(query_len * heads, 64), schedule.items.shape[0])
    return grid, args, {"num_warps": 4, "ptx_options": LOW_REGISTERS}


def decode(
    q: Tensor, cache: Tensor, block_table: Tensor, seq_lens: Tensor, schedule: Schedule,
    out: Tensor, partial: Tensor, lse: Tensor, scale: float
) -> None:  # fmt: skip
    """As `mla_dot_fp8.decode`, bfloat16 queries, R = 512, P = 64, blocks of 64 tokens, 64 or 128
    heads."""
    assert q.is_contiguous() and cache.is_contiguous() and block_table.stride(1) == 1
    assert q.dtype == out.dtype == torch.bfloat16 and holds(cache, 512, 64), (q.dtype, cache.shape)
    assert fits(q.shape[2], q.shape[1], out.shape[-1], q.shape[-1] - out.shape[-1], cache.shape[1])
    grid, args, options = plan(q, cache, block_table, seq_lens, schedule, out, partial, lse, scale)
    seesaw_fp8_kernel[grid](**args, **options)
