"""fp8 GEMM with block scales for few tokens: bound by the bytes of the weight, for Hopper.

Weights are wgmma's operand of 64 rows, tokens its narrow one (8 ... 64), so that nothing is
padded to 64 tokens. A block of threads streams 64 rows of w over a piece of K: one warp loads
(TMA), one warpgroup multiplies. Pieces of K are added up as `split_k` says.

Launched with programmatic dependence: the ring is filled with weights, which no kernel before this
one writes, while that kernel still runs; everything else waits for its end.
"""

from functools import lru_cache
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
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from . import reference
from .compat import barrier, describe_box, flat_layout, num_sms, tma_load, tma_store
from .fp8_gemm import check, fma, k_major, tma_ready
from .split_k import MAX_COUNTERS, is_last, leave_piece, load_piece, split_counters

MAX_REGISTERS = {8: 64, 16: 64, 32: 96, 64: 128}
"""By tokens of a tile: so that two blocks fit an SM, where shared memory lets them."""
SPLIT_BLOCKS = {8: 2.0, 16: 2.0, 32: 1.65, 64: 1.0}
"""By tokens of a tile: blocks of threads for each SM, at most, that a split makes."""
MIN_BLOCKS_OF_K = {8: 3, 16: 3, 32: 7, 64: 7}
"""Of a piece. Leaving and adding pieces up costs more with more tokens."""


class Plan(NamedTuple):
    tokens: int
    stages: int
    split: int


@lru_cache(4096)
def choose_plan(m: int, n: int, k: int, sms: int) -> Plan:
    """Rules that fit what was measured on an H100 at 1, 16, 32, 64 and 128 tokens for the shapes of
    DeepSeek-V3, whole and shared by eight. A short ring wins where pieces are short: all of it is
    under way before the first token is loaded."""
    num_n, num_k = -(-n // 64), -(-k // 128)
    tokens = next((t for t in MAX_REGISTERS if m <= t), 64)
    tiles = num_n * -(-m // tokens)

    def pieces(blocks: float) -> int:
        most = min(8 if tokens <= 32 else 6, num_k // MIN_BLOCKS_OF_K[tokens])
        return max(1, min(most, int(blocks * sms / tiles)))

    split = pieces(SPLIT_BLOCKS[tokens])
    if tiles >= 0.8 * sms and num_k < 64:
        split = 1
    elif tokens == 64 and tiles * split < 0.7 * sms:
        split = pieces(1.65)
    length = num_k // split
    if tokens <= 32:
        stages = 10 if length >= (14 if tokens <= 16 else 28) else 6
    else:
        stages = 8 if length >= 16 and tiles * split <= sms else 6
    return Plan(tokens, stages, split)


def fp8_gemm_nt_swap(
    x: Tensor,
    x_scale: Tensor,
    w: Tensor,
    w_scale: Tensor,
    out: Tensor,
    plan: Plan | None = None,
) -> Tensor:
    """out = x @ w^T, both e4m3 with block scales.

    x: [T, K] float8_e4m3fn, rows 16-byte aligned
    x_scale: [T, ceil(K/128)] float32, any layout (see `k_major`)
    w: [N, K] float8_e4m3fn, rows 16-byte aligned; constant (see `wait_previous`)
    w_scale: [ceil(N/128), ceil(K/128)] float32, rows adjacent or strided
    out: [T, N] bfloat16, rows 16-byte aligned
    plan: `choose_plan`'s if None
    Nothing behind the last row or column is read or written. Not for two streams at once: the
    counters of `split` are shared.
    """
    check(x, x_scale, w, w_scale, out)
    if not x.is_cuda:
        return out.copy_(reference.fp8_gemm_nt(x, x_scale, w, w_scale, out.dtype))
    assert tma_ready(out), (out.stride(), out.data_ptr())
    (m, k), n = x.shape, w.shape[0]
    plan = plan or choose_plan(m, n, k, num_sms(x))
    grid = (-(-n // 64), plan.split, -(-m // plan.tokens))
    partial = counters = out  # not used without a split
    if plan.split > 1:
        size = grid[0] * grid[1] * grid[2] * 64 * plan.tokens
        partial = torch.empty(size, dtype=torch.float32, device=x.device)
        counters = split_counters(x.device)
        assert grid[0] * grid[2] <= MAX_COUNTERS, grid
    swap_kernel[grid](
        *describe(x, k_major(x_scale), w, plan.tokens), describe_out(out, plan.tokens),
        w_scale, w_scale.stride(0), partial, counters, -(-k // 128),
        STAGES=plan.stages, SPLIT=plan.split,
        num_warps=4, maxnreg=MAX_REGISTERS[plan.tokens], launch_pdl=True,
    )  # fmt: skip
    return out


def describe(
    x: Tensor, x_scale: Tensor, w: Tensor, tokens: int
) -> tuple[TensorDescriptor, TensorDescriptor, TensorDescriptor]:
    """TMA boxes of w [N, K], x [T, K] and x_scale [G, T]. A box of scales has 32 or more: each
    stage must begin at a multiple of 128 bytes."""
    return (
        describe_box(w, (64, 128), gl.float8e4nv),
        describe_box(x, (tokens, 128), gl.float8e4nv),
        TensorDescriptor.from_tensor(x_scale, [1, max(tokens, 32)], flat_layout()),
    )


def describe_out(out: Tensor, tokens: int) -> TensorDescriptor:
    return describe_box(out, (tokens, 64), gl.bfloat16)


@gluon.jit
def _load(
    w_desc, x_desc, sx_desc, w_bufs, x_bufs, sx_bufs, empty, full, w_row, row, first, count
):  # fmt: skip
    """The loading warp: `count` blocks of K from block `first` on."""
    STAGES: gl.constexpr = w_bufs.type.shape[0]
    BYTES: gl.constexpr = (
        w_desc.block_type.nbytes + x_desc.block_type.nbytes + sx_desc.block_type.nbytes
    )
    ahead = min(STAGES, count)
    for j in range(ahead):
        mbarrier.expect(full.index(j), BYTES)
        tma_load(w_desc, [w_row, (first + j) * 128], full.index(j), w_bufs.index(j))
    gdc_launch_dependents()  # the next kernel may come in beside this one and load its weights
    gdc_wait()  # the kernel before this one has ended and its writes are seen
    for j in range(ahead):
        tma_load(x_desc, [row, (first + j) * 128], full.index(j), x_bufs.index(j))
        tma_load(sx_desc, [first + j, row], full.index(j), sx_bufs.index(j))
    for j in range(ahead, count):
        stage = j % STAGES
        ready = full.index(stage)
        mbarrier.wait(empty.index(stage), ((j // STAGES) & 1) ^ 1)
        mbarrier.expect(ready, BYTES)
        tma_load(w_desc, [w_row, (first + j) * 128], ready, w_bufs.index(stage))
        tma_load(x_desc, [row, (first + j) * 128], ready, x_bufs.index(stage))
        tma_load(sx_desc, [first + j, row], ready, sx_bufs.index(stage))


@gluon.jit
def step(w, x, sx, scale, part, acc, empty, L: gl.constexpr):
    """acc [64, tokens] += w x^T of one block of 128, by the scales of both; frees the stage."""
    BT: gl.constexpr = x.type.shape[0]
    part = warpgroup_mma(w, x.permute((1, 0)), part, use_acc=False, is_async=True)
    boxed = sx.reshape((sx.type.shape[1],)).slice(0, BT, 0)
    sx = boxed.load(gl.SliceLayout(0, L)) * scale  # under the wgmma
    part = warpgroup_mma_wait(0, deps=(part,))
    mbarrier.arrive(empty, count=1)
    return part, fma(part, gl.expand_dims(sx, 0), acc)


@gluon.jit
def _multiply(
    out_desc, w_bufs, x_bufs, sx_bufs, sw, partial, counters, empty, full, w_row, row, count,
    SPLIT: gl.constexpr,
):  # fmt: skip
    STAGES: gl.constexpr = w_bufs.type.shape[0]
    BT: gl.constexpr = x_bufs.type.shape[1]
    L: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BT, 32])
    acc = gl.zeros((64, BT), gl.float32, L)
    part = gl.zeros((64, BT), gl.float32, L)
    scale_next = gl.load(sw)
    for j in range(count):
        stage = j % STAGES
        scale = scale_next  # loaded a step ahead
        scale_next = gl.load(sw + min(j + 1, count - 1))
        mbarrier.wait(full.index(stage), (j // STAGES) & 1)
        part, acc = step(
            w_bufs.index(stage), x_bufs.index(stage), sx_bufs.index(stage), scale, part, acc,
            empty.index(stage), L,
        )  # fmt: skip
    if SPLIT == 1:
        _store(acc, w_bufs, out_desc, row, w_row)
    else:
        tile = gl.program_id(2) * gl.num_programs(0) + gl.program_id(0)
        partial += tile * (SPLIT * 64 * BT)
        leave_piece(partial + gl.program_id(1) * (64 * BT), acc)
        if is_last(counters + tile, SPLIT):
            acc = gl.zeros((64, BT), gl.float32, L)
            for s in gl.static_range(SPLIT):
                acc += load_piece(partial + s * (64 * BT), acc)
            _store(acc, w_bufs, out_desc, row, w_row)


@gluon.jit
def _store(acc, w_bufs, out_desc, row, column):
    """acc: [64 outputs, tokens], through the ring, whose last load has been used."""
    BT: gl.constexpr = acc.shape[1]
    TILES: gl.constexpr = w_bufs.type.shape[0] * 64 // BT
    tile = w_bufs._reinterpret(gl.bfloat16, [TILES, BT, 64], out_desc.layout).index(0)
    barrier()  # all warps' last wgmma has read the weights
    tile.permute((1, 0)).store(acc.to(gl.bfloat16))
    fence_async_shared()
    tma_store(out_desc, [row, column], tile)
    tma.store_wait(0)


@gluon.jit(
    do_not_specialize=["sw_stride", "num_k"],
    do_not_specialize_on_alignment=["sw", "counters"],
)
def swap_kernel(
    w_desc, x_desc, sx_desc, out_desc, sw, sw_stride, partial, counters, num_k,
    STAGES: gl.constexpr, SPLIT: gl.constexpr,
):  # fmt: skip
    """Grid: (tiles of 64 rows of w, SPLIT, tiles of tokens). num_k: blocks of 128 of K."""
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
    w_row = gl.program_id(0) * 64
    row = gl.program_id(2) * x_desc.block_type.shape[0]
    first = gl.program_id(1) * num_k // SPLIT  # pieces differ by one block at most
    count = (gl.program_id(1) + 1) * num_k // SPLIT - first
    sw += w_row // 128 * sw_stride + first
    gl.warp_specialize(
        [
            (_multiply, (
                out_desc, w_bufs, x_bufs, sx_bufs, sw, partial, counters, empty, full, w_row, row,
                count, SPLIT)),
            (_load, (
                w_desc, x_desc, sx_desc, w_bufs, x_bufs, sx_bufs, empty, full, w_row, row, first,
                count)),
        ],
        [1],
        [40],
    )  # fmt: skip
