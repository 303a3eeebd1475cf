"""From the gate to the experts' GEMMs in one launch, where there are few tokens.

A step of decode is latency, and each kernel that waits for another costs microseconds. One kernel
makes here what `permute_by_expert`, `gather_quantized`, `item_table` and `tile_scales` make one
after the other: each program finds out from all pairs where its own goes, and waits for none.

```
pairs    | token 0: 7 2 | token 1: 2 9 | token 2: 2 7 |        top_k = 2, bm = 2, of experts 0 ... 7
rows     | 2: 0a 1a 2a     | 7: 0b 2b | (1b) |                 behind: nobody takes expert 9's
columns  | 0 1 | 2 _       | 4 5      | -1   |                 of the scales: `bm` to an item
```
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import reference
from .compat import has_fp8, has_wgmma, overlap, runs_kernels, wait_previous
from .fp8_gemm import tma_ready
from .fused import activated, silu_groups
from .moe_gemm import SWAP_EXPECTED, swap_tokens
from .moe_items import Tiles, most_items
from .quant import quantize_1x128, store_quantized

MAX_PAIRS = 2048
"""Every program looks at all pairs, so the work grows with their square: from about here on it
costs as much as the launches that it saves."""
SHAPES = {32: (2048, 1), 128: (2048, 1), 512: (8192, 4), 1024: (8192, 4), MAX_PAIRS: (8192, 8)}
"""By most pairs: columns that one program copies, and its warps. One warp needs no barriers."""


class Dispatched(NamedTuple):
    """Quantised rows as `moe_gemm.grouped_fp8_gemm_nt_tiled` takes them."""

    rows: Tensor
    """[P, K] float8_e4m3fn, in the order of `permute_by_expert`; behind the last: not written."""
    scale: Tensor
    """[ceil(K/128), items * bm] float32, at `tiles.columns`; elsewhere: not written, nor does
    it matter, since a column is one row's alone."""
    place: Tensor
    """[P] int64: where each pair went; -1: left out."""
    tiles: Tiles


def dispatches(num_pairs: int, expected: float, dtype: torch.dtype, *maps: Tensor) -> bool:
    """Whether experts of these weights [E, N, K], that give `dtype`, take `Dispatched` rows: few of
    them, and multiplied by `moe_gemm.swap_kernel`. expected: rows that an expert has on average."""
    few = num_pairs <= MAX_PAIRS and expected <= SWAP_EXPECTED and dtype == torch.bfloat16
    return few and all(has_wgmma(w) and tma_ready(w) and w.shape[1] % 8 == 0 for w in maps)


def dispatch(
    q: Tensor,
    scale: Tensor,
    topk_ids: Tensor,
    n_experts: int,
    first_expert: int = 0,
    expected: float = 0.0,
) -> Dispatched:
    """Rows for n_experts from first_expert on; pairs of others are left out.

    q: [T, K] float8_e4m3fn, contiguous; scale: [T, ceil(K/128)] float32, any layout
    topk_ids: [T, top_k] int64, contiguous; expected: rows that an expert has on average
    """
    groups, bm = -(-q.shape[1] // reference.BLOCK), swap_tokens(expected)
    assert scale.shape == (q.shape[0], groups) and len(topk_ids) == len(q), (q.shape, scale.shape)
    assert q.dtype == torch.float8_e4m3fn and scale.dtype == torch.float32, (q.dtype, scale.dtype)
    assert topk_ids.dim() == 2 and topk_ids.dtype == torch.int64, (topk_ids.shape, topk_ids.dtype)
    if not runs_kernels(q):
        rows, tiled, place, *tiles = reference.dispatch(
            q, scale, topk_ids, n_experts, first_expert, bm
        )
        return Dispatched(rows, tiled, place, Tiles(*tiles, bm))
    assert q.is_contiguous() and topk_ids.is_contiguous(), (q.stride(), topk_ids.stride())
    width, num_pairs, device = q.shape[1], topk_ids.numel(), q.device
    assert num_pairs <= MAX_PAIRS, f"{num_pairs=} > {MAX_PAIRS=}"
    most = most_items(n_experts, num_pairs, bm)
    rows = torch.empty(num_pairs, width, dtype=torch.uint8, device=device)
    tiled = torch.empty(groups, most * bm, dtype=torch.float32, device=device)
    place = torch.empty(num_pairs, dtype=torch.int64, device=device)
    table = torch.empty(1 + most, 4, dtype=torch.int32, device=device)
    columns = torch.empty(num_pairs, dtype=torch.int32, device=device)
    pairs, block, warps = dispatch_shape(num_pairs)
    if num_pairs:
        _dispatch[(num_pairs, triton.cdiv(width, block))](
            q.view(torch.uint8), scale, topk_ids, rows, tiled, place, table, columns, num_pairs,
            n_experts, first_expert, *scale.stride(), tiled.stride(0),
            WIDTH=width, GROUPS=groups, GROUPS_BLOCK=triton.next_power_of_2(groups),
            TOP_K=topk_ids.shape[1], BM=bm, EXPERTS=expert_bins(n_experts), PAIRS=pairs,
            BLOCK=block, num_warps=warps, **overlap(q)
        )  # fmt: skip
    return Dispatched(rows.view(q.dtype), tiled, place, Tiles(table, columns, bm))


def dispatch_shape(num_pairs: int) -> tuple[int, int, int]:
    """Pairs that a program has room for, columns that it copies, and its warps."""
    pairs = min(most for most in SHAPES if num_pairs <= most)
    return pairs, *SHAPES[pairs]


def warm_up_tokens(top_k: int, n_routed: int, most: int) -> list[int]:
    """A few numbers of tokens with which dispatched rows use every kernel that they use with 1 ...
    most tokens: after them, none is compiled."""
    met, counts = set(), []
    for m in range(1, min(most, MAX_PAIRS // top_k) + 1):
        kind = dispatch_shape(m * top_k), swap_tokens(m * top_k / n_routed)
        if kind not in met:
            met.add(kind)
            counts.append(m)
    return counts


def expert_bins(n_experts: int) -> int:
    """Of the histogram: at least one for each lane of a warp."""
    return max(triton.next_power_of_2(n_experts), 32)


def silu_mul_dispatched(
    gate_up: Tensor, tiles: Tiles, ue8m0: bool = False
) -> tuple[Tensor, Tensor]:
    """`silu_mul_quant` of rows that were dispatched; their scales go straight to the tiles' order.

    gate_up: [P, 2N], gate first, rows of unit stride
    -> q [P, N] float8_e4m3fn; rows that no expert takes are not written
       scale [ceil(N/128), items * bm] float32; not written where no row's scale belongs
    """
    num_rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    assert tiles.columns.shape == (num_rows,), (tiles.columns.shape, gate_up.shape)
    groups, device = -(-width // reference.BLOCK), gate_up.device
    size = (len(tiles.table) - 1) * tiles.bm
    if not (runs_kernels(gate_up) and has_fp8(gate_up)):
        q, scale = quantize_1x128(reference.silu_mul(gate_up), ue8m0)
        return q, reference.tiled(scale, tiles.columns, size)
    assert gate_up.stride(1) == 1, gate_up.stride()
    q = torch.empty(num_rows, width, dtype=torch.float8_e4m3fn, device=device)
    tiled = torch.empty(groups, size, dtype=torch.float32, device=device)
    block = silu_groups(width)
    if num_rows:
        _silu_mul_dispatched[(num_rows, triton.cdiv(groups, block))](
            gate_up, tiles.columns, q, tiled, gate_up.stride(0), tiled.stride(0), WIDTH=width,
            GROUPS=block, UE8M0=ue8m0, num_warps=max(block // 2, 1), **overlap(gate_up)
        )  # fmt: skip
    return q, tiled


@triton.jit
def _held(ids, first_expert, n_experts):
    """Experts counted from first_expert on; n_experts, which is behind all of them, for others."""
    expert = ids.to(tl.int32) - first_expert
    return tl.where((expert >= 0) & (expert < n_experts), expert, n_experts)


@triton.jit(
    do_not_specialize=[
        "num_pairs", "n_experts", "first_expert", "scale_token", "scale_group",
        "tiled_stride"
    ]
)  # fmt: skip
def _dispatch(
    q, scale, topk_ids, rows, tiled, place, table, columns, num_pairs, n_experts, first_expert,
    scale_token, scale_group, tiled_stride, WIDTH: tl.constexpr, GROUPS: tl.constexpr,
    GROUPS_BLOCK: tl.constexpr, TOP_K: tl.constexpr, BM: tl.constexpr, EXPERTS: tl.constexpr,
    PAIRS: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr
):  # fmt: skip
    """BLOCK columns of one pair's row. The first program of a pair also writes its scales and its
    place, and the item that begins with it; that of the first pair, how many items there are."""
    wait_previous(PDL)
    pair = tl.program_id(0)
    token = (pair // TOP_K).to(tl.int64)
    # What is to be copied comes while the pairs are counted.
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(q + token * WIDTH + at, at < WIDTH)
    group = tl.arange(0, GROUPS_BLOCK)
    factor = tl.load(scale + token * scale_token + group * scale_group, group < GROUPS)

    own = _held(tl.load(topk_ids + pair), first_expert, n_experts)
    lane = tl.arange(0, PAIRS)
    expert = _held(tl.load(topk_ids + lane, lane < num_pairs, -1), first_expert, n_experts)
    rank = tl.sum(((expert == own) & (lane < pair)).to(tl.int32), 0)
    sizes = tl.histogram(expert, EXPERTS, expert < n_experts)
    items = (sizes + BM - 1) // BM
    each = tl.arange(0, EXPERTS)
    start = tl.sum(tl.where(each < own, sizes, 0), 0)
    first = tl.sum(tl.where(each < own, items, 0), 0)

    row = start + rank  # of pairs that are left out: behind all others
    taken = own < n_experts
    tl.store(rows + row.to(tl.int64) * WIDTH + at, value, (at < WIDTH) & taken)
    if tl.program_id(1) == 0:
        column = first * BM + rank
        tl.store(
            tiled + group.to(tl.int64) * tiled_stride + column, factor, (group < GROUPS) & taken
        )
        tl.store(place + pair, tl.where(taken, row, -1).to(tl.int64))
        tl.store(columns + row, tl.where(taken, column, -1))
        if taken & (rank % BM == 0):
            item = table + 4 + (first + rank // BM) * 4
            tl.store(item, own)
            tl.store(item + 1, first)
            tl.store(item + 2, start)
            tl.store(item + 3, start + tl.sum(tl.where(each == own, sizes, 0), 0))
        if pair == 0:
            tl.store(table, tl.sum(items, 0))


@triton.jit(do_not_specialize=["tiled_stride"])
def _silu_mul_dispatched(
    gate_up, columns, q, tiled, stride, tiled_stride, WIDTH: tl.constexpr, GROUPS: tl.constexpr,
    UE8M0: tl.constexpr, PDL: tl.constexpr
):  # fmt: skip
    """GROUPS blocks of 128 of one row."""
    wait_previous(PDL)
    row = tl.program_id(0).to(tl.int64)
    column = tl.load(columns + row)
    group = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)
    value = activated(gate_up + row * stride, group, WIDTH).to(tl.float32)
    if column >= 0:
        store_quantized(value, group, q + row * WIDTH, tiled + column, tiled_stride, WIDTH, UE8M0)
