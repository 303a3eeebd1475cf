import pytest
import torch
from torch import Tensor

from dsd.kernels import fused


def angles(num_tokens: int, pairs: int) -> Tensor:
    return torch.rand(num_tokens, pairs) * 100


@pytest.mark.parametrize("shape", [(5, 64), (5, 3, 64), (1, 1, 2), (0, 4, 16), (7, 16)], ids=str)
def test_apply_rope_equals_complex_multiplication(shape: tuple[int, ...], close) -> None:
    x = torch.randn(shape)
    angle = angles(shape[0], shape[-1] // 2)
    turn = torch.polar(torch.ones_like(angle), angle)
    if len(shape) == 3:
        turn = turn[:, None]
    want = torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2))) * turn).flatten(-2)
    close(fused.apply_rope(x, angle.cos(), angle.sin()), want, "float32")


def test_apply_rope_of_a_strided_view_equals_its_copy() -> None:
    wide = torch.randn(4, 3, 40).bfloat16()
    view, angle = wide[..., 24:], angles(4, 8)
    got = fused.apply_rope(view, angle.cos(), angle.sin())
    assert got.dtype == torch.bfloat16
    assert torch.equal(got, fused.apply_rope(view.contiguous(), angle.cos(), angle.sin()))


def test_apply_rope_dot_product_depends_on_the_distance_alone() -> None:
    q, k = torch.randn(1, 16), torch.randn(1, 16)
    frequency = 1.0 / 10000 ** (torch.arange(8) / 8)

    def score(m: int, n: int) -> float:
        rotated = [
            fused.apply_rope(x, (p * frequency).cos()[None], (p * frequency).sin()[None])
            for x, p in ((q, m), (k, n))
        ]
        return float(rotated[0] @ rotated[1].t())

    assert score(3, 1) == pytest.approx(score(103, 101), abs=1e-4)


def test_rms_norm_and_add_rms_norm_equal_their_formula(close) -> None:
    x, residual, weight = torch.randn(5, 96), torch.randn(5, 96), torch.randn(96)
    total = (x + residual).double()
    want = total / (total.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * weight
    normed, summed = fused.add_rms_norm(x, residual, weight, 1e-6)
    close(normed, want, "float32")
    close(summed, x + residual, "exact")
    close(fused.rms_norm(summed, weight, 1e-6), normed, "exact")


def test_rms_norm_of_huge_and_zero_rows_is_finite() -> None:
    x = torch.stack((torch.full((64,), 1e15), torch.zeros(64))).bfloat16()
    assert torch.isfinite(fused.rms_norm(x, torch.ones(64), 1e-6)).all()


def test_silu_mul_takes_the_gate_first(close) -> None:
    gate, up = torch.randn(3, 10), torch.randn(3, 10)
    got = fused.silu_mul(torch.cat((gate, up), dim=-1))
    close(got, gate / (1 + (-gate).exp()) * up, "float32")
