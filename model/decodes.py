"""A step's decodes: their tokens, what is accepted of them, and what is drafted for the next step.

A row that decodes has n known tokens and drafts of what follows them. Its newest token and k drafts
are computed at once; each choice c is what would have been chosen without drafts, as long as
the tokens before it are the row's own:

    computed   t[n-1]  d[1]  d[2]  d[3]       positions n - 1 ... n - 1 + k
    chosen     c[0]    c[1]  c[2]  c[3]       of the position behind each
    accepted   c[0]    c[1]                   where c[0] == d[1] and c[1] != d[2]

Then n grows by 2, and what was computed at d[2] and d[3] is garbage: the next step begins with the
position of d[2] and writes over it before anything reads it.

Everything here is captured in a CUDA graph: shapes are fixed, and rows that take no further part
are replaced by the null row.
"""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from ..kernels import sample
from ..kernels import step as kernels
from ..kernels.drafts import begin_drafts, keep_accepted, put_drafts
from ..kernels.step import Inputs, TokenState
from . import sampler
from .batch import ForwardBatch, Sampled
from .deepseek import DeepseekV3
from .kv_cache import KVCache
from .mtp import MTP
from .rows import Rows


def empty_inputs(num_tokens: int, model: DeepseekV3) -> Inputs:
    return Inputs.empty(num_tokens, model.cos.shape[1], model.cos.device)


def fill_inputs(
    tokens: TokenState,
    lines: Tensor,
    drafts: Tensor | None,
    query_len: int,
    model: DeepseekV3,
    inputs: Inputs,
) -> tuple[Tensor, Tensor]:
    """Writes the first B * query_len of `inputs`: the newest token of each line and drafts behind
    it. lines: [B] int32 -> block_table [B, max_blocks] int32, seq_lens [B] int32."""
    most, device = tokens.block_table.shape[1], lines.device
    table = torch.empty(len(lines), most, dtype=torch.int32, device=device)
    seq_lens = torch.empty(len(lines), dtype=torch.int32, device=device)
    kernels.decode_inputs(
        tokens, lines, model.cos, model.sin, inputs, table, seq_lens, drafts, query_len
    )
    return table, seq_lens


Accepts = Callable[[Rows, Tensor, int], Tensor]
"""Rows, row of each line [B] int32, place of the draft from 0 -> which are accepted, [B] bool."""


def accept(
    logits: Tensor,
    lines: Tensor,
    num_decodes: int,
    query_len: int,
    rows: Rows,
    accepts: Accepts | None = None,
) -> Sampled:
    """Chooses a token for each line and appends it to the line's row; of a decode, for as long as
    its drafts are what is chosen (or what `accepts` says), up to `query_len` of them.

    logits: [num_decodes * query_len + chunks, V] float32; lines: [num_decodes + chunks] int32
    """
    if query_len == 1 or not num_decodes:
        return Sampled(logits, sampler.choose(logits, lines, rows))
    num_lines = num_decodes * query_len
    each = logits[:num_lines].view(num_decodes, query_len, -1)
    decodes = lines[:num_decodes]
    drafts = None if rows.relaxed is None else rows.drafts[decodes.long()]
    left, num_tokens = decodes, torch.empty_like(decodes)
    chosen: list[Tensor] = []
    for i in range(query_len - 1):
        nearby = None if drafts is None else drafts[:, i]
        chosen.append(sampler.choose(each[:, i], left, rows, nearby))
        agreed = None if accepts is None else accepts(rows, decodes, i)
        left = keep_accepted(left, chosen[-1], i, rows.drafts, rows.tokens, num_tokens, agreed)
    chosen.append(sampler.choose(each[:, -1], left, rows))
    token_ids = torch.stack(chosen, dim=1).flatten()
    if len(lines) > num_decodes:
        # A copy begins at an aligned address; for others the sampler would be compiled anew.
        of_chunks = sampler.choose(logits[num_lines:], lines[num_decodes:].clone(), rows)
        token_ids = torch.cat((token_ids, of_chunks))
    return Sampled(logits, token_ids, num_tokens)


def received(token_ids: Tensor, lines: Tensor, rows: Rows) -> Sampled:
    """Appends to each line's row the token that the last stage chose for it. token_ids: [S] int64;
    lines: [S] int32."""
    tokens, row = rows.tokens, lines.long()
    at = tokens.num_tokens[row].clamp(max=tokens.token_ids.shape[1] - 1)
    tokens.token_ids[row, at.long()] = token_ids.int()
    tokens.num_tokens[row] = at + 1
    return Sampled(None, token_ids)


def last_accepted(sampled: Sampled, num_decodes: int, query_len: int) -> Tensor:
    """[num_decodes] int64: of each decode, the index of its last token whose choice was accepted
    among the tokens computed."""
    num_tokens, device = num_decodes * query_len, sampled.token_ids.device
    if sampled.num_tokens is None:
        return torch.arange(0, num_tokens, query_len, device=device)
    return torch.arange(-1, num_tokens - 1, query_len, device=device) + sampled.num_tokens


class Drafter:
    """Runs the MTP layer behind the model, and writes `Rows.drafts`.

    A draft is chosen as the model's tokens are, with the noise of its own position, so that it is
    the model's choice wherever the two agree closely enough. Nothing of it is appended or counted.
    """

    def __init__(self, mtp: MTP, rows: Rows) -> None:
        self.mtp = mtp
        self.rows = rows
        self._ahead = torch.zeros_like(rows.tokens.num_computed)
        """[R] int32: the position that each row's next draft is computed at."""
        self._position = torch.zeros_like(self._ahead)
        """[R] int32: of the draft itself, whose noise it gets."""
        self._tokens = replace(rows.tokens, num_computed=self._ahead)
        self._choice = replace(rows.choice, num_tokens=self._position)

    def follow(
        self,
        hidden: Tensor,
        batch: ForwardBatch,
        lines: Tensor,
        last: Tensor,
        num_drafts: int,
        cache: KVCache,
    ) -> None:
        """Writes the layer's KV where the model was computed, so that it has no hole; then computes
        it for the last token but one of each of `lines`, and on from there, a draft each.

        hidden: [T, hidden] of the model; batch: its places, with the token behind each as input id
        lines: [S] int32, rows; last: [S] int64, where in `batch` each row's last token but one is
        """
        self.mtp.store(hidden, batch, cache)
        if not num_drafts or not len(lines):
            return
        rows, own = self.rows, batch.inputs.input_ids
        hidden, following = begin_drafts(
            hidden, own, last, lines, rows.tokens.num_tokens, self._ahead, self._position
        )
        for place in range(num_drafts):
            hidden = self.mtp.forward(hidden, self._next_batch(lines, following), cache)
            logits = self.mtp.model.logits(hidden)
            following = sample.sample_rows(logits, lines, self._choice)
            put_drafts(following, lines, place, rows.drafts, self._position)

    def _next_batch(self, lines: Tensor, following: Tensor) -> ForwardBatch:
        """The next position of each line, with the token behind it, [S] int64. What is read as the
        row's token there may not be known yet, and is not used."""
        inputs = empty_inputs(len(lines), self.mtp.model)
        where = fill_inputs(self._tokens, lines, None, 1, self.mtp.model, inputs)
        return ForwardBatch(inputs, len(lines), *where, None).following(following)
