"""CUDA graphs of the decode step: captured once for a list of sizes, replayed with padding.

A step of n rows replays a graph of at least n lines; the lines behind are the null row's. Steps
that verify or make other numbers of drafts have graphs of their own. All graphs share one memory
pool, and are captured from the largest down, so that together they take about what the largest
takes.
"""

from collections.abc import Callable, Sequence

import torch

from .batch import Sampled
from .beside import end_fork

Drafts = tuple[int, int]
"""How many a step verifies, and how many it makes for the next one."""


class DecodeGraphs:
    """`run` works before anything is captured too: eagerly."""

    def __init__(self, decode: Callable[[int, int, int], Sampled], device: torch.device) -> None:
        """decode: of a number of lines, and of `Drafts`."""
        self._decode = decode
        self._device = device
        self._graphs: dict[tuple[int, int, int], tuple[torch.cuda.CUDAGraph, Sampled]] = {}

    @property
    def sizes(self) -> tuple[int, ...]:
        return tuple(sorted({size for size, *_ in self._graphs}))

    @torch.inference_mode()
    def capture(
        self, sizes: Sequence[int], drafts: Sequence[Drafts], report: Callable[[int, int], None]
    ) -> None:
        """Captures a graph for each size and each of `drafts`. `report`: how many are done, of how
        many."""
        self.drop()
        pool = torch.cuda.graph_pool_handle()
        stream = torch.cuda.Stream(self._device)
        keys = [(size, *each) for size in set(sizes) for each in drafts]
        keys.sort(key=lambda key: (key[0] * (key[1] + 1), key), reverse=True)
        for done, key in enumerate(keys):
            report(done, len(keys))
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                self._decode(*key)  # compiles, and allocates what outlives a graph
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool, stream=stream):
                try:
                    sampled = self._decode(*key)
                except BaseException:
                    end_fork(self._device)
                    raise
            self._graphs[key] = graph, sampled

    def drop(self) -> None:
        """Gives the graphs' memory back."""
        self._graphs.clear()

    def run(
        self, num_lines: int, padded_size: int, num_drafts: int = 0, num_next_drafts: int = 0
    ) -> Sampled:
        """The next tokens of the first `num_lines` rows of the batch: by the graph of that size, if
        there is one. What it returns is overwritten by the next run."""
        key = padded_size, num_drafts, num_next_drafts
        if key not in self._graphs:
            return self._decode(num_lines, num_drafts, num_next_drafts)
        graph, sampled = self._graphs[key]
        graph.replay()
        return sampled.first(num_lines, num_drafts + 1)


def drafts_of(num_nextn: int) -> list[Drafts]:
    """What steps ask for again and again: any length that stays. The one step between two lengths
    runs eagerly."""
    return [(length, length) for length in range(num_nextn, -1, -1)]


def default_sizes(max_batch_size: int) -> list[int]:
    """Sizes up to `max_batch_size` such that at most a tenth of a step's lines are padding; and the
    powers of two, which people like."""
    sizes = {1 << i for i in range(max_batch_size.bit_length()) if 1 << i < max_batch_size}
    size = 0
    while size < max_batch_size:
        size = min(max(size + 1, (size + 1) * 10 // 9), max_batch_size)
        sizes.add(size)
    return sorted(sizes)
