"""What a GPU did in a few steps, from torch's profiler."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import click
import torch

TRACE_STEPS = 8
GPU_WORK = ("kernel", "gpu_memcpy", "gpu_memset")
"""Categories of a Chrome trace."""


class Busy(NamedTuple):
    """Of a GPU, per step."""

    busy_ms: float
    idle_ms: float
    num_kernels: float


def trace(advance: Callable[[], object], path: Path) -> Busy:
    """Profiles TRACE_STEPS calls of `advance`, a step each, and writes their Chrome trace."""
    activities = [torch.profiler.ProfilerActivity.CUDA]  # the CPU's would slow the host down
    with torch.profiler.profile(activities=activities) as profiler:
        for _ in range(TRACE_STEPS):
            advance()
        torch.cuda.synchronize()
    profiler.export_chrome_trace(str(path))
    return read_trace(json.loads(path.read_text()), TRACE_STEPS)


def read_trace(fields: dict[str, Any], num_steps: int) -> Busy:
    """Busy: the union of all kernels and copies; idle: what is between the first and the last."""
    spans = sorted(
        (event["ts"], event["ts"] + event["dur"])
        for event in fields["traceEvents"]
        if event.get("cat") in GPU_WORK
    )
    if not spans:
        raise click.ClickException("the trace holds no work of a GPU")
    busy_us, idle_us, end = 0.0, 0.0, spans[0][0]
    for start, stop in spans:
        idle_us += max(0.0, start - end)
        busy_us += max(0.0, stop - max(start, end))
        end = max(end, stop)
    kernels = sum(event.get("cat") == "kernel" for event in fields["traceEvents"])
    return Busy(busy_us / 1000 / num_steps, idle_us / 1000 / num_steps, kernels / num_steps)
