"""fp8 GEMM with block scales for many tokens: persistent and warp-specialised, for Hopper.

A block of threads on each SM walks over the tiles: one warp loads (TMA), two warpgroups multiply
(wgmma), a ring of stages between them.

    tile     BM tokens x BN outputs; a warpgroup owns BM/2 of the rows, 64 at a time ("waves")
    stage    x [BM, 128] | w [BN, 128] | scales of x [BM]
    step     4 wgmma of 32 -> a partial sum of 128 -> acc += partial * (scale of x * scale of w)

The tensor core adds fp8 products with about 14 bits, hence the promotion every 128 (DeepSeek-V3
technical report, arXiv 2412.19437, section 3.3.2). Tiles of experts come from a table
(`moe_gemm.item_table`); a dense map is the case without one.
"""

from typing import NamedTuple

import torch
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

from . import reference
from .compat import num_sms, tma_load, tma_store

TILE_ORDER = 8
"""Row tiles that are walked column by column: a wave of tiles then reads few rows and columns."""


class Tile(NamedTuple):
    bm: int
    bn: int
    stages: int


TILES = {Tile(256, 128, 3): 1.0, Tile(128, 128, 5): 0.8, Tile(128, 64, 6): 0.62}
"""Shapes that are compiled, and the speed of each when all SMs are busy (the first is 1): smaller
tiles read more bytes through L2 for the same product."""


def choose_tile(m: int, n: int, sms: int) -> Tile:
    """The shape whose waves take the least time."""

    def time(tile: Tile) -> float:
        waves = -(-(-(-m // tile.bm) * -(-n // tile.bn)) // sms)
        return waves * tile.bm * tile.bn / TILES[tile]

    return min(TILES, key=time)


def tma_ready(x: Tensor) -> bool:
    """Rows that TMA can read: 16-byte aligned, elements adjacent."""
    aligned = x.stride(-2) * x.element_size() % 16 == 0 and x.data_ptr() % 16 == 0
    return aligned and x.stride(-1) == 1


def k_major(x_scale: Tensor) -> Tensor:
    """x_scale: [T, G] float32 of any layout -> [G, T] for TMA: stride (a multiple of 4, 1). A view
    if `quantize_1x128` was told so, else a copy."""
    if x_scale.stride(0) == 1 and x_scale.stride(1) % 4 == 0 and x_scale.data_ptr() % 16 == 0:
        return x_scale.t()
    num_tokens, num_groups = x_scale.shape
    padded = torch.empty(num_groups, -(-num_tokens // 4) * 4, device=x_scale.device)
    return padded[:, :num_tokens].copy_(x_scale.t())


def fp8_gemm_nt_dense(
    x: Tensor, x_scale: Tensor, w: Tensor, w_scale: Tensor, out: Tensor
) -> Tensor:
    """out = x @ w^T, both e4m3 with block scales.

    x: [T, K] float8_e4m3fn, rows 16-byte aligned
    x_scale: [T, ceil(K/128)] float32, any layout (see `k_major`)
    w: [N, K] float8_e4m3fn, rows 16-byte aligned
    w_scale: [ceil(N/128), ceil(K/128)] float32, rows adjacent or strided
    out: [T, N] bfloat16, rows 16-byte aligned
    Nothing behind the last row or column is read or written.
    """
    check(x, x_scale, w, w_scale, out)
    if not x.is_cuda:
        return out.copy_(reference.fp8_gemm_nt(x, x_scale, w, w_scale, out.dtype))
    (m, k), n = x.shape, w.shape[0]
    sms = num_sms(x)
    tile = choose_tile(m, n, sms)
    num_m, num_n = -(-m // tile.bm), -(-n // tile.bn)
    grid = (min(sms, num_m * num_n),)
    descriptors = describe(x, k_major(x_scale), w, out, tile)
    dense_kernel[grid](
        *descriptors, out, out.stride(0), w_scale, w_scale.stride(0), w_scale,
        num_m, num_n, n, -(-k // 128),
        STAGES=tile.stages, WAVES=tile.bm // 128, ORDER=TILE_ORDER, GROUPED=False, num_warps=4,
    )  # fmt: skip
    return out


def check(x: Tensor, x_scale: Tensor, w: Tensor, w_scale: Tensor, out: Tensor) -> None:
    """What every fp8 GEMM of one matrix asks of its arguments."""
    blocks = -(-x.shape[1] // 128)
    assert x.dtype == w.dtype == torch.float8_e4m3fn, (x.dtype, w.dtype)
    assert x_scale.dtype == w_scale.dtype == torch.float32, (x_scale.dtype, w_scale.dtype)
    assert x.shape[1] == w.shape[1] and out.shape == (x.shape[0], w.shape[0]), (x.shape, w.shape)
    assert x_scale.shape == (x.shape[0], blocks), (x.shape, x_scale.shape)
    assert w_scale.shape == (-(-w.shape[0] // 128), blocks), (w.shape, w_scale.shape)
    assert w_scale.stride(1) == 1 or blocks == 1, w_scale.stride()
    assert x.stride(1) == w.stride(1) == out.stride(1) == 1, (x.stride(), w.stride())


def describe(
    x: Tensor, x_scale: Tensor, w: Tensor, out: Tensor, tile: Tile
) -> tuple[TensorDescriptor, TensorDescriptor, TensorDescriptor, TensorDescriptor]:
    """TMA boxes of x [T, K], w [N, K], x_scale [G, T] and out [T, N]."""
    fp8, of = gl.float8e4nv, gl.NVMMASharedLayout
    x_box, w_box, out_box = [tile.bm, 128], [tile.bn, 128], [64, tile.bn]
    flat = of(swizzle_byte_width=0, element_bitwidth=32, rank=2)
    return (
        TensorDescriptor.from_tensor(x, x_box, of.get_default_for(x_box, fp8)),
        TensorDescriptor.from_tensor(w, w_box, of.get_default_for(w_box, fp8)),
        TensorDescriptor.from_tensor(x_scale, [1, tile.bm], flat),
        TensorDescriptor.from_tensor(out, out_box, of.get_default_for(out_box, gl.bfloat16)),
    )


@gluon.jit
def fma(a, b, c):
    """a * b + c, volatile: stays before the next wgmma. LLVM sinks a plain one below it, so that
    two partial sums live at once and registers spill."""
    return gl.inline_asm_elementwise(
        "fma.rn.f32 $0, $1, $2, $3;",
        "=f,f,f,f",
        [a, b, c],
        dtype=gl.float32,
        is_pure=False,
        pack=1,
    )


@gluon.jit
def tile_order(t, num_m, num_n, ORDER: gl.constexpr):
    """Tile t of num_m x num_n -> its row and column: bands of ORDER rows, column by column."""
    band = t // (ORDER * num_n)
    inside = t % (ORDER * num_n)
    rows = min(num_m - band * ORDER, ORDER)
    return band * ORDER + inside % rows, inside // rows


@gluon.jit
def tile_at(t, table, num_m, num_n, BM: gl.constexpr, ORDER: gl.constexpr, GROUPED: gl.constexpr):
    """Tile t -> its group, first row, the row behind the group's last, its column of tiles, and
    where its rows' scales begin (see `moe_gemm.tile_scales`)."""
    if GROUPED:
        item = table + 4 + t // num_n * 4
        group, first = gl.load(item), gl.load(item + 1)
        start, end = gl.load(item + 2), gl.load(item + 3)
        m, n = tile_order(t - first * num_n, gl.cdiv(end - start, BM), num_n, ORDER)
        return group, start + m * BM, end, n, (first + m) * BM
    else:  # noqa: RET505  Triton compiles what follows a return, but not the other branch
        m, n = tile_order(t, num_m, num_n, ORDER)
        return t * 0, m * BM, num_m * BM, n, m * BM


@gluon.jit
def count_tiles(table, num_m, num_n, GROUPED: gl.constexpr):
    if GROUPED:
        num_m = gl.load(table)
    return num_m * num_n


@gluon.jit
def _load_tiles(
    x_desc, w_desc, sx_desc, x_bufs, w_bufs, sx_bufs, empty, full, table,
    num_m, num_n, n_rows, num_k, ORDER: gl.constexpr, GROUPED: gl.constexpr,
):  # fmt: skip
    """The loading warp. Stage and phase run on across tiles."""
    STAGES: gl.constexpr = x_bufs.type.shape[0]
    BM: gl.constexpr = x_bufs.type.shape[1]
    BN: gl.constexpr = w_bufs.type.shape[1]
    BYTES: gl.constexpr = (
        x_desc.block_type.nbytes + w_desc.block_type.nbytes + sx_desc.block_type.nbytes
    )
    stage = 0
    phase = 1
    total = count_tiles(table, num_m, num_n, GROUPED)
    for t in range(gl.program_id(0), total, gl.num_programs(0)):
        group, row, _, n, sx_row = tile_at(t, table, num_m, num_n, BM, ORDER, GROUPED)
        w_row = group * n_rows + n * BN
        for k in range(num_k):
            mbarrier.wait(empty.index(stage), phase)
            ready = full.index(stage)
            mbarrier.expect(ready, BYTES)
            tma_load(x_desc, [row, k * 128], ready, x_bufs.index(stage))
            tma_load(w_desc, [w_row, k * 128], ready, w_bufs.index(stage))
            tma_load(sx_desc, [k, sx_row], ready, sx_bufs.index(stage))
            stage += 1
            if stage == STAGES:
                stage = 0
                phase ^= 1


@gluon.jit
def _multiply(
    x_bufs, w_bufs, sx_bufs, empty, full, sw, num_k, stage, phase,
    WG: gl.constexpr, WAVES: gl.constexpr,
):  # fmt: skip
    """One tile of one warpgroup -> its accumulators, and where the ring stands."""
    STAGES: gl.constexpr = x_bufs.type.shape[0]
    BM: gl.constexpr = x_bufs.type.shape[1]
    BN: gl.constexpr = w_bufs.type.shape[1]
    FIRST: gl.constexpr = WG * 64 * WAVES
    L: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BN, 32])
    ROWS: gl.constexpr = gl.SliceLayout(1, L)
    part = gl.zeros((64, BN), gl.float32, L)
    acc0 = gl.zeros((64, BN), gl.float32, L)
    acc1 = gl.zeros((64, BN), gl.float32, L)
    scale_next = gl.load(sw)
    for k in range(num_k):
        scale = scale_next  # loaded a step ahead
        scale_next = gl.load(sw + min(k + 1, num_k - 1))
        mbarrier.wait(full.index(stage), phase)
        x = x_bufs.index(stage)
        w = w_bufs.index(stage).permute((1, 0))
        sx = sx_bufs.index(stage).reshape((BM,))
        part = warpgroup_mma(x.slice(FIRST, 64, 0), w, part, use_acc=False, is_async=True)
        s0 = sx.slice(FIRST, 64, 0).load(ROWS) * scale
        part = warpgroup_mma_wait(0, deps=(part,))
        if WAVES == 1:
            mbarrier.arrive(empty.index(stage), count=1)
            acc0 = fma(part, gl.expand_dims(s0, 1), acc0)
        else:
            acc0 = fma(part, gl.expand_dims(s0, 1), acc0)
            part = warpgroup_mma(x.slice(FIRST + 64, 64, 0), w, part, use_acc=False, is_async=True)
            s1 = sx.slice(FIRST + 64, 64, 0).load(ROWS) * scale
            part = warpgroup_mma_wait(0, deps=(part,))
            mbarrier.arrive(empty.index(stage), count=1)
            acc1 = fma(part, gl.expand_dims(s1, 1), acc1)
        stage += 1
        if stage == STAGES:
            stage = 0
            phase ^= 1
    return acc0, acc1, stage, phase


@gluon.jit
def _store(out_desc, out, out_stride, buf, row, end, column, n_rows, GROUPED: gl.constexpr):
    """Writes 64 rows from shared memory; of a group's last tile only the group's rows."""
    if GROUPED:
        if row + 64 <= end:
            tma_store(out_desc, [row, column], buf)
        elif row < end:
            BN: gl.constexpr = buf.type.shape[1]
            L: gl.constexpr = gl.BlockedLayout([1, 8], [256 // BN, BN // 8], [4, 1], [1, 0])
            rows = row + gl.expand_dims(gl.arange(0, 64, gl.SliceLayout(1, L)), 1)
            columns = column + gl.expand_dims(gl.arange(0, BN, gl.SliceLayout(0, L)), 0)
            # Both are multiples of 8, which the compiler must see to store 16 bytes at once.
            at = rows.to(gl.int64) * (out_stride // 8 * 8) + columns
            live = (rows < end) & (columns < n_rows // 8 * 8)
            gl.store(out + at, buf.load(L), mask=live)
    else:
        tma_store(out_desc, [row, column], buf)


@gluon.jit
def _multiply_tiles(
    out_desc, out, out_stride, x_bufs, w_bufs, sx_bufs, out_bufs, sw, sw_stride, empty, full,
    table, num_m, num_n, n_rows, num_k,
    WG: gl.constexpr, WAVES: gl.constexpr, ORDER: gl.constexpr, GROUPED: gl.constexpr,
):  # fmt: skip
    """A multiplying warpgroup."""
    BM: gl.constexpr = x_bufs.type.shape[1]
    BN: gl.constexpr = w_bufs.type.shape[1]
    stage = 0
    phase = 0
    total = count_tiles(table, num_m, num_n, GROUPED)
    for t in range(gl.program_id(0), total, gl.num_programs(0)):
        group, row, end, n, _ = tile_at(t, table, num_m, num_n, BM, ORDER, GROUPED)
        block = group * gl.cdiv(n_rows, 128) + n * BN // 128
        acc0, acc1, stage, phase = _multiply(
            x_bufs, w_bufs, sx_bufs, empty, full, sw + block * sw_stride, num_k, stage, phase,
            WG, WAVES,
        )  # fmt: skip
        row += WG * 64 * WAVES
        first = out_bufs.index(WG * WAVES)
        second = out_bufs.index(WG * WAVES + WAVES - 1)
        tma.store_wait(0)  # the last tile's stores have left the buffers
        first.store(acc0.to(gl.bfloat16))
        if WAVES == 2:
            second.store(acc1.to(gl.bfloat16))
        fence_async_shared()
        _store(out_desc, out, out_stride, first, row, end, n * BN, n_rows, GROUPED)
        if WAVES == 2:
            _store(out_desc, out, out_stride, second, row + 64, end, n * BN, n_rows, GROUPED)
    tma.store_wait(0)


@gluon.jit(
    do_not_specialize=["out_stride", "sw_stride", "num_m", "num_n", "n_rows", "num_k"],
    do_not_specialize_on_alignment=["sw", "table"],
)
def dense_kernel(
    x_desc, w_desc, sx_desc, out_desc, out, out_stride, sw, sw_stride, table,
    num_m, num_n, n_rows, num_k,
    STAGES: gl.constexpr, WAVES: gl.constexpr, ORDER: gl.constexpr, GROUPED: gl.constexpr,
):  # fmt: skip
    """n_rows: rows of w of one group (N); num_k: blocks of 128 of K. table, num_m: one is used."""
    BM: gl.constexpr = x_desc.block_type.shape[0]
    BN: gl.constexpr = w_desc.block_type.shape[0]
    x_bufs = gl.allocate_shared_memory(x_desc.dtype, [STAGES, BM, 128], x_desc.layout)
    w_bufs = gl.allocate_shared_memory(w_desc.dtype, [STAGES, BN, 128], w_desc.layout)
    sx_bufs = gl.allocate_shared_memory(gl.float32, [STAGES, 1, BM], sx_desc.layout)
    out_bufs = gl.allocate_shared_memory(gl.bfloat16, [2 * WAVES, 64, BN], out_desc.layout)
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(empty.index(i), count=2)  # one arrival for each warpgroup
        mbarrier.init(full.index(i), count=1)
    fence_async_shared()
    # Without register budgets every warp would get 168, and ptxas would serialise the wgmmas.
    gl.warp_specialize(
        [
            (_multiply_tiles, (
                out_desc, out, out_stride, x_bufs, w_bufs, sx_bufs, out_bufs, sw, sw_stride, empty,
                full, table, num_m, num_n, n_rows, num_k, 0, WAVES, ORDER, GROUPED)),
            (_multiply_tiles, (
                out_desc, out, out_stride, x_bufs, w_bufs, sx_bufs, out_bufs, sw, sw_stride, empty,
                full, table, num_m, num_n, n_rows, num_k, 1, WAVES, ORDER, GROUPED)),
            (_load_tiles, (
                x_desc, w_desc, sx_desc, x_bufs, w_bufs, sx_bufs, empty, full, table,
                num_m, num_n, n_rows, num_k, ORDER, GROUPED)),
        ],
        [4, 1],
        [232, 40],
    )  # fmt: skip
