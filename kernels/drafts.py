"""What drafts do to the state of the rows: how far they were right, and how the next are made.

One launch each: what a step of few rows takes is the number of its launches.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .compat import overlap, runs_kernels, wait_previous
from .step import TokenState

LINES_BLOCK = 128
"""Lines that one program looks at."""
HIDDEN_BLOCK = 2048


def keep_accepted(
    left: Tensor,
    chosen: Tensor,
    place: int,
    drafts: Tensor,
    state: TokenState,
    num_tokens: Tensor,
    agreed: Tensor | None = None,
) -> Tensor:
    """After a token was chosen for each line of a decode batch, and appended to its row: the rows
    whose drafts were right so far, and what of them is computed, their newest token excepted.

    left: [B] int32: the row of each line; the null row, `state`'s last, where a draft was wrong
    chosen: [B] int64; place: of the draft that it is compared with, from 0
    drafts: [R, more than place] int32, rows of unit stride
    agreed: [B] bool: which drafts are right, in place of drafts == chosen
    num_tokens: [B] int32, written: how many tokens of each line count, the next choice included;
    at place 0 it holds nothing
    -> [B] int32, what is left; a tensor of its own, since `left` may be the batch of the next step
    """
    assert left.dtype == num_tokens.dtype == drafts.dtype == torch.int32, (left.dtype, drafts.dtype)
    assert chosen.dtype == torch.int64 and chosen.shape == num_tokens.shape == left.shape
    assert 0 <= place < drafts.shape[1] and drafts.stride(1) == 1, (place, drafts.shape)
    assert agreed is None or (agreed.dtype == torch.bool and agreed.shape == left.shape), agreed
    null = len(state.num_tokens) - 1
    if runs_kernels(left):
        assert left.is_contiguous() and chosen.is_contiguous() and num_tokens.is_contiguous()
        assert agreed is None or agreed.is_contiguous()
        kept = torch.empty_like(left)
        _keep_accepted[(triton.cdiv(len(left), LINES_BLOCK),)](
            left, chosen, drafts, agreed, state.num_tokens, state.num_computed, num_tokens, kept,
            len(left), place, null, drafts.stride(0), BLOCK=LINES_BLOCK, num_warps=1,
            **overlap(left)
        )  # fmt: skip
        return kept
    row = left.long()
    right = (left != null) & (drafts[row, place] == chosen if agreed is None else agreed)
    num_tokens.copy_(torch.where(right, place + 2, 1 if place == 0 else num_tokens))
    computed = state.num_tokens[row] - 1 + right
    state.num_computed[row] = torch.where(left == null, state.num_computed[row], computed)
    return left.masked_fill(~right, null)


def begin_drafts(
    hidden: Tensor,
    input_ids: Tensor,
    last: Tensor,
    lines: Tensor,
    num_tokens: Tensor,
    ahead: Tensor,
    position: Tensor,
) -> tuple[Tensor, Tensor]:
    """What the first draft of each line is made of, and where: it is computed at the row's last
    token but one, and itself comes behind the last.

    hidden: [T, H], rows of unit stride; input_ids: [T] int64; last: [S] int64, < T
    lines: [S] int32, rows; num_tokens: [R] int32, what the rows have
    ahead, position: [R] int32, written for `lines`: num_tokens - 2, and num_tokens
    -> hidden[last], input_ids[last]
    """
    assert len(hidden) == len(input_ids), (hidden.shape, input_ids.shape)
    assert last.shape == lines.shape and lines.dtype == torch.int32, (last.shape, lines.dtype)
    assert last.dtype == input_ids.dtype == torch.int64, (last.dtype, input_ids.dtype)
    assert num_tokens.dtype == ahead.dtype == position.dtype == torch.int32, num_tokens.dtype
    if not runs_kernels(hidden):
        row = lines.long()
        ahead[row], position[row] = num_tokens[row] - 2, num_tokens[row]
        return hidden[last], input_ids[last]
    assert hidden.stride(1) == 1 and input_ids.is_contiguous(), (hidden.stride(), input_ids.shape)
    assert last.is_contiguous() and lines.is_contiguous(), (last.stride(), lines.stride())
    width = hidden.shape[1]
    own = torch.empty(len(last), width, dtype=hidden.dtype, device=hidden.device)
    following = torch.empty(len(last), dtype=torch.int64, device=hidden.device)
    _begin_drafts[(len(last), triton.cdiv(width, HIDDEN_BLOCK))](
        hidden, input_ids, last, lines, num_tokens, ahead, position, own, following,
        hidden.stride(0), WIDTH=width, BLOCK=HIDDEN_BLOCK, **overlap(hidden)
    )  # fmt: skip
    return own, following


def put_drafts(chosen: Tensor, lines: Tensor, place: int, drafts: Tensor, position: Tensor) -> None:
    """drafts[row, place] = chosen, and position[row] grows by 1, for the row of each line. What
    this leaves of a row that several lines name, the null row, means nothing.

    chosen: [S] int64; lines: [S] int32; drafts: [R, more than place] int32, rows of unit stride
    position: [R] int32
    """
    assert chosen.dtype == torch.int64 and chosen.shape == lines.shape, (chosen.shape, lines.shape)
    assert lines.dtype == drafts.dtype == position.dtype == torch.int32, drafts.dtype
    assert 0 <= place < drafts.shape[1] and drafts.stride(1) == 1, (place, drafts.shape)
    if not runs_kernels(chosen):
        row = lines.long()
        drafts[row, place] = chosen.int()
        position[row] += 1
        return
    assert chosen.is_contiguous() and lines.is_contiguous(), (chosen.stride(), lines.stride())
    _put_drafts[(triton.cdiv(len(lines), LINES_BLOCK),)](
        chosen, lines, drafts, position, len(lines), place, drafts.stride(0), BLOCK=LINES_BLOCK,
        num_warps=1, **overlap(chosen)
    )  # fmt: skip


@triton.jit(
    do_not_specialize=["num_lines", "place", "null", "drafts_stride"],
    do_not_specialize_on_alignment=["left"],
)
def _keep_accepted(
    left, chosen, drafts, agreed, row_tokens, num_computed, num_tokens, kept, num_lines, place,
    null, drafts_stride, BLOCK: tl.constexpr, PDL: tl.constexpr
):  # fmt: skip
    wait_previous(PDL)
    line = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = line < num_lines
    row = tl.load(left + line, inside, null)
    real = row != null
    if agreed is None:
        at = row.to(tl.int64) * drafts_stride + place
        same = tl.load(drafts + at, real, 0) == tl.load(chosen + line, real, 0)
    else:
        same = tl.load(agreed + line, real, 0) != 0
    right = real & same
    tl.store(kept + line, tl.where(right, row, null), inside)
    tl.store(num_tokens + line, tl.where(right, place + 2, 1), inside & (right | (place == 0)))
    computed = tl.load(row_tokens + row, real, 0) - 1 + right.to(tl.int32)
    tl.store(num_computed + row, computed, real)


@triton.jit(do_not_specialize_on_alignment=["input_ids", "last", "lines"])
def _begin_drafts(
    hidden, input_ids, last, lines, num_tokens, ahead, position, own, following, stride,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr
):  # fmt: skip
    wait_previous(PDL)
    line = tl.program_id(0).to(tl.int64)
    token = tl.load(last + line)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(hidden + token * stride + at, at < WIDTH)
    tl.store(own + line * WIDTH + at, value, at < WIDTH)
    if tl.program_id(1) == 0:
        row = tl.load(lines + line)
        known = tl.load(num_tokens + row)
        tl.store(ahead + row, known - 2)
        tl.store(position + row, known)
        tl.store(following + line, tl.load(input_ids + token))


@triton.jit(
    do_not_specialize=["num_lines", "place", "drafts_stride"],
    do_not_specialize_on_alignment=["lines"],
)
def _put_drafts(
    chosen, lines, drafts, position, num_lines, place, drafts_stride, BLOCK: tl.constexpr,
    PDL: tl.constexpr
):  # fmt: skip
    wait_previous(PDL)
    line = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = line < num_lines
    row = tl.load(lines + line, inside, 0)
    token = tl.load(chosen + line, inside, 0)
    tl.store(drafts + row.to(tl.int64) * drafts_stride + place, token.to(tl.int32), inside)
    tl.store(position + row, tl.load(position + row, inside, 0) + 1, inside)
