"""From router logits to rows sorted by expert, and back."""

import torch
import triton
import triton.language as tl
from torch import Tensor, float32

from . import reference
from .compat import runs_kernels

COMBINE_BLOCK = 1024
"""Columns that one program of `combine_experts` sums."""


def moe_gate(
    logits: Tensor,
    bias: Tensor,
    n_group: int,
    topk_group: int,
    top_k: int,
    norm_topk_prob: bool,
    routed_scaling_factor: float,
) -> tuple[Tensor, Tensor]:
    """Sigmoid gate with correction bias and group-limited top-k; ties go to the lowest index.

    logits: [T, E] float32, contiguous (GPU)
    bias: [E] float, added for the choice alone
    -> topk_ids [T, top_k] int64, best first, topk_weights [T, top_k] float32
    """
    assert logits.dtype == float32 and logits.shape[1] == bias.shape[0], (logits.shape, bias.shape)
    assert logits.shape[1] % n_group == 0 and topk_group <= n_group
    if not runs_kernels(logits):
        return reference.moe_gate(
            logits, bias, n_group, topk_group, top_k, norm_topk_prob, routed_scaling_factor
        )
    num_tokens, n_experts = logits.shape
    size = n_experts // n_group
    assert top_k <= topk_group * size, f"{top_k=} > {topk_group=} * {size=}"
    assert logits.is_contiguous() and bias.is_contiguous(), (logits.stride(), bias.stride())
    topk_ids = torch.empty(num_tokens, top_k, dtype=torch.int64, device=logits.device)
    topk_weights = torch.empty(num_tokens, top_k, dtype=float32, device=logits.device)
    _gate[(num_tokens,)](
        logits, bias, topk_ids, topk_weights, routed_scaling_factor, GROUPS=n_group,
        SIZE=size, KEPT=topk_group, TOP_K=top_k, NORM=norm_topk_prob,
        GROUPS_BLOCK=triton.next_power_of_2(n_group),
        SIZE_BLOCK=triton.next_power_of_2(size), TOP_K_BLOCK=triton.next_power_of_2(top_k),
        num_warps=1
    )  # fmt: skip
    return topk_ids, topk_weights


def permute_by_expert(topk_ids: Tensor, n_experts: int) -> tuple[Tensor, Tensor]:
    """Sorts (token, choice) pairs by expert, stably.

    topk_ids: [T, top_k] integer, contiguous (GPU), all < n_experts
    -> order [T * top_k] int64 into the flattened pairs, counts [n_experts] int64
    """
    assert topk_ids.dim() == 2, topk_ids.shape
    if not runs_kernels(topk_ids):
        return reference.permute_by_expert(topk_ids, n_experts)
    order, counts, _ = permute_both_ways(topk_ids, n_experts)
    return order, counts


def permute_both_ways(topk_ids: Tensor, n_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """`permute_by_expert`, and place [T * top_k] int64, where each pair went: order[place[i]] = i.

    `combine_experts` takes `place`, and need not find it again.
    """
    if not runs_kernels(topk_ids):
        order, counts = reference.permute_by_expert(topk_ids, n_experts)
        place = torch.empty_like(order)
        place[order] = torch.arange(len(order), device=order.device)
        return order, counts, place
    assert topk_ids.is_contiguous(), topk_ids.stride()
    num_pairs = topk_ids.numel()
    order = torch.empty(num_pairs, dtype=torch.int64, device=topk_ids.device)
    place = torch.empty_like(order)
    counts = torch.empty(n_experts, dtype=torch.int64, device=topk_ids.device)
    block, warps = permute_tile(num_pairs)
    _permute[(n_experts,)](topk_ids, order, counts, place, num_pairs, BLOCK=block, num_warps=warps)
    return order, counts, place


def permute_tile(num_pairs: int) -> tuple[int, int]:
    """Pairs that a program looks at at once, and its warps."""
    return (1024, 4) if num_pairs <= 4096 else (4096, 8)


def combine_experts(
    y: Tensor,
    order: Tensor,
    topk_weights: Tensor,
    place: Tensor | None = None,
    shared: Tensor | None = None,
) -> Tensor:
    """Undoes `permute_by_expert` and sums each token's experts by weight, in the order of choice.

    y: [T * top_k, N] in expert order, rows of unit stride
    order: [T * top_k] int64; topk_weights: [T, top_k] float32, contiguous
    place: order's inverse, where the caller has it
    shared: [T, N] in y's dtype, contiguous, added to the rounded sum, or None
    -> [T, N] in y's dtype
    """
    assert y.shape[0] == order.shape[0] == topk_weights.numel(), (y.shape, topk_weights.shape)
    if not runs_kernels(y):
        routed = reference.combine_experts(y, order, topk_weights)
        return routed if shared is None else routed + shared
    assert y.stride(1) == 1 and topk_weights.is_contiguous(), (y.stride(), topk_weights.stride())
    assert topk_weights.dtype == float32, topk_weights.dtype
    num_tokens, top_k = topk_weights.shape
    width = y.shape[1]
    if shared is not None:
        assert shared.shape == (num_tokens, width) and shared.dtype == y.dtype, shared.shape
        assert shared.is_contiguous(), shared.stride()
    if place is None:
        place = torch.empty_like(order)
        _invert[(triton.cdiv(len(order), 1024),)](order, place, len(order), BLOCK=1024)
    out = torch.empty(num_tokens, width, dtype=y.dtype, device=y.device)
    grid = (num_tokens, triton.cdiv(width, COMBINE_BLOCK))
    _combine[grid](
        y, place, topk_weights, shared, out, y.stride(0), WIDTH=width, TOP_K=top_k,
        BLOCK=COMBINE_BLOCK
    )  # fmt: skip
    return out


@triton.jit
def _kept(choice, index, GROUPS: tl.constexpr, SIZE: tl.constexpr, KEPT: tl.constexpr):
    """Which groups of choice [groups, experts] are among the KEPT best by the sum of their two
    best, counting the groups that are better. index: [1, experts]."""
    best, where = tl.max(choice, 1, return_indices=True)
    score = best
    if SIZE > 1:
        score += tl.max(tl.where(index == where[:, None], float("-inf"), choice), 1)
    group = tl.arange(0, choice.shape[0])
    equal_and_first = (score[None, :] == score[:, None]) & (group[None, :] < group[:, None])
    better = (score[None, :] > score[:, None]) | equal_and_first
    return (tl.sum(better.to(tl.int32), 1) < KEPT) & (group < GROUPS)


@triton.jit
def _best(choice, GROUPS_BLOCK: tl.constexpr):
    """The group of the best element, and its index there; the first of equals."""
    best, index = tl.max(choice, 1, return_indices=True)
    _, group = tl.max(best, 0, return_indices=True)
    mine = tl.arange(0, GROUPS_BLOCK) == group
    return group, tl.sum(tl.where(mine, index, 0), 0)


@triton.jit
def _gate(
    logits, bias, topk_ids, topk_weights, factor, GROUPS: tl.constexpr, SIZE: tl.constexpr,
    KEPT: tl.constexpr, TOP_K: tl.constexpr, NORM: tl.constexpr, GROUPS_BLOCK: tl.constexpr,
    SIZE_BLOCK: tl.constexpr, TOP_K_BLOCK: tl.constexpr
):  # fmt: skip
    """One token: TOP_K rounds of argmax over [groups, experts of a group]."""
    token = tl.program_id(0).to(tl.int64)
    group = tl.arange(0, GROUPS_BLOCK)[:, None]
    index = tl.arange(0, SIZE_BLOCK)[None, :]
    expert = group * SIZE + index
    real = (group < GROUPS) & (index < SIZE)
    logit = tl.load(logits + token * (GROUPS * SIZE) + expert, real, 0.0)
    score = tl.sigmoid(logit)
    choice = score + tl.load(bias + expert, real, 0.0).to(tl.float32)
    # A NaN or -inf is a choice like others, or padding might win over it.
    choice = tl.where(choice > -3.0e38, choice, -3.0e38)
    choice = tl.where(real, choice, float("-inf"))
    if GROUPS > 1:
        kept = _kept(choice, index, GROUPS, SIZE, KEPT)
        choice = tl.where(kept[:, None], choice, float("-inf"))
    rank = tl.arange(0, TOP_K_BLOCK)
    ids = tl.zeros((TOP_K_BLOCK,), tl.int32)
    weights = tl.zeros((TOP_K_BLOCK,), tl.float32)
    for k in tl.static_range(TOP_K):
        best_group, best_index = _best(choice, GROUPS_BLOCK)
        hit = (group == best_group) & (index == best_index)
        weight = tl.sum(tl.sum(tl.where(hit, score, 0.0), 1), 0)
        ids = tl.where(rank == k, best_group * SIZE + best_index, ids)
        weights = tl.where(rank == k, weight, weights)
        choice = tl.where(hit, float("-inf"), choice)
    if NORM:
        weights = tl.div_rn(weights, tl.sum(weights, 0) + 1e-20)
    at = token * TOP_K + rank
    tl.store(topk_ids + at, ids.to(tl.int64), rank < TOP_K)
    tl.store(topk_weights + at, weights * factor, rank < TOP_K)


@triton.jit(do_not_specialize=["num_pairs"])
def _permute(topk_ids, order, counts, place, num_pairs, BLOCK: tl.constexpr):
    """One expert: counts the pairs of lower experts and its own, then lists its own in order. No
    program waits for another, so the result is the same every time."""
    expert = tl.program_id(0)
    lane = tl.arange(0, BLOCK)
    lower = tl.zeros((BLOCK,), tl.int32)
    own = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, num_pairs, BLOCK):
        pair = start + lane
        chosen = tl.load(topk_ids + pair, pair < num_pairs, 0x7FFFFFFF).to(tl.int32)
        lower += (chosen < expert).to(tl.int32)
        own += (chosen == expert).to(tl.int32)
    next_place = tl.sum(lower, 0)
    tl.store(counts + expert, tl.sum(own, 0).to(tl.int64))
    for start in range(0, num_pairs, BLOCK):
        pair = start + lane
        chosen = tl.load(topk_ids + pair, pair < num_pairs, 0x7FFFFFFF).to(tl.int32)
        mine = chosen == expert
        before = tl.cumsum(mine.to(tl.int32), 0)
        at = next_place + before - 1
        tl.store(order + at, pair.to(tl.int64), mine)
        tl.store(place + pair, at.to(tl.int64), mine)
        next_place += tl.sum(mine.to(tl.int32), 0)


@triton.jit(do_not_specialize=["length"])
def _invert(order, place, length, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    target = tl.load(order + at, at < length, 0)
    tl.store(place + target, at.to(tl.int64), at < length)


@triton.jit
def _combine(
    y, place, topk_weights, shared, out, y_stride, WIDTH: tl.constexpr, TOP_K: tl.constexpr,
    BLOCK: tl.constexpr
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = at < WIDTH
    total = tl.zeros((BLOCK,), tl.float32)
    for k in tl.static_range(TOP_K):
        row = tl.load(place + token * TOP_K + k)
        weight = tl.load(topk_weights + token * TOP_K + k)
        total += tl.load(y + row * y_stride + at, mask, 0.0).to(tl.float32) * weight
    value = total.to(out.dtype.element_ty)
    if shared is not None:
        added = tl.load(shared + token * WIDTH + at, mask, 0.0).to(tl.float32)
        value = (value.to(tl.float32) + added).to(out.dtype.element_ty)
    tl.store(out + token * WIDTH + at, value, mask)
