"""fp8 GEMM with block scales for many tokens: persistent and warp-specialised, for Hopper.

A block of threads on each SM walks over the tiles: one warp loads (TMA), two warpgroups multiply
(wgmma), a ring of stages between them.

    tile     BM tokens x BN outputs; a warpgroup owns BM/2 of the rows, 64 at a time ("waves")
    stage    x [BM, 128] | w [BN, 128] | scales of x [BM]
    step     4 wgmma of 32 -> a partial sum of 128 -> acc += partial * (scale of x * scale of w)

The tensor core adds fp8 products with about 14 bits, hence the promotion every 128 (DeepSeek-V3
technical report, arXiv 2412.19437, section 3.3.2). Tiles of experts come from a table
(`moe_items.item_table`); a dense map is the case without one.
"""

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
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from . import reference
from .compat import describe_box, flat_layout, num_sms, tma_load, tma_store
from .fp8_gemm_work import Tile, Work, choose_work
from .split_k import MAX_COUNTERS, add_pieces, is_last, leave_piece, split_counters

TILE_ORDER = 8
"""Row tiles that are walked column by column: a wave of tiles then reads few rows and columns."""


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
    x: Tensor,
    x_scale: Tensor,
    w: Tensor,
    w_scale: Tensor,
    out: Tensor,
    work: Work | None = None,
) -> Tensor:
    """out = x @ w^T, both e4m3 with block scales.

    x: [T, K] float8_e4m3fn, rows 16-byte aligned
    x_scale: [T, ceil(K/128)] float32, any layout (see `k_major`)
    w: [N, K] float8_e4m3fn, rows 16-byte aligned
    w_scale: [ceil(N/128), ceil(K/128)] float32, rows adjacent or strided
    out: [T, N] bfloat16, rows 16-byte aligned
    work: `choose_work`'s if None
    Nothing behind the last row or column is read or written.
    """
    check(x, x_scale, w, w_scale, out)
    if not x.is_cuda:
        return out.copy_(reference.fp8_gemm_nt(x, x_scale, w, w_scale, out.dtype))
    (m, k), n = x.shape, w.shape[0]
    sms = num_sms(x)
    tile, whole, pieces = work or choose_work(m, n, k, sms)
    num_m, num_n = -(-m // tile.bm), -(-n // tile.bn)
    rest = num_m * num_n - whole
    partial = counters = out  # not used without pieces
    if rest:
        size = rest * pieces * tile.bm * tile.bn
        partial = torch.empty(size, dtype=torch.float32, device=x.device)
        counters = split_counters(x.device)
        assert 2 * rest <= MAX_COUNTERS and pieces <= -(-k // 128), (rest, pieces)
    descriptors = describe(x, k_major(x_scale), w, out, tile)
    dense_kernel[(min(sms, whole + rest * pieces),)](
        *descriptors, out, out.stride(0), w_scale, w_scale.stride(0), w_scale, partial, counters,
        num_m, num_n, n, -(-k // 128), whole, pieces,
        STAGES=tile.stages, WAVES=tile.bm // 128, ORDER=TILE_ORDER, GROUPED=False, SPLIT=rest > 0,
        num_warps=4, launch_pdl=True,
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
    return (
        describe_box(x, (tile.bm, 128), gl.float8e4nv),
        describe_box(w, (tile.bn, 128), gl.float8e4nv),
        TensorDescriptor.from_tensor(x_scale, [1, tile.bm], flat_layout()),
        describe_box(out, (64, tile.bn), gl.bfloat16),
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
    where its rows' scales begin (see `moe_items.tile_scales`)."""
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
def count_units(table, num_m, num_n, whole, pieces, GROUPED: gl.constexpr, SPLIT: gl.constexpr):
    """Whole tiles, and pieces of the others."""
    tiles = count_tiles(table, num_m, num_n, GROUPED)
    if SPLIT:
        tiles = whole + (tiles - whole) * pieces
    return tiles


@gluon.jit
def unit_at(u, whole, pieces, num_k, SPLIT: gl.constexpr):
    """Unit u -> its tile, its first block of K and the one behind its last."""
    tile = u
    first = u * 0
    stop = num_k
    if SPLIT and u >= whole:
        tile = whole + (u - whole) // pieces
        piece = (u - whole) % pieces
        first = piece * num_k // pieces
        stop = (piece + 1) * num_k // pieces
    return tile, first, stop


@gluon.jit
def _load_tiles(
    x_desc, w_desc, sx_desc, x_bufs, w_bufs, sx_bufs, empty, full, table,
    num_m, num_n, n_rows, num_k, whole, pieces,
    ORDER: gl.constexpr, GROUPED: gl.constexpr, SPLIT: gl.constexpr,
):  # fmt: skip
    """The loading warp. Stage and phase run on across tiles. A dense map's weights, which no kernel
    before this one writes, fill the ring while that kernel still runs."""
    STAGES: gl.constexpr = x_bufs.type.shape[0]
    BM: gl.constexpr = x_bufs.type.shape[1]
    BN: gl.constexpr = w_bufs.type.shape[1]
    BYTES: gl.constexpr = (
        x_desc.block_type.nbytes + w_desc.block_type.nbytes + sx_desc.block_type.nbytes
    )
    stage = 0
    phase = 1
    ahead = 0
    if not GROUPED:
        t, first, stop = unit_at(gl.program_id(0), whole, pieces, num_k, SPLIT)
        _, _, _, n, _ = tile_at(t, table, num_m, num_n, BM, ORDER, False)
        ahead = min(STAGES, stop - first)
        for j in range(ahead):
            mbarrier.expect(full.index(j), BYTES)
            tma_load(w_desc, [n * BN, (first + j) * 128], full.index(j), w_bufs.index(j))
        gdc_launch_dependents()
        gdc_wait()  # the kernel before this one has ended and its writes are seen
    units = count_units(table, num_m, num_n, whole, pieces, GROUPED, SPLIT)
    for u in range(gl.program_id(0), units, gl.num_programs(0)):
        t, first, stop = unit_at(u, whole, pieces, num_k, SPLIT)
        group, row, _, n, sx_row = tile_at(t, table, num_m, num_n, BM, ORDER, GROUPED)
        w_row = group * n_rows + n * BN
        for k in range(first, stop):
            ready = full.index(stage)
            if ahead > 0:
                ahead -= 1
            else:
                mbarrier.wait(empty.index(stage), phase)
                mbarrier.expect(ready, BYTES)
                tma_load(w_desc, [w_row, k * 128], ready, w_bufs.index(stage))
            tma_load(x_desc, [row, k * 128], ready, x_bufs.index(stage))
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
    """num_k blocks of K of a tile, one warpgroup's rows -> its accumulators, and where the ring
    stands. sw: the first block's scale."""
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
def _join(
    acc0, acc1, u, t, partial, counters, whole, pieces, WG: gl.constexpr, WAVES: gl.constexpr
):
    """Leaves this unit's sums in `partial` [units, BM / 64, 64, BN]. Whether the tile's last unit
    was this one; then the sums of all."""
    SIZE: gl.constexpr = 64 * acc0.shape[1]
    UNIT: gl.constexpr = 2 * WAVES * SIZE
    mine = partial + (u - whole).to(gl.int64) * UNIT + WG * WAVES * SIZE
    leave_piece(mine, acc0)
    if WAVES == 2:
        leave_piece(mine + SIZE, acc1)
    last = is_last(counters + (t - whole) * 2 + WG, pieces)
    if last:
        piece = partial + ((t - whole) * pieces).to(gl.int64) * UNIT + WG * WAVES * SIZE
        acc0 = add_pieces(piece, pieces, UNIT, acc0)
        if WAVES == 2:
            acc1 = add_pieces(piece + SIZE, pieces, UNIT, acc1)
    return acc0, acc1, last


@gluon.jit
def _multiply_tiles(
    out_desc, out, out_stride, x_bufs, w_bufs, sx_bufs, out_bufs, sw, sw_stride, empty, full,
    table, partial, counters, num_m, num_n, n_rows, num_k, whole, pieces, WG: gl.constexpr,
    WAVES: gl.constexpr, ORDER: gl.constexpr, GROUPED: gl.constexpr, SPLIT: gl.constexpr,
):  # fmt: skip
    """A multiplying warpgroup."""
    BM: gl.constexpr = x_bufs.type.shape[1]
    BN: gl.constexpr = w_bufs.type.shape[1]
    stage = 0
    phase = 0
    units = count_units(table, num_m, num_n, whole, pieces, GROUPED, SPLIT)
    for u in range(gl.program_id(0), units, gl.num_programs(0)):
        t, first, stop = unit_at(u, whole, pieces, num_k, SPLIT)
        group, row, end, n, _ = tile_at(t, table, num_m, num_n, BM, ORDER, GROUPED)
        block = group * gl.cdiv(n_rows, 128) + n * BN // 128
        acc0, acc1, stage, phase = _multiply(
            x_bufs, w_bufs, sx_bufs, empty, full, sw + block * sw_stride + first, stop - first,
            stage, phase, WG, WAVES,
        )  # fmt: skip
        complete = True
        if SPLIT and u >= whole:
            acc0, acc1, complete = _join(
                acc0, acc1, u, t, partial, counters, whole, pieces, WG, WAVES
            )
        if complete:
            row += WG * 64 * WAVES
            first_buf = out_bufs.index(WG * WAVES)
            second_buf = out_bufs.index(WG * WAVES + WAVES - 1)
            tma.store_wait(0)  # the last tile's stores have left the buffers
            first_buf.store(acc0.to(gl.bfloat16))
            if WAVES == 2:
                second_buf.store(acc1.to(gl.bfloat16))
            fence_async_shared()
            _store(out_desc, out, out_stride, first_buf, row, end, n * BN, n_rows, GROUPED)
            if WAVES == 2:
                row += 64
                _store(out_desc, out, out_stride, second_buf, row, end, n * BN, n_rows, GROUPED)
    tma.store_wait(0)


@gluon.jit(
    do_not_specialize=[
        "out_stride", "sw_stride", "num_m", "num_n", "n_rows", "num_k", "whole", "pieces",
    ],
    do_not_specialize_on_alignment=["sw", "table", "counters"],
)  # fmt: skip
def dense_kernel(
    x_desc, w_desc, sx_desc, out_desc, out, out_stride, sw, sw_stride, table, partial, counters,
    num_m, num_n, n_rows, num_k, whole, pieces,
    STAGES: gl.constexpr, WAVES: gl.constexpr, ORDER: gl.constexpr, GROUPED: gl.constexpr,
    SPLIT: gl.constexpr,
):  # fmt: skip
    """n_rows: rows of w of one group (N); num_k: blocks of 128 of K. table, num_m: one is used.
    partial, counters, whole, pieces: see `_join` and `Work`, used if SPLIT."""
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
                full, table, partial, counters, num_m, num_n, n_rows, num_k, whole, pieces, 0,
                WAVES, ORDER, GROUPED, SPLIT)),
            (_multiply_tiles, (
                out_desc, out, out_stride, x_bufs, w_bufs, sx_bufs, out_bufs, sw, sw_stride, empty,
                full, table, partial, counters, num_m, num_n, n_rows, num_k, whole, pieces, 1,
                WAVES, ORDER, GROUPED, SPLIT)),
            (_load_tiles, (
                x_desc, w_desc, sx_desc, x_bufs, w_bufs, sx_bufs, empty, full, table,
                num_m, num_n, n_rows, num_k, whole, pieces, ORDER, GROUPED, SPLIT)),
        ],
        [4, 1],
        [232, 40],
    )  # fmt: skip
