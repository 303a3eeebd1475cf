"""From token events to what a client sees: text, reasoning, log-probabilities, usage.

One `Choice` follows one sequence: detokenizes, cuts at stop strings, splits off the thinking. A
`Generation` follows the sequences of one HTTP request and yields `Delta`s in the order of events.
"""

import time
from collections.abc import AsyncGenerator, Callable, Sequence

import msgspec

from ..ipc.messages import LogprobEntry
from .detokenizer import Detokenizer
from .engine import Engine
from .request import FinishReason, Request, TokenEvent
from .stream import TokenStream
from .thinking import ThinkingSplitter


class Delta(msgspec.Struct):
    """What came of one batch of events for one choice."""

    index: int
    content: str = ""
    reasoning: str = ""
    token_ids: list[int] = msgspec.field(default_factory=list)
    logprobs: list[LogprobEntry] = msgspec.field(default_factory=list)
    prompt_logprobs: list[LogprobEntry] = msgspec.field(default_factory=list)
    finish: FinishReason | None = None
    message: str = ""
    """For FinishReason.ERROR and for aborts by the daemon."""


class Choice:
    """One sequence's way back to text."""

    def __init__(
        self,
        index: int,
        request: Request,
        detokenizer: Detokenizer | None,
        splitter: ThinkingSplitter | None,
    ) -> None:
        self.index = index
        self.request = request
        self._detokenizer = detokenizer
        self._splitter = splitter
        self.is_done = False
        self.stop_string: str | None = None
        self.num_tokens = 0
        """Generated ones that the client is told of."""
        self.num_reasoning_tokens = 0

    def take(self, event: TokenEvent, delta: Delta) -> bool:
        """Adds the event to `delta`. True: a stop string was found, and the engine must be told."""
        if self.is_done:
            return False
        delta.prompt_logprobs.extend(event.prompt_logprobs)
        stopped = event.token_id >= 0 and self._take_token(event, delta)
        if stopped or event.finish is not None:
            self._end(event, delta, stopped)
        return stopped and event.finish is None

    def _take_token(self, event: TokenEvent, delta: Delta) -> bool:
        self.num_tokens += 1
        delta.token_ids.append(event.token_id)
        if event.logprob is not None:
            delta.logprobs.append(event.logprob)
        if self._splitter is not None and self._splitter.inside:
            self.num_reasoning_tokens += 1
        is_stop_token = event.finish is FinishReason.STOP
        if self._detokenizer is None or is_stop_token:
            return False
        self._add_text(self._detokenizer.push(event.token_id), delta)
        self.stop_string = self._detokenizer.stopped
        return self.stop_string is not None

    def _add_text(self, text: str, delta: Delta) -> None:
        if self._splitter is None:
            delta.content += text
        elif text:
            self._add_pieces(self._splitter.push(text), delta)

    def _add_pieces(self, pieces: Sequence[tuple[str, str]], delta: Delta) -> None:
        for kind, text in pieces:
            if kind == "reasoning":
                delta.reasoning += text
            else:
                delta.content += text

    def _end(self, event: TokenEvent, delta: Delta, stopped: bool) -> None:
        self.is_done = True
        delta.finish = FinishReason.STOP if stopped else event.finish
        delta.message = event.message
        if self._detokenizer is not None and not stopped:
            self._add_text(self._detokenizer.flush(), delta)
            if self._detokenizer.stopped is not None:
                self.stop_string = self._detokenizer.stopped
                delta.finish = FinishReason.STOP
        if self._splitter is not None:
            self._add_pieces(self._splitter.flush(), delta)


class Timing(msgspec.Struct):
    """Moments of one HTTP request, monotonic seconds."""

    submitted: float
    first_token: float = 0.0
    last_token: float = 0.0


class Generation:
    """The sequences of one HTTP request, from submission to their ends."""

    def __init__(
        self,
        engine: Engine,
        choices: Sequence[Choice],
    ) -> None:
        self._engine = engine
        self.choices = list(choices)
        self._by_id = {choice.request.request_id: choice for choice in choices}
        self.observe: Callable[[Generation], None] | None = None
        """Called once, at the end."""
        self.timing = Timing(time.monotonic())
        self._stream: TokenStream | None = None

    async def start(self) -> None:
        """Queues the sequences. Raises what `Engine.submit` raises."""
        self._stream = await self._engine.submit([choice.request for choice in self.choices])

    async def deltas(self) -> AsyncGenerator[Delta]:
        """Until every choice has finished. Leaving early aborts what is left."""
        assert self._stream is not None
        num_left = len(self.choices)
        try:
            while num_left:
                for delta in self._collect(await self._stream.next()):
                    num_left -= delta.finish is not None
                    yield delta
        finally:
            self.close()
            if self.observe is not None:
                self.observe(self)

    def close(self) -> None:
        """Aborts what is left; also where nobody came to ask for `deltas`."""
        if self._stream is not None and not all(choice.is_done for choice in self.choices):
            self._engine.abort(self._stream)

    def _collect(self, events: Sequence[TokenEvent]) -> list[Delta]:
        deltas: dict[int, Delta] = {}
        now = time.monotonic()
        for event in events:
            choice = self._by_id[event.request.request_id]
            if choice.is_done:
                continue
            delta = deltas.setdefault(choice.index, Delta(choice.index))
            if event.token_id >= 0:
                self.timing.first_token = self.timing.first_token or now
                self.timing.last_token = now
            if choice.take(event, delta):
                self._engine.finish(choice.request)
        return list(deltas.values())

    # ---- usage ----

    @property
    def num_prompt_tokens(self) -> int:
        """Each prompt once, however many choices it has."""
        prompts = {id(choice.request.prompt_ids): choice.request for choice in self.choices}
        return sum(len(request.prompt_ids) for request in prompts.values())

    @property
    def num_cached_tokens(self) -> int:
        prompts: dict[int, int] = {}
        for choice in self.choices:
            request = choice.request
            prompts.setdefault(id(request.prompt_ids), request.num_cached_tokens)
        return sum(prompts.values())

    @property
    def num_completion_tokens(self) -> int:
        return sum(choice.num_tokens for choice in self.choices)

    @property
    def num_reasoning_tokens(self) -> int:
        return sum(choice.num_reasoning_tokens for choice in self.choices)
