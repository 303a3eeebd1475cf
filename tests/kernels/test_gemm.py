from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from dsd.kernels.fp8_gemm_torch import fp8_gemm_nt_torch
from dsd.kernels.gemm import grouped_linear, linear
from dsd.kernels.quant import dequantize_128x128, quantize_1x128, quantize_128x128
from dsd.kernels.reference import fp8_gemm_nt


@dataclass(frozen=True)
class Case:
    t: int
    n: int
    k: int


CORRECTNESS = [Case(1, 576, 7168), Case(4, 1536, 7168), Case(16, 512, 2048), Case(130, 256, 256)]
CORNER = [
    Case(0, 64, 64),
    Case(1, 1, 1),
    Case(3, 129, 127),
    Case(2, 100, 300),
    Case(5, 300, 128),
    Case(3, 1024, 128),
    Case(3, 1025, 128),
    Case(2, 2200, 130),
]
CASES = [pytest.param(case, id=str(case)) for case in CORRECTNESS + CORNER]


def fp8(n: int, k: int) -> tuple[Tensor, Tensor]:
    # Blocks of different magnitude, so that a scale in the wrong place shows.
    blocks = torch.rand(-(-n // 128), -(-k // 128)) * 4 + 0.1
    factor = blocks.repeat_interleave(128, 0)[:n].repeat_interleave(128, 1)[:, :k]
    return quantize_128x128(torch.randn(n, k) * factor)


@pytest.mark.parametrize("case", CASES)
def test_fp8_gemm_equals_float_product_of_dequantised_inputs(case: Case, close) -> None:
    x = torch.randn(case.t, case.k) * torch.logspace(-2, 2, case.k)
    q, q_scale = quantize_1x128(x)
    w, w_scale = fp8(case.n, case.k)
    got = fp8_gemm_nt(q, q_scale, w, w_scale, torch.float32)
    x_back = q.double() * q_scale.repeat_interleave(128, 1)[:, : case.k].double()
    w_back = dequantize_128x128(w, w_scale, torch.float32).double()
    close(got, x_back @ w_back.t(), "float32")


@pytest.mark.parametrize("ue8m0", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_linear_act_quant_is_near_the_unquantised_product(case: Case, ue8m0: bool, close) -> None:
    x = torch.randn(case.t, case.k)
    w, w_scale = fp8(case.n, case.k)
    exact = x @ dequantize_128x128(w, w_scale, torch.float32).t()
    close(linear(x, w, w_scale), exact, "float32")
    close(linear(x, w, w_scale, act_quant=True, ue8m0=ue8m0), exact, "fp8")


@pytest.mark.parametrize("case", CASES)
def test_linear_bfloat16_keeps_the_dtype_of_its_input(case: Case, close) -> None:
    x = torch.randn(case.t, case.k).bfloat16()
    w, w_scale = fp8(case.n, case.k)
    exact = x.float() @ dequantize_128x128(w, w_scale, torch.float32).t()
    for act_quant, kind in ((False, "bfloat16"), (True, "fp8")):
        got = linear(x, w, w_scale, act_quant)
        assert got.dtype == torch.bfloat16
        close(got, exact, kind)


def test_linear_plain_weight_of_another_dtype_is_converted(close) -> None:
    x, w = torch.randn(3, 40), torch.randn(20, 40).bfloat16()
    close(linear(x, w, None), x @ w.float().t(), "exact")


def test_linear_wrong_scale_shape_is_a_bug_that_asserts() -> None:
    w, w_scale = fp8(200, 300)
    with pytest.raises(AssertionError):
        linear(torch.randn(1, 300), w, w_scale[:1])


COUNTS = {
    "even": [4, 4, 4, 4],
    "empty_first_and_last": [0, 9, 0, 7, 0],
    "one_takes_all": [0, 0, 33, 0],
    "only_expert": [5],
    "no_rows": [0, 0],
}


@pytest.mark.parametrize("quantised", ["plain", "weight_only", "act_quant"])
@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS.keys())
def test_grouped_linear_equals_linear_group_by_group(
    counts: list[int], quantised: str, close
) -> None:
    n, k, experts = 130, 257, len(counts)
    w, w_scale = torch.randn(experts, n, k), None
    if quantised != "plain":
        pairs = [quantize_128x128(each) for each in w]
        w = torch.stack([q.view(torch.uint8) for q, _ in pairs]).view(torch.float8_e4m3fn)
        w_scale = torch.stack([scale for _, scale in pairs])
    x = torch.randn(sum(counts), k)
    act_quant = quantised == "act_quant"
    got = grouped_linear(x, w, w_scale, torch.tensor(counts).cumsum(0), act_quant)
    parts = [
        linear(rows, w[e], None if w_scale is None else w_scale[e], act_quant)
        for e, rows in enumerate(x.split(counts))
    ]
    close(got, torch.cat(parts), "exact")


@pytest.mark.parametrize("shape", [(1, 128, 128), (7, 130, 257), (33, 256, 384)])
def test_torchs_fp8_gemm_equals_ours(shape: tuple[int, int, int], close) -> None:
    m, n, k = shape
    x, x_scale = quantize_1x128(torch.randn(m, k))
    w, w_scale = quantize_128x128(torch.randn(n, k))
    got = fp8_gemm_nt_torch(x, x_scale, w, w_scale, torch.float32)
    close(got, fp8_gemm_nt(x, x_scale, w, w_scale, torch.float32), "float32")
