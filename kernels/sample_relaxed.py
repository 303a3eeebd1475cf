"""Accepting drafts that are not what the sampler chose, but nearly as good: lossy, and asked for.

`near_best` says of each line's draft whether it may stand in for the choice; it goes before the
sampler, which changes what the logits are adjusted by. `settle` then puts such drafts in place of
what was chosen and appended, and keeps the rows' marks of who is thinking.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor, float32, int32, int64

from . import reference_sample as reference
from .compat import runs_kernels
from .sample_row import (
    _LOG2_E,
    adjusted,
    adjustments,
    load_logits,
    options,
    ranks_before,
    tokens_from,
)
from .sample_state import SamplingState

PART = 2048
"""Tokens of one row that one program looks at, as in the sampler; a multiple of 4."""
PART_WARPS = 4


def near_best(
    logits: Tensor, drafts: Tensor, rows: Tensor, state: SamplingState, top_k: int, delta: float
) -> Tensor:
    """Whether each line's draft is one of its `top_k` best tokens, no more than `delta` less likely
    than the best, and none that the row's own top-k, top-p and min-p exclude. Likely: at the row's
    temperature (1 for a row that takes its best token), after penalties, bias and masks.

    Where a row has top-k and top-p, top-p counts as if top-k kept nothing behind the draft, which
    may refuse one that both would keep.

    logits, rows: as `sample.sample_rows` takes them, before it is called; drafts: [S] int32
    -> [S] bool
    """
    assert drafts.shape == rows.shape and drafts.dtype == int32, (drafts.shape, drafts.dtype)
    assert top_k >= 1 and 0.0 <= delta <= 1.0, (top_k, delta)
    if not runs_kernels(logits):
        return reference.near_best(logits, drafts, rows, state, top_k, delta)
    lines, vocab = len(rows), state.vocab_size
    num_parts = triton.cdiv(vocab, PART)
    top, total, better, count = (
        torch.empty(lines, num_parts, dtype=float32, device=logits.device) for _ in range(4)
    )
    own = torch.empty(lines, dtype=float32, device=logits.device)
    out = torch.empty(lines, dtype=torch.bool, device=logits.device)
    _look_at_parts[lines, num_parts](
        logits, rows, state.pointers, drafts, top, total, better, count, own, logits.stride(-2),
        drafts.stride(0), VOCAB=vocab, WIDTH=logits.shape[-1], PART=PART, enable_fp_fusion=False,
        num_warps=PART_WARPS
    )  # fmt: skip
    _decide[(lines,)](
        rows, state.pointers, top, total, better, count, own, out, top_k, delta,
        PARTS=num_parts, PARTS_BLOCK=triton.next_power_of_2(num_parts), VOCAB=vocab, num_warps=1
    )  # fmt: skip
    return out


def settle(
    chosen: Tensor,
    rows: Tensor,
    state: SamplingState,
    token_ids: Tensor,
    thinking: Tensor,
    think_ids: tuple[int, int],
    near: Tensor | None = None,
    drafts: Tensor | None = None,
) -> None:
    """After `sample.sample_and_append`, in place: where a row is thinking and its draft is `near`
    the best, the draft takes the place of its newest token; `thinking` follows the newest token.

    chosen: [S] int64, what the sampler returned; token_ids: [R, L] int32; thinking: [R] int32, 0 or
    1; think_ids: the tokens that begin and end it; near: [S] bool and drafts: [S] int32, or none
    """
    assert (near is None) == (drafts is None)
    assert chosen.dtype == int64 and thinking.dtype == int32, (chosen.dtype, thinking.dtype)
    if not runs_kernels(chosen):
        reference.settle(chosen, rows, state, token_ids, thinking, think_ids, near, drafts)
        return
    _settle[(len(rows),)](
        chosen, rows, state.pointers, token_ids, thinking, near, drafts, token_ids.stride(0),
        thinking.stride(0), 0 if drafts is None else drafts.stride(0), *think_ids, num_warps=1
    )  # fmt: skip


@triton.jit(do_not_specialize=["draft_stride"], do_not_specialize_on_alignment=["rows", "drafts"])
def _look_at_parts(
    logits, rows, state, drafts, top_out, total_out, better_out, count_out, own_out, stride,
    draft_stride, VOCAB: tl.constexpr, WIDTH: tl.constexpr, PART: tl.constexpr
):  # fmt: skip
    """Of a part: its best logit; the sum of exp((logit - best) / temperature), of all and of the
    tokens before the draft; how many these are. And the draft's own logit."""
    line = tl.program_id(0).to(tl.int64)
    start = tl.program_id(1) * PART
    row = tl.load(rows + line).to(tl.int64)
    draft = tl.load(drafts + line * draft_stride)
    heat, _k, _p, _min_p = options(state, row, VOCAB)
    scale = tl.where(heat > 0, tl.div_rn(1.0, heat), 1.0) * _LOG2_E
    asked = adjustments(state, row)
    value = _values(logits, line, start, PART, row, state, asked, stride, VOCAB, WIDTH)
    four = draft // 4 * 4
    own = _values(logits, line, four, 4, row, state, asked, stride, VOCAB, WIDTH)
    own = tl.where(tokens_from(four, 4) == draft, own, float("-inf"))
    own = tl.max(tl.max(own, 1), 0)
    before = ranks_before(value, tokens_from(start, PART), own, draft)
    best = tl.maximum(tl.max(tl.max(value, 1), 0), -3.0e38)  # a part may be -inf throughout
    weight = tl.exp2((value - best) * scale)
    part = line * tl.num_programs(1) + tl.program_id(1)
    tl.store(top_out + part, best)
    tl.store(total_out + part, tl.sum(tl.sum(weight, 1), 0))
    tl.store(better_out + part, tl.sum(tl.sum(tl.where(before, weight, 0.0), 1), 0))
    tl.store(count_out + part, tl.sum(tl.sum(before.to(tl.float32), 1), 0))
    if tl.program_id(1) == 0:
        tl.store(own_out + line, own)


@triton.jit
def _values(
    logits, line, start, SIZE: tl.constexpr, row, state, asked, stride, VOCAB: tl.constexpr,
    WIDTH: tl.constexpr
):  # fmt: skip
    """[SIZE / 4, 4]: adjusted logits of tokens start ... start + SIZE - 1; -inf for NaN."""
    token = tokens_from(start, SIZE)
    raw = load_logits(logits, line, token, stride, VOCAB, WIDTH)
    value = adjusted(raw, token, token < VOCAB, start, SIZE, row, state, asked)
    return tl.where(value == value, value, float("-inf"))


@triton.jit(do_not_specialize=["top_k"], do_not_specialize_on_alignment=["rows"])
def _decide(
    rows, state, top, total, better, count, own, out, top_k, delta, PARTS: tl.constexpr,
    PARTS_BLOCK: tl.constexpr, VOCAB: tl.constexpr
):  # fmt: skip
    line = tl.program_id(0).to(tl.int64)
    index = tl.arange(0, PARTS_BLOCK)
    part = line * PARTS + index
    row = tl.load(rows + line).to(tl.int64)
    heat, k, p, min_p = options(state, row, VOCAB)
    scale = tl.where(heat > 0, tl.div_rn(1.0, heat), 1.0) * _LOG2_E
    tops = tl.load(top + part, index < PARTS, -3.0e38)
    best = tl.max(tops, 0)
    shares = tl.exp2((tops - best) * scale)
    # Weights, of which the best token's is 1.
    whole = tl.sum(shares * tl.load(total + part, index < PARTS, 0.0), 0)
    before = tl.sum(shares * tl.load(better + part, index < PARTS, 0.0), 0)
    rank = tl.sum(tl.load(count + part, index < PARTS, 0.0), 0)
    value = tl.load(own + line)
    weight = tl.exp2((value - best) * scale)
    near = (value > float("-inf")) & (rank < top_k) & (weight >= 1.0 - delta * whole)
    if heat > 0:
        near &= ((k == 0) | (rank < k)) & (weight >= min_p)
        near &= (p >= 1.0) | (before < p * tl.where(k > 0, before + weight, whole))
    tl.store(out + line, near)


@triton.jit(
    do_not_specialize=["draft_stride", "think_start", "think_end"],
    do_not_specialize_on_alignment=["chosen", "rows", "near", "drafts"],
)
def _settle(
    chosen, rows, state, ids, thinking, near, drafts, ids_stride, thinking_stride, draft_stride,
    think_start, think_end
):  # fmt: skip
    line = tl.program_id(0).to(tl.int64)
    row = tl.load(rows + line).to(tl.int64)
    token = tl.load(chosen + line).to(tl.int32)
    thinks = tl.load(thinking + row * thinking_stride)
    if near is not None:
        draft = tl.load(drafts + line * draft_stride)
        if (thinks != 0) & (draft != token) & (tl.load(near + line) != 0):
            _replace(ids + row * ids_stride, token, draft, row, state)
            tl.store(chosen + line, draft.to(tl.int64))
            token = draft
    thinks = tl.where(token == think_start, 1, tl.where(token == think_end, 0, thinks))
    tl.store(thinking + row * thinking_stride, thinks)


@triton.jit
def _replace(ids, token, draft, row, state):
    """The newest token of a row."""
    at = row * state.row_stride
    tl.store(ids + tl.load(state.num_tokens + at) - 1, draft)
    presence = tl.load(state.presence_penalty + at)
    frequency = tl.load(state.frequency_penalty + at)
    if (presence != 0) | (frequency != 0) | (tl.load(state.repetition_penalty + at) != 1):
        counts = state.counts + row * state.counts_stride
        tl.store(counts + token, tl.load(counts + token) - 1)
        tl.store(counts + draft, tl.load(counts + draft) + 1)
