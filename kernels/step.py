"""What a step does to the state of the rows before and after the model: changes are scattered into
it, and the tokens to compute are read out of it.

All state of the rows is int32 words of one tensor, so that whatever a step changes travels in one
copy:

```
staging   | data of all changes, one after the other      |
spans     | (to, from, length), (to, from, length), ...   |   words[to ...] = staging[from ...]
```
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .compat import overlap, runs_kernels, wait_previous

SCATTER_BLOCK = 1024
TOKENS_BLOCK = 128
"""Tokens of a chunk that one program reads out."""


def scatter_words(words: Tensor, staging: Tensor, num_spans: int, first_data: int) -> None:
    """words: [N] int32, the state. staging: [first_data + data] int32 on the same device: num_spans
    spans (to, from, length), where `from` counts from `first_data`, then the data. Spans do not
    overlap in `words`."""
    assert words.dtype == staging.dtype == torch.int32, (words.dtype, staging.dtype)
    assert words.dim() == staging.dim() == 1 and 3 * num_spans <= first_data, first_data
    if not num_spans:
        return
    if runs_kernels(words):
        _scatter[(num_spans, 4)](words, staging, first_data, BLOCK=SCATTER_BLOCK)
        return
    for to, start, length in staging[: 3 * num_spans].view(-1, 3).tolist():
        words[to : to + length] = staging[first_data + start : first_data + start + length]


@dataclass(frozen=True)
class TokenState:
    """The rows' tokens and where their KV is; R rows, all int32."""

    token_ids: Tensor
    """[R, L]: prompt, then what was generated."""
    num_tokens: Tensor
    """[R]: of them are known."""
    num_computed: Tensor
    """[R]: of them have their KV."""
    block_table: Tensor
    """[R, max_blocks]."""
    block_size: int


@dataclass(frozen=True)
class Inputs:
    """Of T tokens; `kernels.step` writes them, the model reads them."""

    input_ids: Tensor
    """[T] int64."""
    positions: Tensor
    """[T] int64."""
    slot_mapping: Tensor
    """[T] int64: block * block_size + offset."""
    cos: Tensor
    sin: Tensor
    """[T, P/2] float32: the rope tables' rows of the positions."""

    @classmethod
    def empty(cls, num_tokens: int, pairs: int, device: torch.device) -> "Inputs":
        def ints() -> Tensor:
            return torch.empty(num_tokens, dtype=torch.int64, device=device)

        def angles() -> Tensor:
            return torch.empty(num_tokens, pairs, dtype=torch.float32, device=device)

        return cls(ints(), ints(), ints(), angles(), angles())


def decode_inputs(
    state: TokenState,
    rows: Tensor,
    cos: Tensor,
    sin: Tensor,
    inputs: Inputs,
    block_table: Tensor,
    seq_lens: Tensor,
    drafts: Tensor | None = None,
    query_len: int = 1,
) -> None:
    """The newest token of each row of a decode batch and query_len - 1 drafts of what follows it;
    and one more of the row's tokens computed, the newest.

    rows: [B] int32; the last row of `state` is the null row of padding: it keeps its state, its
    length is 0 and its slots are the first of the null block
    cos, sin: [max_positions, P/2] float32, the tables
    inputs: the first B * query_len tokens are written, row after row
    block_table: [B, max_blocks] int32, written up to each sequence's length; seq_lens: [B] int32,
    written, the new tokens included
    drafts: [R, at least query_len - 1] int32
    """
    num_rows, null = rows.shape[0], state.num_tokens.shape[0] - 1
    assert rows.dtype == torch.int32 and block_table.shape[0] == seq_lens.shape[0] == num_rows
    if query_len > 1:
        assert drafts is not None and drafts.dtype == torch.int32, drafts
        assert drafts.shape[1] >= query_len - 1 and drafts.stride(1) == 1, drafts.shape
    if not num_rows:
        return
    if runs_kernels(rows):
        pairs = cos.shape[1]
        _decode_inputs[(num_rows,)](
            state.token_ids, state.num_computed, state.block_table, rows, cos, sin,
            inputs.input_ids, inputs.positions, inputs.slot_mapping, inputs.cos, inputs.sin,
            block_table, seq_lens, null, state.token_ids.stride(0), state.block_table.stride(0),
            block_table.stride(0), drafts if query_len > 1 else None,
            drafts.stride(0) if drafts is not None and query_len > 1 else 0, SIZE=state.block_size,
            PAIRS=pairs, PAIRS_BLOCK=triton.next_power_of_2(pairs), LEN=query_len,
            LEN_BLOCK=triton.next_power_of_2(query_len), num_warps=1, **overlap(rows)
        )  # fmt: skip
        return
    row, real = rows.long(), rows != null
    first = torch.where(real, state.num_computed[row], 0).long()
    seq_lens[:] = torch.where(real, first + query_len, 0)
    block_table[:] = state.block_table[row]
    behind = torch.arange(query_len, device=rows.device)
    position = torch.where(real[:, None], first[:, None] + behind, 0).flatten()
    _read(state, row.repeat_interleave(query_len), position, cos, sin, inputs, 0)
    if drafts is not None and query_len > 1:
        ids = inputs.input_ids[: num_rows * query_len].view(num_rows, query_len)
        ids[:, 1:] = drafts[row, : query_len - 1]
    state.num_computed[row[real]] += 1


def chunk_inputs(
    state: TokenState, chunks: Tensor, max_tokens: int, cos: Tensor, sin: Tensor, inputs: Inputs
) -> None:
    """The tokens of slices of prompts, which are computed by then.

    chunks: [C, 4] int32 on the device: row, first position, number of tokens (at most max_tokens),
    index in `inputs` of its first token
    """
    assert chunks.dtype == torch.int32 and chunks.shape[1:] == (4,), chunks.shape
    if not len(chunks):
        return
    if runs_kernels(chunks):
        pairs = cos.shape[1]
        _chunk_inputs[(len(chunks), triton.cdiv(max_tokens, TOKENS_BLOCK))](
            state.token_ids, state.num_computed, state.block_table, chunks, cos, sin,
            inputs.input_ids, inputs.positions, inputs.slot_mapping, inputs.cos, inputs.sin,
            state.token_ids.stride(0), state.block_table.stride(0), SIZE=state.block_size,
            PAIRS=pairs, PAIRS_BLOCK=triton.next_power_of_2(pairs), BLOCK=TOKENS_BLOCK
        )  # fmt: skip
        return
    for row, start, count, first in chunks.tolist():
        position = torch.arange(start, start + count)
        _read(state, torch.full_like(position, row), position, cos, sin, inputs, first)
        state.num_computed[row] = start + count


def _read(
    state: TokenState,
    row: Tensor,
    position: Tensor,
    cos: Tensor,
    sin: Tensor,
    inputs: Inputs,
    first: int,
) -> None:
    to, size = slice(first, first + len(row)), state.block_size
    inputs.input_ids[to] = state.token_ids[row, position].long()
    inputs.positions[to] = position
    block = state.block_table[row, position // size].long()
    inputs.slot_mapping[to] = block * size + position % size
    inputs.cos[to], inputs.sin[to] = cos[position], sin[position]


@triton.jit(do_not_specialize=["first_data"], do_not_specialize_on_alignment=["staging"])
def _scatter(words, staging, first_data, BLOCK: tl.constexpr):
    span = staging + tl.program_id(0) * 3
    to, start, length = tl.load(span).to(tl.int64), tl.load(span + 1), tl.load(span + 2)
    data = staging + first_data + start
    for begin in range(tl.program_id(1) * BLOCK, length, tl.num_programs(1) * BLOCK):
        at = begin + tl.arange(0, BLOCK)
        tl.store(words + to + at, tl.load(data + at, at < length), at < length)


@triton.jit
def _angles(cos, sin, cos_out, sin_out, position, token, PAIRS: tl.constexpr, BLOCK: tl.constexpr):
    """position, token: [N, 1]."""
    pair = tl.arange(0, BLOCK)[None, :]
    live = (pair < PAIRS) & (token >= 0)
    at, to = position.to(tl.int64) * PAIRS + pair, token.to(tl.int64) * PAIRS + pair
    tl.store(cos_out + to, tl.load(cos + at, live), live)
    tl.store(sin_out + to, tl.load(sin + at, live), live)


@triton.jit(
    do_not_specialize=[
        "null",
        "ids_stride",
        "table_stride",
        "out_table_stride",
        "drafts_stride",
    ],
    do_not_specialize_on_alignment=["rows", "seq_lens"],
)
def _decode_inputs(
    token_ids, num_computed, block_table, rows, cos, sin, input_ids, positions, slots, cos_out,
    sin_out, out_table, seq_lens, null, ids_stride, table_stride, out_table_stride, drafts,
    drafts_stride, SIZE: tl.constexpr, PAIRS: tl.constexpr, PAIRS_BLOCK: tl.constexpr,
    LEN: tl.constexpr, LEN_BLOCK: tl.constexpr, PDL: tl.constexpr
):  # fmt: skip
    wait_previous(PDL)
    line = tl.program_id(0)
    row = tl.load(rows + line).to(tl.int64)
    real = row != null
    first = tl.where(real, tl.load(num_computed + row), 0)
    behind = tl.arange(0, LEN_BLOCK)
    inside = behind < LEN
    position = tl.where(real, first + behind, 0)
    token = line * LEN + behind
    found = tl.load(token_ids + row * ids_stride + first + behind, behind == 0, 0)
    if LEN > 1:
        drafted = tl.load(
            drafts + row * drafts_stride + behind - 1, inside & (behind > 0), 0
        )  # fmt: skip
        found = tl.where(behind == 0, found, drafted)
    tl.store(input_ids + token, found.to(tl.int64), inside)
    tl.store(positions + token, position.to(tl.int64), inside)
    table = block_table + row * table_stride
    block = tl.load(table + position // SIZE, inside, 0).to(tl.int64)
    tl.store(slots + token, block * SIZE + position % SIZE, inside)
    last = tl.where(real, first + LEN - 1, 0)
    tl.store(seq_lens + line, tl.where(real, last + 1, 0))
    for begin in range(0, last // SIZE + 1, 128):
        at = begin + tl.arange(0, 128)
        mask = at <= last // SIZE
        to = out_table + line.to(tl.int64) * out_table_stride + at
        tl.store(to, tl.load(table + at, mask), mask)
    _angles(
        cos, sin, cos_out, sin_out, tl.expand_dims(position, 1),
        tl.expand_dims(tl.where(inside, token, -1), 1), PAIRS, PAIRS_BLOCK
    )  # fmt: skip
    tl.store(num_computed + row, first + 1, mask=real)


@triton.jit(
    do_not_specialize=["ids_stride", "table_stride"],
    do_not_specialize_on_alignment=["token_ids", "chunks"],
)
def _chunk_inputs(
    token_ids, num_computed, block_table, chunks, cos, sin, input_ids, positions, slots, cos_out,
    sin_out, ids_stride, table_stride, SIZE: tl.constexpr, PAIRS: tl.constexpr,
    PAIRS_BLOCK: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    chunk = chunks + tl.program_id(0) * 4
    row, start = tl.load(chunk).to(tl.int64), tl.load(chunk + 1)
    count, first = tl.load(chunk + 2), tl.load(chunk + 3)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    live = at < count
    position, token = start + at, first + at
    found = tl.load(token_ids + row * ids_stride + position, live)
    tl.store(input_ids + token, found.to(tl.int64), live)
    tl.store(positions + token, position.to(tl.int64), live)
    block = tl.load(block_table + row * table_stride + position // SIZE, live).to(tl.int64)
    tl.store(slots + token, block * SIZE + position % SIZE, live)
    of = tl.where(live, token, -1)
    _angles(
        cos, sin, cos_out, sin_out, tl.expand_dims(position, 1), tl.expand_dims(of, 1), PAIRS,
        PAIRS_BLOCK
    )  # fmt: skip
    if tl.program_id(1) == 0:
        tl.store(num_computed + row, start + count)
