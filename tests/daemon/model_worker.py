"""A worker that computes nothing but keeps books, and a harness that compares the scheduler with
what it sees.

The "KV" of a position is a fingerprint of the salt and of every token up to that position, so a
block with the right tokens after a wrong prefix is as wrong as one with wrong tokens. What was
computed for a rejected draft is POISON. The draft layer has a KV of its own.

Which token a request gets next depends on the request and on how many it has, and on nothing else:
so whatever is drafted, and whoever else runs, its tokens must be the same.
"""

import hashlib
import random
import zlib
from collections import Counter, deque
from dataclasses import dataclass, field

from dsd.daemon.request import FinishReason, Phase, Refused, Request, TokenEvent
from dsd.daemon.scheduler import Scheduler
from dsd.ipc.messages import (
    Chunk,
    Join,
    LogprobEntry,
    Step,
    StepOutput,
    pack_int32,
    unpack_int32,
)

HASH_KEY = b"key of the tests"
STOP_TOKEN = 3
TOKENS = (0, 0, 0, 0, 1, 1, 1, 1, 2, 2, STOP_TOKEN)
POISON = -1
UNKNOWN = -2
"""In place of a token that nobody knows."""
Slot = tuple[int, int]


@dataclass
class Seq:
    """A row as the worker knows it."""

    tokens: list[int]
    fingerprints: list[int]
    """Of the computed tokens."""
    block_table: list[int]
    num_prompt_tokens: int
    started: bool = False
    """A token was sampled since the join."""
    drafts: list[int] = field(default_factory=list)


@dataclass
class InFlight:
    step: Step
    sampled: list[Request]
    token_ids: list[list[int]]
    """Of each sampled row."""
    chunked: list[Request]
    rows: set[int]
    written: dict[Slot, int] = field(default_factory=dict)
    drafted: list[Slot] = field(default_factory=list)
    """Written by the draft layer."""


class ModelWorker:
    """Applies steps as soon as they are planned; what they wrote counts as known from `settle`."""

    def __init__(self, block_size: int, max_num_rows: int) -> None:
        self.block_size = block_size
        self.max_num_rows = max_num_rows
        self.seqs: dict[int, Seq] = {}
        self.kv: dict[Slot, int] = {}
        self.known: dict[Slot, int] = {}
        self.draft_kv: dict[Slot, int] = {}

    def slot(self, seq: Seq, position: int) -> Slot:
        index, offset = divmod(position, self.block_size)
        assert index < len(seq.block_table), f"{position=} has no block: {seq}"
        return seq.block_table[index], offset

    def join(self, join: Join, salt: bytes) -> None:
        assert 0 <= join.row < self.max_num_rows
        tokens = list(unpack_int32(join.token_ids))
        seq = Seq(tokens, [], list(join.block_table), join.num_prompt_tokens)
        assert 0 <= join.num_cached_tokens < len(tokens)
        assert 0 not in join.block_table
        assert len(set(join.block_table)) == len(join.block_table)
        for position in range(join.num_cached_tokens):
            seq.fingerprints.append(fingerprint(seq, position, salt))
            found = self.known.get(self.slot(seq, position))
            assert found == seq.fingerprints[-1], f"{position=} of {join} is not in the cache"
            self._check_draft_kv(seq, position)
        self.seqs[join.row] = seq

    def _check_draft_kv(self, seq: Seq, position: int) -> None:
        """At the end of a block the token after it may be another request's."""
        slot = self.slot(seq, position)
        found = self.draft_kv[slot]
        if slot[1] < self.block_size - 1:
            assert found == hash((seq.fingerprints[position], seq.tokens[position + 1]))
        assert found != POISON, f"{position=} of the draft layer is not in the cache"

    def compute(self, row: int, start: int, length: int, salt: bytes) -> dict[Slot, int]:
        seq = self.seqs[row]
        assert start == len(seq.fingerprints), f"{row=} {start=} {seq}"
        assert 1 <= length <= len(seq.tokens) - start
        written = {}
        for position in range(start, start + length):
            seq.fingerprints.append(fingerprint(seq, position, salt))
            written[self.slot(seq, position)] = seq.fingerprints[-1]
        self.kv.update(written)
        for position, expected in enumerate(seq.fingerprints):
            assert self.kv[self.slot(seq, position)] == expected, f"{row=} {position=} overwritten"
        return written

    def verify(
        self, row: int, num_drafts: int, targets: list[int], salt: bytes
    ) -> tuple[list[int], dict[Slot, int]]:
        """The row's new tokens, of those that the model chooses one after the other, and what was
        written: behind the accepted ones, POISON."""
        seq = self.seqs[row]
        start = len(seq.tokens) - 1
        drafts = seq.drafts[:num_drafts]
        assert len(drafts) == num_drafts, f"{row=} has only {len(drafts)} drafts"
        num_accepted = 0
        while num_accepted < num_drafts and drafts[num_accepted] == targets[num_accepted]:
            num_accepted += 1
        token_ids = targets[: num_accepted + 1]
        seq.tokens += token_ids
        written = self.compute(row, start, num_accepted + 1, salt)
        for position in range(start + num_accepted + 1, start + num_drafts + 1):
            written[self.slot(seq, position)] = POISON
        self.kv.update(written)
        return token_ids, written

    def draft(self, row: int, start: int, num_drafts: int, drafts: list[int]) -> list[Slot]:
        """The draft layer computes what it has not computed since `start`, then guesses. Returns
        the slots that it wrote."""
        seq = self.seqs[row]
        num_computed = len(seq.fingerprints)
        written = []
        for position in range(start, num_computed + max(num_drafts - 1, 0)):
            written.append(self.slot(seq, position))
            successor = seq.tokens[position + 1] if position + 1 < len(seq.tokens) else UNKNOWN
            is_guess = position >= num_computed
            value = POISON if is_guess else hash((seq.fingerprints[position], successor))
            self.draft_kv[written[-1]] = value
        seq.drafts = drafts[:num_drafts]
        return written


def fingerprint(seq: Seq, position: int, salt: bytes) -> int:
    before = seq.fingerprints[position - 1] if position else hash(salt)
    return hash((before, seq.tokens[position]))


class Harness:
    """Drives one scheduler and one model worker, and checks everything after every call."""

    def __init__(self, scheduler: Scheduler, rng: random.Random, acceptance: float = 0.5) -> None:
        self.scheduler = scheduler
        self.rng = rng
        self.acceptance = acceptance
        """Share of the drafts that are right."""
        self.seed = rng.getrandbits(32)
        num_nextn, depth = scheduler.num_nextn, scheduler.pipeline_depth
        self.overrun = depth * num_nextn + max(num_nextn - 1, 0)
        self.max_position = scheduler.max_seq_len + (depth + 1) * (num_nextn + 1)
        self.live: dict[str, Request] = {}
        self.ended: dict[str, FinishReason] = {}
        self.outputs: dict[str, list[int]] = {}
        self.arrivals: dict[str, int] = {}
        self.scored: dict[str, list[int]] = {}
        self.num_steps = 0
        self.num_tokens_asked = 0
        self._start_worker()

    def _start_worker(self) -> None:
        scheduler = self.scheduler
        self.worker = ModelWorker(scheduler.block_size, scheduler.max_num_rows)
        self.in_flight: deque[InFlight] = deque()
        self.legit: dict[bytes, int] = {}
        """Fingerprint of the last token by digest: blocks of accepted tokens."""
        self.digests: dict[str, tuple[bytes, int]] = {}
        self.last_join = -(10**9)

    # ---- what a client does ----

    def add(self, request: Request) -> bool:
        asked = request.max_tokens
        try:
            self.scheduler.add(request)
        except Refused:
            return False
        limit = min(self.scheduler.max_seq_len, self.capacity - self.overrun)
        assert request.max_tokens == min(asked, limit - len(request.prompt_ids))
        self.live[request.request_id] = request
        self.outputs[request.request_id] = []
        self.arrivals[request.request_id] = len(self.arrivals)
        self.scored[request.request_id] = []
        self.num_tokens_asked += len(request.prompt_ids) + request.max_tokens
        self.check()
        return True

    @property
    def capacity(self) -> int:
        return (self.scheduler.num_blocks - 1) * self.scheduler.block_size

    def targets(self, request: Request, start: int, count: int) -> list[int]:
        """The tokens `start` to `start + count - 1` that the model chooses for the request."""
        number = zlib.crc32(request.request_id.encode())
        return [TOKENS[hash((self.seed, number, i)) % 11] for i in range(start, start + count)]

    def drafts(self, request: Request, start: int, count: int) -> list[int]:
        """Guesses of them."""
        targets = self.targets(request, start, count)
        chances = [hash((self.seed, start, i)) % 1000 / 1000 for i in range(count)]
        return [
            target if chance < self.acceptance else (target + 1) % (STOP_TOKEN + 1)
            for target, chance in zip(targets, chances, strict=True)
        ]

    def abort(self, request_id: str) -> None:
        self._ended_by(request_id, self.scheduler.abort(request_id), FinishReason.ABORT)

    def finish(self, request_id: str) -> None:
        self._ended_by(request_id, self.scheduler.finish(request_id), FinishReason.STOP)

    def _ended_by(self, request_id: str, event: TokenEvent | None, reason: FinishReason) -> None:
        if request_id not in self.live:
            assert event is None
            return
        assert event is not None
        assert (event.token_id, event.finish) == (-1, reason)
        self._note_end(event)
        self.check()

    def reset(self) -> None:
        events = self.scheduler.reset(self.scheduler.epoch + 1)
        assert {event.request.request_id for event in events} == self.live.keys()
        for event in events:
            assert event.finish is FinishReason.ERROR
            self._note_end(event)
        assert not self.scheduler.has_work
        stale = self.in_flight[0] if self.in_flight else None
        self._start_worker()
        if stale is not None:
            assert self.scheduler.update(StepOutput(stale.step.epoch, stale.step.seq, b"")) == []
        self.check()

    def _note_end(self, event: TokenEvent) -> None:
        request_id = event.request.request_id
        assert event.finish is not None
        assert request_id not in self.ended, f"{event.request!r} ended twice"
        self.ended[request_id] = event.finish
        del self.live[request_id]
        assert event.request.phase is Phase.FINISHED
        outputs = self.outputs[request_id]
        assert event.request.output_ids == outputs
        assert outputs == self.targets(event.request, 0, len(outputs)), "tokens in another order"

    # ---- what the engine does ----

    def schedule(self) -> bool:
        preemptions = {id(r): r.num_preemptions for r in self.live.values()}
        step = self.scheduler.schedule()
        preempted = [r for r in self.live.values() if r.num_preemptions > preemptions[id(r)]]
        assert not preempted or step is None or not step.num_drafts, "preempted for drafts"
        seq = self.scheduler._planned + (step is None)
        for request in preempted:
            size, num_nextn = self.scheduler.block_size, self.scheduler.num_nextn
            assert seq > self.last_join + size // (1 + num_nextn), "admission thrashes"
            # Back in the same step only if it gave up copies of blocks that others had cached.
            # (Or those that it held for drafts.)
            assert request.row == -1 or request.num_scheduled >= size or num_nextn
        if step is None:
            stalled = self.live and not self.in_flight
            assert not stalled, f"nothing in flight, nothing planned: {self.live}"
            self.check()
            return False
        self.num_steps += 1
        assert self.num_steps < 100 + 40 * self.num_tokens_asked, "no progress"
        self._apply(step, preempted)
        self.check()
        return True

    def _apply(self, step: Step, preempted: list[Request]) -> None:
        owners = {r.row: r for r in self.live.values() if r.row >= 0}
        decodes = list(unpack_int32(step.decodes))
        self._check_limits(step, decodes)
        self._check_order(step, owners, preempted)
        self._join_and_grow(step, owners)
        self._check_all_decode(decodes, owners)
        rows = [*decodes, *(chunk.row for chunk in step.chunks)]
        flight = InFlight(step, [], [], [owners[chunk.row] for chunk in step.chunks], set(rows))
        for row in decodes:
            self._decode(flight, row, owners[row])
        for chunk in step.chunks:
            self._prefill(flight, chunk, owners[chunk.row])
        self._check_writes(flight, owners)
        self.in_flight.append(flight)

    def _decode(self, flight: InFlight, row: int, request: Request) -> None:
        seq, step = self.worker.seqs[row], flight.step
        start = len(seq.fingerprints)
        assert start == len(seq.tokens) - 1
        assert start + step.num_drafts < self.max_position
        num_outputs = len(seq.tokens) - seq.num_prompt_tokens
        targets = self.targets(request, num_outputs, step.num_drafts + 1)
        token_ids, written = self.worker.verify(row, step.num_drafts, targets, request.salt)
        flight.written |= written
        self._sampled(flight, row, request, start, token_ids)

    def _prefill(self, flight: InFlight, chunk: Chunk, request: Request) -> None:
        seq = self.worker.seqs[chunk.row]
        flight.written |= self.worker.compute(
            chunk.row, chunk.start, chunk.num_tokens, request.salt
        )
        is_last = len(seq.fingerprints) == len(seq.tokens)
        assert chunk.sample == (is_last and request.max_tokens > 0)
        if not chunk.sample:
            flight.drafted += self.worker.draft(chunk.row, chunk.start, 0, [])
            return
        token_ids = self.targets(request, len(seq.tokens) - seq.num_prompt_tokens, 1)
        seq.tokens += token_ids
        seq.started = True
        self._sampled(flight, chunk.row, request, chunk.start, token_ids)

    def _sampled(
        self, flight: InFlight, row: int, request: Request, start: int, token_ids: list[int]
    ) -> None:
        seq, num_drafts = self.worker.seqs[row], flight.step.num_next_drafts
        drafts = self.drafts(request, len(seq.tokens) - seq.num_prompt_tokens, num_drafts)
        flight.drafted += self.worker.draft(row, start, num_drafts, drafts)
        flight.sampled.append(request)
        flight.token_ids.append(token_ids)

    def _check_limits(self, step: Step, decodes: list[int]) -> None:
        scheduler = self.scheduler
        assert len(self.in_flight) < scheduler.pipeline_depth
        assert 0 <= step.num_drafts <= scheduler.num_nextn
        assert 0 <= step.num_next_drafts <= scheduler.num_nextn
        num_tokens = len(decodes) * (1 + step.num_drafts)
        num_tokens += sum(chunk.num_tokens for chunk in step.chunks)
        assert 1 <= num_tokens <= scheduler.max_num_tokens
        assert len(decodes) <= step.padded_size
        prefill_mode = "mixed" if decodes else "prefill"
        assert step.mode == (prefill_mode if step.chunks else "decode")
        rows = [*decodes, *(chunk.row for chunk in step.chunks)]
        assert len(set(rows)) == len(rows)

    def _check_order(
        self, step: Step, owners: dict[int, Request], preempted: list[Request]
    ) -> None:
        def place(request: Request) -> tuple[int, int]:
            return request.priority, self.arrivals[request.request_id]

        for grow in step.grows:
            assert all(place(owners[grow.row]) < place(victim) for victim in preempted)
        waiting = [place(r) for r in self.live.values() if r.row < 0]
        for join in step.joins:
            assert place(owners[join.row]) < min(waiting, default=(10**9, 0)), "overtaken"
        if step.joins:
            self.last_join = step.seq

    def _join_and_grow(self, step: Step, owners: dict[int, Request]) -> None:
        """Fresh blocks and rows belong to nobody, not even to a step in flight."""
        worker = self.worker
        busy_rows = set().union(*(flight.rows for flight in self.in_flight))
        joined = {join.row for join in step.joins}
        assert not joined & busy_rows, "the row is still in a step in flight"
        in_use = {
            block_id
            for row in (busy_rows | owners.keys()) - joined
            for block_id in worker.seqs[row].block_table
        }
        for join in step.joins:
            request = owners[join.row]
            assert request.row == join.row
            assert list(unpack_int32(join.token_ids)) == [
                *request.prompt_ids, *self.outputs[request.request_id],
            ]  # fmt: skip
            assert join.num_prompt_tokens == len(request.prompt_ids)
            if request.num_preemptions == 0:
                assert request.num_cached_tokens == join.num_cached_tokens
            if request.sampling.num_prompt_logprobs >= 0:
                assert join.num_cached_tokens == 0
            fresh = set(join.block_table[join.num_cached_tokens // worker.block_size :])
            assert not fresh & in_use, f"{fresh & in_use} handed out twice"
            in_use |= set(join.block_table)
            worker.join(join, request.salt)
        for grow in step.grows:
            assert not set(grow.block_ids) & in_use, f"{grow} handed out twice"
            in_use |= set(grow.block_ids)
            worker.seqs[grow.row].block_table += grow.block_ids
        for row, request in owners.items():
            assert worker.seqs[row].block_table == request.block_ids

    def _check_all_decode(self, decodes: list[int], owners: dict[int, Request]) -> None:
        """Whoever has not certainly reached its end, if each step in flight yields one token."""
        in_flight = Counter(id(r) for flight in self.in_flight for r in flight.sampled)
        expected = {
            row
            for row, request in owners.items()
            if self.worker.seqs[row].started
            and len(self.outputs[request.request_id]) + in_flight[id(request)] < request.max_tokens
        }
        assert expected == set(decodes), "a decoding row was left out"

    def _check_writes(self, flight: InFlight, owners: dict[int, Request]) -> None:
        rows = set(owners).union(flight.rows, *(other.rows for other in self.in_flight))
        users = Counter(b for row in rows for b in self.worker.seqs[row].block_table)
        for block_id, _ in (*flight.written, *flight.drafted):
            assert users[block_id] == 1, f"{block_id=} is shared and written"

    def update(self) -> list[TokenEvent]:
        flight = self.in_flight.popleft()
        self.worker.known.update(flight.written)
        output, scores = self._output(flight)
        events = self.scheduler.update(output)
        expected = self._expected(flight, scores)
        assert [_as_tuple(event) for event in events if event.token_id >= 0] == expected
        for event in events:
            if event.token_id < 0:
                request_id = event.request.request_id
                self.scored[request_id] += [e.token_id for e in event.prompt_logprobs]
                if event.finish is not None:
                    assert event.request.max_tokens == 0
                    assert event.finish is FinishReason.LENGTH
            if event.finish is not None:
                self._note_end(event)
                self._check_scores(event.request)
        for request in flight.chunked:
            self._accept_digests(request)
        self.check()
        return events

    def _output(self, flight: InFlight) -> tuple[StepOutput, dict[int, LogprobEntry]]:
        owners = [
            (request, token_id)
            for request, token_ids in zip(flight.sampled, flight.token_ids, strict=True)
            for token_id in token_ids
        ]
        logprobs = {
            i: LogprobEntry(token_id, -float(i), ())
            for i, (request, token_id) in enumerate(owners)
            if request.sampling.num_logprobs >= 0
        }
        prompt_logprobs = {}
        for i, chunk in enumerate(flight.step.chunks):
            request = flight.chunked[i]
            if request.sampling.num_prompt_logprobs >= 0:
                after = request.prompt_ids[chunk.start + 1 : chunk.start + 1 + chunk.num_tokens]
                prompt_logprobs[i] = tuple(LogprobEntry(t, -1.0, ()) for t in after)
        step = flight.step
        counts = b""
        if step.num_drafts or (self.scheduler.num_nextn and self.rng.randrange(2)):
            counts = pack_int32([len(token_ids) for token_ids in flight.token_ids])
        output = StepOutput(
            step.epoch,
            step.seq,
            pack_int32([token_id for _, token_id in owners]),
            logprobs,
            prompt_logprobs,
            num_tokens=counts,
        )
        assert self.scheduler.expects(output)
        return output, logprobs

    def _expected(
        self, flight: InFlight, scores: dict[int, LogprobEntry]
    ) -> list[tuple[str, int, LogprobEntry | None, FinishReason | None]]:
        expected = []
        stop = 0
        for request, token_ids in zip(flight.sampled, flight.token_ids, strict=True):
            start, stop = stop, stop + len(token_ids)
            if request.request_id in self.ended:
                continue
            outputs = self.outputs[request.request_id]
            for i, token_id in enumerate(token_ids, start=start):
                outputs.append(token_id)
                finish = None
                stops = token_id in request.stop_token_ids
                if stops and len(outputs) > request.sampling.min_tokens:
                    finish = FinishReason.STOP
                elif len(outputs) == request.max_tokens:
                    finish = FinishReason.LENGTH
                expected.append((request.request_id, token_id, scores.get(i), finish))
                if finish is not None:
                    break
            self._accept_digests(request)
        return expected

    def _check_scores(self, request: Request) -> None:
        wanted = list(request.prompt_ids[1:]) if request.sampling.num_prompt_logprobs >= 0 else []
        assert self.scored[request.request_id] == wanted

    def _accept_digests(self, request: Request) -> None:
        """The digests that the cache may know after this update."""
        size = self.scheduler.block_size
        root = _digest(b"salt:" + request.salt)
        digest, num_blocks = self.digests.get(request.request_id, (root, 0))
        tokens = [*request.prompt_ids, *self.outputs[request.request_id]]
        fingerprints = hash(request.salt)
        for token_id in tokens[: num_blocks * size]:
            fingerprints = hash((fingerprints, token_id))
        while (num_blocks + 1) * size <= len(tokens):
            block = tokens[num_blocks * size : (num_blocks + 1) * size]
            digest = _digest(digest + pack_int32(block))
            for token_id in block:
                fingerprints = hash((fingerprints, token_id))
            self.legit[digest] = fingerprints
            num_blocks += 1
        self.digests[request.request_id] = (digest, num_blocks)

    # ---- what must be true ----

    def check(self) -> None:
        self.scheduler.check()
        assert self.scheduler.num_running + self.scheduler.num_waiting == len(self.live)
        last = self.scheduler.block_size - 1
        for digest, block_id in self.scheduler._pool.cached_hashes().items():
            assert digest in self.legit, f"{block_id=} is cached with tokens nobody accepted"
            expected = self.legit[digest]
            assert self.worker.known[block_id, last] == expected, f"{block_id=} not known"
            assert self.worker.kv[block_id, last] == expected, f"{block_id=} overwritten"

    def drain(self) -> None:
        """Runs until every request has ended, then looks for leaks."""
        while self.scheduler.has_work:
            while self.schedule():
                pass
            if self.in_flight:
                self.update()
        stats = self.scheduler.stats()
        assert not self.live
        assert (stats.num_running, stats.num_waiting, stats.num_in_flight) == (0, 0, 0)
        assert stats.num_held_blocks == 0
        assert stats.num_free_blocks + stats.num_cached_blocks == stats.num_blocks


def _as_tuple(event: TokenEvent) -> tuple[str, int, LogprobEntry | None, FinishReason | None]:
    return event.request.request_id, event.token_id, event.logprob, event.finish


def _digest(data: bytes) -> bytes:
    return hashlib.blake2b(data, key=HASH_KEY, digest_size=16).digest()
