"""The twin of `moe_dispatch` against those of the kernels whose place it takes; who takes it."""

import pytest
import torch

from dsd.kernels import moe_dispatch, moe_gemm, moe_route
from dsd.kernels.quant import quantize_1x128
from dsd.tests.kernels.dispatch_cases import CORNER, CORRECTNESS, LARGEST, Case


@pytest.mark.parametrize("case", CORRECTNESS + CORNER + LARGEST, ids=str)
def test_dispatch_gives_each_item_the_rows_and_scales_of_its_expert(case: Case) -> None:
    ids = case.topk_ids()
    q, scale = quantize_1x128(torch.randn(case.num_tokens, 300))
    scale = scale + torch.arange(case.num_tokens)[:, None]
    got = moe_dispatch.dispatch(q, scale, ids, case.held, case.first, case.expected)
    order, offsets, place = moe_route.permute_by_expert(ids, case.held, case.first)
    assert torch.equal(got.place, place)
    (table, columns, bm), used = got.tiles, int(offsets[-1])
    bounds = moe_gemm.contiguous_bounds(offsets)
    want = [(e, slice(i, min(i + bm, end))) for e, (s, end) in enumerate(bounds)
            for i in range(s, end, bm)]  # fmt: skip
    assert table[0, 0] == len(want) < len(table)
    token = order // case.top_k
    assert torch.equal(got.rows[:used].float(), q.float()[token[:used]])
    for item, (expert, rows) in enumerate(want):
        found, first, start, end = table[1 + item].tolist()
        assert (found, (start, end)) == (expert, bounds[expert])
        assert rows.start == start + (item - first) * bm
        lanes = torch.arange(rows.stop - rows.start) + item * bm
        assert torch.equal(columns[rows], lanes.int())
        assert torch.equal(got.scale[:, lanes], scale[token[rows]].t())
    assert (columns[used:] == -1).all()


def test_too_many_rows_or_another_card_are_not_dispatched(monkeypatch: pytest.MonkeyPatch) -> None:
    w = torch.zeros(2, 256, 512, dtype=torch.float8_e4m3fn)
    assert not moe_dispatch.dispatches(8, 1.0, torch.bfloat16, w)
    monkeypatch.setattr(moe_dispatch, "has_wgmma", lambda x: True)
    assert moe_dispatch.dispatches(8, 1.0, torch.bfloat16, w, w)
    assert not moe_dispatch.dispatches(8, 1.0, torch.float32, w)
    assert not moe_dispatch.dispatches(8, 57.0, torch.bfloat16, w)
    assert not moe_dispatch.dispatches(moe_dispatch.MAX_PAIRS + 1, 1.0, torch.bfloat16, w)
    assert not moe_dispatch.dispatches(8, 1.0, torch.bfloat16, w, w[:, :250])
    assert not moe_dispatch.dispatches(8, 1.0, torch.bfloat16, w, w[:, :, 1:])


@pytest.mark.parametrize(("top_k", "routed"), [(8, 256), (6, 160), (6, 64), (8 * 32, 256), (1, 4)])
def test_after_the_warm_up_no_number_of_tokens_needs_another_kernel(
    top_k: int, routed: int
) -> None:
    def kind(m: int) -> object:
        pairs = m * top_k
        return moe_dispatch.dispatch_shape(pairs), moe_gemm.swap_tokens(pairs / routed)

    most = moe_dispatch.MAX_PAIRS // top_k
    warm = moe_dispatch.warm_up_tokens(top_k, routed, 8192)
    assert len(warm) <= 9 and max(warm) <= most
    assert {kind(m) for m in range(1, most + 1)} == {kind(m) for m in warm}
    assert moe_dispatch.warm_up_tokens(top_k, routed, 1) == [1]
