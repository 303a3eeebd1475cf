"""What the ranks of a layout give each other, at the places where the layers ask for it.

One rank alone, for measurements: an exchange is a local copy of the same size, so that every kernel
behind it has the shapes that it has among the others. What comes out means nothing.
"""

import torch
from torch import Tensor

from .config import ModelConfig
from .layers import Quantized


class LocalCopies:
    """Stands in for a group of `size` ranks, of which this is one."""

    def __init__(self, size: int) -> None:
        self.size = size

    def gather(self, x: Tensor) -> Tensor:
        """x: [T, ...] of this rank -> [size * T, ...], the ranks' one after the other."""
        return x.repeat(self.size, *(1,) * (x.dim() - 1))

    def gather_rows(self, x: Tensor | Quantized) -> Tensor | Quantized:
        """`gather` of activations."""
        if not isinstance(x, Quantized):
            return self.gather(x)
        values = self.gather(x.values.view(torch.uint8)).view(x.values.dtype)
        return Quantized(values, self.gather(x.scale))

    def scatter_sum(self, x: Tensor) -> Tensor:
        """x: [size * T, N], this rank's part of all ranks' sums -> [T, N], the sums of its own."""
        return x[: len(x) // self.size].clone()


class LoneStage:
    """Stands in for the stages before and behind this one."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype, device: torch.device) -> None:
        generator = torch.Generator().manual_seed(0)
        row = torch.randn(1, config.hidden_size, generator=generator)
        self._row = row.to(device, dtype)

    def receive(self, num_tokens: int) -> Tensor:
        """What the stage before made of a step's tokens: [num_tokens, hidden]."""
        return self._row.repeat(num_tokens, 1)

    def send(self, hidden: Tensor) -> Tensor:
        """hidden: [T, hidden], for the stage behind -> what lies there."""
        return hidden.clone()

    def receive_tokens(self, lines: Tensor) -> Tensor:
        """lines: [S] int32, rows -> [S] int64, what the last stage chose for them."""
        return torch.zeros_like(lines, dtype=torch.int64)
