"""When steps ran, by the device's own clock."""

import time

import torch


class StepTimes:
    """Of one step: its beginning and its end, once that is there."""

    def __init__(self, device: torch.device, before: "StepTimes | None") -> None:
        self._cuda = device.type == "cuda"
        self._before = before
        self._begin = self._now()
        self._end: torch.cuda.Event | float | None = None

    def _now(self) -> torch.cuda.Event | float:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def finish(self) -> None:
        """Everything of the step is on the stream."""
        self._end = self._now()

    def done(self) -> bool:
        return not isinstance(self._end, torch.cuda.Event) or self._end.query()

    def wait(self) -> tuple[int, int]:
        """Waits for the end. Microseconds that the step took, and that the device stood idle since
        the end of the step before."""
        assert self._end is not None
        if isinstance(self._end, torch.cuda.Event):
            self._end.synchronize()
        before, self._before = self._before, None  # or all steps would be kept
        idle = 0.0 if before is None or before._end is None else _between(before._end, self._begin)
        return round(_between(self._begin, self._end)), max(0, round(idle))


class StepClock:
    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._last: StepTimes | None = None

    def start(self) -> StepTimes:
        """A step begins; the one before has been finished."""
        self._last = StepTimes(self._device, self._last)
        return self._last


def _between(start: torch.cuda.Event | float, stop: torch.cuda.Event | float) -> float:
    """Microseconds."""
    if isinstance(start, torch.cuda.Event) and isinstance(stop, torch.cuda.Event):
        return start.elapsed_time(stop) * 1e3
    assert isinstance(start, float) and isinstance(stop, float)
    return (stop - start) * 1e6
