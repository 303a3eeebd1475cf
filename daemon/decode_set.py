"""The rows that compute one token in every step, and what is due for them when.

A steady step must cost nothing per row to plan. All members advance together, one position a
tick (a tick is the seq of a step), so where a row stands follows from when it entered:

    num_scheduled(row) after tick t  =  offset + t        (step t writes position offset + t - 1)

and what will happen to it is known in advance. Three calendars hold the dates:

    grow    the step that writes the first position of a block that the row does not have yet
    fill    the step that writes the last position of a block: it can be cached after that
    end     the step that samples token number max_tokens: the row leaves when it is planned

A date is computed from the offset when the one before it fires. Accepting several tokens a
tick (MTP) moves the offset, and then a date that fires early is put off.
"""

from collections.abc import Iterator

from ..ipc.messages import Grow, pack_int32
from .blocks import BlockPool
from .request import Phase, Request
from .ticks import Calendar


class DecodeSet:
    def __init__(self, block_size: int) -> None:
        self._block_size = block_size
        self._active: dict[int, Request] = {}
        """By row: those that the next step decodes, in order of entry."""
        self._entered: dict[int, Request] = {}
        """By row: the active ones and the draining ones, whose blocks may still fill."""
        self._offsets: dict[int, int] = {}
        self._ends: dict[int, int] = {}
        self._grow = Calendar()
        self._fill = Calendar()
        self._end = Calendar()
        self._snapshot: tuple[list[Request], bytes] | None = ([], b"")

    def __len__(self) -> int:
        return len(self._active)

    @property
    def num_growing(self) -> int:
        """Rows that will need at least one more block."""
        return len(self._grow)

    def snapshot(self) -> tuple[list[Request], bytes]:
        """The members and `Step.decodes`; built anew only after a change, never changed later."""
        if self._snapshot is None:
            self._snapshot = (list(self._active.values()), pack_int32(self._active))
        return self._snapshot

    # ---- membership ----

    def enter(self, request: Request, tick: int, num_tokens: int) -> Phase:
        """Step `tick` computes the last of the row's `num_tokens` tokens and samples the next."""
        row = request.row
        offset = num_tokens - tick
        end = len(request.prompt_ids) + request.max_tokens - offset - 1
        self._entered[row] = request
        self._offsets[row] = offset
        self._ends[row] = end
        if end <= tick:
            return Phase.DRAINING
        self._active[row] = request
        self._snapshot = None
        self._end.arm(row, end)
        self._arm_growth(row, request)
        self._arm_fill(row, num_tokens // self._block_size)
        return Phase.DECODE

    def retire(self, tick: int) -> list[Request]:
        """The rows for which the step being planned is the last one."""
        rows = self._end.fire(tick)
        if rows:
            self._snapshot = None
        return [self._active.pop(row) for row in rows]

    def remove(self, request: Request) -> None:
        """The request has ended or is preempted: nothing is due any more."""
        row = request.row
        if self._entered.pop(row, None) is None:
            return
        if self._active.pop(row, None) is not None:
            self._snapshot = None
        del self._offsets[row], self._ends[row]
        for calendar in (self._grow, self._fill, self._end):
            calendar.disarm(row)

    # ---- dates ----

    def due_growth(self, tick: int) -> dict[int, None]:
        """Rows that need a block before step `tick`."""
        return self._grow.due(tick)

    def grow(self, tick: int, pool: BlockPool) -> tuple[Grow, ...]:
        """Gives a block to each row that is due. The caller has made sure that there are enough."""
        rows = self._grow.fire(tick)
        block_ids = pool.allocate(len(rows))
        for row, block_id in zip(rows, block_ids, strict=True):
            request = self._active[row]
            request.block_ids.append(block_id)
            self._arm_growth(row, request)
        return tuple(Grow(row, (block_id,)) for row, block_id in zip(rows, block_ids, strict=True))

    def filled(self, tick: int) -> Iterator[tuple[Request, int]]:
        """(request, index of a block) for each block whose last position step `tick` wrote."""
        for row in self._fill.fire(tick):
            num_full = (self._offsets[row] + tick) // self._block_size
            self._arm_fill(row, num_full)
            yield self._entered[row], num_full - 1

    def _arm_growth(self, row: int, request: Request) -> None:
        tick = len(request.block_ids) * self._block_size - self._offsets[row] + 1
        if tick <= self._ends[row]:
            self._grow.arm(row, tick)

    def _arm_fill(self, row: int, num_full: int) -> None:
        tick = (num_full + 1) * self._block_size - self._offsets[row]
        if tick <= self._ends[row]:
            self._fill.arm(row, tick)

    def check(self, planned: int, done: int) -> None:
        """Asserts the invariants, after step `planned` was planned and `done` was updated."""
        assert self._active.keys() <= self._entered.keys()
        assert self._entered.keys() == self._offsets.keys() == self._ends.keys()
        if self._snapshot is not None:
            assert self._snapshot == (list(self._active.values()), pack_int32(self._active))
        size, grow, fill = self._block_size, self._grow.dates(), self._fill.dates()
        assert self._end.dates() == {row: self._ends[row] for row in self._active}
        for row, request in self._entered.items():
            assert request.row == row, f"{row=} holds {request!r}"
            assert request.phase is (Phase.DECODE if row in self._active else Phase.DRAINING)
            offset, end = self._offsets[row], self._ends[row]
            if row in self._active:
                room = len(request.block_ids) * size
                assert planned < end
                assert offset + planned <= room, f"{request!r} writes past its blocks"
                next_growth = room - offset + 1
                assert grow.get(row) == (next_growth if next_growth <= end else None)
            if row in fill:
                assert done < fill[row] <= min(end, planned + size)
                assert (offset + fill[row]) % size == 0
