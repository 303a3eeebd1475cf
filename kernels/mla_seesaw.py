"""MLA decode for 64 or 128 heads, on Hopper, in Gluon: 64 rows (query token, head) a CTA.

O is 64 x 512 fp32 = half of the register file, so two consumer warpgroups own 256 columns each;
WG0 scores even blocks of 64 tokens, WG1 odd ones, and each applies both blocks' P to its columns.
The running maximum and P go from one to the other through shared memory. In plain online-softmax
order (P0 V0, then P1 V1) WG0 never waits for WG1's maximum, and WG1's softmax lies under P0 V0:

    WG0   QK0 softmax P0V0 ......... P1V1 | QK0 ...
    WG1   QK1 softmax .... P0V0 P1 scale .. P1V1 | QK1 ...

Shared memory: Q 72 KB and two blocks of 72 KB. P overwrites the rope tile of its block, which is
dead after QK. Each block lies in two half tiles with barriers of their own, reloaded as soon as
their last reader is done; with whole-block stages both are empty at the end of a round. All wgmma
operands are in shared memory: with ptxas before CUDA 13.3 operands in registers can be overwritten
while they are read (triton PR 11781). The design is FlashMLA's, the hand-over is not.
"""

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .compat import LOW_REGISTERS, describe_box, tma_load, tma_store
from .mla_schedule import Schedule, Tiling
from .mla_transposed import zero_dead_rows

HEADS = (64, 128)
S_LAYOUT = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16]))
O_LAYOUT = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 256, 16]))


@gluon.jit
def _produce(half_desc, rope_desc, halves, ropes, free, ready, table, first, last, rounds):
    """Tile 2w: block w, the columns of WG w; tile 2w + 1: block w, the other columns. `last`: the
    sequence's last block; a block after it is loaded as a copy of it, and masked."""
    BYTES: gl.constexpr = half_desc.block_type.nbytes
    for it in range(rounds):
        phase = (it & 1) ^ 1
        row0 = gl.load(table + first + it * 2) * 64
        row1 = gl.load(table + gl.minimum(first + it * 2 + 1, last)) * 64
        mbarrier.wait(free.index(0), phase)
        mbarrier.expect(ready.index(0), BYTES)
        tma_load(half_desc, [row0, 0], ready.index(0), halves.index(0))
        mbarrier.wait(free.index(1), phase)
        mbarrier.expect(ready.index(1), BYTES + rope_desc.block_type.nbytes)
        tma_load(rope_desc, [row0, 512], ready.index(1), ropes.index(0))
        tma_load(half_desc, [row0, 256], ready.index(1), halves.index(1))
        mbarrier.wait(free.index(2), phase)
        mbarrier.expect(ready.index(2), BYTES)
        tma_load(half_desc, [row1, 256], ready.index(2), halves.index(2))
        mbarrier.wait(free.index(3), phase)
        mbarrier.expect(ready.index(3), BYTES + rope_desc.block_type.nbytes)
        tma_load(rope_desc, [row1, 512], ready.index(3), ropes.index(1))
        tma_load(half_desc, [row1, 0], ready.index(3), halves.index(3))
    gdc_launch_dependents()  # the combine may start under the tail


@gluon.jit
def scale_rows(o, factor):
    return o * gl.expand_dims(gl.convert_layout(factor, gl.SliceLayout(1, O_LAYOUT)), 1)


@gluon.jit
def _scores(s, qn, qr, halves, ropes, ready, phase, tok0, limit, scale_log2, WG: gl.constexpr):
    """Of this warpgroup's block, in base 2, masked."""
    NEAR: gl.constexpr = 2 * WG
    FAR: gl.constexpr = 2 * WG + 1
    mbarrier.wait(ready.index(NEAR), phase)
    if tok0 + 64 > limit:
        mbarrier.wait(ready.index(FAR), phase)
        zero_dead_rows(halves.index(NEAR), tok0, limit)
        zero_dead_rows(halves.index(FAR), tok0, limit)
    near = halves.index(NEAR).permute((1, 0))
    s = warpgroup_mma(qn.index(WG), near, s, use_acc=False, is_async=True)
    mbarrier.wait(ready.index(FAR), phase)
    s = warpgroup_mma(qn.index(1 - WG), halves.index(FAR).permute((1, 0)), s, is_async=True)
    s = warpgroup_mma(qr, ropes.index(WG).permute((1, 0)), s, is_async=True)
    s = warpgroup_mma_wait(0, deps=(s,))
    seen = tok0 + gl.arange(0, 64, gl.SliceLayout(0, S_LAYOUT)) < limit
    return gl.where(gl.expand_dims(seen, 0), s * scale_log2, -1.0e30)


@gluon.jit
def _hand_over(p, top, shared, ropes, handed, WG: gl.constexpr):
    """P and the maximum that it is relative to, for the other warpgroup."""
    shared.index(WG).store(top)
    ropes.index(WG).store(p.to(ropes.dtype))
    fence_async_shared()
    mbarrier.arrive(handed.index(WG), count=1)


@gluon.jit
def _sum(p, weights):
    """Of each row; weights: [64] in shared memory, one for each column, or None."""
    if weights is not None:
        p *= gl.expand_dims(weights.load(gl.SliceLayout(0, S_LAYOUT)), 0)
    return gl.sum(p, 1)


@gluon.jit
def round0(s, weights, o, m, norm, halves, ropes, shared, ready, free, handed, phase):
    """WG0: own block, then WG1's."""
    top = gl.maximum(gl.max(s, 1), m)
    keep = gl.exp2(m - top)
    p = gl.exp2(s - gl.expand_dims(top, 1))
    _hand_over(p, top, shared, ropes, handed, 0)
    o = scale_rows(o, keep)
    o = warpgroup_mma(ropes.index(0), halves.index(0), o, is_async=True)
    norm = norm * keep + _sum(p, weights)
    o = warpgroup_mma_wait(0, deps=(o,))
    mbarrier.arrive(free.index(0), count=1)
    mbarrier.arrive(free.index(1), count=1)
    mbarrier.wait(handed.index(1), phase)
    mbarrier.wait(ready.index(3), phase)
    m = shared.index(1).load(gl.SliceLayout(1, S_LAYOUT))
    keep = gl.exp2(top - m)
    norm = norm * keep
    o = scale_rows(o, keep)
    o = warpgroup_mma(ropes.index(1), halves.index(3), o, is_async=True)
    o = warpgroup_mma_wait(0, deps=(o,))
    mbarrier.arrive(free.index(3), count=1)
    return o, m, norm


@gluon.jit
def round1(s, weights, o, m, norm, halves, ropes, shared, ready, free, handed, phase):
    """WG1: WG0's block first, own softmax under its product."""
    local = gl.maximum(gl.max(s, 1), m)
    mbarrier.wait(handed.index(0), phase)
    mbarrier.wait(ready.index(1), phase)
    top0 = shared.index(0).load(gl.SliceLayout(1, S_LAYOUT))
    o = scale_rows(o, gl.exp2(m - top0))
    o = warpgroup_mma(ropes.index(0), halves.index(1), o, is_async=True)
    top = gl.maximum(local, top0)
    p = gl.exp2(s - gl.expand_dims(top, 1))
    _hand_over(p, top, shared, ropes, handed, 1)
    norm = norm * gl.exp2(m - top) + _sum(p, weights)
    keep = gl.exp2(top0 - top)
    o = warpgroup_mma_wait(0, deps=(o,))
    mbarrier.arrive(free.index(1), count=1)
    o = scale_rows(o, keep)
    o = warpgroup_mma(ropes.index(1), halves.index(2), o, is_async=True)
    o = warpgroup_mma_wait(0, deps=(o,))
    mbarrier.arrive(free.index(2), count=1)
    mbarrier.arrive(free.index(3), count=1)
    return o, top, norm


@gluon.jit
def store_half(o, halves, desc, row, WG: gl.constexpr):
    """Through the latents' tiles, which nobody reads any more: four of bf16 or two of fp32."""
    TILES: gl.constexpr = 64 // desc.dtype.primitive_bitwidth
    tiles = halves._reinterpret(desc.dtype, [TILES, 64, 256], desc.layout)
    tile = tiles.index(WG * (TILES // 2))
    tile.store(o.to(desc.dtype))
    fence_async_shared()
    tma_store(desc, [row, WG * 256], tile)
    tma.store_wait(0)


@gluon.jit
def finish(
    o, m, norm, halves, shared, summed, out_desc, partial_desc, lse_ptr, out_row, partial_row,
    slot, WG: gl.constexpr
):  # fmt: skip
    """Joins the sums of both; past this exchange nobody reads the latents' tiles."""
    ROW: gl.constexpr = gl.SliceLayout(1, S_LAYOUT)
    shared.index(2 + WG).store(norm)
    mbarrier.arrive(summed.index(WG), count=1)
    mbarrier.wait(summed.index(1 - WG), 0)
    norm = norm + shared.index(3 - WG).load(ROW)
    inverse = gl.where(norm > 0, 1.0 / norm, 0.0)
    o = scale_rows(o, inverse)
    if slot >= 0:
        if WG == 0:
            lse = gl.where(norm > 0, gl.log2(norm) + m, float("-inf"))
            gl.store(lse_ptr + partial_row + gl.arange(0, 64, ROW), lse)
        store_half(o, halves, partial_desc, partial_row, WG)
    if slot == -1:
        store_half(o, halves, out_desc, out_row, WG)


@gluon.jit
def _consume(
    qn, qr, halves, ropes, shared, ready, free, summed, handed, q_bar, out_desc, partial_desc,
    lse_ptr, out_row, partial_row, slot, begin, end, limit, rounds, scale_log2, WG: gl.constexpr
):  # fmt: skip
    ROW: gl.constexpr = gl.SliceLayout(1, S_LAYOUT)
    m = gl.full((64,), -1.0e30, gl.float32, ROW)
    norm = gl.full((64,), 0.0, gl.float32, ROW)
    o = gl.zeros((64, 256), gl.float32, O_LAYOUT)
    s = gl.zeros((64, 64), gl.float32, S_LAYOUT)
    if begin < end:
        mbarrier.wait(q_bar, 0)
    for it in range(rounds):
        phase = it & 1
        tok0 = begin + (it * 2 + WG) * 64
        s = _scores(s, qn, qr, halves, ropes, ready, phase, tok0, limit, scale_log2, WG)
        if WG == 0:
            o, m, norm = round0(
                s, None, o, m, norm, halves, ropes, shared, ready, free, handed, phase
            )
        else:
            o, m, norm = round1(
                s, None, o, m, norm, halves, ropes, shared, ready, free, handed, phase
            )
    finish(
        o, m, norm, halves, shared, summed, out_desc, partial_desc, lse_ptr, out_row, partial_row,
        slot, WG
    )  # fmt: skip


@gluon.jit(
    do_not_specialize=["table_stride", "heads", "query_len"],
    do_not_specialize_on_alignment=["table", "seq_lens", "items"],
)
def seesaw_kernel(
    qn_desc, qr_desc, half_desc, rope_desc, table, table_stride, seq_lens, items,
    out_desc, partial_desc, lse, scale_log2, heads, query_len
):  # fmt: skip
    """grid: (rows / 64, items). Tensors as in `mla_dot.decode`."""
    BARRIER: gl.constexpr = mbarrier.MBarrierLayout()
    FLAT: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    rows = heads * query_len
    row0 = gl.program_id(0) * 64
    item = items + gl.program_id(1) * 4
    qn = gl.allocate_shared_memory(gl.bfloat16, [2, 64, 256], qn_desc.layout)
    qr = gl.allocate_shared_memory(gl.bfloat16, [64, 64], qr_desc.layout)
    halves = gl.allocate_shared_memory(gl.bfloat16, [4, 64, 256], half_desc.layout)
    ropes = gl.allocate_shared_memory(gl.bfloat16, [2, 64, 64], rope_desc.layout)
    shared = gl.allocate_shared_memory(gl.float32, [4, 64], FLAT)
    ready = gl.allocate_shared_memory(gl.int64, [4, 1], BARRIER)
    free = gl.allocate_shared_memory(gl.int64, [4, 1], BARRIER)
    summed = gl.allocate_shared_memory(gl.int64, [2, 1], BARRIER)
    handed = gl.allocate_shared_memory(gl.int64, [2, 1], BARRIER)
    q_bar = gl.allocate_shared_memory(gl.int64, [1], BARRIER)
    for i in gl.static_range(2):
        mbarrier.init(ready.index(2 * i), count=1)
        mbarrier.init(ready.index(2 * i + 1), count=1)
        mbarrier.init(free.index(2 * i), count=1)  # read by its own warpgroup only
        mbarrier.init(free.index(2 * i + 1), count=2)  # and the rope tile that holds P: by both
        mbarrier.init(summed.index(i), count=1)
        mbarrier.init(handed.index(i), count=1)
    mbarrier.init(q_bar, count=1)
    fence_async_shared()
    gdc_wait()  # until here under the tail of the kernel before this one
    b = gl.load(item)
    begin = gl.load(item + 1)
    end = gl.load(item + 2)
    slot = gl.load(item + 3)
    limit = gl.minimum(end, gl.load(seq_lens + b) - (query_len - 1 - row0 // heads))
    rounds = gl.cdiv(gl.maximum(limit - begin, 0), 128)
    out_row = b * rows + row0
    if begin < end:
        mbarrier.expect(q_bar, 2 * qn_desc.block_type.nbytes + qr_desc.block_type.nbytes)
        tma_load(qn_desc, [out_row, 0], q_bar, qn.index(0))
        tma_load(qn_desc, [out_row, 256], q_bar, qn.index(1))
        tma_load(qr_desc, [out_row, 512], q_bar, qr)
    table += b.to(gl.int64) * table_stride
    last = (limit - 1) // 64
    partial_row = slot * rows + row0
    gl.warp_specialize([
        (_produce, (half_desc, rope_desc, halves, ropes, free, ready, table, begin // 64, last,
                    rounds)),
        (_consume, (qn, qr, halves, ropes, shared, ready, free, summed, handed, q_bar, out_desc,
                    partial_desc, lse, out_row, partial_row, slot, begin, end, limit, rounds,
                    scale_log2, 0)),
        (_consume, (qn, qr, halves, ropes, shared, ready, free, summed, handed, q_bar, out_desc,
                    partial_desc, lse, out_row, partial_row, slot, begin, end, limit, rounds,
                    scale_log2, 1)),
    ], [4, 4], [232, 232])  # fmt: skip


def fits(heads: int, query_len: int, rank: int, rope: int, block_size: int) -> bool:
    return heads in HEADS and query_len > 0 and (rank, rope, block_size) == (512, 64, 64)


def tiling(heads: int, query_len: int) -> Tiling:
    assert heads * query_len % 64 == 0, (heads, query_len)
    return Tiling("seesaw", 64, ctas_per_sm=1, unit=128)


def plan(
    q: Tensor, cache: Tensor, block_table: Tensor, seq_lens: Tensor, schedule: Schedule,
    out: Tensor, partial: Tensor, lse: Tensor, scale: float
) -> tuple[tuple[int, ...], dict[str, object], dict[str, object]]:  # fmt: skip
    """Grid, arguments and options of the launch."""
    _, query_len, heads, width = q.shape
    rows, latents = q.view(-1, width), cache.view(-1, width)

    def desc(x: Tensor, box: list[int]) -> TensorDescriptor:
        dtype = gl.float32 if x.dtype == torch.float32 else gl.bfloat16
        return describe_box(x, tuple(box), dtype)

    args = {
        "qn_desc": desc(rows, [64, 256]), "qr_desc": desc(rows, [64, 64]),
        "half_desc": desc(latents, [64, 256]), "rope_desc": desc(latents, [64, 64]),
        "table": block_table, "table_stride": block_table.stride(0),
        "seq_lens": seq_lens, "items": schedule.items,
        "out_desc": desc(out.view(-1, 512), [64, 256]),
        "partial_desc": desc(partial.view(-1, 512), [64, 256]),
        "lse": lse, "scale_log2": scale * 1.4426950408889634,
        "heads": heads, "query_len": query_len,
    }  # fmt: skip
    grid = (triton.cdiv(query_len * heads, 64), schedule.items.shape[0])
    options = {"num_warps": 4, "ptx_options": LOW_REGISTERS, "launch_pdl": True}
    return grid, args, options


def decode(
    q: Tensor, cache: Tensor, block_table: Tensor, seq_lens: Tensor, schedule: Schedule,
    out: Tensor, partial: Tensor, lse: Tensor, scale: float
) -> None:  # fmt: skip
    """As `mla_dot.decode`, bfloat16, R = 512, P = 64, blocks of 64 tokens, 64 or 128 heads."""
    assert q.is_contiguous() and cache.is_contiguous() and block_table.stride(1) == 1
    assert q.dtype == cache.dtype == out.dtype == torch.bfloat16, (q.dtype, cache.dtype)
    assert fits(q.shape[2], q.shape[1], out.shape[-1], q.shape[-1] - out.shape[-1], cache.shape[1])
    grid, args, options = plan(q, cache, block_table, seq_lens, schedule, out, partial, lse, scale)
    seesaw_kernel[grid](**args, **options)
