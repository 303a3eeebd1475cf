"""The plain-Triton GEMMs and the table of items against their twins in Triton's interpreter, on a
machine without a GPU. Outside the interpreter one test runs this file again inside it."""

from dataclasses import dataclass

import pytest
import torch
import triton
from torch import Tensor

from dsd.kernels import fp8_gemm_dot, gemm, moe_gemm, moe_items, reference
from dsd.kernels.quant import quantize_128x128
from dsd.tests.kernels.interpreter import patch, run_interpreted

pytestmark = pytest.mark.slow

INTERPRET = triton.knobs.runtime.interpret
if INTERPRET:
    patch()
else:

    def test_plain_gemms_in_the_interpreter_equal_their_twins() -> None:
        run_interpreted(__file__)


interpreted = pytest.mark.skipif(not INTERPRET, reason="run by the test above")
BF16, F32 = torch.bfloat16, torch.float32


@dataclass(frozen=True)
class Case:
    t: int
    n: int
    k: int
    dtype: torch.dtype = BF16


CASES = [
    Case(1, 136, 256),
    Case(19, 100, 300),
    Case(70, 130, 130),
    Case(3, 1, 1),
    Case(5, 70, 96, F32),
]


def fp8(*shape: int) -> tuple[Tensor, Tensor]:
    """A weight [..., N, K] and its scales, of blocks that differ in magnitude."""
    pairs = [quantize_128x128(torch.randn(shape[-2:]) * (i + 1)) for i in range(shape[0])]
    w = torch.stack([q.view(torch.uint8) for q, _ in pairs]).view(torch.float8_e4m3fn)
    scale = torch.stack([scale for _, scale in pairs])
    return w, scale * (0.5 + torch.rand_like(scale))


def inside(x: Tensor) -> Tensor:
    """x as rows of a wider tensor of NaN."""
    wide = torch.full((x.shape[0] + 1, x.shape[1] + 5), float("nan")).to(x.dtype)
    wide[: x.shape[0], : x.shape[1]] = x
    return wide[: x.shape[0], : x.shape[1]]


@interpreted
@pytest.mark.parametrize("has_fp8", [True, False])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_dense(case: Case, has_fp8: bool, close, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fp8_gemm_dot, "has_fp8", lambda x: has_fp8)
    kind = "float32" if case.dtype == F32 else "bfloat16"
    w, w_scale = (each[0] for each in fp8(1, case.n, case.k))
    x = torch.randn(case.t, case.k, dtype=case.dtype)
    q, q_scale = reference.quantize_1x128(x)
    got = gemm.fp8_gemm_nt(inside(q), q_scale, w, w_scale, case.dtype)
    close(got, reference.fp8_gemm_nt(q, q_scale, w, w_scale, case.dtype), kind)
    got = fp8_gemm_dot.dequant_gemm_nt(inside(x), w, w_scale)
    close(got, reference.dequant_gemm_nt(x.float(), w, w_scale).to(case.dtype), kind)


COUNTS = {
    "mixed": [3, 0, 70, 1, 16],
    "one_takes_all": [0, 0, 33],
    "only_expert": [5],
    "empty": [0, 0],
}


@interpreted
@pytest.mark.parametrize("kind", ["scaled", "dequant", "plain"])
@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS.keys())
def test_grouped(counts: list[int], kind: str, close) -> None:
    n, k, rows = 130, 200, 72
    sizes = torch.tensor(counts)
    w, w_scale = fp8(len(counts), n, k)
    x = torch.randn(sum(counts) + 2, k, dtype=BF16)
    x[-2:] = float("nan")
    bounds = moe_gemm.contiguous_bounds(sizes.cumsum(0))
    out, want = torch.full((2, len(x), n), 7.0, dtype=BF16)
    slots = torch.full((len(counts), rows, k), float("nan"), dtype=BF16)
    for slot, (start, end) in zip(slots, bounds, strict=True):
        slot[: end - start] = x[start:end]
    if kind == "scaled":
        q, q_scale = reference.quantize_1x128(x)
        moe_gemm.by_expert(q, q_scale, w, w_scale, bounds, want)
        moe_gemm.grouped_fp8_gemm_nt_contiguous(q, q_scale, w, w_scale, sizes.cumsum(0), out)
    else:
        plain, scale = (w, w_scale) if kind == "dequant" else (w.to(BF16), None)
        moe_gemm.by_expert(x, None, plain, scale, bounds, want)
        moe_gemm.grouped_gemm_nt_contiguous(x, plain, sizes.cumsum(0), out, scale)
    close(out, want, "bfloat16")
    assert (out[-2:] == 7).all()
    if kind == "plain":
        masked = torch.full((len(counts), rows, n), 7.0, dtype=BF16)
        moe_gemm.grouped_gemm_nt_masked(slots, plain, sizes.int(), masked, expected_m=9)
        for slot, (start, end) in zip(masked, bounds, strict=True):
            close(slot[: end - start], want[start:end], "bfloat16")
            assert (slot[end - start :] == 7).all()


@interpreted
@pytest.mark.parametrize("bm", [16, 128])
@pytest.mark.parametrize("counts", [*COUNTS.values(), list(range(40)), [300] * 3])
def test_item_table_cuts_each_group_by_itself(counts: list[int], bm: int) -> None:
    rows = 304
    want_starts = {0: [sum(counts[:e]) for e in range(len(counts))]}
    want_starts[rows] = [e * rows for e in range(len(counts))]
    for slot, starts in want_starts.items():
        want, sizes = [], torch.tensor(counts)
        for e, (start, count) in enumerate(zip(starts, counts, strict=True)):
            items = -(-count // bm)
            want += [[e, len(want), start, start + count]] * items
        num_rows = rows * len(counts) if slot else sum(counts)
        table = moe_items.item_table(sizes if slot else sizes.cumsum(0), slot, num_rows, bm)
        assert table[0, 0] == len(want) < len(table)
        assert table[1 : 1 + len(want)].tolist() == want
