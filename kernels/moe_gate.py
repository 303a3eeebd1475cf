"""The experts of tokens: the gate's linear map, and the choice by its logits.

For few tokens the map is cut into pieces of K, a block of threads each, whose part of the weight is
under way before the kernel ahead has ended. The choice adds the pieces up, so nobody waits.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor, bfloat16, float32

from . import gemm, reference
from .compat import overlap, prefetch_l2, runs_kernels, wait_previous

MAX_TOKENS = 64
"""With more, or operands other than bf16, the library multiplies."""
COLUMNS, PIECE = 32, 512
"""Experts and part of K of a block of threads: 112 of 32 KiB each for DeepSeek-V3's weight."""
ROWS = 32
"""Tokens of a block of threads, at most."""


def gate_logits(x: Tensor, weight: Tensor) -> Tensor:
    """What `moe_gate` takes: float32 whatever x is, as published.

    x: [T, K] float; weight: [E, K] in x's dtype, contiguous, constant (see `wait_previous`)
    -> x @ weight^T [T, E] float32, or `partial_logits`
    """
    if runs_kernels(x) and len(x) <= MAX_TOKENS and x.dtype == weight.dtype == bfloat16:
        return partial_logits(x, weight)
    return gemm.linear_float32(x, weight)


def partial_logits(x: Tensor, weight: Tensor) -> Tensor:
    """x: [T, K] bf16, rows of unit stride, weight: [E, K] bf16, contiguous; runs as a kernel only
    -> [T, S, E] float32, whose sum over S pieces of K is x @ weight^T"""
    num_tokens, k = x.shape
    n_experts = weight.shape[0]
    assert x.dtype == weight.dtype == bfloat16 and weight.shape[1] == k, (x.shape, weight.shape)
    assert x.stride(1) == 1 and weight.is_contiguous(), (x.stride(), weight.stride())
    tokens = 16 if num_tokens <= 16 else ROWS
    grid = (triton.cdiv(n_experts, COLUMNS), triton.cdiv(k, PIECE), triton.cdiv(num_tokens, tokens))
    out = torch.empty(num_tokens, grid[1], n_experts, dtype=float32, device=x.device)
    _partial_logits[grid](
        x, weight, out, num_tokens, x.stride(0), EXPERTS=n_experts, K=k, TOKENS=tokens,
        COLUMNS=COLUMNS, PIECE=PIECE, num_warps=8, **overlap(x)
    )  # fmt: skip
    return out


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

    logits: [T, E] float32, contiguous (GPU); or [T, S, E], of which a token's S are added in order
    bias: [E] float, added for the choice alone; constant (see `wait_previous`)
    -> topk_ids [T, top_k] int64, best first, topk_weights [T, top_k] float32
    """
    assert logits.dtype == float32 and logits.shape[-1:] == bias.shape, (logits.shape, bias.shape)
    assert bias.shape[0] % n_group == 0 and topk_group <= n_group
    if not runs_kernels(logits):
        logits = logits if logits.dim() == 2 else logits.sum(1)
        return reference.moe_gate(
            logits, bias, n_group, topk_group, top_k, norm_topk_prob, routed_scaling_factor
        )
    num_tokens, size = logits.shape[0], bias.shape[0] // n_group
    assert top_k <= topk_group * size, f"{top_k=} > {topk_group=} * {size=}"
    assert logits.is_contiguous() and bias.is_contiguous(), (logits.stride(), bias.stride())
    topk_ids = torch.empty(num_tokens, top_k, dtype=torch.int64, device=logits.device)
    topk_weights = torch.empty(num_tokens, top_k, dtype=float32, device=logits.device)
    _gate[(num_tokens,)](
        logits, bias, topk_ids, topk_weights, routed_scaling_factor, GROUPS=n_group,
        PIECES=1 if logits.dim() == 2 else logits.shape[1], SIZE=size, KEPT=topk_group,
        TOP_K=top_k, NORM=norm_topk_prob,
        GROUPS_BLOCK=triton.next_power_of_2(n_group),
        SIZE_BLOCK=triton.next_power_of_2(size), TOP_K_BLOCK=triton.next_power_of_2(top_k),
        num_warps=1, **overlap(logits)
    )  # fmt: skip
    return topk_ids, topk_weights


@triton.jit(do_not_specialize=["num_tokens"])
def _partial_logits(
    x, weight, out, num_tokens, x_stride, EXPERTS: tl.constexpr, K: tl.constexpr,
    TOKENS: tl.constexpr, COLUMNS: tl.constexpr, PIECE: tl.constexpr, PDL: tl.constexpr
):  # fmt: skip
    """Grid: (tiles of experts, pieces of K, tiles of tokens)."""
    expert = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    k = tl.program_id(1) * PIECE + tl.arange(0, PIECE)
    known = (expert < EXPERTS) & (k[:, None] < K)
    if PDL and K % 64 == 0:  # all lines of 128 bytes at once: the loads below take turns
        line = tl.program_id(1) * PIECE + tl.arange(0, PIECE // 64)[:, None] * 64
        line = tl.where((expert < EXPERTS) & (line < K), weight + expert * K + line, weight)
        prefetch_l2(line.to(tl.int64, bitcast=True))
    part = tl.load(weight + expert * K + k[:, None], known, 0.0)
    wait_previous(PDL)
    token = (tl.program_id(2) * TOKENS + tl.arange(0, TOKENS)).to(tl.int64)[:, None]
    live = token < num_tokens
    value = tl.load(x + token * x_stride + k[None, :], live & (k[None, :] < K), 0.0)
    logits = tl.dot(value, part)
    at = (token * tl.num_programs(1) + tl.program_id(1)) * EXPERTS + expert
    tl.store(out + at, logits, live & (expert < EXPERTS))


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
    logits, bias, topk_ids, topk_weights, factor, GROUPS: tl.constexpr, PIECES: tl.constexpr,
    SIZE: tl.constexpr, KEPT: tl.constexpr, TOP_K: tl.constexpr, NORM: tl.constexpr,
    GROUPS_BLOCK: tl.constexpr, SIZE_BLOCK: tl.constexpr, TOP_K_BLOCK: tl.constexpr,
    PDL: tl.constexpr
):  # fmt: skip
    """One token: TOP_K rounds of argmax over [groups, experts of a group]."""
    token = tl.program_id(0).to(tl.int64)
    group = tl.arange(0, GROUPS_BLOCK)[:, None]
    index = tl.arange(0, SIZE_BLOCK)[None, :]
    expert = group * SIZE + index
    real = (group < GROUPS) & (index < SIZE)
    correction = tl.load(bias + expert, real, 0.0).to(tl.float32)
    wait_previous(PDL)
    logits += token * (PIECES * GROUPS * SIZE)
    logit = tl.load(logits + expert, real, 0.0)
    for piece in tl.static_range(1, PIECES):
        logit += tl.load(logits + piece * (GROUPS * SIZE) + expert, real, 0.0)
    score = tl.sigmoid(logit)
    choice = score + correction
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
