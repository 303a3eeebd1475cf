"""From logits to tokens: two launches a step, whatever its rows ask for.

The first cuts each row into parts, so that few rows fill the card, and finds the winner of each:
the best of logits + noise. The second joins a row's parts, and where the row has top-k, top-p or
min-p looks again (`sample_filter`). Nothing here waits for the device: all may be captured in a
CUDA graph. What draws a token is the noise field of `reference_sample.gumbel_noise`, so the same
token comes out whatever the batch.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor, float32, int32, int64

from . import reference_sample as reference
from .compat import runs_kernels
from .sample_filter import BLOCK, LIST, MAX_VOCAB, draw_filtered
from .sample_row import (
    _LOG2_E,
    _NO_TOKEN,
    adjusted,
    adjustments,
    gumbel,
    load_logits,
    options,
    tokens_from,
)
from .sample_state import IN_PROMPT, SamplingState, count_tokens

__all__ = [
    "IN_PROMPT",
    "SamplingState",
    "count_tokens",
    "logsumexp",
    "merge_shards",
    "merge_sumexp",
    "sample_and_append",
    "sample_rows",
    "shard_best",
    "shard_sumexp",
    "top_logprobs",
]

PART = 2048
"""Tokens of one row that one program looks at; a multiple of 4 (a Philox block), at most BLOCK."""
PART_WARPS, ROW_WARPS = 4, 8
PART_REGISTERS, ROW_REGISTERS = 64, 128
"""Of a thread: so few that enough programs are on an SM to wait for memory together."""


def sample_rows(logits: Tensor, rows: Tensor, state: SamplingState) -> Tensor:
    """Chooses a token for each line: penalties, bias, masks; then, at a temperature, top-k, top-p,
    min-p and the noise; then the best, of equals the first.

    logits: [S, V] bf16 or float32, rows of unit stride; or [shards, S, V / shards], contiguous, as
    an all-gather over a sharded vocabulary delivers it. Left alone. NaN counts as -inf
    rows: [S] int32 or int64, the row in `state` of each line
    -> [S] int64
    """
    return _sample(logits, rows, state, None)


def sample_and_append(
    logits: Tensor, rows: Tensor, state: SamplingState, token_ids: Tensor
) -> Tensor:
    """`sample_rows`, and the token goes to where the next step reads it: into
    token_ids[row, num_tokens[row]] and, if the row has penalties, counts[row]; num_tokens[row]
    grows by 1. A full row stays full, and nothing is written. The rows of a step differ, but for
    one that stands for padding: whatever is in it is left undefined.

    token_ids: [R, L] int32, rows of unit stride
    """
    assert token_ids.dtype == int32 and token_ids.dim() == 2, (token_ids.dtype, token_ids.shape)
    assert token_ids.stride(1) == 1 and len(token_ids) == len(state.seed), token_ids.shape
    return _sample(logits, rows, state, token_ids)


def _sample(logits: Tensor, rows: Tensor, state: SamplingState, token_ids: Tensor | None) -> Tensor:
    assert logits.dtype in (torch.bfloat16, float32), logits.dtype
    assert logits.dim() in (2, 3) and logits.stride(-1) == 1, (logits.shape, logits.stride())
    assert logits.dim() == 2 or logits.is_contiguous(), logits.stride()
    vocab, width, lines = state.vocab_size, logits.shape[-1], logits.shape[-2]
    assert width * (logits.shape[0] if logits.dim() == 3 else 1) == vocab, (logits.shape, vocab)
    assert rows.shape == (lines,) and rows.dtype in (int32, int64), (rows.shape, rows.dtype)
    if not runs_kernels(logits):
        return reference.sample_rows(logits, rows, state, token_ids)
    assert rows.is_contiguous(), rows.stride()
    assert vocab <= MAX_VOCAB, vocab
    num_parts = triton.cdiv(vocab, PART)
    # Of one tensor they would be aligned as the number of lines has it, and compiled for that.
    best, top, total = (
        torch.empty(lines, num_parts, dtype=float32, device=logits.device) for _ in range(3)
    )
    token = torch.empty(lines, num_parts, dtype=int32, device=logits.device)
    lists = torch.empty(lines, LIST.value, dtype=int64, device=logits.device)
    out = torch.empty(lines, dtype=int64, device=logits.device)
    ids_stride, max_tokens = (0, 0)
    if token_ids is not None:
        ids_stride, max_tokens = token_ids.stride(0), token_ids.shape[1]
    sizes = {"VOCAB": vocab, "WIDTH": width, "PART": PART, "enable_fp_fusion": False}
    _win_parts[lines, num_parts](
        logits, rows, state.pointers, best, token, top, total, logits.stride(-2), None,
        **sizes, num_warps=PART_WARPS, maxnreg=PART_REGISTERS
    )  # fmt: skip
    _win_rows[(lines,)](
        logits, rows, state.pointers, best, token, top, total, lists, out, token_ids,
        logits.stride(-2), ids_stride, max_tokens,
        PARTS=num_parts, PARTS_BLOCK=max(triton.next_power_of_2(num_parts), BLOCK.value // PART),
        **sizes, num_warps=ROW_WARPS, maxnreg=ROW_REGISTERS
    )  # fmt: skip
    return out


def shard_best(
    logits: Tensor, vocab_start: int, rows: Tensor, state: SamplingState
) -> tuple[Tensor, Tensor]:
    """`sample_rows` of one shard of the vocabulary, for rows without top-k, top-p and min-p (of
    which top-k 1 and top-p 0 are allowed). `merge_shards` finds the best of all shards.

    logits: [S, W] bf16 or float32, rows of unit stride: tokens vocab_start ... vocab_start + W - 1
    -> value [S] float32 (logit, or logit / temperature + noise), token [S] int64
    """
    assert logits.dtype in (torch.bfloat16, float32), logits.dtype
    assert logits.dim() == 2 and logits.stride(1) == 1, (logits.shape, logits.stride())
    lines, width = logits.shape
    assert 0 <= vocab_start <= state.vocab_size - width, (vocab_start, width)
    assert rows.shape == (lines,) and rows.dtype in (int32, int64), (rows.shape, rows.dtype)
    if not runs_kernels(logits):
        return reference.shard_best(logits, vocab_start, rows, state)
    assert rows.is_contiguous(), rows.stride()
    num_parts = triton.cdiv(vocab_start % PART + width, PART)
    best = torch.empty(lines, num_parts, dtype=float32, device=logits.device)
    token = torch.empty(lines, num_parts, dtype=int32, device=logits.device)
    _win_parts[lines, num_parts](
        logits, rows, state.pointers, best, token, None, None, logits.stride(0), vocab_start,
        VOCAB=state.vocab_size, WIDTH=width, PART=PART, enable_fp_fusion=False,
        num_warps=PART_WARPS, maxnreg=PART_REGISTERS
    )  # fmt: skip
    return _join(best.t(), token.t())


def merge_shards(values: Tensor, tokens: Tensor) -> Tensor:
    """values: [shards, S] float32, tokens: [shards, S] int64, of `shard_best` -> [S] int64."""
    assert values.shape == tokens.shape and values.dim() == 2, (values.shape, tokens.shape)
    if not runs_kernels(values):
        return reference.merge_shards(values, tokens)
    return _join(values, tokens)[1]


def _join(values: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """[parts, S] both -> the best value [S], and the least of its tokens [S] int64."""
    assert values.stride() == tokens.stride(), (values.stride(), tokens.stride())
    parts, lines = values.shape
    value = torch.empty(lines, dtype=float32, device=values.device)
    token = torch.empty(lines, dtype=int64, device=values.device)
    _join_parts[(lines,)](
        values, tokens, value, token, *values.stride(),
        PARTS=parts, BLOCK=triton.next_power_of_2(parts), num_warps=1
    )  # fmt: skip
    return value, token


def top_logprobs(logits: Tensor, chosen: Tensor, num_top: int) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities of the chosen token and of the best ones.

    logits: [B, V] float, rows of unit stride; chosen: [B] int64
    -> chosen_logprob [B], top_logprob and top_ids [B, num_top]
    """
    assert chosen.shape == logits.shape[:1], (chosen.shape, logits.shape)
    if not runs_kernels(logits):
        return reference.top_logprobs(logits, chosen, num_top)
    lse = logsumexp(logits)
    top = logits.topk(num_top, dim=-1)
    chosen_logprob = logits.gather(1, chosen[:, None]).squeeze(1).float() - lse
    return chosen_logprob, top.values.float() - lse[:, None], top.indices


def logsumexp(logits: Tensor) -> Tensor:
    """logits: [B, V] float, rows of unit stride -> [B] float32."""
    if not runs_kernels(logits):
        return logits.float().logsumexp(dim=-1)
    largest, total = _sumexp_of_parts(logits)
    return _join_sums(largest.t(), total.t(), True)[0]


def shard_sumexp(logits: Tensor) -> tuple[Tensor, Tensor]:
    """What `merge_sumexp` needs of a shard: logits: [B, W] float, rows of unit stride
    -> its largest logit [B] float32, and the sum of exp(logit - largest) [B] float32."""
    if not runs_kernels(logits):
        return reference.shard_sumexp(logits)
    largest, total = _sumexp_of_parts(logits)
    return _join_sums(largest.t(), total.t(), False)


def merge_sumexp(largest: Tensor, total: Tensor) -> Tensor:
    """largest, total: [shards, B] float32 -> logsumexp over all shards [B] float32."""
    assert largest.shape == total.shape and largest.dim() == 2, (largest.shape, total.shape)
    if not runs_kernels(largest):
        return reference.merge_sumexp(largest, total)
    return _join_sums(largest, total, True)[0]


def _sumexp_of_parts(logits: Tensor) -> tuple[Tensor, Tensor]:
    assert logits.dim() == 2 and logits.stride(1) == 1, (logits.shape, logits.stride())
    grid = logits.shape[0], triton.cdiv(logits.shape[1], PART)
    largest, total = (torch.empty(grid, dtype=float32, device=logits.device) for _ in range(2))
    _sumexp_parts[grid](
        logits, largest, total, logits.stride(0), VOCAB=logits.shape[1], PART=PART,
        num_warps=PART_WARPS
    )  # fmt: skip
    return largest, total


def _join_sums(largest: Tensor, total: Tensor, as_log: bool) -> tuple[Tensor, Tensor]:
    """[parts, B] both -> the same of all parts [B]; as_log: logsumexp in place of the first."""
    assert largest.stride() == total.stride(), (largest.stride(), total.stride())
    parts, lines = largest.shape
    top, whole = (torch.empty(lines, dtype=float32, device=largest.device) for _ in range(2))
    _join_sumexp[(lines,)](
        largest, total, top, whole, *largest.stride(),
        PARTS=parts, BLOCK=triton.next_power_of_2(parts), AS_LOG=as_log, num_warps=1
    )  # fmt: skip
    return top, whole


@triton.jit(do_not_specialize_on_alignment=["rows"])
def _win_parts(
    logits, rows, state, best, token_out, top, total, stride, vocab_start, VOCAB: tl.constexpr,
    WIDTH: tl.constexpr, PART: tl.constexpr
):  # fmt: skip
    """The winner of a part: its logit, or logit / temperature + noise, and itself. For a row with
    filters also the part's best logit and, for top-p, the sum of exp((logit - best) / temperature).
    """
    line = tl.program_id(0).to(tl.int64)
    first = 0 if vocab_start is None else vocab_start // PART
    start = (first + tl.program_id(1)) * PART
    token = tokens_from(start, PART)
    if vocab_start is None:
        inside = token < VOCAB
        raw = load_logits(logits, line, token, stride, VOCAB, WIDTH)
    else:
        own = token - vocab_start
        inside = (own >= 0) & (own < WIDTH)
        raw = tl.load(logits + line * stride + own, inside, float("-inf"))
    row = tl.load(rows + line).to(tl.int64)
    heat, k, p, min_p = options(state, row, VOCAB)
    part = line * tl.num_programs(1) + tl.program_id(1)
    value = adjusted(raw, token, inside, start, PART, row, state, adjustments(state, row))
    # A NaN must not win over what is behind the vocabulary: the token becomes an index.
    value = tl.where(value == value, value, float("-inf"))
    if heat > 0:
        seed = tl.load(state.seed + row * state.seed_stride)
        position = tl.load(state.num_tokens + row * state.row_stride)
        cold = tl.div_rn(1.0, heat)
        if top is not None:
            _store_filter_sums(value, cold, (k > 0) | (min_p > 0), p, top + part, total + part)
        value = tl.fma(value, cold, gumbel(seed, position, start, PART))
    highest = tl.max(tl.max(value, 1), 0)
    winner = tl.min(tl.min(tl.where(value == highest, token, _NO_TOKEN), 1), 0)
    if vocab_start is not None:
        winner = tl.maximum(winner, vocab_start)  # all are -inf, what is not ours too
    tl.store(best + part, highest)
    tl.store(token_out + part, winner)


@triton.jit
def _store_filter_sums(value, cold, filters, p, top, total):
    if filters | (p < 1.0):
        largest = tl.max(tl.max(value, 1), 0)
        tl.store(top, largest)
        if p < 1.0:
            largest = tl.maximum(largest, -3.0e38)  # a part may be -inf throughout
            weight = tl.exp2((value - largest) * (cold * _LOG2_E))
            tl.store(total, tl.sum(tl.sum(weight, 1), 0))


@triton.jit(do_not_specialize_on_alignment=["rows"])
def _win_rows(
    logits, rows, state, best, token, top, total, lists, out, token_ids, stride, ids_stride,
    max_tokens, PARTS: tl.constexpr, PARTS_BLOCK: tl.constexpr, VOCAB: tl.constexpr,
    WIDTH: tl.constexpr, PART: tl.constexpr
):  # fmt: skip
    # Backwards: what `_win_parts` read last may still be in the L2 cache.
    line = (tl.num_programs(0) - 1 - tl.program_id(0)).to(tl.int64)
    index = tl.arange(0, PARTS_BLOCK)
    part = line * PARTS + index
    value = tl.load(best + part, index < PARTS, float("-inf"))
    winner = tl.load(token + part, index < PARTS, _NO_TOKEN)
    row = tl.load(rows + line).to(tl.int64)
    heat, k, p, min_p = options(state, row, VOCAB)
    position = tl.load(state.num_tokens + row * state.row_stride)
    chosen = tl.min(tl.where(value == tl.max(value, 0), winner, _NO_TOKEN), 0)
    if (heat > 0) & ((k > 0) | (p < 1.0) | (min_p > 0)):
        tops = tl.load(top + part, index < PARTS, float("-inf"))
        if tl.max(tops, 0) > float("-inf"):
            sums = tl.load(total + part, index < PARTS, 0.0)
            field = (tl.load(state.seed + row * state.seed_stride), position)
            here = (logits, stride, line, row, state, adjustments(state, row))
            chosen = draw_filtered(
                here, lists + line * LIST, value, winner, tops, sums, k, p, min_p, heat, field,
                VOCAB, WIDTH, PART
            )  # fmt: skip
    tl.store(out + line, chosen.to(tl.int64))
    if token_ids is not None:
        _append(token_ids + row * ids_stride, chosen, row, position, max_tokens, state)


@triton.jit
def _append(ids, token, row, position, max_tokens, state):
    if position < max_tokens:
        at = row * state.row_stride
        tl.store(ids + position, token)
        tl.store(state.num_tokens + at, position + 1)
        presence = tl.load(state.presence_penalty + at)
        frequency = tl.load(state.frequency_penalty + at)
        if (presence != 0) | (frequency != 0) | (tl.load(state.repetition_penalty + at) != 1):
            count = state.counts + row * state.counts_stride + token
            tl.store(count, tl.load(count) + 1)


@triton.jit(do_not_specialize=["part_stride", "line_stride"])
def _join_parts(
    values, tokens, value, token, part_stride, line_stride, PARTS: tl.constexpr,
    BLOCK: tl.constexpr
):  # fmt: skip
    line = tl.program_id(0).to(tl.int64)
    part = tl.arange(0, BLOCK)
    at = part * part_stride + line * line_stride
    each = tl.load(values + at, part < PARTS, float("-inf"))
    whose = tl.load(tokens + at, part < PARTS, _NO_TOKEN)
    highest = tl.max(each, 0)
    tl.store(value + line, highest)
    tl.store(token + line, tl.min(tl.where(each == highest, whose, _NO_TOKEN), 0).to(tl.int64))


@triton.jit
def _sumexp_parts(logits, largest, total, stride, VOCAB: tl.constexpr, PART: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * PART + tl.arange(0, PART)
    value = tl.load(logits + row * stride + at, at < VOCAB, float("-inf")).to(tl.float32)
    top = tl.maximum(tl.max(value, 0), -3.0e38)  # a part may be -inf throughout
    part = row * tl.num_programs(1) + tl.program_id(1)
    tl.store(largest + part, top)
    tl.store(total + part, tl.sum(tl.exp(value - top), 0))


@triton.jit(do_not_specialize=["part_stride", "line_stride"])
def _join_sumexp(
    largest, total, top_out, total_out, part_stride, line_stride, PARTS: tl.constexpr,
    BLOCK: tl.constexpr, AS_LOG: tl.constexpr
):  # fmt: skip
    line = tl.program_id(0).to(tl.int64)
    part = tl.arange(0, BLOCK)
    at = part * part_stride + line * line_stride
    tops = tl.load(largest + at, part < PARTS, -3.0e38)
    sums = tl.load(total + at, part < PARTS, 0.0)
    top = tl.max(tops, 0)
    whole = tl.sum(sums * tl.exp(tops - top), 0)
    tl.store(top_out + line, top + tl.log(whole) if AS_LOG else top)
    tl.store(total_out + line, whole)
