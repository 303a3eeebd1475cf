"""One difference metric and one tolerance table for all kernels."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

TOLERANCE = {
    "exact": 0.0,
    "float32": 1e-6,
    "bfloat16": 1e-5,
    "fp8": 1.5e-3,
}
"""By what the inputs went through: 1 - 2<a, b> / (<a, a> + <b, b>), DeepGEMM's `calc_diff`."""

Close = Callable[[Tensor, Tensor, str], None]


def difference(actual: Tensor, expected: Tensor) -> float:
    a, b = actual.double(), expected.double()
    norm = (a * a + b * b).sum()
    return float(1 - 2 * (a * b).sum() / norm) if norm > 0 else 0.0


@pytest.fixture
def close() -> Close:
    """Asserts shape, finiteness, and a difference within the row of the table."""

    def check(actual: Tensor, expected: Tensor, kind: str) -> None:
        assert actual.shape == expected.shape, (actual.shape, expected.shape)
        assert torch.isfinite(actual).all()
        if kind == "exact":
            assert torch.equal(actual, expected), (actual - expected).abs().max()
            return
        if not actual.numel():
            return
        found = difference(actual, expected)
        assert found <= TOLERANCE[kind], f"{found=} > {TOLERANCE[kind]=}"
        if kind == "float32":
            size = expected.double().square().mean().sqrt().item()
            torch.testing.assert_close(
                actual.double(), expected.double(), rtol=1e-4, atol=1e-4 * size
            )

    return check


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
