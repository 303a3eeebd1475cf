"""GEMMs of experts: groups of rows, each with its own weight. Sizes are read on the device.

A table of items, made on the device from the groups' sizes, cuts each group into row tiles of its
own; tiles are not padded in memory. What a tile reads behind its group's end (the next group's
rows) it computes and does not store.

    few rows to an expert    `swap_kernel` here: streams weights, persistent
    many                     `fp8_gemm.dense_kernel` with the table
    bf16, other cards        `fp8_gemm_dot.dot_kernel` with the table

Grids depend on shapes alone, so all of it can be captured in a CUDA graph.
"""

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from . import fp8_gemm_dot, reference
from .compat import has_wgmma, num_sms, runs_kernels, tma_load
from .fp8_gemm import (
    TILE_ORDER,
    count_tiles,
    dense_kernel,
    describe,
    tile_at,
    tma_ready,
)
from .fp8_gemm_swap import MAX_REGISTERS, step
from .fp8_gemm_swap import describe as describe_swap
from .fp8_gemm_work import Tile
from .moe_items import Tables, Tiles, shared_table, tile_scales

SWAP_ORDER = 64
"""As `TILE_ORDER`: row tiles of one expert are neighbours, and share its weight in L2."""
SWAP_EXPECTED = 56
"""Rows of an expert, on average, up to which `swap_kernel` is the faster."""
SWAP_STAGES = {16: 8, 32: 8, 64: 6}
"""By tokens of a tile: two blocks fit an SM, with 96 to 128 KiB of weights under way."""


def grouped_fp8_gemm_nt_contiguous(
    x: Tensor,
    x_scale: Tensor,
    w: Tensor,
    w_scale: Tensor,
    offsets: Tensor,
    out: Tensor,
    expected_m: float | None = None,
    tables: Tables | None = None,
) -> Tensor:
    """Rows sorted by expert: out[i] = x[i] @ w[expert of i]^T, e4m3 with block scales.

    x: [M, K] float8_e4m3fn
    x_scale: [M, ceil(K/128)] float32, any layout
    w: [E, N, K] float8_e4m3fn, contiguous
    w_scale: [E, ceil(N/128), ceil(K/128)] float32, contiguous
    offsets: [E] int32 or int64: the row behind each expert's last; ascending, at most M
    out: [M, N] bfloat16; rows behind the last offset are not written, nor does x matter there
    expected_m: rows that an expert has on average (M / E if nobody knows); for speed only
    tables: shared by GEMMs over the same offsets and M
    """
    check_grouped(x, x_scale, w, w_scale, offsets, out)
    if not runs_kernels(x):
        return by_expert(x, x_scale, w, w_scale, contiguous_bounds(offsets), out)
    expected = x.shape[0] / w.shape[0] if expected_m is None else expected_m
    return launch(x, x_scale, w, w_scale, offsets, 0, out, expected, tables)


def grouped_fp8_gemm_nt_masked(
    x: Tensor,
    x_scale: Tensor,
    w: Tensor,
    w_scale: Tensor,
    counts: Tensor,
    out: Tensor,
    expected_m: float | None = None,
) -> Tensor:
    """Rows in slots of M for each expert: out[e, :counts[e]] = x[e, :counts[e]] @ w[e]^T.

    x: [E, M, K] float8_e4m3fn, contiguous; rows from counts[e] on are not used
    x_scale: [E, M, ceil(K/128)] float32, contiguous or a view of `quantize_1x128`'s other layout
    w: [E, N, K] float8_e4m3fn, contiguous
    w_scale: [E, ceil(N/128), ceil(K/128)] float32, contiguous
    counts: [E] int32 or int64, at most M
    out: [E, M, N] bfloat16, contiguous; rows from counts[e] on are not written
    expected_m: rows that an expert has on average (M if nobody knows); for speed only
    """
    rows, flat = x.shape[1], out.flatten(0, 1)
    x, x_scale = x.flatten(0, 1), x_scale.flatten(0, 1)
    check_grouped(x, x_scale, w, w_scale, counts, flat)
    assert out.is_contiguous() and len(flat) == len(w) * rows, (out.shape, w.shape)
    if not runs_kernels(x):
        by_expert(x, x_scale, w, w_scale, masked_bounds(counts, rows), flat)
    else:
        launch(x, x_scale, w, w_scale, counts, rows, flat, expected_m or rows)
    return out


def grouped_gemm_nt_contiguous(
    x: Tensor, w: Tensor, offsets: Tensor, out: Tensor, w_scale: Tensor | None = None
) -> Tensor:
    """`grouped_fp8_gemm_nt_contiguous` of unquantised rows: x [M, K], out [M, N] of one float
    dtype, and w of that dtype too, or e4m3 with scales and dequantised as it is used."""
    check_grouped(x, None, w, w_scale, offsets, out)
    if not runs_kernels(x):
        return by_expert(x, None, w, w_scale, contiguous_bounds(offsets), out)
    return launch(x, None, w, w_scale, offsets, 0, out, x.shape[0] / w.shape[0])


def grouped_gemm_nt_masked(
    x: Tensor, w: Tensor, counts: Tensor, out: Tensor, expected_m: float | None = None
) -> Tensor:
    """`grouped_fp8_gemm_nt_masked` of unquantised x [E, M, K], w [E, N, K], out [E, M, N], all of
    one float dtype."""
    rows, flat = x.shape[1], out.flatten(0, 1)
    x = x.flatten(0, 1)
    check_grouped(x, None, w, None, counts, flat)
    assert out.is_contiguous() and len(flat) == len(w) * rows, (out.shape, w.shape)
    if not runs_kernels(x):
        by_expert(x, None, w, None, masked_bounds(counts, rows), flat)
    else:
        launch(x, None, w, None, counts, rows, flat, expected_m or rows)
    return out


def grouped_fp8_gemm_nt_tiled(
    x: Tensor, x_scale: Tensor, w: Tensor, w_scale: Tensor, tiles: Tiles, out: Tensor
) -> Tensor:
    """`grouped_fp8_gemm_nt_contiguous` of rows that `moe_dispatch` has cut into tiles, for few rows
    to an expert and, on a GPU, where `moe_dispatch.dispatches`.

    x_scale: [ceil(K/128), items * bm] float32, at `tiles.columns`; what is elsewhere does not count
    """
    _, n, k = w.shape
    assert x.shape == (out.shape[0], k) and out.shape[1] == n, (x.shape, w.shape, out.shape)
    assert x_scale.shape == (w_scale.shape[2], (len(tiles.table) - 1) * tiles.bm), x_scale.shape
    assert w.is_contiguous() and w_scale.is_contiguous(), (w.stride(), w_scale.stride())
    assert x.dtype == w.dtype == torch.float8_e4m3fn and x_scale.dtype == torch.float32, x.dtype
    if not runs_kernels(x):
        return by_item(x, x_scale, w, w_scale, tiles, out)
    assert tma_ready(x) and tma_ready(w) and tma_ready(out), (x.stride(), out.stride())
    return launch_tiles(x, x_scale, w, w_scale, tiles.table, tiles.bm, out) if len(out) else out


def check_grouped(
    x: Tensor, x_scale: Tensor | None, w: Tensor, w_scale: Tensor | None, sizes: Tensor, out: Tensor
) -> None:
    (experts, n, k), blocks = w.shape, (-(-w.shape[1] // 128), -(-w.shape[2] // 128))
    assert x.shape == (out.shape[0], k) and out.shape[1] == n, (x.shape, w.shape, out.shape)
    assert w.is_contiguous() and x.stride(1) == out.stride(1) == 1, (w.stride(), x.stride())
    assert sizes.shape == (experts,) and sizes.dtype in (torch.int32, torch.int64), sizes.shape
    if w_scale is not None:
        assert w.dtype == torch.float8_e4m3fn and w_scale.dtype == torch.float32, w.dtype
        assert w_scale.shape == (experts, *blocks) and w_scale.is_contiguous(), w_scale.shape
    if x_scale is not None:
        assert x.dtype == torch.float8_e4m3fn and w_scale is not None, x.dtype
        assert x_scale.shape == (x.shape[0], blocks[1]), (x.shape, x_scale.shape)


# ---- the torch twin -----------------------------------------------------------------------------


def contiguous_bounds(offsets: Tensor) -> list[tuple[int, int]]:
    ends = offsets.tolist()
    return list(zip([0, *ends[:-1]], ends, strict=True))


def masked_bounds(counts: Tensor, rows: int) -> list[tuple[int, int]]:
    return [(e * rows, e * rows + count) for e, count in enumerate(counts.tolist())]


def by_expert(
    x: Tensor,
    x_scale: Tensor | None,
    w: Tensor,
    w_scale: Tensor | None,
    bounds: list[tuple[int, int]],
    out: Tensor,
) -> Tensor:
    """The twin of every kernel here: one reference GEMM for each expert that has rows."""
    for expert, (start, end) in enumerate(bounds):
        rows = slice(start, end)
        if start == end:
            continue
        if w_scale is None:
            out[rows] = reference.gemm_nt(x[rows], w[expert])
        elif x_scale is None:
            out[rows] = reference.dequant_gemm_nt(x[rows], w[expert], w_scale[expert])
        else:
            out[rows] = reference.fp8_gemm_nt(
                x[rows], x_scale[rows], w[expert], w_scale[expert], out.dtype
            )
    return out


def by_item(
    x: Tensor, x_scale: Tensor, w: Tensor, w_scale: Tensor, tiles: Tiles, out: Tensor
) -> Tensor:
    """The twin of `swap_kernel` alone: one reference GEMM for each item."""
    items = tiles.table[1 : 1 + int(tiles.table[0, 0])].tolist()
    for item, (expert, first, start, end) in enumerate(items):
        begin = start + (item - first) * tiles.bm
        rows = slice(begin, min(end, begin + tiles.bm))
        scale = x_scale[:, item * tiles.bm :][:, : rows.stop - begin].t()
        out[rows] = reference.fp8_gemm_nt(x[rows], scale, w[expert], w_scale[expert], out.dtype)
    return out


# ---- launches -----------------------------------------------------------------------------------


def launch(
    x: Tensor,
    x_scale: Tensor | None,
    w: Tensor,
    w_scale: Tensor | None,
    sizes: Tensor,
    rows: int,
    out: Tensor,
    expected: float,
    tables: Tables | None = None,
) -> Tensor:
    """x: [M, K], out: [M, N]; sizes, rows: as `item_table` takes them."""
    if not out.numel():
        return out
    fast = has_wgmma(x) and x_scale is not None and out.dtype == torch.bfloat16
    fast = fast and w.shape[1] % 8 == 0
    if fast and tma_ready(x) and tma_ready(w) and tma_ready(out):
        assert x_scale is not None and w_scale is not None
        run = launch_swap if expected <= SWAP_EXPECTED else launch_dense
        return run(x, x_scale, w, w_scale, sizes, rows, out, expected, tables)
    kind = "plain" if w_scale is None else "dequant" if x_scale is None else "scaled"
    tile = fp8_gemm_dot.choose_tile(expected, kind, x)
    table = shared_table(sizes, rows, x.shape[0], tile.bm, tables)
    return fp8_gemm_dot.launch(x, x_scale, w, w_scale, out, table, expected)


def launch_dense(
    x: Tensor,
    x_scale: Tensor,
    w: Tensor,
    w_scale: Tensor,
    sizes: Tensor,
    rows: int,
    out: Tensor,
    expected: float,
    tables: Tables | None,
) -> Tensor:
    """Two shapes of tiles: the large one where few of its rows are wasted at experts' ends."""
    tile = Tile(256, 128, 3) if expected >= 768 else Tile(128, 128, 5)
    table = shared_table(sizes, rows, x.shape[0], tile.bm, tables)
    _, n, k = w.shape
    dense_kernel[(num_sms(x),)](
        *describe(x, tile_scales(x_scale, table, tile.bm), w.flatten(0, 1), out, tile),
        out, out.stride(0),
        w_scale, w_scale.stride(1), table, out, table, 0, -(-n // tile.bn), n, -(-k // 128), 0, 1,
        STAGES=tile.stages, WAVES=tile.bm // 128, ORDER=TILE_ORDER, GROUPED=True, SPLIT=False,
        num_warps=4,
    )  # fmt: skip
    return out


def launch_swap(
    x: Tensor,
    x_scale: Tensor,
    w: Tensor,
    w_scale: Tensor,
    sizes: Tensor,
    rows: int,
    out: Tensor,
    expected: float,
    tables: Tables | None,
) -> Tensor:
    tokens = swap_tokens(expected)
    table = shared_table(sizes, rows, x.shape[0], tokens, tables)
    return launch_tiles(x, tile_scales(x_scale, table, tokens), w, w_scale, table, tokens, out)


def swap_tokens(expected: float) -> int:
    """A tile of tokens holds most experts whole: their numbers scatter around the expected one."""
    return 16 if expected <= 6 else 32 if expected <= 18 else 64


def launch_tiles(
    x: Tensor,
    x_scale: Tensor,
    w: Tensor,
    w_scale: Tensor,
    table: Tensor,
    tokens: int,
    out: Tensor,
) -> Tensor:
    """x_scale: [ceil(K/128), items * tokens], in the order of the table's items."""
    _, n, k = w.shape
    swap_kernel[(2 * num_sms(x),)](
        *describe_swap(x, x_scale, w.flatten(0, 1), tokens),
        w_scale, w_scale.stride(1),
        out, out.stride(0), table, -(-n // 64), n, -(-k // 128),
        STAGES=SWAP_STAGES[tokens], ORDER=SWAP_ORDER, num_warps=4, maxnreg=MAX_REGISTERS[tokens],
        launch_pdl=True,
    )  # fmt: skip
    return out


# ---- few rows to an expert ----------------------------------------------------------------------


@gluon.jit
def _load_tiles(
    w_desc, x_desc, sx_desc, w_bufs, x_bufs, sx_bufs, empty, full, table, num_n, n_rows, num_k,
    ORDER: gl.constexpr,
):  # fmt: skip
    """The loading warp runs ahead across tiles: stage and phase go on."""
    STAGES: gl.constexpr = w_bufs.type.shape[0]
    BT: gl.constexpr = x_bufs.type.shape[1]
    BYTES: gl.constexpr = (
        w_desc.block_type.nbytes + x_desc.block_type.nbytes + sx_desc.block_type.nbytes
    )
    stage = 0
    phase = 1
    for t in range(gl.program_id(0), count_tiles(table, 0, num_n, True), gl.num_programs(0)):
        group, row, _, n, sx_row = tile_at(t, table, 0, num_n, BT, ORDER, True)
        w_row = group * n_rows + n * 64
        for k in range(num_k):
            mbarrier.wait(empty.index(stage), phase)
            ready = full.index(stage)
            mbarrier.expect(ready, BYTES)
            tma_load(w_desc, [w_row, k * 128], ready, w_bufs.index(stage))
            tma_load(x_desc, [row, k * 128], ready, x_bufs.index(stage))
            tma_load(sx_desc, [k, sx_row], ready, sx_bufs.index(stage))
            stage += 1
            if stage == STAGES:
                stage = 0
                phase ^= 1


@gluon.jit
def _scales_at(sw, stride, group, n, n_rows):
    """The scales of a column of tiles of a group's weight."""
    return sw + (group * gl.cdiv(n_rows, 128) + n // 2) * stride


@gluon.jit
def _multiply_tiles(
    w_bufs, x_bufs, sx_bufs, sw, sw_stride, out, out_stride, empty, full, table,
    num_n, n_rows, num_k, ORDER: gl.constexpr,
):  # fmt: skip
    STAGES: gl.constexpr = w_bufs.type.shape[0]
    BT: gl.constexpr = x_bufs.type.shape[1]
    L: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BT, 32])
    OUT: gl.constexpr = gl.BlockedLayout([8, 1], [8, 4], [1, 4], [0, 1])  # 16 bytes a thread
    part = gl.zeros((64, BT), gl.float32, L)
    stage = 0
    phase = 0
    num_tiles = count_tiles(table, 0, num_n, True)
    nearest = min(gl.program_id(0), max(num_tiles - 1, 0))
    group, row, end, n, _ = tile_at(nearest, table, 0, num_n, BT, ORDER, True)
    some = num_tiles > 0  # else the table's first item may hold anything
    scales = _scales_at(sw, sw_stride, gl.where(some, group, 0), gl.where(some, n, 0), n_rows)
    scale_next = gl.load(scales)
    for t in range(gl.program_id(0), num_tiles, gl.num_programs(0)):
        # Where the next tile is, and its first scale, come while this one is multiplied.
        after = min(t + gl.num_programs(0), num_tiles - 1)
        next_group, next_row, next_end, next_n, _ = tile_at(after, table, 0, num_n, BT, ORDER, True)
        next_scales = _scales_at(sw, sw_stride, next_group, next_n, n_rows)
        acc = gl.zeros((64, BT), gl.float32, L)
        for k in range(num_k):
            scale = scale_next  # loaded a step ahead
            scale_next = gl.load(gl.where(k + 1 < num_k, scales + k + 1, next_scales))
            mbarrier.wait(full.index(stage), phase)
            part, acc = step(
                w_bufs.index(stage), x_bufs.index(stage), sx_bufs.index(stage), scale, part, acc,
                empty.index(stage), L,
            )  # fmt: skip
            stage += 1
            if stage == STAGES:
                stage = 0
                phase ^= 1
        result = gl.convert_layout(acc.to(gl.bfloat16), OUT)
        column = n * 64 + gl.expand_dims(gl.arange(0, 64, gl.SliceLayout(1, OUT)), 1)
        token = row + gl.expand_dims(gl.arange(0, BT, gl.SliceLayout(0, OUT)), 0)
        at = out + token.to(gl.int64) * out_stride + column
        gl.store(at, result, mask=(token < end) & (column < n_rows))
        row, end, n, scales = next_row, next_end, next_n, next_scales


@gluon.jit(
    do_not_specialize=["sw_stride", "num_n", "num_k"],
    do_not_specialize_on_alignment=["sw", "table"],
)
def swap_kernel(
    w_desc, x_desc, sx_desc, sw, sw_stride, out, out_stride, table, num_n, n_rows, num_k,
    STAGES: gl.constexpr, ORDER: gl.constexpr,
):  # fmt: skip
    """`fp8_gemm_swap`'s kernel over the tiles of a table, without pieces of K."""
    w_bufs = gl.allocate_shared_memory(w_desc.dtype, [STAGES, 64, 128], w_desc.layout)
    x_bufs = gl.allocate_shared_memory(
        x_desc.dtype, [STAGES, x_desc.block_type.shape[0], 128], x_desc.layout
    )
    sx_bufs = gl.allocate_shared_memory(
        gl.float32, [STAGES, 1, sx_desc.block_type.shape[1]], sx_desc.layout
    )
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(empty.index(i), count=1)
        mbarrier.init(full.index(i), count=1)
    fence_async_shared()
    gdc_launch_dependents()
    gdc_wait()  # even the first weight to load depends on what the kernel before this one wrote
    gl.warp_specialize(
        [
            (_multiply_tiles, (
                w_bufs, x_bufs, sx_bufs, sw, sw_stride, out, out_stride, empty, full, table,
                num_n, n_rows, num_k, ORDER)),
            (_load_tiles, (
                w_desc, x_desc, sx_desc, w_bufs, x_bufs, sx_bufs, empty, full, table,
                num_n, n_rows, num_k, ORDER)),
        ],
        [1],
        [40],
    )  # fmt: skip
