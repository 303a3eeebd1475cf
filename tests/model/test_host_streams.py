"""Copies on a stream of their own: a device with two streams that advance in any order.

Scheduler, `Runner._copy_blocks` and `HostBlocks` are the real ones; the model is the fake worker's,
which looks at the KV of every position that it attends to. What is launched runs later, when the
dice say so, as a GPU may run it: only events hold one stream up for the other.
"""

import random
from collections import deque
from collections.abc import Callable
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
import torch
from torch import Tensor

from dsd.daemon.request import Request
from dsd.daemon.scheduler import Scheduler
from dsd.ipc.messages import Load, Sampling, Step, StepOutput
from dsd.model.host_blocks import Copies, HostBlocks
from dsd.model.runner import Runner
from dsd.tests.fake_worker import Breach, FakeModel, Options, continuation


class Event:
    def __init__(self) -> None:
        self.done = False

    def set(self) -> None:
        self.done = True

    def query(self) -> bool:
        return self.done


class Stream:
    """What was launched and has not run. An event: wait for it."""

    def __init__(self) -> None:
        self.queue: deque[Event | Callable[[], object]] = deque()

    def record_event(self) -> Event:
        event = Event()
        self.queue.append(event.set)
        return event

    def wait_event(self, event: Event) -> None:
        self.queue.append(event)

    def wait_stream(self, other: "Stream") -> None:
        self.wait_event(other.record_event())

    def advance(self) -> bool:
        """Runs what is first, if it may run."""
        if not self.queue or (isinstance(self.queue[0], Event) and not self.queue[0].done):
            return False
        first = self.queue.popleft()
        if not isinstance(first, Event):
            first()
        return True


class LateHost(HostBlocks):
    """Copies when its stream comes to it."""

    def __init__(self, layer: Tensor, num_slots: int) -> None:
        super().__init__([layer], num_slots)
        self._stream: Any = Stream()

    def _offload(self, pairs: Copies) -> None:
        self._stream.queue.append(lambda: super(LateHost, self)._offload(pairs))

    def _restore(self, pairs: Copies) -> None:
        self._stream.queue.append(lambda: super(LateHost, self)._restore(pairs))


class HostWithoutWaits(LateHost):
    def before_writes(self, block_ids: object) -> None:
        pass


class HostThatForgets(LateHost):
    """As if every copy were done as soon as the next step comes."""

    def _forget_done(self) -> None:
        self._reading.clear()


class TensorKV:
    """The fake model's KV, where the copies find it: [num_blocks, block_size] int64."""

    def __init__(self, layer: Tensor) -> None:
        self.layer = layer

    def get(self, place: tuple[int, int]) -> int:
        return int(self.layer[place])

    def __setitem__(self, place: tuple[int, int], value: int) -> None:
        self.layer[place] = value


class Rig:
    def __init__(self, seed: int, cls: type[LateHost]) -> None:
        self.rng = rng = random.Random(seed)
        num_blocks, block_size = rng.randint(8, 14), rng.choice((2, 4))
        num_slots = rng.choice((3, 10, 60))
        self.scheduler = Scheduler(
            max_batch_size=3,
            max_num_tokens=rng.choice((7, 32)),
            max_seq_len=(num_blocks - 1) * block_size,
            num_blocks=num_blocks,
            block_size=block_size,
            num_host_blocks=num_slots,
        )
        options, layer = Options(num_blocks=num_blocks), torch.zeros(num_blocks, block_size).long()
        load = Load(0, "", "", "", "", 3, 32, 0, block_size, 0, 0)
        self.model = FakeModel(options, load)
        self.model.kv = TensorKV(layer)  # type: ignore[assignment]
        self.runner = SimpleNamespace(
            host=cls(layer, num_slots), cache=SimpleNamespace(block_size=block_size)
        )
        self.stream = Stream()
        self.copy_speed = rng.choice((0.02, 0.05, 0.2))
        self.in_flight: deque[int] = deque()
        self.outputs: deque[StepOutput] = deque()
        self.requests: list[Request] = []
        self.num_overlaps = 0
        """Steps that were computed while copies launched before them had not been made."""

    def launch(self, step: Step) -> None:
        Runner._copy_blocks(self.runner, step)  # type: ignore[arg-type]
        rest = msgspec.structs.replace(step, offloads=(), restores=())
        self.stream.queue.append(lambda: self.compute(rest))
        self.in_flight.append(step.seq)

    def compute(self, step: Step) -> None:
        self.num_overlaps += any(not isinstance(x, Event) for x in self.runner.host._stream.queue)
        self.outputs.append(self.model.run(step))

    def add(self) -> None:
        """Beginnings of three texts, so that prefixes are shared; some clients leave."""
        text = [self.rng.randint(1, 3)] * self.scheduler.max_seq_len
        prompt = [*text[: self.rng.randint(1, self.scheduler.max_seq_len - 8)], 9]
        number = len(self.requests)
        request = Request(f"r{number}", prompt, Sampling(temperature=0.0), self.rng.randint(1, 7))
        self.scheduler.add(request)
        self.requests.append(request)

    def act(self) -> None:
        action = self.rng.random()
        if action < 0.1 and self.scheduler.num_waiting < 3:
            self.add()
        elif action < 0.12 and self.requests:
            self.scheduler.abort(self.rng.choice(self.requests).request_id)
        elif action < 0.4:
            if (step := self.scheduler.schedule()) is not None:
                self.launch(step)
        elif action < 0.5 and self.outputs:
            assert self.in_flight.popleft() == self.outputs[0].seq
            self.scheduler.update(self.outputs.popleft())
        elif action < 0.5 + self.copy_speed:
            self.runner.host._stream.advance()
        else:
            self.stream.advance()

    def run(self, num_actions: int) -> None:
        for _ in range(num_actions):
            self.act()
        for request in self.requests:
            expected = continuation([*request.prompt_ids], request.max_tokens)
            assert request.output_ids == expected[: len(request.output_ids)]


@pytest.fixture
def streams(monkeypatch) -> Callable[[Rig], None]:
    """Makes the rig's streams those of torch."""

    def use(rig: Rig) -> None:
        monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: rig.stream)

    return use


NUM_ACTIONS = 3000


@pytest.mark.parametrize("seed", range(12))
def test_no_order_of_two_streams_changes_what_a_step_reads(streams, seed: int) -> None:
    rig = Rig(seed, LateHost)
    streams(rig)
    rig.run(NUM_ACTIONS)
    stats = rig.scheduler.stats().host
    assert stats is not None
    assert stats.num_offloaded_blocks > 10
    assert stats.num_restored_blocks > 3
    assert rig.num_overlaps > 5, "the streams did not overlap"


@pytest.mark.parametrize("cls", [HostWithoutWaits, HostThatForgets])
def test_missing_wait_before_a_write_is_found(streams, cls: type[LateHost]) -> None:
    for seed in range(30):
        rig = Rig(seed, cls)
        streams(rig)
        try:
            rig.run(NUM_ACTIONS)
        except Breach:
            return
    pytest.fail("no run noticed")


def test_missing_wait_for_what_comes_back_is_found(streams, monkeypatch) -> None:
    monkeypatch.setattr(Stream, "wait_stream", lambda self, other: None)
    rig = Rig(0, LateHost)
    streams(rig)
    with pytest.raises(Breach, match="another's"):
        rig.run(NUM_ACTIONS)
