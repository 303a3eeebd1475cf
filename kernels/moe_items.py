"""The table of items: groups of rows cut into row tiles, on the device.

```
sizes   | expert 0: 5 rows | expert 1: 0 | expert 2: 37        |     bm = 16
items     (0, 0, 0, 5)                    (2, 1, 5, 42) x 3          expert, its first item, rows
```
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .compat import overlap, wait_previous

TABLE_PROGRAMS = 8
TILED_SCALES = 2048
"""Scales that one program of `tile_scales` copies."""

Tables = dict[int, Tensor]
"""`item_table`s of the same groups by `bm`, filled as they are needed."""


class Tiles(NamedTuple):
    """P rows sorted by expert, cut into items of `bm`."""

    table: Tensor
    """As `item_table` makes it."""
    columns: Tensor
    """[P] int32: where a row's scales lie among those of all items, `bm` to each; -1: no expert
    takes the row."""
    bm: int


def most_items(experts: int, num_rows: int, bm: int) -> int:
    """Into which so many rows can be cut."""
    return experts + num_rows // bm


def item_table(sizes: Tensor, rows: int, num_rows: int, bm: int) -> Tensor:
    """Cuts groups into items of `bm` rows.

    sizes: [E] offsets (`rows` is 0) or counts of slots of `rows`; num_rows: rows of all slots
    -> [1 + most items, 4] int32: (number of items, ...), then for each item (its expert, the
    expert's first item, first row, row behind the last). What is behind the items is not written.
    """
    experts = sizes.shape[0]
    table = torch.empty(
        1 + most_items(experts, num_rows, bm), 4, dtype=torch.int32, device=sizes.device
    )
    padded = triton.next_power_of_2(experts)
    item_table_kernel[(TABLE_PROGRAMS,)](
        sizes, table, experts, rows, BM=bm, PADDED=padded, **overlap(sizes)
    )
    return table


def shared_table(sizes: Tensor, rows: int, num_rows: int, bm: int, tables: Tables | None) -> Tensor:
    """`item_table`, or the one that was made for an earlier GEMM."""
    if tables is None:
        return item_table(sizes, rows, num_rows, bm)
    if bm not in tables:
        tables[bm] = item_table(sizes, rows, num_rows, bm)
    return tables[bm]


@triton.jit(do_not_specialize=["experts", "rows"], do_not_specialize_on_alignment=["sizes"])
def item_table_kernel(
    sizes, table, experts, rows, BM: tl.constexpr, PADDED: tl.constexpr, PDL: tl.constexpr
):
    """Every program counts; each writes the items of its own turn within an expert."""
    wait_previous(PDL)
    e = tl.arange(0, PADDED)
    live = e < experts
    size = tl.load(sizes + e, live, 0).to(tl.int32)
    if rows > 0:
        start = e * rows
        end = start + size
    else:
        start = tl.load(sizes + e - 1, live & (e > 0), 0).to(tl.int32)
        end = size
    items = tl.where(live, (end - start + BM - 1) // BM, 0)
    first = tl.cumsum(items, 0) - items
    if tl.program_id(0) == 0:
        tl.store(table, tl.sum(items))
    for i in range(tl.program_id(0), tl.max(items), tl.num_programs(0)):
        item = table + 4 + (first + i) * 4
        mine = i < items
        tl.store(item, e, mine)
        tl.store(item + 1, first, mine)
        tl.store(item + 2, start, mine)
        tl.store(item + 3, end, mine)


def tile_scales(x_scale: Tensor, table: Tensor, bm: int) -> Tensor:
    """Scales in the order of the table's items, `bm` to each, for TMA: groups begin at any row, but
    the inner coordinate of a TMA box must be a multiple of 16 bytes (an H100 answers others with
    "illegal instruction").

    x_scale: [M, G] float32, any layout -> [G, items * bm] float32; behind an item's last row:
    zeros; behind the last item: not written
    """
    groups, most = x_scale.shape[1], table.shape[0] - 1
    tiled = torch.empty(groups, most * bm, dtype=torch.float32, device=x_scale.device)
    block = min(triton.next_power_of_2(groups), TILED_SCALES // bm)
    tile_scales_kernel[(most, triton.cdiv(groups, block))](
        x_scale, x_scale.stride(0), x_scale.stride(1), table, tiled, most * bm, groups,
        BM=bm, GROUPS=block, **overlap(x_scale)
    )  # fmt: skip
    return tiled


@triton.jit(
    do_not_specialize=["row_stride", "group_stride", "tiled_stride", "groups"],
    do_not_specialize_on_alignment=["x_scale"],
)
def tile_scales_kernel(
    x_scale, row_stride, group_stride, table, tiled, tiled_stride, groups, BM: tl.constexpr,
    GROUPS: tl.constexpr, PDL: tl.constexpr
):  # fmt: skip
    """A program for each item that there may be, and for each GROUPS of its scales."""
    wait_previous(PDL)
    item = tl.program_id(0)
    if item >= tl.load(table):
        return
    first, start = tl.load(table + 4 + item * 4 + 1), tl.load(table + 4 + item * 4 + 2)
    end = tl.load(table + 4 + item * 4 + 3)
    at = tl.arange(0, BM)
    row = (start + (item - first) * BM + at).to(tl.int64)[None, :]
    group = (tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)).to(tl.int64)[:, None]
    inside = (row < end) & (group < groups)
    scale = tl.load(x_scale + row * row_stride + group * group_stride, inside, 0.0)
    to = tiled + group * tiled_stride + item * BM + at[None, :]
    tl.store(to, scale, group < groups)
