"""The engine actor: owns the scheduler, keeps the worker fed, fans events out.

Everything that happens to it arrives in one mailbox and is handled in order:

    front       -> Submit, Abort, Finish
    supervisor  -> WorkerReady, WorkerLost, StepOutput

After each message it plans as many steps as the pipeline takes. With two in flight the worker has
its next step before it has finished the last.
"""

import asyncio
import enum
import secrets
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence

import msgspec

from ..ipc.messages import Ready, Step, StepOutput
from . import logs
from .config import EngineConfig
from .pace import Pace
from .request import FinishReason, Refused, Request, TokenEvent
from .scheduler import Scheduler
from .scheduler_stats import SchedulerStats
from .stream import TokenStream

log = logs.get("engine")
RATE_WINDOW_S = 10.0


class Unavailable(Exception):
    """The request cannot be taken now; trying again later may help."""


class QueueFull(Exception):
    """Too many requests wait."""


class EngineState(enum.StrEnum):
    LOADING = "loading"
    READY = "ready"
    DRAINING = "draining"
    """Runs what it has and takes nothing new."""
    LOST = "rebuilding"
    """The worker died; another is being loaded."""


class _Submit(msgspec.Struct):
    stream: TokenStream
    accepted: "asyncio.Future[None]"


class _Abort(msgspec.Struct):
    stream: TokenStream
    message: str


class _Finish(msgspec.Struct):
    request_id: str


class _WorkerLost(msgspec.Struct):
    message: str


_Mail = _Submit | _Abort | _Finish | _WorkerLost | Ready | StepOutput


class Counters(msgspec.Struct):
    """Since the daemon started."""

    requests: int = 0
    refused: int = 0
    prompt_tokens: int = 0
    generation_tokens: int = 0
    steps: int = 0
    finished: dict[str, int] = msgspec.field(default_factory=dict)
    """By FinishReason."""


class Engine:
    """One model's engine. `run` is its only task; the other methods may be called from the loop."""

    def __init__(
        self,
        config: EngineConfig,
        max_queued_requests: int,
        send: Callable[[Step], Awaitable[None]],
    ) -> None:
        self.print_iter_log = config.print_iter_log
        self.max_queued_requests = max_queued_requests
        self.counters = Counters()
        self.ready: Ready | None = None
        """The worker's, while it lives."""
        self._pipeline_depth = 2 if config.enable_overlap_scheduler else 1
        self._pads_batches = config.cuda_graph_padding_enabled
        self._num_nextn_by_batch_size = config.num_nextn_by_batch_size
        self._send = send
        self._hash_key = secrets.token_bytes(16)
        self._scheduler: Scheduler | None = None
        self._pace = Pace(0, config.max_itl_ms)
        self._streams: dict[str, TokenStream] = {}
        self._mail: deque[_Mail] = deque()
        self._wake = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()
        self._has_worker = asyncio.Event()
        self._broken = asyncio.Event()
        self._is_draining = False
        self._was_ready = False
        self._rates: deque[tuple[float, int]] = deque()
        self._in_flight: deque[Step] = deque()

    # ---- for the front ----

    async def submit(self, requests: Sequence[Request]) -> TokenStream:
        """Queues sequences, all or none. Raises Unavailable, QueueFull, or Refused."""
        if self.state is not EngineState.READY:
            raise Unavailable(why_unavailable(self.state))
        stream = TokenStream(requests)
        self._idle.clear()  # at once: a drain that begins now must wait for this one too
        accepted = asyncio.get_running_loop().create_future()
        self._post(_Submit(stream, accepted))
        try:
            await accepted
        except asyncio.CancelledError:
            self.abort(stream)
            raise
        return stream

    def abort(self, stream: TokenStream, message: str = "") -> None:
        """Ends what is left of the stream's sequences; harmless after their end."""
        self._post(_Abort(stream, message))

    def finish(self, request: Request) -> None:
        """A stop string was found in the request's text."""
        self._post(_Finish(request.request_id))

    @property
    def state(self) -> EngineState:
        if self._is_draining:
            return EngineState.DRAINING
        if self.ready is not None:
            return EngineState.READY
        return EngineState.LOST if self._was_ready else EngineState.LOADING

    # ---- for the supervisor ----

    def worker_ready(self, ready: Ready) -> None:
        self._post(ready)

    def worker_lost(self, message: str) -> None:
        self._post(_WorkerLost(message))

    def step_done(self, output: StepOutput) -> None:
        self._post(output)

    async def wait_broken(self) -> str:
        """Until the worker sends a result that fits no step in flight; returns a word on it."""
        self._broken.clear()
        await self._broken.wait()
        return "it sent a result that fits no step"

    # ---- for the node ----

    async def run(self) -> None:
        """Handles mail and plans steps, for ever."""
        while True:
            await self._wake.wait()
            self._wake.clear()
            while self._mail:
                self._handle(self._mail.popleft())
            await self._plan()

    def start_drain(self) -> None:
        """From now on nothing new is taken."""
        self._is_draining = True

    def resume(self) -> None:
        self._is_draining = False

    @property
    def max_itl_ms(self) -> float:
        """The goal for the time between two tokens of a sequence; 0: none."""
        return self._pace.max_itl_ms

    @max_itl_ms.setter
    def max_itl_ms(self, max_itl_ms: float) -> None:
        self._pace.max_itl_ms = max_itl_ms
        if self._scheduler is not None:
            self._scheduler.step_limit = self._pace.limit

    async def wait_ready(self) -> None:
        """Until a worker takes steps."""
        await self._has_worker.wait()

    async def wait_idle(self) -> None:
        """Until no sequence is live."""
        await self._idle.wait()

    def abort_all(self, message: str) -> None:
        """Ends every live sequence with `message`."""
        for stream in set(self._streams.values()):
            self.abort(stream, message)

    def stats(self) -> SchedulerStats | None:
        return None if self._scheduler is None else self._scheduler.stats()

    def tokens_per_s(self) -> float:
        """Generated tokens, over the last ten seconds."""
        self._forget_rates()
        return sum(count for _, count in self._rates) / RATE_WINDOW_S

    # ---- inside ----

    def _forget_rates(self) -> None:
        oldest = time.monotonic() - RATE_WINDOW_S
        while self._rates and self._rates[0][0] < oldest:
            self._rates.popleft()

    def _post(self, mail: _Mail) -> None:
        self._mail.append(mail)
        self._wake.set()

    def _handle(self, mail: _Mail) -> None:
        match mail:
            case StepOutput():
                self._on_output(mail)
            case _Submit():
                self._on_submit(mail)
            case _Abort():
                self._on_abort(mail)
            case _Finish():
                if self._scheduler is not None:
                    self._deliver(self._scheduler.finish(mail.request_id))
            case Ready():
                self._on_ready(mail)
            case _WorkerLost():
                self._on_lost(mail)

    async def _plan(self) -> None:
        if self._scheduler is None or self.ready is None:
            return
        while (step := self._scheduler.schedule()) is not None:
            self._in_flight.append(step)
            await self._send(step)

    def _on_ready(self, ready: Ready) -> None:
        self.ready = ready
        self._was_ready = True
        self._has_worker.set()
        self._in_flight.clear()
        self._pace = Pace(ready.max_num_tokens, self._pace.max_itl_ms)
        self._scheduler = Scheduler(
            max_batch_size=ready.max_batch_size,
            max_num_tokens=ready.max_num_tokens,
            max_seq_len=ready.max_seq_len,
            num_blocks=ready.num_blocks,
            block_size=ready.block_size,
            pipeline_depth=self._pipeline_depth,
            epoch=ready.epoch,
            hash_key=self._hash_key,
            graph_batch_sizes=ready.graph_batch_sizes if self._pads_batches else (),
            num_host_blocks=ready.num_host_blocks,
            num_nextn=ready.num_nextn,
            num_nextn_by_batch_size=self._num_nextn_by_batch_size,
        )
        self._scheduler.step_limit = self._pace.limit

    def _on_lost(self, lost: _WorkerLost) -> None:
        self.ready = None
        self._has_worker.clear()
        if self._scheduler is not None:
            events = self._scheduler.reset(self._scheduler.epoch + 1, lost.message)
            self._scheduler = None
            for event in events:
                self._deliver(event)

    def _on_submit(self, submit: _Submit) -> None:
        if submit.accepted.cancelled():
            self._note_idle()
            return
        try:
            self._add(submit.stream.requests)
        except (Refused, QueueFull, Unavailable) as error:
            self.counters.refused += 1
            submit.accepted.set_exception(error)
            self._note_idle()
            return
        for request in submit.stream.requests:
            self._streams[request.request_id] = submit.stream
        submit.accepted.set_result(None)

    def _add(self, requests: Sequence[Request]) -> None:
        if self._scheduler is None:
            raise Unavailable(why_unavailable(EngineState.LOST))
        if len(requests) > self.max_queued_requests:
            raise Refused(f"{len(requests)} sequences; at most {self.max_queued_requests} may wait")
        waiting = self._scheduler.num_waiting
        if waiting + len(requests) > self.max_queued_requests:
            raise QueueFull(f"{waiting} requests wait; the limit is {self.max_queued_requests}")
        added: list[Request] = []
        try:
            for request in requests:
                self._scheduler.add(request)
                added.append(request)
        except Refused:
            for request in added:
                self._scheduler.abort(request.request_id)
            raise
        self.counters.requests += len(requests)
        self.counters.prompt_tokens += sum(len(request.prompt_ids) for request in requests)

    def _on_abort(self, abort: _Abort) -> None:
        if self._scheduler is None:
            return
        for request in abort.stream.requests:
            event = self._scheduler.abort(request.request_id, FinishReason.ABORT, abort.message)
            self._deliver(event)

    def _on_output(self, output: StepOutput) -> None:
        if self._scheduler is None or output.epoch != self._scheduler.epoch:
            return
        if not self._scheduler.expects(output):
            self._broken.set()
            return
        step = self._in_flight.popleft()
        if step.chunks:
            self._pace.observe(step, output)
            self._scheduler.step_limit = self._pace.limit
        events = self._scheduler.update(output)
        num_tokens = sum(event.token_id >= 0 for event in events)
        self.counters.steps += 1
        self.counters.generation_tokens += num_tokens
        self._rates.append((time.monotonic(), num_tokens))
        self._forget_rates()
        for event in events:
            self._deliver(event)
        if self.print_iter_log:
            stats = self._scheduler.stats()
            log.info(
                "step",
                seq=output.seq,
                mode=step.mode,
                num_decodes=len(step.decodes) // 4,
                num_tokens=num_tokens,
                num_prompt_tokens=sum(chunk.num_tokens for chunk in step.chunks),
                compute_us=output.compute_us,
                idle_us=output.idle_us,
                num_running=stats.num_running,
                num_waiting=stats.num_waiting,
                num_held_blocks=stats.num_held_blocks,
            )

    def _deliver(self, event: TokenEvent | None) -> None:
        if event is None:
            return
        request_id = event.request.request_id
        self._streams[request_id].put(event)
        if event.finish is not None:
            del self._streams[request_id]
            finished = self.counters.finished
            finished[event.finish] = finished.get(event.finish, 0) + 1
            self._note_idle()

    def _note_idle(self) -> None:
        if not self._streams and not any(isinstance(mail, _Submit) for mail in self._mail):
            self._idle.set()


def why_unavailable(state: EngineState) -> str:
    """A sentence for the client of a request that cannot be taken."""
    return {
        EngineState.LOADING: "the model is being loaded",
        EngineState.READY: "the model is ready",
        EngineState.DRAINING: "the daemon is draining and takes no new requests",
        EngineState.LOST: "the model's worker was lost and is being loaded again",
    }[state]
