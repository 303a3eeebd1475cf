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
    first time, and gives the result. One computation at a time."""
    current, second = torch.cuda.current_stream(device), _second_stream(device)
    second.wait_stream(current)
    with torch.cuda.stream(second):
        result = compute()
    waits = True

    def join() -> T:
        nonlocal waits
        if waits:
            current.wait_stream(second)
            waits = False
        return result

    return join


@cache
def _second_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)
