"""What is true of a scheduler between any two calls. It looks at everything: for tests and for
idle moments."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from .request import Phase, Request

if TYPE_CHECKING:
    from .scheduler import Scheduler


def check_scheduler(scheduler: Scheduler) -> None:
    """Asserts that rows, blocks, phases and steps in flight agree."""
    rows, in_flight = scheduler._rows, scheduler._in_flight
    owners = [request for request in rows if request is not None]
    scheduler._pool.check(Counter(i for request in owners for i in request.block_ids))
    scheduler._decoding.check(scheduler._planned, scheduler._done)
    _check_rows(scheduler)

    seqs = [flight.seq for flight in in_flight]
    assert seqs == list(range(scheduler._done + 1, scheduler._planned + 1))
    assert len(seqs) <= scheduler.pipeline_depth
    assert all(0 <= flight.num_drafts <= scheduler.num_nextn for flight in in_flight)
    assert 0 <= scheduler._num_next_drafts <= scheduler.num_nextn

    requests = scheduler._requests.values()
    for request in requests:
        _check_request(scheduler, request)
    live = [request for request in requests if request.phase is not Phase.WAITING]
    ended = [request for flight in in_flight for request in flight.releases]
    assert all(request.phase is Phase.FINISHED for request in ended)
    assert Counter(map(id, live + ended)) == Counter(map(id, owners))
    assert len(live) == scheduler.num_running
    for phase, members in (
        (Phase.PREFILL, scheduler._prefilling),
        (Phase.DECODE, scheduler._decoding),
    ):
        assert len(members) == sum(request.phase is phase for request in live)


def _check_rows(scheduler: Scheduler) -> None:
    taken = [row for row, request in enumerate(scheduler._rows) if request is not None]
    assert sorted(scheduler._free_rows + taken) == list(range(scheduler.max_num_rows))
    for row in taken:
        request = scheduler._rows[row]
        assert request is not None
        assert request.row == row, f"{row=} holds {request!r}"


def _check_request(scheduler: Scheduler, request: Request) -> None:
    phase = request.phase
    assert phase is not Phase.FINISHED, f"{request!r} ended and was kept"
    assert len(request.output_ids) <= request.max_tokens
    assert (phase is Phase.PREFILL) == (request in scheduler._prefilling)
    assert (phase is Phase.WAITING) == (request in scheduler._waiting)
    if phase is Phase.WAITING:
        assert (request.row, request.block_ids) == (-1, [])
        return
    assert request.num_scheduled <= len(request.block_ids) * scheduler.block_size
    _check_cached(scheduler, request)
    if phase is Phase.DRAINING:
        assert scheduler._last_step(request) > scheduler._done, f"{request!r} waits for nothing"


def _check_cached(scheduler: Scheduler, request: Request) -> None:
    """What others can find of the request's blocks is computed, and none of it was rejected."""
    num_known = request.num_computed
    if request.phase is not Phase.PREFILL:
        num_known = max(num_known, request.num_tokens - 1)
    hashes = scheduler._pool._hashes
    cached = [i for i, block_id in enumerate(request.block_ids) if hashes[block_id] is not None]
    assert (max(cached, default=-1) + 1) * scheduler.block_size <= num_known, f"{request!r}"
