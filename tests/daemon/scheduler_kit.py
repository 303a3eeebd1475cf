"""What the scheduler's example tests share."""

from collections.abc import Iterable

from dsd.daemon.request import Request, TokenEvent
from dsd.daemon.scheduler import Scheduler
from dsd.ipc.messages import (
    LogprobEntry,
    Sampling,
    Step,
    StepOutput,
    pack_int32,
    unpack_int32,
)

GREEDY = Sampling(temperature=0.0)
numbers = iter(range(10**9))


def make_scheduler(**changes: object) -> Scheduler:
    settings: dict[str, object] = {
        "max_batch_size": 4,
        "max_num_tokens": 16,
        "max_seq_len": 64,
        "num_blocks": 33,
        "block_size": 4,
    }
    return Scheduler(**settings | changes)  # type: ignore[arg-type]


def make_request(
    prompt: int | list[int] = 3,
    max_tokens: int = 8,
    sampling: Sampling = GREEDY,
    stop: Iterable[int] = (),
    priority: int = 0,
    salt: bytes = b"",
) -> Request:
    """An int as prompt: so many tokens that no other request shares."""
    number = next(numbers)
    if isinstance(prompt, int):
        prompt = [1000 * (number + 1) + i for i in range(prompt)]
    return Request(f"r{number}", prompt, sampling, max_tokens, frozenset(stop), priority, salt)


def plan(scheduler: Scheduler) -> Step:
    step = scheduler.schedule()
    scheduler.check()
    assert step is not None
    return step


def answer(
    scheduler: Scheduler,
    step: Step,
    *token_ids: int,
    logprobs: dict[int, LogprobEntry] | None = None,
    prompt_logprobs: dict[int, tuple[LogprobEntry, ...]] | None = None,
) -> list[TokenEvent]:
    """Without token ids, every row says 7."""
    num_tokens = len(step.decodes) // 4 + sum(chunk.sample for chunk in step.chunks)
    data = pack_int32(token_ids or [7] * num_tokens)
    output = StepOutput(step.epoch, step.seq, data, logprobs or {}, prompt_logprobs or {})
    events = scheduler.update(output)
    scheduler.check()
    return events


def run(scheduler: Scheduler) -> list[TokenEvent]:
    """One step at a time until idle."""
    events = []
    while scheduler.has_work:
        events += answer(scheduler, plan(scheduler))
    return events


def rows(step: Step) -> list[int]:
    return list(unpack_int32(step.decodes))
