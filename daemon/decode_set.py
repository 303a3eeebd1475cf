"""The rows that decode in every step, and what is due for them when.

A steady step must cost nothing per row to plan. All members advance together, so where a row stands
follows from when it entered. Time is counted in ticks: a step that verifies k drafts takes k + 1
of them, for the k + 1 tokens that it yields at most, and any other step takes one:

    num_drafts of the steps        0     2           1
    ticks                       |  1  |  2  3  4  |  5  6  |
                                      ^ _clock of the first step

    num_scheduled(row) at tick t  <=  offset + t        (a step writes up to offset + _clock - 1)

What will happen to a row is known in advance. Three calendars hold the dates:

    grow    positions of a block that the row does not have yet may be written
    fill    the last position of a block may have been computed: it can be cached then
    end     token number max_tokens may be sampled: the row leaves when the step is planned

The dates are the earliest possible ones: as if every draft were accepted. Without drafts they are
exact. A rejected draft lowers the offset and so puts a date off, but nobody looks at it until it
fires; then it is computed anew from what is known by then. Whether a row has ended must be certain
before it leaves, so near its end the slowest case is asked too: a token a step.
"""

from collections.abc import Iterator
from itertools import islice

from ..ipc.messages import Grow, pack_int32
from .blocks import BlockPool
from .request import Phase, Request
from .ticks import Calendar


class DecodeSet:
    """`overrun`: positions past a row's last one that steps may write before its end is known.
    `lookahead`: positions past those of the newest tokens that the draft layer writes."""

    def __init__(self, block_size: int, overrun: int = 0, lookahead: int = 0) -> None:
        self._block_size = block_size
        self._overrun = overrun
        self._lookahead = lookahead
        self._active: dict[int, Request] = {}
        """By row: those that the next step decodes, in order of entry."""
        self._entered: dict[int, Request] = {}
        """By row: the active ones and the draining ones, whose blocks may still fill."""
        self._entries: dict[int, tuple[int, int]] = {}
        """By row: seq and clock just before it sampled its first token here."""
        self._offsets: dict[int, int] = {}
        """By row, as they were when a date was last computed."""
        self._finals: dict[int, int] = {}
        """By row: `Request.num_final`."""
        self._num_full: dict[int, int] = {}
        """By row: blocks known to be full."""
        self._grow = Calendar()
        self._fill = Calendar()
        self._end = Calendar()
        self._planned, self._clock = 0, 0
        """Seq of the newest step, and the last of its ticks."""
        self._done, self._done_clock = 0, 0
        """The same of the newest step whose tokens are known."""
        self._snapshot: tuple[list[Request], bytes] | None = ([], b"")

    def __len__(self) -> int:
        return len(self._active)

    @property
    def num_growing(self) -> int:
        """Rows that may need at least one more block."""
        return len(self._grow)

    def snapshot(self) -> tuple[list[Request], bytes]:
        """The members and `Step.decodes`; built anew only after a change, never changed later."""
        if self._snapshot is None:
            self._snapshot = (list(self._active.values()), pack_int32(self._active))
        return self._snapshot

    # ---- membership ----

    def enter(self, request: Request, num_drafts: int) -> Phase:
        """The step being planned, which verifies so many drafts of the others, computes the last of
        the row's tokens and samples the next."""
        row, num_tokens, num_final = request.row, request.num_tokens, request.num_final
        self._entered[row] = request
        self._entries[row] = self._planned, self._clock + num_drafts
        self._finals[row] = num_final
        self._num_full[row] = num_tokens // self._block_size
        self._look_at(row)
        if num_tokens >= num_final:
            return Phase.DRAINING
        self._active[row] = request
        self._snapshot = None
        self._end.arm(row, num_final - self._offsets[row])
        self._arm_growth(row, request)
        self._arm_fill(row)
        return Phase.DECODE

    def advance(self, num_drafts: int) -> list[Request]:
        """A step is planned. Returns those for which it is certainly the last one."""
        first_tick = self._clock + 1
        self._planned += 1
        self._clock = first_tick + num_drafts
        return self._retire(first_tick, self._clock)

    def settle(self) -> list[Request]:
        """Those that turned out to need no step beyond the ones in flight."""
        return self._retire(self._clock + 1, self._clock + 1)

    def _retire(self, first_tick: int, last_tick: int) -> list[Request]:
        retired = []
        for row in self._end.fire(first_tick, last_tick):
            request = self._entered[row]
            num_in_flight = self._planned - max(self._done, self._entries[row][0])
            if len(request.output_ids) + num_in_flight >= request.max_tokens:
                retired.append(self._active.pop(row))
                self._grow.disarm(row)
            else:
                self._look_at(row)
                date = self._finals[row] - self._offsets[row]
                self._end.arm(row, max(date, self._clock + 1))
        if retired:
            self._snapshot = None
        return retired

    def remove(self, request: Request) -> None:
        """The request has ended or is preempted: nothing is due any more."""
        row = request.row
        if self._entered.pop(row, None) is None:
            return
        if self._active.pop(row, None) is not None:
            self._snapshot = None
        del self._entries[row], self._offsets[row], self._finals[row], self._num_full[row]
        for calendar in (self._grow, self._fill, self._end):
            calendar.disarm(row)

    # ---- dates ----

    def due_growth(self, num_drafts: int) -> dict[int, int]:
        """By row: the blocks that must be added before a step that verifies so many drafts."""
        size, clock = self._block_size, self._clock + 1 + num_drafts
        rows = self._grow.due(self._clock + 1, clock)
        if not self._overrun:
            return dict.fromkeys(rows, 1)
        due = {}
        for row in rows:
            self._look_at(row)
            request = self._active[row]
            num_positions = self._offsets[row] + clock + self._lookahead
            num_needed = -(-num_positions // size) - len(request.block_ids)
            if num_needed > 0:
                due[row] = num_needed
            else:
                self._grow.disarm(row)
                self._arm_growth(row, request)
        return due

    def grow(self, num_drafts: int, due: dict[int, int], pool: BlockPool) -> tuple[Grow, ...]:
        """Gives the rows their blocks. The caller has made sure that there are enough."""
        grows = []
        fresh = iter(pool.allocate(sum(due.values())))
        for row in self._grow.fire(self._clock + 1, self._clock + 1 + num_drafts):
            request = self._active[row]
            block_ids = tuple(islice(fresh, due[row]))
            request.block_ids += block_ids
            self._arm_growth(row, request)
            grows.append(Grow(row, block_ids))
        return tuple(grows)

    def filled(self, num_drafts: int) -> Iterator[tuple[Request, int, int]]:
        """(request, first, stop) of the blocks whose last positions the next step in line computed.
        Its tokens have been accepted, and those that ended with it are still here."""
        first_tick = self._done_clock + 1
        self._done += 1
        self._done_clock = first_tick + num_drafts
        for row in self._fill.fire(first_tick, self._done_clock):
            if self._overrun:
                self._look_at(row)
            first = self._num_full[row]
            stop = (self._offsets[row] + self._done_clock) // self._block_size
            self._num_full[row] = stop
            self._arm_fill(row)
            if first < stop:
                yield self._entered[row], first, stop

    def _look_at(self, row: int) -> None:
        """Computes the offset anew. Where the row's first step here is still in flight, that step
        adds exactly one token."""
        known_at = max(self._entries[row][1], self._done_clock)
        self._offsets[row] = self._entered[row].num_tokens - 1 - known_at

    def _arm_growth(self, row: int, request: Request) -> None:
        room = len(request.block_ids) * self._block_size
        if room < self._finals[row] + self._overrun:
            self._grow.arm(row, room - self._lookahead - self._offsets[row] + 1)

    def _arm_fill(self, row: int) -> None:
        num_tokens = (self._num_full[row] + 1) * self._block_size
        if num_tokens <= self._finals[row]:
            self._fill.arm(row, num_tokens - self._offsets[row])

    def check(self, planned: int, done: int) -> None:
        """Asserts the invariants, after step `planned` was planned and `done` was updated."""
        assert (self._planned, self._done) == (planned, done)
        assert planned - done <= self._clock - self._done_clock
        assert self._active.keys() <= self._entered.keys() == self._entries.keys()
        assert self._entered.keys() == self._offsets.keys() == self._finals.keys()
        if self._snapshot is not None:
            assert self._snapshot == (list(self._active.values()), pack_int32(self._active))
        grow, fill, end = self._grow.dates(), self._fill.dates(), self._end.dates()
        assert grow.keys() <= end.keys() == self._active.keys()
        assert fill.keys() <= self._num_full.keys() == self._entered.keys()
        for row, request in self._entered.items():
            assert request.row == row, f"{row=} holds {request!r}"
            assert request.phase is (Phase.DECODE if row in self._active else Phase.DRAINING)
            assert self._finals[row] == request.num_final
            offset = request.num_tokens - 1 - max(self._entries[row][1], self._done_clock)
            assert offset == self._offsets[row] or self._overrun
            assert offset <= self._offsets[row]
            if row in self._active:
                assert self._clock < end[row] <= max(request.num_final - offset, self._clock + 1)
                self._check_growth(request, offset, grow.get(row))
            if row in fill:
                earliest = (self._num_full[row] + 1) * self._block_size - offset
                assert self._done_clock < fill[row] <= earliest

    def _check_growth(self, request: Request, offset: int, date: int | None) -> None:
        num_written = offset + self._clock + self._lookahead
        room = len(request.block_ids) * self._block_size
        limit = request.num_final + self._overrun
        assert num_written <= room, f"{request!r} writes past its blocks"
        assert num_written <= limit, f"{request!r} runs too far past its end"
        assert (date is None) == (room >= limit)
        assert date is None or self._clock < date <= room - self._lookahead - offset + 1
