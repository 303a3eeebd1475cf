"""What the tokens of a step's result mean for the requests."""

from collections.abc import Mapping, Sequence

from ..ipc.messages import LogprobEntry, StepOutput, unpack_int32
from .flight import Flight
from .request import FinishReason, Phase, Request, TokenEvent


def is_result_of(flight: Flight, output: StepOutput) -> bool:
    """Whether the result belongs to the step and has as many tokens as its rows may have."""
    num_decoding = len(flight.decoding)
    num_sampled = num_decoding + len(flight.prefilled)
    num_ids = len(output.token_ids) / 4
    if output.seq != flight.seq or not output.num_tokens:
        return output.seq == flight.seq and num_ids == num_sampled
    if len(output.num_tokens) != 4 * num_sampled:
        return False
    counts = unpack_int32(output.num_tokens)
    return (
        min(counts) >= 1
        and max(counts[:num_decoding], default=1) <= flight.num_drafts + 1
        and max(counts[num_decoding:], default=1) == 1
        and num_ids == sum(counts)
    )


def accept(
    flight: Flight, output: StepOutput, events: list[TokenEvent], dates_are_exact: bool
) -> list[Request]:
    """Gives each row its tokens, and adds an event for each. Returns the requests that end with
    them; what comes after a request's end is dropped.

    dates_are_exact: a row in DECODE cannot reach max_tokens, because no step has drafts.
    """
    sampled = flight.decoding + flight.prefilled
    token_ids = unpack_int32(output.token_ids)
    if output.logprobs or not dates_are_exact:
        counts = unpack_int32(output.num_tokens) if output.num_tokens else [1] * len(sampled)
        return _accept_several(sampled, counts, token_ids, output.logprobs, events)
    ended = []
    # The one loop over all rows. Only those in DECODE can neither have ended nor reach
    # max_tokens here.
    decode, emit = Phase.DECODE, events.append
    for request, token_id in zip(sampled, token_ids, strict=True):
        if request.phase is decode and token_id not in request.stop_token_ids:
            request.output_ids.append(token_id)
            emit(TokenEvent(request, token_id))
        elif request.phase is not Phase.FINISHED and _accept(request, token_id, None, events):
            ended.append(request)
    return ended


def num_tokens_by_row(flight: Flight, output: StepOutput) -> Sequence[int]:
    """Those that the step gave each of its decoding rows."""
    num_decoding = len(flight.decoding)
    return unpack_int32(output.num_tokens[: 4 * num_decoding]) or [1] * num_decoding


def _accept_several(
    sampled: Sequence[Request],
    counts: Sequence[int],
    token_ids: Sequence[int],
    logprobs: Mapping[int, LogprobEntry],
    events: list[TokenEvent],
) -> list[Request]:
    ended = []
    start = 0
    for request, count in zip(sampled, counts, strict=True):
        if request.phase is not Phase.FINISHED:
            for i in range(start, start + count):
                if _accept(request, token_ids[i], logprobs.get(i), events):
                    ended.append(request)
                    break
        start += count
    return ended


def _accept(
    request: Request, token_id: int, logprob: LogprobEntry | None, events: list[TokenEvent]
) -> bool:
    """Whether this is the request's last token."""
    request.output_ids.append(token_id)
    num_tokens = len(request.output_ids)
    finish = None
    if token_id in request.stop_token_ids and num_tokens > request.sampling.min_tokens:
        finish = FinishReason.STOP
    elif num_tokens == request.max_tokens:
        finish = FinishReason.LENGTH
    events.append(TokenEvent(request, token_id, logprob, (), finish))
    return finish is not None
