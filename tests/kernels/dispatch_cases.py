"""What is dispatched to experts, for the tests of `moe_dispatch` on every machine."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Case:
    num_tokens: int
    top_k: int = 8
    routed: int = 256
    """Experts that there are, on all ranks."""
    first: int = 0
    held: int = 256
    """Experts of this rank, from `first` on."""
    lone: int | None = None
    """The expert to whom every pair goes."""
    expected: float = 1.0

    def topk_ids(self, device: str = "cpu") -> Tensor:
        shape = self.num_tokens, self.top_k
        if self.lone is not None:
            return torch.full(shape, self.lone, device=device)
        scores = torch.rand(self.num_tokens, self.routed, device=device)
        return scores.argsort(dim=1)[:, : self.top_k].contiguous()


CORRECTNESS = [Case(1), Case(2), Case(5), Case(16), Case(63)]
CORNER = [
    Case(0),
    Case(1, top_k=1, routed=1, held=1),
    Case(7, top_k=3, routed=12, first=4, held=5),
    Case(33, top_k=6, routed=384, first=96, held=96),
    Case(3, first=32, held=32, lone=31),  # nobody here takes them
    Case(13, top_k=3, routed=30, held=30, lone=29),  # more than a tile to one expert
    Case(43, top_k=3, routed=7, held=7, expected=18.4),
    Case(61, top_k=2, routed=40, first=1, held=38, expected=7.0),
]
LARGEST = [
    Case(256, expected=8.0),
    Case(128, expected=4.0),
    Case(128, held=100, first=150, lone=200),
]
