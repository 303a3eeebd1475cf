"""A second stream, for what need not wait for what comes next on the current one.

```
current | x ready | gate, dispatch, routed experts        | their sum, with the shared one's |
second            | shared expert             |
                  fork                                    join
```
Inside a CUDA graph's capture both streams' kernels go into the graph, with the fork and the join.
"""

from collections.abc import Callable
from functools import cache
from typing import TypeVar

import torch

T = TypeVar("T")


def beside(compute: Callable[[], T], device: torch.device) -> Callable[[], T]:
    """Starts `compute` on the second stream; what it reads is ready on the current one, and stays
    as it is until the returned function has been called, which makes the current stream wait the
    first time, and gives the result. One computation at a time.

    Memory that `compute` takes belongs to the second stream. A later call uses it again, and first
    waits for the current stream, and with it for whatever read the result."""
    current, second = torch.cuda.current_stream(device), _second_stream(device)
    second.wait_stream(current)
    with torch.cuda.stream(second):
        result = compute()
    reads: Callable[[], T] | None = compute  # holds what the second stream reads

    def join() -> T:
        nonlocal reads
        if reads is not None:
            current.wait_stream(second)
            reads = None
        return result

    return join


def nothing() -> None:
    """Takes the place of what `beside` returns where there is nothing to compute."""


def end_fork(device: torch.device) -> None:
    """After an error in a capture: joins a fork that was not joined, or else ending the capture
    would be an error of its own, and hide the first."""
    second = _second_stream(device)
    with torch.cuda.stream(second):
        forked = torch.cuda.is_current_stream_capturing()
    if forked:
        torch.cuda.current_stream(device).wait_stream(second)


@cache
def _second_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)
