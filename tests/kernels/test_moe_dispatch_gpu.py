"""Dispatched rows on a GPU against a kernel for each step, by bits: from the gate's choice to what
the experts make of it, with NaN in all memory that is not written, and in CUDA graphs."""

import pytest
import torch
from torch import Tensor

from dsd.kernels import fused, gemm, moe_dispatch, moe_gemm, moe_items, moe_route, quant
from dsd.tests.kernels.dispatch_cases import CORNER, CORRECTNESS, LARGEST, Case

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]
BF16, FP8 = torch.bfloat16, torch.float8_e4m3fn
HIDDEN, WIDTH = 7168, 2048
MORE = [Case(4), Case(17), Case(64, expected=2.0), Case(65, expected=2.03), Case(40, expected=50.0)]
CASES = CORRECTNESS + CORNER + LARGEST + MORE


@pytest.fixture(autouse=True)
def _cuda() -> None:
    torch.cuda.manual_seed(0)


def poison() -> None:
    """What torch.empty finds next is NaN."""
    rooms = [torch.full((1 << size,), float("nan"), device="cuda") for size in range(8, 26)]
    del rooms


def quantized(num_tokens: int, width: int = HIDDEN) -> tuple[Tensor, Tensor]:
    decades = torch.linspace(-3, 3, num_tokens, device="cuda")[:, None]
    x = torch.randn(num_tokens, width, device="cuda") * 10**decades
    return quant.quantize_1x128(x.to(BF16), scale_k_major=True)


def weight(experts: int, n: int, k: int) -> tuple[Tensor, Tensor]:
    """Every expert has the same rows in another order."""
    rows = torch.randn(n, k, device="cuda").to(FP8).view(torch.uint8)
    w = torch.stack([rows.roll(expert, 0) for expert in range(experts)]).view(FP8)
    return w, torch.rand(experts, -(-n // 128), -(-k // 128), device="cuda") * 0.01


@pytest.mark.parametrize("case", CASES, ids=str)
def test_dispatch_equals_the_kernels_whose_place_it_takes(case: Case) -> None:
    ids, (q, scale) = case.topk_ids("cuda"), quantized(case.num_tokens)
    order, offsets, place = moe_route.permute_by_expert(ids, case.held, case.first)
    rows, scales = moe_route.gather_quantized(q, scale, order, offsets, case.top_k)
    used = int(offsets[-1])
    poison()
    got = moe_dispatch.dispatch(q, scale, ids, case.held, case.first, case.expected)
    assert torch.equal(got.place, place)
    assert torch.equal(got.rows[:used].view(torch.uint8), rows[:used].view(torch.uint8))
    columns, bm = got.tiles.columns, got.tiles.bm
    assert (columns[used:] == -1).all()
    taken = columns[:used].long()
    assert torch.equal(got.scale[:, taken].t(), scales[:used])
    if case.num_tokens:
        table = moe_items.item_table(offsets, 0, ids.numel(), bm)
        items = int(table[0, 0])
        assert got.tiles.table[0, 0] == items
        assert torch.equal(got.tiles.table[1 : 1 + items], table[1 : 1 + items])
        tiled = moe_items.tile_scales(scales, table, bm)
        assert torch.equal(got.scale[:, taken], tiled[:, taken])


def separate(
    q: Tensor, scale: Tensor, ids: Tensor, case: Case, maps: list[tuple[Tensor, Tensor]]
) -> tuple[Tensor, Tensor]:
    order, offsets, place = moe_route.permute_by_expert(ids, case.held, case.first)
    x = moe_route.gather_quantized(q, scale, order, offsets, case.top_k, True)
    tables: moe_items.Tables = {}
    hidden = gemm.grouped_fp8_linear(*x, *maps[0], offsets, BF16, case.expected, tables)
    x = fused.silu_mul_quant(hidden, False, True)
    return gemm.grouped_fp8_linear(*x, *maps[1], offsets, BF16, case.expected, tables), place


def dispatched(
    q: Tensor, scale: Tensor, ids: Tensor, case: Case, maps: list[tuple[Tensor, Tensor]]
) -> tuple[Tensor, Tensor]:
    rows, scales, place, tiles = moe_dispatch.dispatch(
        q, scale, ids, case.held, case.first, case.expected
    )
    hidden, out = (torch.empty(len(rows), len(w[0]), device="cuda", dtype=BF16) for w, _ in maps)
    moe_gemm.grouped_fp8_gemm_nt_tiled(rows, scales, *maps[0], tiles, hidden)
    x = moe_dispatch.silu_mul_dispatched(hidden, tiles)
    return moe_gemm.grouped_fp8_gemm_nt_tiled(*x, *maps[1], tiles, out), place


@pytest.mark.parametrize("case", CASES, ids=str)
def test_experts_of_dispatched_rows_equal_a_kernel_for_each_step(case: Case) -> None:
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs Hopper")
    q, scale = quantized(case.num_tokens, 1024)
    maps = [weight(case.held, 2 * 640, 1024), weight(case.held, 1024, 640)]
    ids = case.topk_ids("cuda")
    want, want_place = separate(q, scale, ids, case, maps)
    poison()
    got, place = dispatched(q, scale, ids, case, maps)
    used = int((place >= 0).sum())
    assert torch.equal(place, want_place) and torch.isfinite(got[:used]).all()
    assert torch.equal(got[:used], want[:used])


@pytest.mark.parametrize("num_tokens", [1, 3, 16, 64])
def test_replayed_graph_follows_the_choice(num_tokens: int) -> None:
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs Hopper")
    case = Case(num_tokens, first=64, held=128)
    maps = [weight(case.held, 2 * 256, 1024), weight(case.held, 1024, 256)]
    (q, scale), ids = quantized(num_tokens, 1024), case.topk_ids("cuda")
    weights = torch.rand(num_tokens, case.top_k, device="cuda")

    def run() -> Tensor:
        return moe_route.combine_experts(*dispatched(q, scale, ids, case, maps), weights)

    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run()
    for _ in range(20):
        ids.copy_(case.topk_ids("cuda"))
        q.copy_(quantized(num_tokens, 1024)[0])
        graph.replay()
        want = moe_route.combine_experts(*separate(q, scale, ids, case, maps), weights)
        assert torch.equal(out, want)


@pytest.mark.parametrize("width", [128, 1300, WIDTH])
@pytest.mark.parametrize("case", [Case(0), Case(1), Case(33, held=100, first=30)], ids=str)
def test_silu_mul_dispatched_equals_silu_mul_quant(case: Case, width: int) -> None:
    tiles = moe_dispatch.dispatch(
        *quantized(case.num_tokens), case.topk_ids("cuda"), case.held, case.first
    ).tiles
    used = int((tiles.columns >= 0).sum())
    gate_up = torch.randn(len(tiles.columns), 2 * width, device="cuda").to(BF16) * 4
    gate_up[used:] = float("nan")
    for ue8m0 in (False, True):
        poison()
        q, scale = moe_dispatch.silu_mul_dispatched(gate_up, tiles, ue8m0)
        want, want_scale = fused.silu_mul_quant(gate_up, ue8m0)
        assert torch.equal(q[:used].view(torch.uint8), want[:used].view(torch.uint8))
        assert torch.equal(scale[:, tiles.columns[:used].long()].t(), want_scale[:used])
