"""The second stream waits for the first where it begins, and the first for it where it is read."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from dsd.model.beside import beside
from dsd.model.graphs import DecodeGraphs

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]
LONG = 10**8
"""Clocks: some 50 ms, in which whoever does not wait reads what was there before."""


def slow_sum(x: Tensor, slow: str) -> Tensor:
    """(x + 1) + 1, the inner one on the current stream and the outer one beside it."""

    def add(x: Tensor, stream: str) -> Tensor:
        if stream == slow:
            torch.cuda._sleep(LONG)
        return x + 1

    y = add(x, "current")
    return beside(lambda: add(y, "second"), x.device)() + 0


def replayed(run: Callable[[], Tensor]) -> Tensor:
    run()
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        out = run()
    out.zero_()
    graph.replay()
    return out


@pytest.mark.parametrize("slow", ["current", "second"])
@pytest.mark.parametrize("in_graph", [False, True])
def test_each_stream_waits_for_the_other(slow: str, in_graph: bool) -> None:
    x = torch.arange(1 << 20, device="cuda").float()
    got = replayed(lambda: slow_sum(x, slow)) if in_graph else slow_sum(x, slow)
    assert torch.equal(got, x + 2)


def test_error_in_a_capture_after_a_fork_is_the_one_that_is_seen() -> None:
    device = torch.device("cuda", torch.cuda.current_device())

    def decode(*_key: int) -> None:
        beside(lambda: torch.zeros(8, device=device), device)
        if torch.cuda.is_current_stream_capturing():
            raise torch.OutOfMemoryError("no more")

    graphs = DecodeGraphs(decode, device)  # type: ignore[arg-type]
    with pytest.raises(torch.OutOfMemoryError, match="no more"):
        graphs.capture([1], [(0, 0)], lambda done, total: None)
