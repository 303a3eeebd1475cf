"""Which prompts a step computes, and how much of each.

By (priority, arrival), those with a row and those that wait in one line:

    in turn    what a whole step could finish is computed when its turn comes
    long       the first that would take more: it ends the plan, with all that is left,
    passing    but up to half of that is for those behind it, of its priority, that need fewer
               steps: fewest first (1, 2, 3-4, 5-8, ...), in order of arrival among equals

So, while rows and blocks are free and steps have room for B tokens of prompts:

    a short prompt (<= B tokens) that is X tokens deep in the short ones has its first token after
    ceil(X / (B / 2)) steps, one more for each long prompt that ends meanwhile
    a long one of N tokens takes at most ceil(N / (B / 2)) steps once it is the first in line

Admission is in line too: one that does not fit is not overtaken, or it might wait for ever. One
that does, and only waits until a longer one before it is computed, may be passed by those for which
there is room beside it.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from math import ceil, sqrt

import msgspec

from ..ipc.messages import Join
from .prefix_cache import PrefixCache
from .request import Phase, Request
from .waiting import WaitingQueue, place_in_line

INFINITE = float("inf")
LOOKAHEAD = 256
"""How many that wait may be looked at for shorter ones: a step must not cost by the queue."""


@dataclass(slots=True)
class Room:
    """What is left of a step for prompts: tokens, and work.

    A token at position p is 1 + context_weight * p of work: attention reads what is before it.
    """

    num_tokens: int
    work: float
    context_weight: float = 0.0

    def is_full(self) -> bool:
        return self.num_tokens <= 0 or self.work < 1

    def half(self) -> "Room":
        return Room(self.num_tokens // 2, self.work / 2, self.context_weight)

    def holds(self, start: int, length: int) -> bool:
        return length <= self.num_tokens and self._cost(start, length) <= self.work

    def fitting(self, start: int) -> int:
        """How many tokens from position `start` on fit."""
        if not self.context_weight:
            return min(self.num_tokens, int(self.work))
        # length * (first + context_weight * length / 2) == work
        first = 1 + self.context_weight * start
        length = 2 * self.work / (first + sqrt(first**2 + 2 * self.context_weight * self.work))
        return min(self.num_tokens, int(length))

    def take(self, start: int, length: int) -> None:
        self.num_tokens -= length
        self.work = max(self.work - self._cost(start, length), 0.0)

    def size(self, start: int, length: int) -> int:
        """0: it fits; 1: into two of these; 2: into four; 3: into eight; ..."""
        num_steps = max(length / self.num_tokens, self._cost(start, length) / self.work)
        return (ceil(num_steps) - 1).bit_length()

    def _cost(self, start: int, length: int) -> float:
        return length * (1 + self.context_weight * (start + length / 2))


class StepLimit(msgspec.Struct, frozen=True):
    """How large a step may get while rows decode: each of them waits for its end."""

    work: float = INFINITE
    """Of decodes and prompts; a decode counts as 1."""
    context_weight: float = 0.0

    def room(self, max_num_tokens: int, num_decodes: int, least: int) -> Room:
        """For prompts, at least `least` of work; without decodes, the whole step."""
        num_tokens = max_num_tokens - num_decodes
        if not num_decodes or self.work == INFINITE:
            return Room(num_tokens, num_tokens)
        return Room(num_tokens, max(self.work - num_decodes, least), self.context_weight)


class PrefillPlan:
    """The prompts of one step."""

    def __init__(
        self,
        prefilling: Sequence[Request],
        waiting: WaitingQueue,
        room: Room,
        prefix_cache: PrefixCache,
        block_size: int,
        join: Callable[[Request], Join | None],
    ) -> None:
        """join: gives a waiting request row and blocks, if there are."""
        self.joins: list[Join] = []
        self._prefilling = prefilling
        self._waiting = waiting
        self._whole = Room(room.num_tokens, room.work, room.context_weight)
        self._room = room
        self._prefix_cache = prefix_cache
        self._block_size = block_size
        self._join = join
        self._may_join = True
        """Nobody who waits has been found not to fit."""
        self._may_look_up = True
        """Once a step: a long prompt takes a millisecond to hash."""

    def chunks(self) -> Iterator[tuple[Request, int]]:
        """(request, number of its next tokens to compute). The caller plans each before it asks for
        the next."""
        room = self._room
        if room.is_full():
            return
        for request in self._in_line():
            start, num_left = request.num_scheduled, request.num_left
            if room.holds(start, num_left):
                room.take(start, num_left)
                yield request, num_left
                if room.is_full():
                    return
                continue
            least = 1
            if size := self._whole.size(start, num_left):
                yield from self._passing(request, size)
                # Whatever it costs, or it might take for ever.
                least = min(self._block_size, room.num_tokens)
            yield request, min(max(room.fitting(start), least), num_left)
            return

    def _in_line(self) -> Iterator[Request]:
        for request in sorted(self._prefilling, key=place_in_line):
            yield from self._joining(request)
            yield request
        yield from self._joining(None)

    def _joining(self, before: Request | None) -> Iterator[Request]:
        """Those that wait and whose place is before the request's."""
        while self._may_join and self._waiting:
            first = self._waiting.first()
            if before is not None and place_in_line(before) < place_in_line(first):
                return
            if self._joined(first):
                yield first

    def _joined(self, request: Request) -> bool:
        join = self._join(request) if self._may_join else None
        if join is None:
            self._may_join = False
            return False
        self.joins.append(join)
        return True

    def _passing(self, long: Request, size: int) -> Iterator[tuple[Request, int]]:
        behind = [request for request in self._prefilling if request is not long]
        if self._may_join:
            behind += islice(self._waiting, LOOKAHEAD)
        shorter = [
            (own_size, request.arrival, request)
            for request in behind
            if request.priority == long.priority and (own_size := self._size(request)) < size
        ]
        share = self._room.half()
        for _, _, request in sorted(shorter):
            if share.is_full():
                return
            if request.phase is Phase.WAITING and not self._joined(request):
                continue
            start = request.num_scheduled
            length = min(max(share.fitting(start), 1), request.num_left)
            share.take(start, length)
            self._room.take(start, length)
            yield request, length

    def _size(self, request: Request) -> int:
        """Of what is left to compute; for one that waits, as far as is known."""
        start, num_left = request.num_scheduled, request.num_left
        size = self._whole.size(start, num_left)
        if size and request.phase is Phase.WAITING:
            if request.num_found < 0 and self._may_look_up:
                self._may_look_up = False
                num_blocks = self._prefix_cache.num_found(request)
                request.num_found = num_blocks * self._block_size
            start = max(request.num_found, 0)
            size = self._whole.size(start, num_left - start)
        return size
