"""How a step's room is shared between prompts, and the bounds that daemon/prefill.py states."""

import math
import random
from collections import deque
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsd.daemon.prefill import Room, StepLimit
from dsd.daemon.request import Phase, Request
from dsd.daemon.scheduler import Scheduler
from dsd.ipc.messages import Load, Step
from dsd.tests import fake_worker
from dsd.tests.daemon.random_runs import random_limit
from dsd.tests.daemon.scheduler_kit import answer, make_request, make_scheduler, plan, run

LONG = 100_000


def large_scheduler(**changes: object) -> Scheduler:
    """Rows and blocks for everybody."""
    settings = {
        "max_batch_size": 64, "max_num_tokens": 2048, "max_seq_len": 131072,
        "num_blocks": 10_001, "block_size": 64, "pipeline_depth": 1,
    }  # fmt: skip
    return make_scheduler(**settings | changes)


def first_tokens(scheduler: Scheduler, requests: Sequence[Request]) -> list[int]:
    """After how many steps from now each request has its first token."""
    found: dict[Request, int] = {}
    number = 0
    while not all(request in found for request in requests):
        number += 1
        for event in answer(scheduler, plan(scheduler)):
            found.setdefault(event.request, number)
    return [found[request] for request in requests]


def lengths(scheduler: Scheduler, step: Step) -> dict[Request, int]:
    owners = {request.row: request for request in scheduler._rows if request is not None}
    return {owners[chunk.row]: chunk.num_tokens for chunk in step.chunks}


# ---- room ----


@given(
    num_tokens=st.integers(1, 20_000),
    work=st.floats(1, 20_000),
    weight=st.sampled_from((0.0, 1e-9, 1e-4, 0.1, 3.0)),
    start=st.integers(0, 200_000),
)
def test_room_fitting_is_the_most_that_fits(
    num_tokens: int, work: float, weight: float, start: int
) -> None:
    room = Room(num_tokens, work, weight)
    length = room.fitting(start)
    assert 0 <= length <= num_tokens
    # A hair more or less: where the last token fits exactly, rounding decides.
    assert Room(num_tokens, work * (1 + 1e-9), weight).holds(start, length)
    assert not Room(num_tokens, work * (1 - 1e-9), weight).holds(start, length + 1)


@pytest.mark.parametrize(
    ("length", "size"), [(1, 0), (100, 0), (101, 1), (200, 1), (201, 2), (400, 2), (401, 3)]
)
def test_room_size_doubles_from_one_to_the_next(length: int, size: int) -> None:
    assert Room(100, 100.0).size(0, length) == size
    assert Room(10**6, 100.0).size(0, length) == Room(100, 10.0**6).size(0, length) == size


def test_room_size_grows_with_what_comes_before() -> None:
    room = Room(100, 100.0, context_weight=0.01)
    assert [room.size(start, 50) for start in (0, 100, 300, 700)] == [0, 1, 2, 3]


# ---- a short prompt behind a long one ----


def test_short_prompt_behind_a_long_one_is_in_the_next_step() -> None:
    scheduler = large_scheduler()
    long, short = make_request(LONG), make_request(1000)
    scheduler.add(long)
    answer(scheduler, plan(scheduler))
    scheduler.add(short)
    step = plan(scheduler)
    assert lengths(scheduler, step) == {short: 1000, long: 1048}
    assert step.chunks[0].sample


def test_twenty_short_prompts_behind_a_long_one_start_within_the_bound() -> None:
    scheduler = large_scheduler()
    scheduler.add(make_request(LONG))
    answer(scheduler, plan(scheduler))
    shorts = [make_request(300) for _ in range(20)]
    for request in shorts:
        scheduler.add(request)
    # Those that have begun to decode take a token each of the room of the rest.
    room = 2048 - 20
    bounds = [math.ceil((i + 1) * 300 / (room / 2)) for i in range(20)]
    found = first_tokens(scheduler, shorts)
    assert all(steps <= bound for steps, bound in zip(found, bounds, strict=True)), found
    assert found == sorted(found)


def test_short_prompt_behind_many_long_ones_that_wait_is_in_the_next_step() -> None:
    scheduler = large_scheduler()
    longs = [make_request(LONG) for _ in range(4)]
    for request in longs:
        scheduler.add(request)
    answer(scheduler, plan(scheduler))
    short = make_request(1000)
    scheduler.add(short)
    step = plan(scheduler)
    assert lengths(scheduler, step) == {short: 1000, longs[0]: 1048}
    assert [request.phase for request in longs[1:]] == [Phase.WAITING] * 3


def test_long_prompt_takes_at_most_twice_its_steps_under_a_flood_of_short_ones() -> None:
    scheduler = large_scheduler(max_num_tokens=256)
    long = make_request(6400)
    scheduler.add(long)
    steps = 0
    while long.phase in (Phase.WAITING, Phase.PREFILL) and steps <= 50:
        for _ in range(3):
            scheduler.add(make_request(100, max_tokens=1))
        answer(scheduler, plan(scheduler))
        steps += 1
    assert 6400 / 256 < steps <= 6400 / 128


def test_middling_prompt_waits_for_short_ones_and_passes_the_long_one() -> None:
    scheduler = large_scheduler()
    requests = [make_request(n) for n in (LONG, 5000, 900, 5000)]
    for request in requests:
        scheduler.add(request)
    found = first_tokens(scheduler, requests)
    assert found[2] < found[1] < found[3] < found[0]


def test_prompts_of_one_size_are_computed_in_order_of_arrival() -> None:
    scheduler = large_scheduler(max_num_tokens=256)
    requests = [make_request(n) for n in (7000, 6600, 8000, 6800)]
    for request in requests:
        scheduler.add(request)
    found = first_tokens(scheduler, requests)
    assert found == sorted(found)
    assert found[0] == math.ceil(7000 / 256)


def test_turn_of_a_long_conversation_counts_by_what_the_cache_lacks() -> None:
    scheduler = large_scheduler()
    first_turn = make_request(90_000, max_tokens=1)
    scheduler.add(first_turn)
    run(scheduler)
    scheduler.add(make_request(LONG))
    answer(scheduler, plan(scheduler))
    turn = make_request([*first_turn.prompt_ids, *range(1, 500)])
    scheduler.add(turn)
    assert first_tokens(scheduler, [turn]) == [1]
    assert turn.num_cached_tokens == 90_000 - 90_000 % 64


prompts = st.lists(st.sampled_from((3, 20, 31, 40, 90, 200, 640)), min_size=1, max_size=12)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(ahead=prompts, short=st.integers(1, 32))
def test_short_prompt_starts_within_the_bound_whatever_is_before_it(
    ahead: list[int], short: int
) -> None:
    scheduler = large_scheduler(max_num_tokens=48)
    others = [make_request(n, max_tokens=3) for n in ahead]
    request = make_request(short)
    for each in (*others, request):
        scheduler.add(each)
    room = 48 - len(others)  # even if all the others decode
    deep = short + sum(n for n in ahead if n <= 48)
    (steps,) = first_tokens(scheduler, [request])
    num_ended = sum(len(o.prompt_ids) > 48 and bool(o.output_ids) for o in others)
    assert steps <= math.ceil(deep / (room // 2)) + num_ended


# ---- priorities ----


def test_urgent_prompt_goes_before_one_that_is_being_computed() -> None:
    scheduler = large_scheduler()
    usual, urgent = make_request(LONG), make_request(LONG, priority=-1)
    scheduler.add(usual)
    answer(scheduler, plan(scheduler))
    scheduler.add(urgent)
    assert lengths(scheduler, plan(scheduler)) == {urgent: 2048}


def test_short_prompt_does_not_pass_a_more_urgent_long_one() -> None:
    scheduler = large_scheduler()
    urgent, short = make_request(LONG, priority=-1), make_request(10)
    for request in (short, urgent):
        scheduler.add(request)
    assert lengths(scheduler, plan(scheduler)) == {urgent: 2048}


# ---- admission ----


def waiting_behind(num_blocks: int) -> tuple[Scheduler, Request, Request]:
    """A prompt of 63 blocks is being computed, one of 38 waits, then one of 1."""
    scheduler = large_scheduler(num_blocks=1 + num_blocks, max_num_tokens=64)
    first, large, small = make_request(4000), make_request(2400), make_request(60)
    scheduler.add(first)
    answer(scheduler, plan(scheduler))
    for request in (large, small):
        scheduler.add(request)
    return scheduler, large, small


def test_prompt_passes_one_that_waits_only_if_both_fit() -> None:
    # A block more for each of the three that may grow, and one for the one that is computed.
    needed = 63 + 38 + 1 + 4
    for num_blocks, phase in ((needed - 1, Phase.WAITING), (needed, Phase.DECODE)):
        scheduler, large, small = waiting_behind(num_blocks)
        for _ in range(2):
            answer(scheduler, plan(scheduler))
        assert (large.phase, small.phase) == (Phase.WAITING, phase)


def test_last_row_is_not_taken_by_one_that_passes() -> None:
    scheduler = large_scheduler(max_batch_size=2, max_num_tokens=64)
    requests = [make_request(n) for n in (4000, 2400, 60)]
    for request in requests:
        scheduler.add(request)
    for _ in range(4000 // 128):
        answer(scheduler, plan(scheduler))
    assert requests[2].phase is Phase.WAITING


def test_prompt_that_cannot_pass_is_not_overtaken_by_a_smaller_one() -> None:
    scheduler, _, small = waiting_behind(63 + 38 + 4)
    smaller = make_request(1, max_tokens=1)
    scheduler.add(smaller)
    for _ in range(3):
        answer(scheduler, plan(scheduler))
    assert (small.phase, smaller.phase) == (Phase.WAITING, Phase.WAITING)


# ---- limits while rows decode ----


def decoding(limit: StepLimit) -> Scheduler:
    """One row decodes, and the limit holds from now on."""
    scheduler = large_scheduler()
    scheduler.add(make_request(3, max_tokens=1000))
    answer(scheduler, plan(scheduler))
    scheduler.step_limit = limit
    return scheduler


def test_limit_holds_only_while_rows_decode() -> None:
    scheduler = large_scheduler()
    scheduler.step_limit = StepLimit(work=500)
    request = make_request(5000)
    scheduler.add(request)
    assert lengths(scheduler, plan(scheduler)) == {request: 2048}
    scheduler = decoding(StepLimit(work=500))
    request = make_request(5000)
    scheduler.add(request)
    assert lengths(scheduler, plan(scheduler)) == {request: 499}


def test_limit_never_stops_a_prompt() -> None:
    scheduler = decoding(StepLimit(work=0.0, context_weight=1.0))
    request = make_request(640)
    scheduler.add(request)
    for _ in range(10):
        step = plan(scheduler)
        assert lengths(scheduler, step) == {request: 64}
        answer(scheduler, step)
    assert request.phase is Phase.DECODE


def test_limit_of_work_makes_chunks_shorter_towards_the_end_of_a_long_prompt() -> None:
    scheduler = decoding(StepLimit(work=1001, context_weight=1 / 1000))
    request = make_request(10_000)
    scheduler.add(request)
    chunks = []
    while request.phase in (Phase.WAITING, Phase.PREFILL):
        step = plan(scheduler)
        (chunk,) = step.chunks
        chunks.append((chunk.start, chunk.num_tokens))
        answer(scheduler, step)
    del chunks[-1]
    for start, length in chunks:
        assert length * (1 + (start + length / 2) / 1000) == pytest.approx(1000, rel=0.02)
    assert chunks[0][1] > 700
    assert chunks[-1][1] < 100


def test_limit_below_a_block_still_lets_short_prompts_pass() -> None:
    scheduler = decoding(StepLimit(work=0.0))
    long, short = make_request(LONG), make_request(64)
    scheduler.add(long)
    answer(scheduler, plan(scheduler))
    scheduler.add(short)
    # Half a block of work is for those that pass; the long one moves a block at a time.
    assert first_tokens(scheduler, [short]) == [2]
    assert long.num_scheduled == 3 * 64


# ---- nobody's tokens depend on it ----

LOAD = Load(
    epoch=0, model_dir="", device="cpu", dtype="auto", act_quant="auto", max_batch_size=6,
    max_num_tokens=48, max_seq_len=512, block_size=4, kv_cache_gb=0.0,
    kv_cache_free_gpu_memory_fraction=0.9,
)  # fmt: skip


@settings(max_examples=8, deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**32))
def test_tokens_are_the_same_whatever_the_limits(seed: int) -> None:
    rng = random.Random(seed)
    scheduler = make_scheduler(
        max_batch_size=6, max_num_tokens=48, max_seq_len=512, num_blocks=121, block_size=4
    )
    options = fake_worker.Options(num_blocks=121, max_batch_size=6, max_num_tokens=48)
    model = fake_worker.FakeModel(options, LOAD)
    common = rng.choices(range(100), k=60)
    prompts = [
        common[: rng.choice((0, 30, 60))] + rng.choices(range(100), k=rng.choice((1, 9, 40, 150)))
        for _ in range(12)
    ]
    requests = [make_request(ids, 20, priority=rng.choice((0, 0, 0, 1))) for ids in prompts]
    to_come, in_flight = list(requests), deque[Step]()
    while to_come or scheduler.has_work:
        if to_come and rng.random() < 0.3:
            scheduler.add(to_come.pop())
        scheduler.step_limit = random_limit(rng)
        while (step := scheduler.schedule()) is not None:
            in_flight.append(step)
        if in_flight:
            scheduler.update(model.run(in_flight.popleft()))
    for ids, request in zip(prompts, requests, strict=True):
        assert request.output_ids == fake_worker.continuation(ids, 20)
