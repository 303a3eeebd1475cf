from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from dsd.kernels.quant import dequantize_128x128, quantize_1x128, quantize_128x128

FP8_MAX = 448.0


@dataclass(frozen=True)
class Case:
    rows: int
    width: int
    spread: float = 0.0
    """Decades between the largest and the smallest elements."""

    def make(self) -> Tensor:
        x = torch.randn(self.rows, self.width)
        return x * 10 ** (self.spread * (torch.rand(self.rows, self.width) - 0.5))


CORRECTNESS = [Case(1, 7168), Case(64, 1536), Case(5, 512, spread=6), Case(3, 2048, spread=12)]
CORNER = [Case(0, 256), Case(1, 1), Case(2, 127), Case(2, 128), Case(3, 129), Case(7, 300)]
WEIGHTS = [(128, 128), (1, 1), (127, 129), (256, 384), (576, 100), (100, 576), (2, 1000)]


def blocks_of(scale: Tensor, width: int) -> Tensor:
    return scale.repeat_interleave(128, dim=-1)[..., :width]


def check_error(x: Tensor, q: Tensor, scale: Tensor) -> None:
    """e4m3 has 3 mantissa bits: half a step is 2^-4 of the value, or 2^-10 among subnormals."""
    error = (x.double() - q.double() * scale.double()).abs()
    bound = torch.maximum(x.double().abs() / 16, scale.double() / 1024) * (1 + 1e-5)
    assert (error <= bound).all(), (error - bound).max()


@pytest.mark.parametrize("ue8m0", [False, True])
@pytest.mark.parametrize("case", CORRECTNESS + CORNER, ids=str)
def test_quantize_1x128_round_trip_is_within_half_a_step(case: Case, ue8m0: bool) -> None:
    x = case.make()
    q, scale = quantize_1x128(x, ue8m0)
    assert q.shape == x.shape and q.dtype == torch.float8_e4m3fn
    assert scale.shape == (case.rows, -(-case.width // 128)) and scale.dtype == torch.float32
    check_error(x, q, blocks_of(scale, case.width))


def test_quantize_1x128_uses_the_whole_range() -> None:
    q, _ = quantize_1x128(torch.randn(16, 512))
    assert (q.float().view(16, 4, 128).abs().amax(-1) == FP8_MAX).all()


def test_quantize_1x128_bfloat16_input_equals_its_float32_copy() -> None:
    x = torch.randn(4, 300).bfloat16()
    for got, want in zip(quantize_1x128(x), quantize_1x128(x.float()), strict=True):
        assert torch.equal(got.float(), want.float())


def test_quantize_1x128_non_contiguous_input_equals_its_copy() -> None:
    x = torch.randn(300, 7).t()
    for got, want in zip(quantize_1x128(x), quantize_1x128(x.contiguous()), strict=True):
        assert torch.equal(got.float(), want.float())


def test_quantize_1x128_row_does_not_depend_on_the_batch() -> None:
    x = torch.randn(37, 1000) * torch.logspace(-6, 6, 37)[:, None]
    for ue8m0 in (False, True):
        q, scale = quantize_1x128(x, ue8m0)
        for row in range(37):
            q_alone, scale_alone = quantize_1x128(x[row : row + 1], ue8m0)
            assert torch.equal(q_alone.float()[0], q.float()[row])
            assert torch.equal(scale_alone[0], scale[row])


@pytest.mark.parametrize("ue8m0", [False, True])
def test_quantize_zeros_stay_zero_with_finite_scales(ue8m0: bool) -> None:
    q, scale = quantize_1x128(torch.zeros(3, 200), ue8m0)
    assert (q.float() == 0).all() and (scale > 0).all() and torch.isfinite(scale).all()


def hard_maxima() -> Tensor:
    """Maxima around 448 * 2^k: where rounding the scale up is easiest to get wrong."""
    exact = FP8_MAX * torch.exp2(torch.arange(-20.0, 60.0))
    above, below = exact, exact
    values = [exact]
    for _ in range(4):
        above = torch.nextafter(above, torch.tensor(float("inf")))
        below = torch.nextafter(below, torch.tensor(0.0))
        values += [above, below]
    return torch.cat(values)


def test_quantize_ue8m0_scales_are_powers_of_two_and_never_saturate() -> None:
    maxima = torch.cat((hard_maxima(), torch.rand(4000) * 1000))
    x = torch.zeros(len(maxima), 128)
    x[:, 17] = -maxima
    q, scale = quantize_1x128(x, ue8m0=True)
    mantissa, _ = torch.frexp(scale)
    assert (mantissa == 0.5).all()
    assert (maxima.double() <= FP8_MAX * scale[:, 0].double()).all(), "rounded down: saturates"
    tight = maxima.double() > FP8_MAX / 2 * scale[:, 0].double()
    assert (tight | (maxima <= 1e-4)).all(), "a power of two too large"
    check_error(x, q, blocks_of(scale, 128))


@pytest.mark.parametrize("shape", WEIGHTS, ids=str)
def test_quantize_128x128_round_trip_is_within_half_a_step(shape: tuple[int, int]) -> None:
    w = torch.randn(shape) * torch.logspace(-3, 3, shape[1])
    q, scale = quantize_128x128(w)
    n, k = shape
    assert q.shape == shape and q.dtype == torch.float8_e4m3fn and q.is_contiguous()
    assert scale.shape == (-(-n // 128), -(-k // 128)) and scale.dtype == torch.float32
    full = torch.stack([blocks_of(scale[i // 128], k) for i in range(n)])
    check_error(w, q, full)
    assert torch.equal(dequantize_128x128(q, scale, torch.float32), q.float() * full)


def test_dequantize_128x128_stacked_equals_one_by_one() -> None:
    q, scale = zip(*(quantize_128x128(torch.randn(130, 257)) for _ in range(3)), strict=True)
    together = dequantize_128x128(
        torch.stack([x.view(torch.uint8) for x in q]).view(torch.float8_e4m3fn),
        torch.stack(scale),
        torch.bfloat16,
    )
    for i in range(3):
        assert torch.equal(together[i], dequantize_128x128(q[i], scale[i], torch.bfloat16))


def test_quantize_128x128_of_its_own_result_is_stable() -> None:
    q, scale = quantize_128x128(torch.randn(200, 200))
    again, scale_again = quantize_128x128(dequantize_128x128(q, scale, torch.float32))
    torch.testing.assert_close(scale_again, scale)
    assert torch.equal(again.float(), q.float())
