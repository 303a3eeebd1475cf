import pytest

from dsd.daemon.request import FinishReason, Phase, Refused, TokenEvent
from dsd.daemon.scheduler import Scheduler
from dsd.ipc.messages import Chunk, LogprobEntry, Sampling, StepOutput, pack_int32, unpack_int32
from dsd.tests.daemon.random_runs import random_run
from dsd.tests.daemon.scheduler_kit import answer, make_request, make_scheduler, plan, rows, run

# ---- add ----


@pytest.mark.parametrize(
    ("prompt", "message"), [(0, "no tokens"), (64, "64"), (40, "32 tokens")], ids=str
)
def test_add_prompt_that_never_fits_is_refused_with_the_numbers(prompt: int, message: str) -> None:
    scheduler = make_scheduler(num_blocks=9)
    with pytest.raises(Refused, match=message):
        scheduler.add(make_request(prompt))
    assert not scheduler.has_work


def test_add_max_tokens_is_clamped_to_sequence_length_and_pool() -> None:
    by_length, by_pool = make_request(60, max_tokens=100), make_request(30, max_tokens=100)
    make_scheduler().add(by_length)
    make_scheduler(num_blocks=9).add(by_pool)
    assert (by_length.max_tokens, by_pool.max_tokens) == (4, 2)


def test_add_same_id_twice_asserts() -> None:
    scheduler = make_scheduler()
    request = make_request()
    scheduler.add(request)
    with pytest.raises(AssertionError, match="added before"):
        scheduler.add(request)


# ---- planning ----


def test_schedule_nothing_to_do_returns_none() -> None:
    scheduler = make_scheduler()
    assert scheduler.schedule() is None
    assert not scheduler.has_work


def test_schedule_first_request_joins_and_prefills_in_one_chunk() -> None:
    scheduler = make_scheduler()
    request = make_request(5, sampling=Sampling(seed=9))
    scheduler.add(request)
    step = plan(scheduler)
    (join,) = step.joins
    assert (step.mode, step.decodes, step.padded_size) == ("prefill", b"", 0)
    assert step.chunks == (Chunk(0, 0, 5, True),)
    assert list(unpack_int32(join.token_ids)) == request.prompt_ids
    assert (join.num_prompt_tokens, join.num_cached_tokens, len(join.block_table)) == (5, 0, 2)
    assert join.sampling is request.sampling


def test_schedule_plans_the_decode_before_the_token_is_known() -> None:
    scheduler = make_scheduler()
    scheduler.add(make_request())
    first, second = plan(scheduler), plan(scheduler)
    assert (second.seq, second.mode, rows(second)) == (first.seq + 1, "decode", [0])
    assert scheduler.schedule() is None
    answer(scheduler, first)
    assert plan(scheduler).mode == "decode"


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_schedule_pipeline_depth_bounds_steps_in_flight(depth: int) -> None:
    scheduler = make_scheduler(pipeline_depth=depth)
    scheduler.add(make_request())
    for _ in range(depth):
        plan(scheduler)
    assert scheduler.schedule() is None
    assert scheduler.stats().num_in_flight == depth


def test_schedule_long_prompt_is_chunked_and_decodes_go_first() -> None:
    scheduler = make_scheduler(max_num_tokens=8)
    scheduler.add(make_request(3))
    answer(scheduler, plan(scheduler))
    scheduler.add(make_request(10))
    second = plan(scheduler)
    scheduler.add(make_request(2))
    third = plan(scheduler)
    assert (second.mode, rows(second)) == ("mixed", [0])
    assert second.chunks == (Chunk(1, 0, 7, False),)
    assert rows(third) == [0]
    assert third.chunks == (Chunk(1, 7, 3, True), Chunk(2, 0, 2, True))
    answer(scheduler, second, 7)
    assert rows(plan(scheduler)) == [0, 1, 2]


def test_schedule_row_at_a_block_border_grows() -> None:
    scheduler = make_scheduler()
    scheduler.add(make_request(4))
    step = plan(scheduler)
    answer(scheduler, step)
    (used,) = step.joins[0].block_table
    (grow,) = plan(scheduler).grows
    assert (grow.row, len(grow.block_ids)) == (0, 1)
    assert used not in grow.block_ids
    assert plan(scheduler).grows == ()


def test_schedule_last_position_at_a_block_border_does_not_grow() -> None:
    scheduler = make_scheduler()
    scheduler.add(make_request(4, max_tokens=1))
    assert [event.finish for event in run(scheduler)] == [FinishReason.LENGTH]
    assert scheduler.stats().num_cached_blocks == 1


def test_schedule_full_batch_waits_for_a_row() -> None:
    scheduler = make_scheduler(max_batch_size=2)
    for _ in range(3):
        scheduler.add(make_request(max_tokens=2))
    assert len(plan(scheduler).joins) == 2
    assert (scheduler.num_running, scheduler.num_waiting) == (2, 1)
    assert len(run_after(scheduler, 1)) == 6


def run_after(scheduler: Scheduler, seq: int) -> list[TokenEvent]:
    events = scheduler.update(StepOutput(0, seq, pack_int32([7, 7])))
    return events + run(scheduler)


def test_schedule_admits_by_priority_then_arrival() -> None:
    scheduler = make_scheduler()
    requests = [make_request(2, priority=priority) for priority in (1, 0, 1, 0)]
    for request in requests:
        scheduler.add(request)
    plan(scheduler)
    assert [request.row for request in requests] == [2, 0, 3, 1]


def test_schedule_head_of_line_without_blocks_is_not_overtaken() -> None:
    scheduler = make_scheduler(num_blocks=9)
    first, large, small = make_request(16, 4), make_request(16, 4), make_request(1, 1)
    for request in (first, large, small):
        scheduler.add(request)
    answer(scheduler, plan(scheduler))
    assert plan(scheduler).joins == ()
    assert (large.phase, small.phase) == (Phase.WAITING, Phase.WAITING)


@pytest.mark.parametrize(("num_rows", "padded"), [(1, 2), (2, 2), (3, 8), (4, 8)])
def test_schedule_padded_size_is_the_smallest_graph_that_holds_the_decodes(
    num_rows: int, padded: int
) -> None:
    scheduler = make_scheduler(graph_batch_sizes=(8, 2))
    for _ in range(num_rows):
        scheduler.add(make_request(2))
    assert plan(scheduler).padded_size == 0
    assert plan(scheduler).padded_size == padded


def test_schedule_padded_size_beyond_every_graph_is_the_number_itself() -> None:
    scheduler = make_scheduler(graph_batch_sizes=(2,))
    for _ in range(3):
        scheduler.add(make_request(2))
    plan(scheduler)
    assert plan(scheduler).padded_size == 3


# ---- results ----


def test_update_length_final_event_carries_its_token() -> None:
    scheduler = make_scheduler()
    request = make_request(max_tokens=3)
    scheduler.add(request)
    events = run(scheduler)
    assert [event.token_id for event in events] == [7, 7, 7]
    assert [event.finish for event in events] == [None, None, FinishReason.LENGTH]
    assert (request.phase, request.output_ids) == (Phase.FINISHED, [7, 7, 7])


def test_update_row_scheduled_to_max_tokens_leaves_the_decodes() -> None:
    scheduler = make_scheduler(pipeline_depth=3)
    request = make_request(max_tokens=2)
    scheduler.add(request)
    steps = [plan(scheduler), plan(scheduler)]
    assert request.phase is Phase.DRAINING
    assert scheduler.schedule() is None
    assert [answer(scheduler, step)[0].finish for step in steps] == [None, FinishReason.LENGTH]


def test_update_stop_token_drops_the_token_of_the_step_in_flight() -> None:
    scheduler = make_scheduler()
    request = make_request(stop=[2])
    scheduler.add(request)
    first, second = plan(scheduler), plan(scheduler)
    (event,) = answer(scheduler, first, 2)
    assert (event.token_id, event.finish) == (2, FinishReason.STOP)
    assert scheduler.stats().num_in_flight == 1
    assert scheduler.stats().num_held_blocks == 1
    assert answer(scheduler, second, 5) == []
    assert request.output_ids == [2]
    assert not scheduler.has_work
    assert scheduler.stats().num_held_blocks == 0


def test_update_stop_token_before_min_tokens_does_not_stop() -> None:
    scheduler = make_scheduler()
    request = make_request(sampling=Sampling(min_tokens=2), stop=[2])
    scheduler.add(request)
    finishes = [answer(scheduler, plan(scheduler), 2)[0].finish for _ in range(3)]
    assert finishes == [None, None, FinishReason.STOP]


def test_update_stop_token_as_last_allowed_token_is_a_stop() -> None:
    scheduler = make_scheduler()
    scheduler.add(make_request(max_tokens=1, stop=[2]))
    (event,) = answer(scheduler, plan(scheduler), 2)
    assert event.finish is FinishReason.STOP


def test_update_out_of_order_asserts() -> None:
    scheduler = make_scheduler()
    scheduler.add(make_request())
    plan(scheduler)
    with pytest.raises(AssertionError):
        answer(scheduler, plan(scheduler))


def test_update_logprobs_go_to_the_row_at_their_index() -> None:
    scheduler = make_scheduler()
    scheduler.add(make_request())
    scheduler.add(make_request(sampling=Sampling(num_logprobs=1)))
    entry = LogprobEntry(7, -0.5, ((7, -0.5),))
    events = answer(scheduler, plan(scheduler), logprobs={1: entry})
    assert [event.logprob for event in events] == [None, entry]


def test_update_prompt_logprobs_come_chunk_by_chunk_before_the_token() -> None:
    scheduler = make_scheduler(max_num_tokens=2)
    scheduler.add(make_request(3, sampling=Sampling(num_prompt_logprobs=0)))
    one, two = LogprobEntry(1, -1.0, ()), LogprobEntry(2, -2.0, ())
    (event,) = answer(scheduler, plan(scheduler), prompt_logprobs={0: (one, two)})
    assert (event.token_id, event.prompt_logprobs) == (-1, (one, two))
    (event,) = answer(scheduler, plan(scheduler))
    assert (event.token_id, event.prompt_logprobs) == (7, ())


def test_update_max_tokens_zero_scores_the_prompt_and_ends_without_a_token() -> None:
    scheduler = make_scheduler()
    scheduler.add(make_request(3, max_tokens=0, sampling=Sampling(num_prompt_logprobs=0)))
    step = plan(scheduler)
    assert step.chunks == (Chunk(0, 0, 3, False),)
    entries = (LogprobEntry(1, -1.0, ()), LogprobEntry(2, -1.0, ()))
    (event,) = answer(scheduler, step, prompt_logprobs={0: entries})
    assert (event.token_id, event.finish) == (-1, FinishReason.LENGTH)
    assert event.prompt_logprobs == entries
    assert not scheduler.has_work


# ---- back-edges ----


def test_abort_waiting_request_ends_without_a_step() -> None:
    scheduler = make_scheduler()
    request = make_request()
    scheduler.add(request)
    event = scheduler.abort(request.request_id)
    assert event is not None
    assert (event.token_id, event.finish) == (-1, FinishReason.ABORT)
    assert scheduler.schedule() is None
    assert scheduler.abort(request.request_id) is None


def test_abort_during_prefill_returns_blocks_after_the_last_step_in_flight() -> None:
    scheduler = make_scheduler(max_num_tokens=4)
    request = make_request(12)
    scheduler.add(request)
    first, second = plan(scheduler), plan(scheduler)
    assert scheduler.abort(request.request_id) is not None
    scheduler.check()
    assert scheduler.schedule() is None
    assert answer(scheduler, first) == []
    assert scheduler.stats().num_held_blocks == 3
    assert answer(scheduler, second) == []
    assert scheduler.stats().num_free_blocks == 32


def test_finish_stop_string_drops_later_tokens_and_keeps_them_out_of_the_cache() -> None:
    scheduler = make_scheduler(pipeline_depth=3)
    request = make_request([1, 2, 3])
    scheduler.add(request)
    steps = [plan(scheduler) for _ in range(3)]
    answer(scheduler, steps[0], 4)
    event = scheduler.finish(request.request_id)
    assert event is not None
    assert event.finish is FinishReason.STOP
    assert answer(scheduler, steps[1], 5) == answer(scheduler, steps[2], 6) == []
    assert request.output_ids == [4]
    stats = scheduler.stats()
    assert (stats.num_free_blocks, stats.num_cached_blocks) == (32, 0)


def test_finish_row_is_not_reused_while_a_step_in_flight_holds_it() -> None:
    scheduler = make_scheduler(max_batch_size=1)
    request = make_request()
    scheduler.add(request)
    first, second = plan(scheduler), plan(scheduler)
    scheduler.add(make_request())
    answer(scheduler, first)
    scheduler.finish(request.request_id)
    assert scheduler.schedule() is None
    answer(scheduler, second)
    assert plan(scheduler).joins[0].row == 0


def test_reset_every_request_ends_with_one_error_and_old_results_are_ignored() -> None:
    scheduler = make_scheduler(max_batch_size=1)
    running, waiting = make_request(), make_request()
    scheduler.add(running)
    scheduler.add(waiting)
    step = plan(scheduler)
    events = scheduler.reset(1)
    assert [(e.request, e.finish) for e in events] == [
        (running, FinishReason.ERROR),
        (waiting, FinishReason.ERROR),
    ]
    assert all(event.message for event in events)
    assert not scheduler.has_work
    assert answer(scheduler, step) == []
    scheduler.add(make_request(max_tokens=1))
    assert plan(scheduler).epoch == 1


# ---- anything may happen ----


@pytest.mark.parametrize("seed", range(100))
def test_random_run_keeps_every_promise(seed: int) -> None:
    random_run(seed)
