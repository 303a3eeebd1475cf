"""Rows of a Runner, driven without a scheduler: what tests and measurements of drafting need.

Every row gets its blocks when it joins, and is computed until it has its tokens. How many drafts a
step verifies and makes is the caller's choice, step by step.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from ..ipc.messages import (
    Chunk,
    Join,
    LogprobEntry,
    Sampling,
    Step,
    StepOutput,
    pack_int32,
    unpack_int32,
)
from ..model.runner import Runner


@dataclass
class HandRow:
    prompt: list[int]
    max_tokens: int
    chunk_size: int
    stop_token_ids: frozenset[int]
    num_prefilled: int = 0
    ended: bool = False
    token_ids: list[int] = field(default_factory=list)
    """Generated; what comes behind the end is dropped."""
    logprobs: list[LogprobEntry] = field(default_factory=list)
    accepted: list[int] = field(default_factory=list)
    """Tokens of each decode step."""

    @property
    def prefills(self) -> bool:
        return self.num_prefilled < len(self.prompt)

    def take(self, token_id: int) -> None:
        if not self.ended:
            self.token_ids.append(token_id)
            full = len(self.token_ids) == self.max_tokens
            self.ended = full or token_id in self.stop_token_ids


class HandDriver:
    def __init__(self, runner: Runner, spare: int | None = None) -> None:
        """spare: positions that a row has blocks for behind its tokens. A step may verify drafts
        there, whose tokens are dropped, and draft beyond that."""
        self.runner = runner
        self.spare = 2 * (runner.rows.num_nextn + 1) if spare is None else spare
        self.rows: list[HandRow] = []
        self._joins: list[Join] = []
        self._next_block = 1
        self._seq = 0

    def add(
        self,
        prompt: list[int],
        max_tokens: int,
        sampling: Sampling,
        chunk_size: int = 512,
        stop_token_ids: frozenset[int] = frozenset(),
    ) -> HandRow:
        """A new row, which joins with the next step."""
        row = HandRow(prompt, max_tokens, chunk_size, stop_token_ids)
        size = self.runner.cache.block_size
        longest = len(prompt) + max_tokens + self.spare
        blocks = range(self._next_block, self._next_block - (-longest // size))
        assert blocks.stop <= self.runner.cache.num_blocks, (blocks, self.runner.cache.num_blocks)
        self._next_block = blocks.stop
        # From the last to the first, so that places in the cache are not in the tokens' order.
        table = tuple(reversed(blocks))
        self._joins.append(
            Join(len(self.rows), pack_int32(prompt), len(prompt), 0, table, sampling)
        )
        self.rows.append(row)
        return row

    def step(self, num_drafts: int = 0, num_next_drafts: int = 0) -> StepOutput:
        """A chunk of each prompt that is not computed, and a decode of every other row."""
        decodes = [i for i, row in enumerate(self.rows) if not (row.prefills or row.ended)]
        chunks = []
        for i, row in enumerate(self.rows):
            if row.prefills:
                stop = min(row.num_prefilled + row.chunk_size, len(row.prompt))
                last = stop == len(row.prompt)
                chunks.append(Chunk(i, row.num_prefilled, stop - row.num_prefilled, last))
                row.num_prefilled = stop
        self._seq += 1
        mode = "decode" if not chunks else "mixed" if decodes else "prefill"
        step = Step(
            0, self._seq, mode, len(decodes), tuple(self._joins), (), pack_int32(decodes),
            tuple(chunks), num_drafts, num_next_drafts,
        )  # fmt: skip
        self._joins = []
        output = self.runner.run(step)
        self._take(output, decodes, [chunk.row for chunk in chunks if chunk.sample])
        return output

    def _take(self, output: StepOutput, decodes: Sequence[int], sampled: Sequence[int]) -> None:
        token_ids = unpack_int32(output.token_ids)
        rows = [*decodes, *sampled]
        counts = list(unpack_int32(output.num_tokens)) or [1] * len(rows)
        assert len(counts) == len(rows) and sum(counts) == len(token_ids), (counts, token_ids)
        index = 0
        for i, count in zip(rows, counts, strict=True):
            row = self.rows[i]
            if i in decodes:
                row.accepted.append(count)
            for _ in range(count):
                if not row.ended and index in output.logprobs:
                    row.logprobs.append(output.logprobs[index])
                row.take(token_ids[index])
                index += 1

    def run(
        self,
        num_drafts: int = 0,
        num_next_drafts: int | None = None,
        before_step: Callable[[], None] = lambda: None,
    ) -> list[list[int]]:
        """Until every row has ended; what each generated."""
        while not all(row.ended for row in self.rows):
            before_step()
            self.step(num_drafts, num_drafts if num_next_drafts is None else num_next_drafts)
        return [row.token_ids for row in self.rows]
