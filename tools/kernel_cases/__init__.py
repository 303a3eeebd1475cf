"""What `bench_kernels` runs: a module for each family of kernels, with `cases()`."""

from collections.abc import Callable
from dataclasses import dataclass

Run = Callable[[int], object]
"""Runs the kernel once, on set i of its rotated tensors."""


@dataclass(frozen=True)
class BenchCase:
    name: str
    build: Callable[[], Run]
    """Makes the tensors of all sets, when the case's turn comes."""
    bytes: int
    """What one run must read and write."""
    flops: int
    flop_kind: str
    """'fp8', 'bf16' or 'none': which ceiling of arithmetic holds."""
    rotate: int = 1
    """Sets of tensors, so many that they do not stay in the L2 cache."""
    peer_us: float | None = None
    """The best other implementation's time in ANCHORS.md (another run, perhaps another card)."""


def rotation(num_bytes: int, l2_bytes: int = 50 << 20, most: int = 32) -> int:
    """Sets of `num_bytes` that fill the L2 cache more than twice."""
    return max(1, min(most, -(-5 * l2_bytes // (2 * num_bytes))))
