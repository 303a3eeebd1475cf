"""Who runs next.

Pure: no await, no clock, no randomness, no I/O. The engine calls

    add, abort, finish             as requests come and go
    schedule() -> Step | None      until it says None
    update(StepOutput) -> events   strictly in the order of the steps

and up to `pipeline_depth` steps are in flight, so step n+1 is planned before the tokens of step n
are known:

    schedule   1    2         3         4
    worker     | 1  |    2    |    3    |
    update              1         2         3

A request whose end is found in update(1) is therefore still in step 2: its token there is dropped,
and row and blocks return only in update(2).

    WAITING -> PREFILL -> DECODE -> DRAINING -> FINISHED      (aborts and stops from everywhere)
       ^----------+---------' preempted

In DECODE, `Request.num_scheduled` and `num_computed` stand still: see `DecodeSet`. With drafts a
step yields 1 to num_drafts + 1 tokens a row, so where a row stands is known only between bounds
while steps are in flight: it has the blocks for the fastest case, and goes on being planned until
it has ended in the slowest.
"""

from collections import deque

from ..ipc.messages import Chunk, Grow, Join, LogprobEntry, Step, StepOutput
from .blocks import BlockPool
from .decode_set import DecodeSet
from .drafting import DraftLength
from .flight import Flight
from .host_cache import HostCache
from .invariants import check_scheduler
from .prefill import PrefillPlan, StepLimit
from .prefix_cache import PrefixCache
from .request import FinishReason, Phase, Refused, Request, TokenEvent
from .results import accept, is_result_of, num_tokens_by_row
from .scheduler_stats import SchedulerStats
from .waiting import WaitingQueue, place_in_line


class Scheduler:
    def __init__(
        self,
        max_batch_size: int,
        max_num_tokens: int,
        max_seq_len: int,
        num_blocks: int,
        block_size: int,
        pipeline_depth: int = 2,
        epoch: int = 0,
        hash_key: bytes = b"",
        graph_batch_sizes: tuple[int, ...] = (),
        num_host_blocks: int = 0,
        num_nextn: int = 0,
        num_nextn_by_batch_size: tuple[tuple[int, int], ...] = (),
    ) -> None:
        assert min(max_batch_size, max_num_tokens, max_seq_len, pipeline_depth) >= 1
        assert num_nextn >= 0
        self.max_num_tokens = max_num_tokens
        self.max_seq_len = max_seq_len
        self.num_blocks = num_blocks
        self.num_host_blocks = num_host_blocks
        self.block_size = block_size
        self.pipeline_depth = pipeline_depth
        self.step_limit = StepLimit()
        """Set by the engine, which knows how long steps take."""
        # Every decoding row takes a token of every step's budget.
        self.max_num_rows = min(max_batch_size, max_num_tokens)
        self.num_nextn = num_nextn
        self.lookahead = max(num_nextn - 1, 0)
        """Drafting num_nextn tokens, the draft layer writes so far past the newest known one."""
        self.overrun = pipeline_depth * num_nextn + self.lookahead
        """Positions past a request's last one that steps in flight may write."""
        self._num_nextn_by_batch_size = num_nextn_by_batch_size
        self._hash_key = hash_key
        self._padded_sizes = _padded_sizes(self.max_num_rows, graph_batch_sizes)
        self._num_arrivals = 0
        self._num_preemptions = 0
        self._num_prompt_tokens = 0
        self._num_cached_tokens = 0
        self._begin(epoch)

    def _begin(self, epoch: int) -> None:
        """The state that lives as long as the worker's."""
        self.epoch = epoch
        self._planned = 0
        """Seq of the newest step."""
        self._done = 0
        """Seq of the newest step whose result is known."""
        self._in_flight: deque[Flight] = deque()
        self._host: HostCache | None = None
        if self.num_host_blocks:
            self._host = HostCache(self.num_host_blocks, self.num_blocks)
        self._pool = BlockPool(self.num_blocks, self.block_size, self._hash_key, self._host)
        self._prefix_cache = PrefixCache(self._pool, self._host, has_drafts=self.num_nextn > 0)
        self._requests: dict[str, Request] = {}
        """Every request without its terminal event."""
        self._waiting = WaitingQueue()
        self._prefilling: list[Request] = []
        self._decoding = DecodeSet(self.block_size, self.overrun, self.lookahead)
        self._drafts = DraftLength(self.num_nextn, self._num_nextn_by_batch_size)
        self._num_next_drafts = 0
        """Those that the newest step makes for each of its rows."""
        self._rows: list[Request | None] = [None] * self.max_num_rows
        self._free_rows = list(range(self.max_num_rows - 1, -1, -1))
        self._last_steps = [0] * self.max_num_rows
        """Seq of the last step that holds the row. Rows in DECODE are in every step."""
        self._num_scored: dict[str, int] = {}
        """For those that want prompt log-probabilities: of how many tokens they were delivered."""

    # ---- requests come and go ----

    def add(self, request: Request) -> None:
        """Queues a request and clamps its `max_tokens`. Raises `Refused` if it can never fit."""
        num_prompt_tokens = len(request.prompt_ids)
        capacity = (self.num_blocks - 1) * self.block_size - self.overrun
        if not num_prompt_tokens:
            raise Refused("the prompt has no tokens")
        if num_prompt_tokens >= self.max_seq_len:
            raise Refused(f"{num_prompt_tokens=} >= max_seq_len={self.max_seq_len}")
        if num_prompt_tokens + min(request.max_tokens, 1) > capacity:
            raise Refused(f"{num_prompt_tokens=} do not fit the KV cache of {capacity} tokens")
        assert request.request_id not in self._requests, f"{request!r} was added before"
        assert request.phase is Phase.WAITING
        assert request.max_tokens >= 0
        room = min(self.max_seq_len, capacity) - num_prompt_tokens
        request.max_tokens = min(request.max_tokens, room)
        self._num_arrivals += 1
        request.arrival = self._num_arrivals
        self._requests[request.request_id] = request
        self._waiting.push(request)

    def abort(
        self, request_id: str, reason: FinishReason = FinishReason.ABORT, message: str = ""
    ) -> TokenEvent | None:
        """The client went away. None: the request has ended before."""
        request = self._requests.get(request_id)
        if request is None:
            return None
        self._end(request)
        return TokenEvent(request, -1, finish=reason, message=message)

    def finish(self, request_id: str) -> TokenEvent | None:
        """A stop string was found downstream. None: the request has ended before."""
        return self.abort(request_id, FinishReason.STOP)

    def reset(self, epoch: int, message: str = "the worker was lost") -> list[TokenEvent]:
        """A new worker holds nothing: every request ends, every block and step is forgotten."""
        assert epoch > self.epoch, f"{epoch=} <= {self.epoch=}"
        events = []
        for request in self._requests.values():
            request.phase, request.row, request.block_ids = Phase.FINISHED, -1, []
            events.append(TokenEvent(request, -1, finish=FinishReason.ERROR, message=message))
        self._begin(epoch)
        return events

    def _end(self, request: Request) -> None:
        """No event follows the one that the caller returns."""
        last_step = self._last_step(request)
        if request.phase is Phase.WAITING:
            self._waiting.remove(request)
        elif request.phase is Phase.PREFILL:
            self._prefilling.remove(request)
        self._decoding.remove(request)
        self._num_scored.pop(request.request_id, None)
        del self._requests[request.request_id]
        request.phase = Phase.FINISHED
        if last_step > self._done:
            self._in_flight[last_step - self._done - 1].releases.append(request)
        else:
            self._release(request)

    def _last_step(self, request: Request) -> int:
        if request.phase is Phase.DECODE:
            return self._planned
        return self._last_steps[request.row] if request.row >= 0 else 0

    def _release(self, request: Request) -> None:
        """No step in flight holds the request: its row and blocks are free for others."""
        if request.row >= 0:
            self._rows[request.row] = None
            self._free_rows.append(request.row)
            request.row = -1
        self._pool.free(request.block_ids)
        request.block_ids = []

    # ---- planning ----

    def schedule(self) -> Step | None:
        """The next step, or None: nothing to do, enough in flight, or results must come first."""
        if len(self._in_flight) >= self.pipeline_depth or not self._requests:
            return None
        if self.num_nextn:
            self._drain(self._decoding.settle())
        num_drafts = self._num_drafts()
        grows = self._grow(num_drafts)
        if grows is None:
            return None
        decoding, decodes = self._decoding.snapshot()
        flight = Flight(self._planned + 1, decoding, num_drafts)
        joins = self._plan_prompts(flight) if self._prefilling or self._waiting else []
        if not decoding and not flight.chunks:
            return None
        return self._commit(flight, tuple(joins), grows, decodes)

    def _commit(
        self, flight: Flight, joins: tuple[Join, ...], grows: tuple[Grow, ...], decodes: bytes
    ) -> Step:
        """The step is certain: time goes on."""
        self._planned = seq = flight.seq
        self._in_flight.append(flight)
        self._drain(self._decoding.advance(flight.num_drafts))
        if self.num_nextn:
            # No more than can be verified, so that steps of one length follow each other.
            wanted = self._drafts.choose(len(self._decoding))
            self._num_next_drafts = self._within_tokens(wanted)
        num_decoding = len(flight.decoding)
        chunks = tuple([chunk for _, chunk in flight.chunks])
        mode = "decode" if not chunks else "mixed" if num_decoding else "prefill"
        copies = ((), ()) if self._host is None else self._host.take(self._pool.num_available)
        return Step(
            self.epoch, seq, mode, self._padded_sizes[num_decoding], joins, grows, decodes, chunks,
            flight.num_drafts, self._num_next_drafts, *copies
        )  # fmt: skip

    def _drain(self, requests: list[Request]) -> None:
        """The steps in flight bring all that these may generate."""
        for request in requests:
            request.phase = Phase.DRAINING
            self._last_steps[request.row] = self._planned

    def _num_drafts(self) -> int:
        """Of the next step: those that the step before makes, as far as there is room. Nobody is
        preempted for a draft."""
        num_drafts = self._within_tokens(self._num_next_drafts)
        if num_drafts and len(self._decoding):
            num_blocks = sum(self._decoding.due_growth(num_drafts).values())
            return num_drafts if num_blocks <= self._pool.num_available else 0
        return 0

    def _within_tokens(self, num_drafts: int) -> int:
        """At most half of the tokens that a step has for prompts go to drafts."""
        num_rows = max(len(self._decoding), 1)
        return min(num_drafts, (self.max_num_tokens - num_rows) // (2 * num_rows))

    def _grow(self, num_drafts: int) -> tuple[Grow, ...] | None:
        """Blocks for the decoding rows that need some now; None: wait for results."""
        due = self._decoding.due_growth(num_drafts)
        while sum(due.values()) > self._pool.num_available:
            victim = self._victim(due)
            if victim is None:
                return None
            self._preempt(victim)
            due = self._decoding.due_growth(num_drafts)
        return self._decoding.grow(num_drafts, due, self._pool) if due else ()

    def _victim(self, due: dict[int, int]) -> Request | None:
        """The last in line of those that could give or want a block; None while it has a result
        outstanding. It may be the one that wants: nobody yields to a newer one."""
        concerned = [
            request
            for request in (*self._prefilling, *self._decoding.snapshot()[0])
            if request.row in due or self._last_step(request) <= self._done
        ]
        victim = max(concerned, key=place_in_line)
        return None if self._last_step(victim) > self._done else victim

    def _preempt(self, request: Request) -> None:
        """Back into the queue, to be computed anew from what the cache still holds then."""
        if request.phase is Phase.PREFILL:
            self._prefilling.remove(request)
        self._decoding.remove(request)
        self._release(request)
        request.phase = Phase.WAITING
        request.num_scheduled = request.num_computed = 0
        request.num_found = -1
        request.num_preemptions += 1
        self._num_preemptions += 1
        self._waiting.push(request)

    def _plan_prompts(self, flight: Flight) -> list[Join]:
        num_decodes = len(flight.decoding) * (1 + flight.num_drafts)
        size = self.block_size
        room = self.step_limit.room(self.max_num_tokens, num_decodes, size)
        plan = PrefillPlan(
            self._prefilling, self._waiting, room, self._prefix_cache, size, self._admit
        )
        for request, length in plan.chunks():
            self._plan_chunk(flight, request, length)
        return plan.joins

    def _plan_chunk(self, flight: Flight, request: Request, length: int) -> None:
        """The next slice of the request's tokens."""
        start = request.num_scheduled
        is_last = start + length == request.num_tokens
        sample = is_last and request.max_tokens > 0
        flight.chunks.append((request, Chunk(request.row, start, length, sample)))
        request.num_scheduled = start + length
        self._last_steps[request.row] = flight.seq
        if sample:
            flight.prefilled.append(request)
        if is_last:
            self._prefilling.remove(request)
            request.phase = self._decoding.enter(request, flight.num_drafts)

    # ---- admission ----

    def _admit(self, request: Request) -> Join | None:
        """One that passes others leaves a row for the first of them, and its blocks, and a block
        more for each of the two, should they grow."""
        first = self._waiting.first()
        if request is first:
            return self._join(request, 0) if self._free_rows else None
        num_spare = -(-first.num_left // self.block_size) + 2
        return self._join(request, num_spare) if len(self._free_rows) > 1 else None

    def _join(self, request: Request, num_spare: int) -> Join | None:
        """Gives the request its row and blocks; None: too few blocks now to leave `num_spare`."""
        token_bytes = self._prefix_cache.token_bytes(request)
        num_tokens = len(token_bytes) // 4 + self.lookahead
        cached = self._prefix_cache.find(request)
        num_needed = -(-num_tokens // self.block_size) - len(cached)
        num_left = self._pool.num_available - self._pool.num_idle(cached) - num_needed
        if num_left < num_spare + self._headroom(request, num_needed + len(cached)):
            return None
        num_restored = self._prefix_cache.assign(request, cached, num_needed)
        request.row = row = self._free_rows.pop()
        self._rows[row] = request
        self._waiting.remove(request)
        self._prefilling.append(request)
        num_cached_tokens = (len(cached) + num_restored) * self.block_size
        self._count_admission(request, num_cached_tokens)
        request.phase = Phase.PREFILL
        request.num_scheduled = request.num_computed = num_cached_tokens
        block_table = tuple(request.block_ids)
        num_prompt_tokens = len(request.prompt_ids)
        return Join(
            row, token_bytes, num_prompt_tokens, num_cached_tokens, block_table, request.sampling
        )

    def _headroom(self, request: Request, num_blocks: int) -> int:
        """Blocks to leave: one for each running row that will need another, so that nobody is
        preempted for at least `block_size` tokens. A request alone always fits: see `add`."""
        grows = request.num_final + self.overrun > num_blocks * self.block_size
        return self._decoding.num_growing + len(self._prefilling) + grows

    def _count_admission(self, request: Request, num_cached_tokens: int) -> None:
        if not request.num_preemptions:
            request.num_cached_tokens = num_cached_tokens
            self._num_cached_tokens += num_cached_tokens
            self._num_prompt_tokens += len(request.prompt_ids)

    # ---- results ----

    def expects(self, output: StepOutput) -> bool:
        """Whether this is the result of the oldest step in flight, with tokens for each row."""
        return bool(self._in_flight) and is_result_of(self._in_flight[0], output)

    def update(self, output: StepOutput) -> list[TokenEvent]:
        """What a step did, an event for each token; of older epochs, nothing."""
        if output.epoch < self.epoch:
            return []
        flight = self._in_flight.popleft()
        assert (output.epoch, output.seq) == (self.epoch, flight.seq)
        self._done = flight.seq
        events: list[TokenEvent] = []
        for i, (request, chunk) in enumerate(flight.chunks):
            if request.phase is not Phase.FINISHED:
                self._chunk_done(request, chunk, output.prompt_logprobs.get(i, ()), events)
        ended = accept(flight, output, events, dates_are_exact=not self.num_nextn)
        if self.num_nextn:
            self._drafts.note(flight.num_drafts, num_tokens_by_row(flight, output))
        for request, first, stop in self._decoding.filled(flight.num_drafts):
            self._prefix_cache.store(request, first, stop)
        for request in ended:
            self._end(request)
        for request in flight.releases:
            self._release(request)
        return events

    def _chunk_done(
        self,
        request: Request,
        chunk: Chunk,
        prompt_logprobs: tuple[LogprobEntry, ...],
        events: list[TokenEvent],
    ) -> None:
        end = chunk.start + chunk.num_tokens
        request.num_computed = end
        size = self.block_size
        self._prefix_cache.store(request, chunk.start // size, end // size)
        if request.sampling.num_prompt_logprobs >= 0:
            # What was delivered before a preemption is not delivered again.
            num_scored = self._num_scored.get(request.request_id, 0)
            prompt_logprobs = prompt_logprobs[max(num_scored - chunk.start, 0) :]
            self._num_scored[request.request_id] = max(num_scored, end)
        finish = None
        if request.max_tokens == 0 and end == len(request.prompt_ids):
            finish = FinishReason.LENGTH
            self._end(request)
        if prompt_logprobs or finish:
            events.append(TokenEvent(request, -1, None, prompt_logprobs, finish))

    # ---- looking ----

    @property
    def has_work(self) -> bool:
        """A request is live, or a result is outstanding."""
        return bool(self._requests or self._in_flight)

    @property
    def num_running(self) -> int:
        """Live requests that have a row."""
        return len(self._requests) - len(self._waiting)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    def stats(self) -> SchedulerStats:
        return SchedulerStats(
            num_running=self.num_running,
            num_waiting=self.num_waiting,
            num_in_flight=len(self._in_flight),
            num_blocks=self.num_blocks - 1,
            num_free_blocks=self._pool.num_free,
            num_held_blocks=self._pool.num_held,
            num_cached_blocks=self._pool.num_cached,
            num_prompt_tokens=self._num_prompt_tokens,
            num_cached_tokens=self._num_cached_tokens,
            num_preemptions=self._num_preemptions,
            host=None if self._host is None else self._host.stats(self.block_size),
            drafts=self._drafts.stats() if self.num_nextn else None,
        )

    def check(self) -> None:
        """Asserts every invariant; see there for which."""
        check_scheduler(self)


def _padded_sizes(max_num_rows: int, graph_batch_sizes: tuple[int, ...]) -> list[int]:
    """By number of decodes: the smallest graph that holds them; none does: the number itself."""
    sizes = sorted(graph_batch_sizes)
    return [0] + [next((s for s in sizes if s >= n), n) for n in range(1, max_num_rows + 1)]
