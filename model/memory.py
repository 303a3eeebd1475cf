"""How much of a GPU's memory is left for the KV cache.

Measured, not guessed: the largest passes that steps may ask for run once on a KV cache of two
blocks, and what they took at their peak stays free. Then come the graphs' share, and the fraction
of the rest that the configuration leaves to others:

    card   | weights, rows | passes at their peak | graphs | KV cache ........ | 1 - fraction |
"""

from collections.abc import Callable

import torch

GRAPH_BYTES_PER_LAYER = 256 * 1024
"""Of one captured graph: its kernels and their arguments, as the driver keeps them. Planned; what
they really take is seen after the capture."""
SPARE_BYTES = 256 * 1024 * 1024
"""For what no rehearsal sees."""


def peak_of(device: torch.device, run: Callable[[], None]) -> int:
    """Bytes that `run` makes the allocator hold at most, beyond what is in use before it."""
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    run()
    torch.cuda.synchronize(device)
    peak = torch.cuda.max_memory_reserved(device) - before
    torch.cuda.empty_cache()
    return peak


def kv_budget(device: torch.device, reserved: int, free_fraction: float) -> int:
    """Bytes for the KV cache, once `reserved` bytes are put aside."""
    free, _ = torch.cuda.mem_get_info(device)
    return int((free - reserved - SPARE_BYTES) * free_fraction)


def missing(device: torch.device, needed: int) -> int:
    """Bytes that are not free of those that passes need; at most 0: all is well."""
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info(device)
    return needed + SPARE_BYTES // 2 - free
