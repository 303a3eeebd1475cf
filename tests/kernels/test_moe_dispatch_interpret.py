"""The kernels of `moe_dispatch` against their twins in Triton's interpreter, on a machine without a
GPU. Outside the interpreter one test runs this file again inside it."""

import pytest
import torch
import triton
from torch import Tensor

from dsd.kernels import fused, moe_dispatch, quant, reference
from dsd.tests.kernels.dispatch_cases import CORNER, CORRECTNESS, LARGEST, Case
from dsd.tests.kernels.interpreter import patch, run_interpreted

pytestmark = pytest.mark.slow

INTERPRET = triton.knobs.runtime.interpret
if INTERPRET:
    patch()
else:

    def test_dispatch_in_the_interpreter_equals_its_twin() -> None:
        run_interpreted(__file__)


interpreted = pytest.mark.skipif(not INTERPRET, reason="run by the test above")


def same_bytes(actual: Tensor, expected: Tensor) -> None:
    assert actual.dtype == expected.dtype
    assert torch.equal(actual.view(torch.uint8), expected.view(torch.uint8))


@interpreted
@pytest.mark.parametrize("case", CORRECTNESS + CORNER + LARGEST, ids=str)
def test_dispatch(case: Case) -> None:
    ids, width = case.topk_ids(), 300
    q, scale = quant.quantize_1x128(torch.randn(case.num_tokens, width))
    scale = scale.t().contiguous().t() + torch.arange(case.num_tokens)[:, None]
    got = moe_dispatch.dispatch(q, scale, ids, case.held, case.first, case.expected)
    bm = got.tiles.bm
    rows, tiled, place, table, columns = reference.dispatch(
        q, scale, ids, case.held, case.first, bm
    )
    used, items = int((columns >= 0).sum()), int(table[0, 0])
    assert torch.equal(got.place, place) and torch.equal(got.tiles.columns, columns)
    if case.num_tokens:
        assert got.tiles.table[0, 0] == items
    assert got.tiles.table.shape == table.shape and got.scale.shape == tiled.shape
    assert torch.equal(got.tiles.table[1 : 1 + items], table[1 : 1 + items])
    same_bytes(got.rows[:used], rows[:used])
    taken = columns[:used].long()
    assert torch.equal(got.scale[:, taken], tiled[:, taken])


@interpreted
@pytest.mark.parametrize("ue8m0", [False, True])
@pytest.mark.parametrize("width", [128, 1300])
@pytest.mark.parametrize("case", [Case(0), Case(7, 3, 12, 4, 5), Case(9, 3, 7, held=7, lone=1)])
def test_silu_mul_dispatched(case: Case, width: int, ue8m0: bool) -> None:
    q, scale = quant.quantize_1x128(torch.randn(case.num_tokens, 128))
    tiles = moe_dispatch.dispatch(q, scale, case.topk_ids(), case.held, case.first).tiles
    gate_up = torch.randn(len(tiles.columns), 2 * width).bfloat16()
    used = int((tiles.columns >= 0).sum())
    gate_up[used:, ::2] = float("nan")
    active, tiled = moe_dispatch.silu_mul_dispatched(gate_up, tiles, ue8m0)
    want, want_scale = fused.silu_mul_quant(gate_up, ue8m0)
    same_bytes(active[:used], want[:used])
    assert torch.equal(tiled[:, tiles.columns[:used].long()].t(), want_scale[:used])
