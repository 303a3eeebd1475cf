"""The NaN guard (`--check-numerics`): which tensor of which layer was the first to hold no number.

For hunting, not for serving: it needs eager steps, and waits for the device once a pass.
"""

import torch
from torch import Tensor


class NumericsError(RuntimeError):
    """A tensor holds NaN or infinity."""


class Numerics:
    """Flags of one pass, on the device until its end."""

    def __init__(self) -> None:
        self._names: list[str] = []
        self._bad: list[Tensor] = []

    def check(self, name: str, x: Tensor) -> None:
        """Notes how many of x: [T, N] are not finite."""
        self._names.append(f"{name} {list(x.shape)}")
        self._bad.append((~torch.isfinite(x)).sum())

    def finish(self) -> None:
        """Raises NumericsError that names the first bad tensor since the last call."""
        names, bad = self._names, torch.stack(self._bad).tolist()
        self._names, self._bad = [], []
        for name, count in zip(names, bad, strict=True):
            if count:
                raise NumericsError(f"{name}: {count} values are NaN or infinite")
