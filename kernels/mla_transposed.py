"""MLA decode for few heads per GPU (16 or 32), on Hopper, in Gluon. Bound by reading the cache.

Transposed, so that nothing is padded: tokens and latent columns are the 64-row side of wgmma.
S^T [tokens, N] = K Q^T and O^T [512, N] = V^T P^T, N = 16 or 32 rows (query token, head). One
warpgroup holds the whole of O (64 or 128 registers a thread), one warp feeds it by TMA:

    producer   load 0 | load 1 |        load 2 |        load 3 |
    consumer          | QK softmax PV 0 | QK softmax PV 1 | ...
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

from .compat import LOW_REGISTERS, barrier, describe_box, tma_load, tma_store
from .mla_schedule import Schedule, Tiling

HEADS = (16, 32)
STAGES = 2


@gluon.jit
def zero_dead_rows(v, tok0, end):
    """Slots past the end may hold anything (NaN): P is 0 there, but 0 * NaN is NaN."""
    ROWS: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    live = gl.expand_dims(tok0 + gl.arange(0, 64, gl.SliceLayout(1, ROWS)) < end, 1)
    for c in gl.static_range(v.type.shape[1] // 64):
        x = v.slice(c * 64, 64, 1).load(ROWS)
        v.slice(c * 64, 64, 1).store(gl.where(live, x, gl.zeros([64, 64], gl.bfloat16, ROWS)))
    fence_async_shared()
    barrier()


@gluon.jit
def _produce(latent_desc, rope_desc, latents, ropes, free, ready, table, first, num_blocks):
    STAGES: gl.constexpr = latents.type.shape[0]
    for j in range(num_blocks):
        stage = j % STAGES
        mbarrier.wait(free.index(stage), ((j // STAGES) & 1) ^ 1)
        page = gl.load(table + first + j)
        bar = ready.index(stage)
        mbarrier.expect(bar, latent_desc.block_type.nbytes + rope_desc.block_type.nbytes)
        tma_load(rope_desc, [page * 64, 512], bar, ropes.index(stage))
        tma_load(latent_desc, [page * 64, 0], bar, latents.index(stage))
    gdc_launch_dependents()  # the combine may start under the tail


@gluon.jit
def _store_output(o, latents, desc, row):
    """O^T through the first stage, which nobody reads any more: 32 or 64 KB hold [N, 512]."""
    N: gl.constexpr = o.type.shape[1]
    TILES: gl.constexpr = 64 * 16 // (N * desc.dtype.primitive_bitwidth)
    tiles = latents.index(0)._reinterpret(desc.dtype, [TILES, N, 512], desc.layout)
    tiles.index(0).permute((1, 0)).store(o.to(desc.dtype))
    fence_async_shared()
    tma_store(desc, [row, 0], tiles.index(0))
    tma.store_wait(0)


@gluon.jit
def finish(o, m, norm, latents, out_desc, partial_desc, lse_ptr, out_row, partial_row, slot):
    columns = gl.arange(0, norm.shape[0], norm.type.layout)
    inverse = gl.where(norm > 0, 1.0 / norm, 0.0)
    o = o * gl.expand_dims(inverse, 0)
    if slot >= 0:
        lse = gl.where(norm > 0, gl.log2(norm) + m, float("-inf"))
        gl.store(lse_ptr + partial_row + columns, lse)
        _store_output(o, latents, partial_desc, partial_row)
    if slot == -1:
        _store_output(o, latents, out_desc, out_row)


@gluon.jit
def _softmax_step(s, m, norm, seen, scale_log2):
    s = gl.where(seen, s * scale_log2, -1.0e30)
    top = gl.maximum(m, gl.max(s, 0))
    keep = gl.exp2(m - top)
    p = gl.where(seen, gl.exp2(s - gl.expand_dims(top, 0)), 0.0)
    return p, top, norm * keep + gl.sum(p, 0), keep


@gluon.jit
def _consume(
    qn, qr, latents, ropes, probs, ready, free, q_bar, out_desc, partial_desc, lse_ptr,
    out_row, partial_row, slot, seq_len, begin, end, row0, scale_log2,
    heads, query_len
):  # fmt: skip
    N: gl.constexpr = qn.type.shape[0]
    STAGES: gl.constexpr = latents.type.shape[0]
    S_T: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, N, 16])
    COLUMN: gl.constexpr = gl.SliceLayout(0, S_T)
    m = gl.full((N,), -1.0e30, gl.float32, COLUMN)
    norm = gl.full((N,), 0.0, gl.float32, COLUMN)
    o = gl.zeros((512, N), gl.float32, S_T)
    s = gl.zeros((64, N), gl.float32, S_T)
    offs = gl.arange(0, 64, gl.SliceLayout(1, S_T))
    columns = gl.arange(0, N, COLUMN)
    limit = gl.minimum(seq_len - (query_len - 1 - (row0 + columns) // heads), end)
    num_blocks = gl.cdiv(end - begin, 64)
    if num_blocks > 0:
        mbarrier.wait(q_bar, 0)
    for j in range(num_blocks):
        stage = j % STAGES
        tok0 = begin + j * 64
        mbarrier.wait(ready.index(stage), (j // STAGES) & 1)
        if tok0 + 64 > end:
            zero_dead_rows(latents.index(stage), tok0, end)
        v = latents.index(stage)
        s = warpgroup_mma(v, qn.permute((1, 0)), s, use_acc=False, is_async=True)
        s = warpgroup_mma(ropes.index(stage), qr.permute((1, 0)), s, is_async=True)
        s = warpgroup_mma_wait(0, deps=(s,))
        seen = gl.expand_dims(tok0 + offs, 1) < gl.expand_dims(limit, 0)
        p, m, norm, keep = _softmax_step(s, m, norm, seen, scale_log2)
        o = o * gl.expand_dims(keep, 0)
        probs.store(p.to(gl.bfloat16))
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
def transposed_kernel(
    qn_desc, qr_desc, latent_desc, rope_desc, table, table_stride, seq_lens, items,
    out_desc, partial_desc, lse, scale_log2,
    heads, query_len, STAGES: gl.constexpr
):  # fmt: skip
    """grid: (rows / N, items). Tensors as in `mla_dot.decode`."""
    N: gl.constexpr = qn_desc.block_type.shape[0]
    BARRIER: gl.constexpr = mbarrier.MBarrierLayout()
    PROBS: gl.constexpr = gl.NVMMASharedLayout.get_default_for([64, N], gl.bfloat16)
    rows = heads * query_len
    row0 = gl.program_id(0) * N
    item = items + gl.program_id(1) * 4
    qn = gl.allocate_shared_memory(gl.bfloat16, [N, 512], qn_desc.layout)
    qr = gl.allocate_shared_memory(gl.bfloat16, [N, 64], qr_desc.layout)
    latents = gl.allocate_shared_memory(gl.bfloat16, [STAGES, 64, 512], latent_desc.layout)
    ropes = gl.allocate_shared_memory(gl.bfloat16, [STAGES, 64, 64], rope_desc.layout)
    probs = gl.allocate_shared_memory(gl.bfloat16, [64, N], PROBS)
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    q_bar = gl.allocate_shared_memory(gl.int64, [1], BARRIER)
    for i in gl.static_range(STAGES):
        mbarrier.init(ready.index(i), count=1)
        mbarrier.init(free.index(i), count=1)
    mbarrier.init(q_bar, count=1)
    fence_async_shared()
    gdc_wait()  # until here under the tail of the kernel before this one
    b = gl.load(item)
    begin = gl.load(item + 1)
    end = gl.load(item + 2)
    slot = gl.load(item + 3)
    seq_len = gl.load(seq_lens + b)
    out_row = b * rows + row0
    if begin < end:
        mbarrier.expect(q_bar, qn_desc.block_type.nbytes + qr_desc.block_type.nbytes)
        tma_load(qn_desc, [out_row, 0], q_bar, qn)
        tma_load(qr_desc, [out_row, 512], q_bar, qr)
    table += b.to(gl.int64) * table_stride
    num_blocks = gl.cdiv(end - begin, 64)
    gl.warp_specialize([
        (_consume, (qn, qr, latents, ropes, probs, ready, free, q_bar, out_desc, partial_desc, lse,
                    out_row, slot * rows + row0, slot, seq_len, begin, end, row0, scale_log2,
                    heads, query_len)),
        (_produce, (latent_desc, rope_desc, latents, ropes, free, ready, table, begin // 64,
                    num_blocks)),
    ], [1], [40])  # fmt: skip


def fits(heads: int, query_len: int, rank: int, rope: int, block_size: int) -> bool:
    return heads in HEADS and query_len > 0 and (rank, rope, block_size) == (512, 64, 64)


def tiling(heads: int, query_len: int) -> Tiling:
    row_tile = 32 if heads * query_len % 32 == 0 else 16
    return Tiling("transposed", row_tile, ctas_per_sm=1, unit=64)


def plan(
    q: Tensor, cache: Tensor, block_table: Tensor, seq_lens: Tensor, schedule: Schedule,
    out: Tensor, partial: Tensor, lse: Tensor, scale: float
) -> tuple[tuple[int, ...], dict[str, object], dict[str, object]]:  # fmt: skip
    """Grid, arguments and options of the launch."""
    _, query_len, heads, width = q.shape
    n = tiling(heads, query_len).row_tile
    rows, latents = q.view(-1, width), cache.view(-1, width)

    def desc(x: Tensor, box: list[int]) -> TensorDescriptor:
        dtype = gl.float32 if x.dtype == torch.float32 else gl.bfloat16
        return describe_box(x, tuple(box), dtype)

    args = {
        "qn_desc": desc(rows, [n, 512]), "qr_desc": desc(rows, [n, 64]),
        "latent_desc": desc(latents, [64, 512]), "rope_desc": desc(latents, [64, 64]),
        "table": block_table, "table_stride": block_table.stride(0),
        "seq_lens": seq_lens, "items": schedule.items,
        "out_desc": desc(out.view(-1, 512), [n, 512]),
        "partial_desc": desc(partial.view(-1, 512), [n, 512]),
        "lse": lse, "scale_log2": scale * 1.4426950408889634,
        "heads": heads, "query_len": query_len, "STAGES": STAGES,
    }  # fmt: skip
    grid = (triton.cdiv(query_len * heads, n), schedule.items.shape[0])
    options = {"num_warps": 4, "maxnreg": 224, "ptx_options": LOW_REGISTERS, "launch_pdl": True}
    return grid, args, options


def decode(
    q: Tensor, cache: Tensor, block_table: Tensor, seq_lens: Tensor, schedule: Schedule,
    out: Tensor, partial: Tensor, lse: Tensor, scale: float
) -> None:  # fmt: skip
    """As `mla_dot.decode`, bfloat16, R = 512, P = 64, blocks of 64 tokens, 16 or 32 heads."""
    assert q.is_contiguous() and cache.is_contiguous() and block_table.stride(1) == 1
    assert q.dtype == cache.dtype == out.dtype == torch.bfloat16, (q.dtype, cache.dtype)
    assert fits(q.shape[2], q.shape[1], out.shape[-1], q.shape[-1] - out.shape[-1], cache.shape[1])
    grid, args, options = plan(q, cache, block_table, seq_lens, schedule, out, partial, lse, scale)
    transposed_kernel[grid](**args, **options)
