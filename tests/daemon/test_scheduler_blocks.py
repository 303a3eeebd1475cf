"""The scheduler and its blocks: what the prefix cache saves, and who yields when none is free."""

from dsd.daemon.request import Phase, Request
from dsd.daemon.scheduler import Scheduler
from dsd.ipc.messages import Grow, Join, Sampling, unpack_int32
from dsd.tests.daemon.scheduler_kit import answer, make_request, make_scheduler, plan, rows, run

# ---- prefix cache ----


def cached_tokens(scheduler: Scheduler, request: Request) -> int:
    scheduler.add(request)
    run(scheduler)
    return request.num_cached_tokens


def test_prefix_same_prompt_again_computes_at_least_the_last_token() -> None:
    scheduler = make_scheduler()
    prompt = list(range(1, 9))
    assert cached_tokens(scheduler, make_request(prompt, 1)) == 0
    assert cached_tokens(scheduler, make_request(prompt, 1)) == 4
    assert cached_tokens(scheduler, make_request([*prompt, 9], 1)) == 8
    assert scheduler.stats().num_cached_tokens == 12


def test_prefix_generated_tokens_are_found_by_the_next_turn() -> None:
    scheduler = make_scheduler()
    assert cached_tokens(scheduler, make_request([1, 2, 3], 6)) == 0
    assert cached_tokens(scheduler, make_request([1, 2, 3, 7, 7, 7, 7, 7, 7], 1)) == 8


def test_prefix_other_salt_finds_nothing() -> None:
    scheduler = make_scheduler()
    prompt = list(range(1, 9))
    cached_tokens(scheduler, make_request(prompt, 1, salt=b"a"))
    assert cached_tokens(scheduler, make_request(prompt, 1, salt=b"b")) == 0
    assert cached_tokens(scheduler, make_request(prompt, 1, salt=b"a")) == 4


def test_prefix_prompt_logprobs_do_not_read_the_cache_but_fill_it() -> None:
    scheduler = make_scheduler()
    prompt = list(range(1, 9))
    scoring = Sampling(num_prompt_logprobs=0)
    assert cached_tokens(scheduler, make_request(prompt, 1, scoring)) == 0
    assert cached_tokens(scheduler, make_request(prompt, 1, scoring)) == 0
    assert cached_tokens(scheduler, make_request(prompt, 1)) == 4


def test_prefix_is_not_found_before_the_step_that_computes_it_came_back() -> None:
    scheduler = make_scheduler()
    prompt = list(range(1, 9))
    scheduler.add(make_request(prompt))
    first = plan(scheduler)
    scheduler.add(make_request(prompt))
    assert plan(scheduler).joins[0].num_cached_tokens == 0
    answer(scheduler, first)
    scheduler.add(make_request(prompt))
    assert plan(scheduler).joins[0].num_cached_tokens == 4


# ---- preemption ----


def crowd(depth: int = 1, old_priority: int = 0) -> tuple[Scheduler, Request, Request]:
    """Two rows that want three blocks each; there are four."""
    scheduler = make_scheduler(num_blocks=5, pipeline_depth=depth)
    old, young = make_request([1, 1], 10, priority=old_priority), make_request([2, 2], 10)
    for request in (old, young):
        scheduler.add(request)
        answer(scheduler, plan(scheduler))
    assert scheduler.num_running == 2
    return scheduler, old, young


def test_schedule_no_free_block_preempts_youngest() -> None:
    scheduler, old, young = crowd()
    while not young.num_preemptions:
        answer(scheduler, plan(scheduler))
    assert (old.phase, young.phase, young.row) == (Phase.DECODE, Phase.WAITING, -1)
    outputs = list(young.output_ids)
    events = run(scheduler)
    assert [event.request for event in events if event.finish] == [old, young]
    assert young.output_ids[: len(outputs)] == outputs
    assert (len(young.output_ids), young.num_preemptions) == (10, 1)
    assert old.num_preemptions == 0


def test_schedule_preempted_request_joins_again_with_its_output() -> None:
    scheduler, _, young = crowd()
    joins: list[Join] = []
    while scheduler.has_work:
        step = plan(scheduler)
        joins += step.joins
        answer(scheduler, step)
    (join,) = joins
    tokens = list(unpack_int32(join.token_ids))
    assert tokens[:2] == young.prompt_ids
    assert tokens[2:] == young.output_ids[: len(tokens) - 2]
    assert (join.num_prompt_tokens, len(tokens) > 2) == (2, True)
    assert young.num_cached_tokens == 0


def test_schedule_victim_with_a_result_outstanding_waits_for_it() -> None:
    scheduler, _, young = crowd(depth=2)
    steps = []
    while (step := scheduler.schedule()) is not None:
        steps.append(step)
        if len(steps) == 2:
            answer(scheduler, steps.pop(0))
    assert len(steps) == 1
    assert young.num_preemptions == 0
    answer(scheduler, steps.pop(0))
    assert rows(plan(scheduler)) == [0]
    assert young.num_preemptions == 1


def test_schedule_priority_outweighs_arrival_when_preempting() -> None:
    scheduler, old, young = crowd(old_priority=1)
    run(scheduler)
    assert (old.num_preemptions, young.num_preemptions) == (1, 0)


def test_schedule_admission_leaves_a_block_for_each_growing_row() -> None:
    scheduler = make_scheduler(num_blocks=4)
    scheduler.add(make_request(4, 5))
    answer(scheduler, plan(scheduler))
    scheduler.add(make_request(5, 2))
    step = plan(scheduler)
    assert step.joins == ()
    assert isinstance(step.grows[0], Grow)
