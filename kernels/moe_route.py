"""From the experts that tokens chose to rows sorted by expert, and back."""

import torch
import triton
import triton.language as tl
from torch import Tensor, float32

from . import reference
from .compat import overlap, runs_kernels, wait_previous
from .quant import empty_scale

COMBINE_BLOCK = 1024
"""Columns that one program of `combine_experts` sums."""
GATHER_BLOCK = 4096
"""Columns that one program of `gather_rows` copies."""


def permute_by_expert(
    topk_ids: Tensor, n_experts: int, first_expert: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """Sorts (token, choice) pairs by expert, stably; of n_experts from first_expert on, others are
    left out.

    topk_ids: [T, top_k] integer, contiguous (GPU)
    -> order [T * top_k] int64: the flattened pairs, sorted; behind the last offset: anything
       offsets [n_experts] int64: the place behind each expert's last pair
       place [T * top_k] int64: where each pair went, order[place[i]] = i; -1: left out
    """
    assert topk_ids.dim() == 2, topk_ids.shape
    if not runs_kernels(topk_ids):
        return reference.permute_by_expert(topk_ids, n_experts, first_expert)
    assert topk_ids.is_contiguous(), topk_ids.stride()
    num_pairs = topk_ids.numel()
    order = torch.empty(num_pairs, dtype=torch.int64, device=topk_ids.device)
    place = torch.empty_like(order)
    offsets = torch.empty(n_experts, dtype=torch.int64, device=topk_ids.device)
    block, warps = permute_tile(num_pairs)
    _permute[(n_experts,)](
        topk_ids, order, offsets, place, num_pairs, first_expert, BLOCK=block, num_warps=warps,
        **overlap(topk_ids)
    )  # fmt: skip
    return order, offsets, place


def gather_rows(x: Tensor, order: Tensor, offsets: Tensor, top_k: int) -> Tensor:
    """x: [T, N], rows of unit stride; order, offsets: of `permute_by_expert` -> the rows of its
    pairs [T * top_k, N]; what is behind the last offset is not written."""
    if not runs_kernels(x):
        return x[order // top_k]
    return _launch_gather(x, None, order, offsets, top_k, False)[0]


def gather_quantized(
    q: Tensor,
    scale: Tensor,
    order: Tensor,
    offsets: Tensor,
    top_k: int,
    scale_k_major: bool = False,
) -> tuple[Tensor, Tensor]:
    """`gather_rows` of rows quantised 1x128 and of their scales, which any layout may have.

    q: [T, N] float8_e4m3fn, scale: [T, ceil(N/128)] float32 -> the same of [T * top_k] rows
    """
    assert scale.shape == (q.shape[0], -(-q.shape[1] // reference.BLOCK)), (q.shape, scale.shape)
    if not runs_kernels(q):
        token = order // top_k
        return q.view(torch.uint8)[token].view(q.dtype), scale[token]
    rows, scales = _launch_gather(q.view(torch.uint8), scale, order, offsets, top_k, scale_k_major)
    assert scales is not None
    return rows.view(q.dtype), scales


def _launch_gather(
    x: Tensor, scale: Tensor | None, order: Tensor, offsets: Tensor, top_k: int, k_major: bool
) -> tuple[Tensor, Tensor | None]:
    assert x.dim() == 2 and x.stride(1) == 1 and order.is_contiguous(), (x.shape, x.stride())
    width, groups = x.shape[1], -(-x.shape[1] // reference.BLOCK)
    rows = torch.empty(len(order), width, dtype=x.dtype, device=x.device)
    scales = None if scale is None else empty_scale(rows, width, k_major)
    strides = (0, 0, 0, 0)
    if scale is not None and scales is not None:
        strides = (*scale.stride(), *scales.stride())
    if len(order):
        _gather[(len(order), triton.cdiv(width, GATHER_BLOCK))](
            x, scale, order, offsets, rows, scales, len(offsets), x.stride(0), *strides,
            WIDTH=width, GROUPS=groups, GROUPS_BLOCK=triton.next_power_of_2(groups),
            TOP_K=top_k, BLOCK=GATHER_BLOCK, **overlap(x)
        )  # fmt: skip
    return rows, scales


def permute_tile(num_pairs: int) -> tuple[int, int]:
    """Pairs that a program looks at at once, and its warps."""
    return (1024, 4) if num_pairs <= 4096 else (4096, 8)


def combine_experts(
    y: Tensor, place: Tensor, topk_weights: Tensor, shared: Tensor | None = None
) -> Tensor:
    """Undoes `permute_by_expert` and sums each token's experts by weight, in the order of choice.

    y: [T * top_k, N] in expert order, rows of unit stride
    place: [T * top_k] int64 of `permute_by_expert`; -1: the pair counts nothing
    topk_weights: [T, top_k] float32, contiguous
    shared: [T, N] in y's dtype, contiguous, added to the rounded sum, or None
    -> [T, N] in y's dtype
    """
    assert y.shape[0] == place.shape[0] == topk_weights.numel(), (y.shape, topk_weights.shape)
    if not runs_kernels(y):
        routed = reference.combine_experts(y, place, topk_weights)
        return routed if shared is None else routed + shared
    assert y.stride(1) == 1 and topk_weights.is_contiguous(), (y.stride(), topk_weights.stride())
    assert topk_weights.dtype == float32, topk_weights.dtype
    num_tokens, top_k = topk_weights.shape
    width = y.shape[1]
    if shared is not None:
        assert shared.shape == (num_tokens, width) and shared.dtype == y.dtype, shared.shape
        assert shared.is_contiguous(), shared.stride()
    out = torch.empty(num_tokens, width, dtype=y.dtype, device=y.device)
    grid = (num_tokens, triton.cdiv(width, COMBINE_BLOCK))
    _combine[grid](
        y, place, topk_weights, shared, out, y.stride(0), WIDTH=width, TOP_K=top_k,
        BLOCK=COMBINE_BLOCK, **overlap(y)
    )  # fmt: skip
    return out


@triton.jit(do_not_specialize=["num_pairs", "first_expert"])
def _permute(
    topk_ids, order, offsets, place, num_pairs, first_expert, BLOCK: tl.constexpr,
    PDL: tl.constexpr
):  # fmt: skip
    """One expert: counts the pairs of lower experts and its own, then lists its own in order. No
    program waits for another, so the result is the same every time."""
    wait_previous(PDL)
    expert = tl.program_id(0)
    lane = tl.arange(0, BLOCK)
    lower = tl.zeros((BLOCK,), tl.int32)
    own = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, num_pairs, BLOCK):
        pair = start + lane
        chosen = tl.load(topk_ids + pair, pair < num_pairs, 0x7FFFFFFF).to(tl.int32) - first_expert
        lower += ((chosen >= 0) & (chosen < expert)).to(tl.int32)
        own += (chosen == expert).to(tl.int32)
    next_place = tl.sum(lower, 0)
    tl.store(offsets + expert, (next_place + tl.sum(own, 0)).to(tl.int64))
    for start in range(0, num_pairs, BLOCK):
        pair = start + lane
        chosen = tl.load(topk_ids + pair, pair < num_pairs, 0x7FFFFFFF).to(tl.int32) - first_expert
        if expert == 0:
            absent = (chosen < 0) | (chosen >= tl.num_programs(0))
            tl.store(place + pair, tl.full((BLOCK,), -1, tl.int64), absent & (pair < num_pairs))
        mine = chosen == expert
        before = tl.cumsum(mine.to(tl.int32), 0)
        at = next_place + before - 1
        tl.store(order + at, pair.to(tl.int64), mine)
        tl.store(place + pair, at.to(tl.int64), mine)
        next_place += tl.sum(mine.to(tl.int32), 0)


@triton.jit
def _combine(
    y, place, topk_weights, shared, out, y_stride, WIDTH: tl.constexpr, TOP_K: tl.constexpr,
    BLOCK: tl.constexpr, PDL: tl.constexpr
):  # fmt: skip
    wait_previous(PDL)
    token = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = at < WIDTH
    total = tl.zeros((BLOCK,), tl.float32)
    for k in tl.static_range(TOP_K):
        row = tl.load(place + token * TOP_K + k)
        weight = tl.load(topk_weights + token * TOP_K + k)
        total += tl.load(y + row * y_stride + at, mask & (row >= 0), 0.0).to(tl.float32) * weight
    value = total.to(out.dtype.element_ty)
    if shared is not None:
        added = tl.load(shared + token * WIDTH + at, mask, 0.0).to(tl.float32)
        value = (value.to(tl.float32) + added).to(out.dtype.element_ty)
    tl.store(out + token * WIDTH + at, value, mask)


@triton.jit(
    do_not_specialize=[
        "n_experts", "scale_token", "scale_group", "scales_token", "scales_group"
    ]
)  # fmt: skip
def _gather(
    x, scale, order, offsets, rows, scales, n_experts, x_stride, scale_token, scale_group,
    scales_token, scales_group, WIDTH: tl.constexpr, GROUPS: tl.constexpr,
    GROUPS_BLOCK: tl.constexpr, TOP_K: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr
):  # fmt: skip
    wait_previous(PDL)
    pair = tl.program_id(0).to(tl.int64)
    if pair >= tl.load(offsets + n_experts - 1):
        return
    token = tl.load(order + pair) // TOP_K
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + token * x_stride + at, at < WIDTH)
    tl.store(rows + pair * WIDTH + at, value, at < WIDTH)
    if scale is not None and tl.program_id(1) == 0:
        group = tl.arange(0, GROUPS_BLOCK)
        live = group < GROUPS
        found = tl.load(scale + token * scale_token + group * scale_group, live)
        tl.store(scales + pair * scales_token + group * scales_group, found, live)
