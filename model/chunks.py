"""The chunks of a step, laid out for one forward pass."""

from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate

import numpy as np
from torch import Tensor

from ..ipc.messages import Chunk
from .batch import Context, Prefills, PrefillSlice
from .rows import Delta, Words

CONTEXT_TOKENS = 4096
"""Cached tokens that are up-projected at once; bounds the memory of a long prefix."""

Pieces = list[tuple[int, int, int]]
"""(chunk, first cached token, behind the last)."""


class ChunkPlan:
    """Where the tokens of a step's chunks lie behind its decodes, as vectors that travel with the
    step's delta and come back by `prefills`."""

    def __init__(
        self, delta: Delta, chunks: Sequence[Chunk], decodes: Words, query_len: int
    ) -> None:
        """decodes: rows, of which `query_len` tokens each are computed."""
        sizes = [chunk.num_tokens for chunk in chunks]
        before = len(decodes) * query_len
        ends = list(accumulate(sizes, initial=before))
        self.chunks = chunks
        self.first_tokens = ends[:-1]
        """Of each chunk, the index of its first token in the pass."""
        self.num_decodes = len(decodes)
        self.num_tokens = ends[-1]
        self.max_tokens = max(sizes)
        self.sampled = [chunk.row for chunk in chunks if chunk.sample]
        """Rows of chunks whose next token is wanted."""
        self._table = delta.carry(
            _ints(
                value
                for chunk, first in zip(chunks, self.first_tokens, strict=True)
                for value in (chunk.row, chunk.start, chunk.num_tokens, first)
            )
        )
        self._bounds = delta.carry(_ints(end - before for end in ends))
        last = [end - 1 for chunk, end in zip(chunks, ends[1:], strict=True) if chunk.sample]
        self._lines = delta.carry(np.concatenate((decodes, _ints(self.sampled))))
        self._wanted = delta.carry(_ints((*range(before), *last)))
        self._contexts = [
            (pieces, delta.carry(_bounds_of(pieces, len(chunks))))
            for pieces in _slices([chunk.start for chunk in chunks], CONTEXT_TOKENS)
        ]

    def table(self, carried: Tensor) -> Tensor:
        """As `kernels.step.chunk_inputs` takes it. `carried`: what `Delta.send` returned."""
        return carried[self._table].view(-1, 4)

    def lines(self, carried: Tensor) -> tuple[Tensor, Tensor]:
        """Of everything whose token is wanted, decodes first: its row [decodes + chunks] int32, and
        the indices of its tokens in the pass [decodes * query_len + chunks] int64."""
        return carried[self._lines], carried[self._wanted].long()

    def prefills(self, carried: Tensor, block_table: Tensor) -> Prefills:
        """block_table: [R, max_blocks] of all rows."""
        return Prefills(
            slices=tuple(
                PrefillSlice(first, chunk.num_tokens, chunk.start, block_table[chunk.row])
                for chunk, first in zip(self.chunks, self.first_tokens, strict=True)
            ),
            cu_seqlens=carried[self._bounds],
            max_tokens=self.max_tokens,
            contexts=tuple(
                Context(tuple(pieces), carried[bounds]) for pieces, bounds in self._contexts
            ),
        )


def _slices(cached: Sequence[int], most: int) -> Iterator[Pieces]:
    """Cuts the cached tokens of all chunks into slices of `most`, in order."""
    pieces: Pieces = []
    room = most
    for chunk, count in enumerate(cached):
        start = 0
        while start < count:
            stop = min(count, start + room)
            pieces.append((chunk, start, stop))
            room -= stop - start
            start = stop
            if not room:
                yield pieces
                pieces, room = [], most
    if pieces:
        yield pieces


def _bounds_of(pieces: Pieces, num_chunks: int) -> Words:
    sizes = [0] * num_chunks
    for chunk, start, stop in pieces:
        sizes[chunk] += stop - start
    return _ints(accumulate(sizes, initial=0))


def _ints(values: Iterable[int]) -> Words:
    return np.fromiter(values, np.int32)
