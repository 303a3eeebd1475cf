"""Split-KV decode: cuts the batch's sequences into items of even work, on the device, and joins
what the items of one sequence found.

```
seq_lens    | 700      | 90 | 5000                                   |
items         [0, 700)   ..   [0, 1250) [1250, 2500) [2500, 3750) ...
written to    out        out  partial, lse: slot 0   slot 1   slot 2     -> combine -> out
```

The number of items is fixed by shapes alone, so that a CUDA graph can be replayed with any
lengths; items that a batch does not need are empty and end at once.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .compat import num_sms

EMPTY = -2
"""`slot` of an item without work."""
DIRECT = -1
"""`slot` of an item that is its whole sequence and writes the result itself."""
MIN_TOKENS = 128
"""Of an item, where its sequence has that many."""
OVERHEAD_TOKENS = tl.constexpr(320)
"""What starting and ending an item costs, in tokens; FlashMLA takes the same five blocks."""
COMBINE_TOKENS = tl.constexpr(192)
SPLIT_TOKENS = tl.constexpr(8)
"""What a combine costs, and each split of the longest sequence in it."""
CANDIDATES = 128
"""Numbers of splits of the longest sequence that are compared: 1 ... CANDIDATES."""


@dataclass(frozen=True)
class Tiling:
    """How a decode kernel cuts its work. `rows` are query_len * heads of one sequence."""

    kernel: str
    row_tile: int
    """Rows of a CTA."""
    ctas_per_sm: int
    unit: int
    """Items begin at multiples of this many tokens."""


@dataclass(frozen=True)
class Schedule:
    items: Tensor
    """[num_items, 4] int32: sequence, first token, last token + 1, slot (or EMPTY or DIRECT)."""
    splits: Tensor
    """[B, 2] int32: first slot, number of slots (0: the result is in `out` already)."""
    tiling: Tiling

    @property
    def may_split(self) -> bool:
        return self.items.shape[0] > self.splits.shape[0]


@triton.jit
def _most(seq_lens, batch, chunk, UNIT: tl.constexpr, TILE: tl.constexpr):
    """Items of the batch for each candidate chunk [C], in units."""
    count = tl.zeros_like(chunk)
    for first in range(0, batch, TILE):
        i = first + tl.arange(0, TILE)
        units = tl.cdiv(tl.load(seq_lens + i, mask=i < batch, other=0), UNIT)
        pieces = tl.maximum(tl.cdiv(units[None, :], chunk[:, None]), 1)
        count += tl.sum(tl.where((i < batch)[None, :], pieces, 0), 1)
    return count


@triton.jit
def _choose_chunk(
    seq_lens, batch, total, longest, num_items, num_parts,
    UNIT: tl.constexpr, MIN_UNITS: tl.constexpr, CANDIDATES: tl.constexpr
):  # fmt: skip
    """The piece length, in units, with the smallest estimate of what the batch takes.

    Two upper bounds of the time that `num_parts` CTAs need for items of at most `chunk`: waves of
    equal items; and the bound of list scheduling, sum / parts + longest item.
    """
    splits = 1 + tl.arange(0, CANDIDATES)
    chunk = tl.maximum(tl.cdiv(longest, splits), MIN_UNITS)
    count = _most(seq_lens, batch, chunk, UNIT, 32)
    item = (chunk * UNIT + OVERHEAD_TOKENS).to(tl.float32)
    waves = tl.cdiv(count, num_parts).to(tl.float32) * item
    listed = (total * UNIT + count * OVERHEAD_TOKENS).to(tl.float32) / num_parts + item
    pieces = tl.cdiv(longest, chunk)
    joined = tl.where(pieces > 1, COMBINE_TOKENS + SPLIT_TOKENS * pieces, 0).to(tl.float32)
    cost = tl.where(count <= num_items, tl.minimum(waves, listed) + joined, float("inf"))
    best = tl.argmin(cost, 0)
    return tl.sum(tl.where(splits == best + 1, chunk, 0))


@triton.jit(
    do_not_specialize=["batch", "num_items", "num_parts"],
    do_not_specialize_on_alignment=["seq_lens", "items", "splits"],
)
def schedule_kernel(
    seq_lens, items, splits, batch, num_items, num_parts,
    UNIT: tl.constexpr, MIN_UNITS: tl.constexpr, CANDIDATES: tl.constexpr, BATCH: tl.constexpr
):  # fmt: skip
    """One CTA. seq_lens: [batch] int32 -> items, splits as in `Schedule`."""
    i = tl.arange(0, BATCH)
    live = i < batch
    seq_len = tl.load(seq_lens + i, mask=live, other=0)
    units = tl.cdiv(seq_len, UNIT)
    longest, total = tl.maximum(tl.max(units, 0), 1), tl.sum(units, 0)
    chunk = _choose_chunk(
        seq_lens, batch, total, longest, num_items, num_parts, UNIT, MIN_UNITS, CANDIDATES
    )
    pieces = tl.where(live, tl.maximum(tl.cdiv(units, chunk), 1), 0)
    start = tl.cumsum(pieces, 0) - pieces
    slots = tl.where(pieces > 1, pieces, 0)
    slot = tl.cumsum(slots, 0) - slots
    tl.store(splits + 2 * i, slot, mask=live)
    tl.store(splits + 2 * i + 1, slots, mask=live)
    for piece in range(tl.max(pieces, 0)):
        row = items + 4 * (start + piece)
        has = piece < pieces
        safe = tl.maximum(pieces, 1)
        tl.store(row, i, mask=has)
        tl.store(row + 1, piece * units // safe * UNIT, mask=has)
        end = tl.minimum((piece + 1) * units // safe * UNIT, seq_len)
        tl.store(row + 2, end, mask=has)
        tl.store(row + 3, tl.where(pieces > 1, slot + piece, -1), mask=has)
    for first in range(tl.sum(pieces, 0), num_items, BATCH):
        rest = first + i
        for column in tl.static_range(3):
            tl.store(items + 4 * rest + column, tl.zeros_like(rest), mask=rest < num_items)
        tl.store(items + 4 * rest + 3, tl.zeros_like(rest) - 2, mask=rest < num_items)


def make_schedule(seq_lens: Tensor, rows: int, max_len: int, tiling: Tiling) -> Schedule:
    """seq_lens: [B] int32, none above max_len (else the items are right, but may be uneven).
    Depends on shapes and on the device's number of SMs only, lengths are read on the device."""
    assert seq_lens.dtype == torch.int32 and seq_lens.is_contiguous(), seq_lens.dtype
    assert tiling.unit <= MIN_TOKENS and MIN_TOKENS % tiling.unit == 0, tiling
    batch = seq_lens.shape[0]
    assert 0 < batch <= 4096, batch
    parts = max(1, num_sms(seq_lens) * tiling.ctas_per_sm // triton.cdiv(rows, tiling.row_tile))
    num_items = batch + (parts if max_len > MIN_TOKENS else 0)
    items = torch.empty(num_items, 4, dtype=torch.int32, device=seq_lens.device)
    splits = torch.empty(batch, 2, dtype=torch.int32, device=seq_lens.device)
    schedule_kernel[(1,)](
        seq_lens, items, splits, batch, num_items, parts,
        UNIT=tiling.unit, MIN_UNITS=MIN_TOKENS // tiling.unit,
        CANDIDATES=CANDIDATES,
        BATCH=max(64, triton.next_power_of_2(batch)), num_warps=8,
    )  # fmt: skip
    return Schedule(items, splits, tiling)


@triton.jit(do_not_specialize=["rows"], do_not_specialize_on_alignment=["splits"])
def combine_kernel(
    partial, lse, splits, out, rows, R: tl.constexpr,
    HB: tl.constexpr, SB: tl.constexpr, RP: tl.constexpr, PDL: tl.constexpr
):  # fmt: skip
    """partial: [slots, rows, R] float32, lse: [slots, rows] float32, base 2, -inf where an item saw
    no key -> out: [B, rows, R]; rows of sequences with no slots are left alone.
    grid: (B, rows / HB)."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    b = tl.program_id(0)
    first = tl.load(splits + 2 * b)
    count = tl.load(splits + 2 * b + 1)
    row = tl.program_id(1) * HB + tl.arange(0, HB)
    d = tl.arange(0, RP)
    m = tl.full((HB,), -1.0e30, tl.float32)
    norm = tl.zeros((HB,), tl.float32)
    acc = tl.zeros((HB, RP), tl.float32)
    for start in range(0, count, SB):
        part = start + tl.arange(0, SB)
        at = (first + part).to(tl.int64)[:, None] * rows + row[None, :]
        live = (part < count)[:, None] & (row < rows)[None, :]
        x = tl.load(lse + at, mask=live, other=float("-inf"))
        top = tl.maximum(m, tl.max(x, 0))
        weight = tl.exp2(x - top[None, :])
        keep = tl.exp2(m - top)
        inside = live[:, :, None] & (d < R)[None, None, :]
        o = tl.load(partial + at[:, :, None] * R + d[None, None, :], mask=inside, other=0.0)
        acc = acc * keep[:, None] + tl.sum(o * weight[:, :, None], 0)
        norm = norm * keep + tl.sum(weight, 0)
        m = top
    if count > 0:
        acc = acc / tl.where(norm > 0, norm, 1.0)[:, None]
        at = (b * rows + row).to(tl.int64)[:, None] * R + d[None, :]
        inside = (row < rows)[:, None] & (d < R)[None, :]
        tl.store(out + at, acc.to(out.dtype.element_ty), mask=inside)


def combine(schedule: Schedule, partial: Tensor, lse: Tensor, out: Tensor) -> None:
    """partial: [slots, rows, R] float32, lse: [slots, rows] float32, out: [B, rows, R]. Launched so
    that it starts under the tail of the kernel before it, where the device can do that."""
    batch, rows, rank = out.shape
    assert partial.is_contiguous() and lse.is_contiguous() and out.is_contiguous()
    hb, sb, warps = (4, 4, 4)
    if batch * rows <= 4096:
        # Few slots a sequence can have, or many.
        hb, sb, warps = (1, 4, 2) if schedule.items.shape[0] < 8 * batch else (1, 8, 4)
    pdl = out.is_cuda and torch.cuda.get_device_capability(out.device) >= (9, 0)
    combine_kernel[(batch, triton.cdiv(rows, hb))](
        partial, lse, schedule.splits, out, rows, R=rank, HB=hb, SB=sb,
        RP=max(16, triton.next_power_of_2(rank)), PDL=pdl, num_warps=warps,
        **({"launch_pdl": True} if pdl else {}),
    )  # fmt: skip
