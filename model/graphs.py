"""CUDA graphs of the decode step: captured once for a list of sizes, replayed with padding.

A step of n rows replays a graph of at least n lines; the lines behind are the null row's. All
graphs share one memory pool, and are captured from the largest down, so that together they take
what the largest takes.
"""

from collections.abc import Callable, Sequence

import torch

from .batch import Sampled


class DecodeGraphs:
    """`run` works before anything is captured too: eagerly."""

    def __init__(self, decode: Callable[[int], Sampled], device: torch.device) -> None:
        self._decode = decode
        self._device = device
        self._graphs: dict[int, tuple[torch.cuda.CUDAGraph, Sampled]] = {}

    @property
    def sizes(self) -> tuple[int, ...]:
        return tuple(sorted(self._graphs))

    @torch.inference_mode()
    def capture(self, sizes: Sequence[int], report: Callable[[int, int], None]) -> None:
        """Captures a graph for each size. `report`: how many are done, of how many."""
        self.drop()
        pool = torch.cuda.graph_pool_handle()
        stream = torch.cuda.Stream(self._device)
        for done, size in enumerate(sorted(set(sizes), reverse=True)):
            report(done, len(sizes))
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                self._decode(size)  # compiles, and allocates what outlives a graph
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool, stream=stream):
                sampled = self._decode(size)
            self._graphs[size] = graph, sampled

    def drop(self) -> None:
        """Gives the graphs' memory back."""
        self._graphs.clear()

    def run(self, num_lines: int, padded_size: int) -> Sampled:
        """The next token of the first `num_lines` rows of the batch: by the graph of that size, if
        there is one. What it returns is overwritten by the next run."""
        if padded_size not in self._graphs:
            return self._decode(num_lines)
        graph, sampled = self._graphs[padded_size]
        graph.replay()
        return sampled.first(num_lines)


def default_sizes(max_batch_size: int) -> list[int]:
    """Sizes up to `max_batch_size` such that at most a tenth of a step's lines are padding; and the
    powers of two, which people like."""
    sizes = {1 << i for i in range(max_batch_size.bit_length()) if 1 << i < max_batch_size}
    size = 0
    while size < max_batch_size:
        size = min(max(size + 1, (size + 1) * 10 // 9), max_batch_size)
        sizes.add(size)
    return sorted(sizes)
