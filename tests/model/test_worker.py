"""The worker's loop, with a device that takes its time."""

from collections import deque
from dataclasses import dataclass, field
from typing import Any

import pytest

from dsd.ipc.messages import Step, StepOutput, Stop
from dsd.model import worker


def step(seq: int) -> Step:
    return Step(0, seq, "decode", 4, (), (), b"\0" * 8, ())


@dataclass
class Launched:
    seq: int
    step: Step
    looks_left: int
    """How often `done` is asked before the device has finished."""

    def done(self) -> bool:
        self.looks_left -= 1
        return self.looks_left < 0


@dataclass
class Device:
    """Stands in for the runner; notes what it is told."""

    looks: int
    calls: list[tuple[str, int]] = field(default_factory=list)

    def launch(self, message: Step) -> Launched:
        self.calls.append(("launch", message.seq))
        return Launched(message.seq, message, self.looks)

    def collect(self, launched: Launched) -> StepOutput:
        self.calls.append(("collect", launched.seq))
        return StepOutput(0, launched.seq, b"")


class Wire:
    """Stands in for the channel: two steps at once, the others one for each result."""

    def __init__(self, messages: list[Any]) -> None:
        self.waiting = deque(messages)
        self.credit = 2
        self.sent: list[int] = []

    def has_message(self) -> bool:
        return self.credit > 0

    def receive(self) -> Any:
        self.credit -= 1
        return self.waiting.popleft()

    def send(self, output: StepOutput) -> None:
        self.credit += 1
        self.sent.append(output.seq)


@pytest.mark.parametrize("looks", [1, 5])
def test_serve_launches_the_next_step_while_one_runs(looks: int) -> None:
    device, wire = Device(looks), Wire([*map(step, range(1, 6)), Stop(0)])
    worker.serve(wire, device)
    assert wire.sent == [1, 2, 3, 4, 5]
    assert device.calls[:3] == [("launch", 1), ("launch", 2), ("collect", 1)]
    assert device.calls.index(("launch", 3)) < device.calls.index(("collect", 2))


def test_serve_with_a_device_that_has_finished_at_once_answers_before_it_asks() -> None:
    device, wire = Device(0), Wire([*map(step, range(1, 4)), Stop(0)])
    worker.serve(wire, device)
    assert device.calls == [(do, seq) for seq in (1, 2, 3) for do in ("launch", "collect")]


def test_serve_told_to_stop_finishes_the_steps_at_hand() -> None:
    device, wire = Device(1000), Wire([step(1), Stop(0)])
    worker.serve(wire, device)
    assert wire.sent == [1]


def test_a_step_that_cannot_be_launched_is_described_in_the_log(capfd) -> None:
    class Broken(Device):
        def launch(self, message: Step) -> Launched:
            raise RuntimeError("CUDA error: out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        worker.serve(Wire([step(7), Stop(0)]), Broken(0))
    err = capfd.readouterr().err
    assert "cannot be launched: step 7: 2 decodes, padded to 4, chunks [], 0 drafts" in err


def test_steps_under_way_when_the_device_fails_are_described_in_the_log(capfd) -> None:
    class Late(Launched):
        def done(self) -> bool:
            if super().done():
                raise RuntimeError("CUDA error: an illegal memory access was encountered")
            return False

    class Broken(Device):
        def launch(self, message: Step) -> Launched:
            return Late(message.seq, message, self.looks)

    with pytest.raises(RuntimeError, match="illegal memory"):
        worker.serve(Wire([step(7), step(8), Stop(0)]), Broken(3))
    err = capfd.readouterr().err
    assert "under way: step 7" in err and "under way: step 8" in err
