"""The scheduler where a step may yield several tokens a row."""

import pytest

from dsd.daemon.drafting import FIRST_PAUSE, WINDOW
from dsd.daemon.request import FinishReason, Phase, Refused, Request, TokenEvent
from dsd.daemon.scheduler import Scheduler
from dsd.ipc.messages import LogprobEntry, Sampling, Step, StepOutput, pack_int32
from dsd.tests.daemon.scheduler_kit import make_request, make_scheduler, plan, rows


def reply(
    scheduler: Scheduler,
    step: Step,
    *tokens: list[int],
    logprobs: dict[int, LogprobEntry] | None = None,
) -> list[TokenEvent]:
    """Each sampled row's tokens; without any, every draft is accepted and every token is 7."""
    num_chunks = sum(chunk.sample for chunk in step.chunks)
    if not tokens:
        tokens = ([7] * (1 + step.num_drafts),) * len(rows(step)) + ([7],) * num_chunks
    output = StepOutput(
        step.epoch,
        step.seq,
        pack_int32(token_id for row in tokens for token_id in row),
        logprobs or {},
        num_tokens=pack_int32(len(row) for row in tokens),
    )
    assert scheduler.expects(output)
    events = scheduler.update(output)
    scheduler.check()
    return events


def drain(scheduler: Scheduler, accept: bool) -> list[TokenEvent]:
    """One step at a time until idle; every draft is accepted, or none."""
    events = []
    while scheduler.has_work:
        step = plan(scheduler)
        num_sampled = len(rows(step)) + sum(chunk.sample for chunk in step.chunks)
        events += reply(scheduler, step, *([] if accept else [[7]] * num_sampled))
    return events


# ---- which drafts ----


def test_schedule_drafts_made_by_a_step_are_verified_by_the_next() -> None:
    scheduler = make_scheduler(num_nextn=2)
    scheduler.add(make_request())
    first, second = plan(scheduler), plan(scheduler)
    assert (first.num_drafts, first.num_next_drafts) == (0, 2)
    assert (second.num_drafts, second.num_next_drafts) == (2, 2)
    reply(scheduler, first)
    assert [event.token_id for event in reply(scheduler, second, [5, 6, 8])] == [5, 6, 8]


def test_schedule_without_mtp_steps_say_nothing_of_drafts() -> None:
    scheduler = make_scheduler()
    scheduler.add(make_request())
    assert (plan(scheduler).num_next_drafts, plan(scheduler).num_drafts) == (0, 0)
    assert scheduler.stats().drafts is None


def test_schedule_length_follows_the_rows_of_the_next_step() -> None:
    scheduler = make_scheduler(num_nextn=3, num_nextn_by_batch_size=((1, 3), (2, 1)))
    lengths = []
    for _ in range(3):
        scheduler.add(make_request(2, max_tokens=30))
        step = plan(scheduler)
        lengths.append((step.num_drafts, step.num_next_drafts))
        reply(scheduler, step)
    assert lengths == [(0, 3), (3, 1), (1, 0)]
    assert plan(scheduler).num_drafts == 0


def test_schedule_drafts_leave_half_of_the_tokens_to_prompts() -> None:
    scheduler = make_scheduler(num_nextn=5, max_num_tokens=16)
    for _ in range(2):
        scheduler.add(make_request(2, max_tokens=30))
    reply(scheduler, plan(scheduler))
    scheduler.add(make_request(40))
    step = plan(scheduler)
    assert step.num_drafts == 3
    assert sum(chunk.num_tokens for chunk in step.chunks) == 8


def test_schedule_no_room_for_drafts_decodes_without() -> None:
    scheduler = make_scheduler(num_nextn=1, max_num_tokens=4, max_batch_size=4)
    for _ in range(4):
        scheduler.add(make_request(1))
    reply(scheduler, plan(scheduler))
    step = plan(scheduler)
    assert (len(rows(step)), step.num_drafts) == (4, 0)


def test_schedule_useless_drafts_stop_and_are_tried_again() -> None:
    scheduler = make_scheduler(num_nextn=2, max_num_tokens=64, max_seq_len=600, num_blocks=641)
    for _ in range(4):
        scheduler.add(make_request(2, max_tokens=500))
    lengths = []
    for _ in range(WINDOW // 4 + FIRST_PAUSE + 10):
        step = scheduler.schedule()
        assert step is not None
        lengths.append(step.num_drafts)
        one_each = pack_int32([7] * 4)
        scheduler.update(StepOutput(step.epoch, step.seq, one_each))
    scheduler.check()
    assert lengths[WINDOW // 4] == 2
    assert set(lengths[WINDOW // 4 + 2 : WINDOW // 4 + FIRST_PAUSE]) == {0}
    assert lengths[-1] == 2
    drafts = scheduler.stats().drafts
    assert drafts is not None
    assert (drafts.num_accepted, drafts.mean_accepted_length) == ((0, 0), 1.0)


# ---- where rows end ----


def test_update_stop_token_in_the_middle_drops_the_rest() -> None:
    scheduler = make_scheduler(num_nextn=3)
    request = make_request(max_tokens=20, stop=[2])
    scheduler.add(request)
    reply(scheduler, plan(scheduler))
    second, third = plan(scheduler), plan(scheduler)
    events = reply(scheduler, second, [5, 2, 6, 8])
    assert [(event.token_id, event.finish) for event in events] == [
        (5, None),
        (2, FinishReason.STOP),
    ]
    assert reply(scheduler, third, [9, 9]) == []
    assert request.output_ids == [7, 5, 2]
    assert scheduler.stats().num_held_blocks == 0


def test_update_min_tokens_counts_the_tokens_of_the_same_step() -> None:
    scheduler = make_scheduler(num_nextn=3)
    request = make_request(max_tokens=20, sampling=Sampling(min_tokens=3), stop=[2])
    scheduler.add(request)
    reply(scheduler, plan(scheduler))
    events = reply(scheduler, plan(scheduler), [2, 2, 2, 5])
    assert [event.finish for event in events] == [None, None, FinishReason.STOP]


@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("accept", [True, False])
@pytest.mark.parametrize("max_tokens", range(1, 10))
def test_update_length_is_exact_whatever_is_accepted(
    depth: int, accept: bool, max_tokens: int
) -> None:
    scheduler = make_scheduler(num_nextn=3, pipeline_depth=depth)
    request = make_request(max_tokens=max_tokens)
    scheduler.add(request)
    events = drain(scheduler, accept)
    assert [event.finish for event in events] == [None] * (max_tokens - 1) + [FinishReason.LENGTH]
    assert request.output_ids == [7] * max_tokens
    assert scheduler.stats().num_held_blocks == 0


def test_schedule_row_that_may_have_ended_is_planned_until_it_has() -> None:
    scheduler = make_scheduler(num_nextn=3, pipeline_depth=2)
    request = make_request(max_tokens=6)
    scheduler.add(request)
    reply(scheduler, plan(scheduler))
    second, third = plan(scheduler), plan(scheduler)
    assert request.phase is Phase.DECODE, "1 + 4 + 4 tokens at most, 1 + 1 + 1 at least"
    reply(scheduler, second, [7])
    fourth = plan(scheduler)
    reply(scheduler, third, [7])
    assert request.phase is Phase.DECODE
    fifth = plan(scheduler)
    assert request.phase is Phase.DECODE, "3 tokens, and at least two more"
    reply(scheduler, fourth, [7, 7])
    assert scheduler.schedule() is None, "5 tokens, and at least one more"
    assert request.phase is Phase.DRAINING
    events = reply(scheduler, fifth, [7, 7, 7])
    assert [event.finish for event in events] == [FinishReason.LENGTH]


def test_schedule_row_that_certainly_ends_leaves_at_once() -> None:
    scheduler = make_scheduler(num_nextn=3, pipeline_depth=2)
    request = make_request(max_tokens=2)
    scheduler.add(request)
    steps = [plan(scheduler), plan(scheduler)]
    assert request.phase is Phase.DRAINING
    reply(scheduler, steps[0])
    assert scheduler.schedule() is None


def test_abort_between_steps_drops_what_comes() -> None:
    scheduler = make_scheduler(num_nextn=2)
    request = make_request()
    scheduler.add(request)
    reply(scheduler, plan(scheduler))
    step = plan(scheduler)
    assert scheduler.abort(request.request_id) is not None
    assert reply(scheduler, step, [7, 7]) == []
    assert scheduler.stats().num_free_blocks == 32


def test_update_logprobs_are_found_by_token() -> None:
    scheduler = make_scheduler(num_nextn=1)
    for _ in range(2):
        scheduler.add(make_request(sampling=Sampling(num_logprobs=0)))
    reply(scheduler, plan(scheduler))
    entries = {i: LogprobEntry(10 + i, -1.0, ()) for i in range(3)}
    events = reply(scheduler, plan(scheduler), [10], [11, 12], logprobs=entries)
    assert [event.logprob for event in events] == list(entries.values())


# ---- blocks ----


def test_schedule_blocks_are_there_for_the_fastest_case() -> None:
    """Three tokens and two steps in flight of three tokens each: positions 0 to 8, and one that
    the draft layer looks ahead."""
    scheduler = make_scheduler(num_nextn=2)
    request = make_request(3, max_tokens=20)
    scheduler.add(request)
    reply(scheduler, plan(scheduler))
    plan(scheduler)
    assert len(request.block_ids) == 2
    step = plan(scheduler)
    assert (len(request.block_ids), len(step.grows[0].block_ids)) == (3, 1)


def test_schedule_rejected_drafts_put_growth_off() -> None:
    scheduler = make_scheduler(num_nextn=2, pipeline_depth=1)
    request = make_request(3, max_tokens=20)
    scheduler.add(request)
    reply(scheduler, plan(scheduler))
    num_blocks = []
    for _ in range(5):
        reply(scheduler, plan(scheduler), [7])
        num_blocks.append(len(request.block_ids))
    # A step of n tokens writes n + 2 positions, and the draft layer looks one ahead.
    assert num_blocks == [2, 2, 3, 3, 3]


def test_update_only_computed_positions_are_cached() -> None:
    scheduler = make_scheduler(num_nextn=3, pipeline_depth=1)
    scheduler.add(make_request(3, max_tokens=20))
    reply(scheduler, plan(scheduler))
    reply(scheduler, plan(scheduler), [7])
    assert len(scheduler._pool.cached_hashes()) == 1, "positions 0 to 3"
    reply(scheduler, plan(scheduler), [7, 7, 7])
    assert len(scheduler._pool.cached_hashes()) == 1, "0 to 6; 7 was rejected"
    reply(scheduler, plan(scheduler), [7])
    assert len(scheduler._pool.cached_hashes()) == 2


def test_update_block_that_fills_in_the_last_step_is_cached() -> None:
    scheduler = make_scheduler(num_nextn=3, pipeline_depth=1)
    scheduler.add(make_request(3, max_tokens=20, stop=[2]))
    reply(scheduler, plan(scheduler))
    reply(scheduler, plan(scheduler), [7, 2])
    assert scheduler.stats().num_cached_blocks == 1


def test_prefix_hit_counts_one_block_less() -> None:
    prompt = list(range(1, 14))
    for num_nextn, num_cached in ((0, 12), (1, 8)):
        scheduler = make_scheduler(num_nextn=num_nextn, max_num_tokens=64)
        first, second = make_request(prompt, 1), make_request(prompt, 1)
        for request in (first, second):
            scheduler.add(request)
            drain(scheduler, accept=True)
        assert second.num_cached_tokens == num_cached


def test_schedule_blocks_run_short_decodes_without_drafts_and_preempts_nobody() -> None:
    """Both want a fourth block for their drafts, and one is left."""
    scheduler = make_scheduler(num_blocks=8, num_nextn=3, pipeline_depth=1)
    requests = [make_request(3, 6), make_request(3, 6)]
    for request in requests:
        scheduler.add(request)
    lengths = []
    while scheduler.has_work:
        step = plan(scheduler)
        lengths.append(step.num_drafts)
        reply(scheduler, step, *[[7]] * (len(rows(step)) + len(step.chunks)))
    assert lengths == [0, 3, 3, 3, 3, 0]
    assert [request.num_preemptions for request in requests] == [0, 0]


@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("num_nextn", range(6))
@pytest.mark.parametrize("accept", [True, False])
def test_add_longest_request_of_the_pool_never_needs_more(
    depth: int, num_nextn: int, accept: bool
) -> None:
    scheduler = make_scheduler(num_blocks=11, num_nextn=num_nextn, pipeline_depth=depth)
    overrun = depth * num_nextn + max(num_nextn - 1, 0)
    request = make_request(3, max_tokens=10**6)
    scheduler.add(request)
    assert request.max_tokens == 40 - overrun - 3
    for event in drain(scheduler, accept):
        assert event.finish in (None, FinishReason.LENGTH)
    assert (len(request.output_ids), request.num_preemptions) == (request.max_tokens, 0)


@pytest.mark.parametrize("num_nextn", [0, 5])
def test_add_prompt_at_the_edge_of_the_pool(num_nextn: int) -> None:
    scheduler = make_scheduler(num_blocks=11, num_nextn=num_nextn, pipeline_depth=2)
    most = 39 - (2 * num_nextn + max(num_nextn - 1, 0))
    fits = make_request(most, max_tokens=5)
    scheduler.add(fits)
    assert fits.max_tokens == 1
    assert len(drain(scheduler, accept=True)) == 1
    with pytest.raises(Refused, match="do not fit"):
        scheduler.add(make_request(most + 1, max_tokens=5))


@pytest.mark.parametrize("accept", [True, False])
def test_add_longest_sequence_is_not_shortened_by_drafts(accept: bool) -> None:
    scheduler = make_scheduler(num_nextn=5, max_seq_len=64)
    request = make_request(60, max_tokens=100)
    scheduler.add(request)
    assert request.max_tokens == 4
    events = drain(scheduler, accept)
    assert len(events) == 4
    assert request.num_final == 63


# ---- results that fit ----


def output(step: Step, token_ids: list[int], num_tokens: list[int]) -> StepOutput:
    return StepOutput(
        step.epoch, step.seq, pack_int32(token_ids), num_tokens=pack_int32(num_tokens)
    )


@pytest.mark.parametrize(
    ("token_ids", "num_tokens", "fits"),
    [
        ([7, 7, 7, 7], [3, 1], True),
        ([7, 7], [1, 1], True),
        ([7, 7], [], True),
        ([7, 7, 7, 7, 7], [4, 1], False),
        ([7, 7, 7], [1, 2], False),
        ([7], [0, 1], False),
        ([7, 7, 7], [3, 1], False),
        ([7, 7, 7], [3], False),
        ([7, 7, 7], [], False),
        ([], [], False),
    ],
)
def test_expects_tokens_of_a_decode_with_two_drafts_and_of_a_chunk(
    token_ids: list[int], num_tokens: list[int], fits: bool
) -> None:
    scheduler = make_scheduler(num_nextn=2)
    scheduler.add(make_request())
    reply(scheduler, plan(scheduler))
    scheduler.add(make_request())
    step = plan(scheduler)
    assert (len(rows(step)), len(step.chunks), step.num_drafts) == (1, 1, 2)
    assert scheduler.expects(output(step, token_ids, num_tokens)) is fits


@pytest.mark.parametrize(
    ("max_batch_size", "max_num_tokens", "num_nextn"),
    [(256, 512, 1), (32, 96, 3), (32, 128, 3), (8, 32, 5), (8, 64, 5)],
)
def test_steady_steps_draft_what_the_next_one_verifies(
    max_batch_size: int, max_num_tokens: int, num_nextn: int
) -> None:
    """Only steps of one length are captured as graphs."""
    scheduler = Scheduler(
        max_batch_size, max_num_tokens, 4096, 40 * max_batch_size, 64, 1, num_nextn=num_nextn
    )
    for i in range(max_batch_size):
        scheduler.add(Request(str(i), [1, 2, 3], Sampling(), 400, frozenset()))
    lengths = []
    for _ in range(300):
        step = scheduler.schedule()
        if step is None:
            break
        num_decodes = len(step.decodes) // 4
        counts = [step.num_drafts + 1] * num_decodes + [1] * sum(c.sample for c in step.chunks)
        ids = pack_int32([7] * sum(counts))
        scheduler.update(StepOutput(0, step.seq, ids, num_tokens=pack_int32(counts)))
        if num_decodes == max_batch_size:
            lengths.append((step.num_drafts, step.num_next_drafts))
    assert len(lengths) > 30
    assert sum(verified != made for verified, made in lengths[3:]) <= len(lengths) // 8, lengths
