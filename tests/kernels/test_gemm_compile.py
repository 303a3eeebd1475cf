"""The GEMMs compile without a GPU: the Gluon ones for Hopper, the plain ones for any card; nothing
spills, all fits, and the tensor cores are used as meant."""

from typing import Any

import pytest
import torch

from dsd.kernels import (
    fp8_gemm,
    fp8_gemm_dot,
    fp8_gemm_swap,
    fp8_gemm_work,
    gemm,
    moe_gemm,
    moe_items,
    split_k,
)
from dsd.tests.kernels.aot import MAX_SMEM, Report, compile_kernel

pytestmark = pytest.mark.slow

M, N, K = 512, 4096, 7168
BF16, FP8 = torch.bfloat16, torch.float8_e4m3fn
X, W, OUT = (
    torch.empty(M, K, dtype=FP8),
    torch.empty(N, K, dtype=FP8),
    torch.empty(M, N, dtype=BF16),
)
X_SCALE, W_SCALE = torch.empty(K // 128, M), torch.empty(N // 128, K // 128)
TABLE = torch.empty(64, 4, dtype=torch.int32)
V3 = [
    (2112, 7168), (24576, 1536), (32768, 512), (7168, 16384), (4096, 7168), (7168, 2048),
    (36864, 7168), (7168, 18432), (3072, 1536), (4608, 7168), (7168, 2304), (512, 7168),
    (7168, 256),
]  # fmt: skip
"""(N, K) of DeepSeek-V3's linear maps, whole and shared by eight."""
H100_SMS = 132


def fits(report: Report) -> None:
    assert not report.spills, report
    assert report.smem <= MAX_SMEM, report


@pytest.mark.parametrize("kind", ["whole", "split", "grouped"])
@pytest.mark.parametrize("tile", fp8_gemm_work.TILES, ids=str)
def test_dense(tile: fp8_gemm_work.Tile, kind: str) -> None:
    descriptors = fp8_gemm.describe(X, X_SCALE, W, OUT, tile)
    table, split = TABLE if kind == "grouped" else W_SCALE, kind == "split"
    waves, partial = tile.bm // 128, W_SCALE if split else OUT
    sizes = (4, N // 128, N, K // 128, 132, 3)
    report = compile_kernel(
        fp8_gemm.dense_kernel,
        (*descriptors, OUT, N, W_SCALE, K // 128, table, partial, TABLE, *sizes),
        {
            "STAGES": tile.stages,
            "WAVES": waves,
            "ORDER": 8,
            "GROUPED": kind == "grouped",
            "SPLIT": split,
        },
        gluon=True,
        launch_pdl=kind != "grouped",
    )
    fits(report)
    assert report.opcodes["QGMMA"] == 8 * waves
    assert report.opcodes["UTMALDG"] == (3 if kind == "grouped" else 4)
    assert report.opcodes["FFMA"] >= tile.bm * tile.bn // 128


def swap_plans() -> set[fp8_gemm_swap.Plan]:
    """All that V3's shapes ask for."""
    return {
        fp8_gemm_swap.choose_plan(m, n, k, H100_SMS)
        for m in range(1, 513)
        for n, k in V3
        if gemm.streams_weight(m, n)
    }


@pytest.mark.parametrize("plan", sorted(swap_plans()), ids=str)
def test_swap(plan: fp8_gemm_swap.Plan) -> None:
    counters = torch.empty(64, dtype=torch.int32)
    report = compile_kernel(
        fp8_gemm_swap.swap_kernel,
        (
            *fp8_gemm_swap.describe(X, X_SCALE, W, plan.tokens),
            fp8_gemm_swap.describe_out(OUT, plan.tokens),
            *(W_SCALE, K // 128, OUT if plan.split == 1 else W_SCALE, counters, K // 128),
        ),
        {"STAGES": plan.stages, "SPLIT": plan.split},
        gluon=True,
        maxnreg=fp8_gemm_swap.MAX_REGISTERS[plan.tokens],
        launch_pdl=True,
    )
    fits(report)
    assert report.opcodes["QGMMA"] == 4 and report.opcodes["UTMASTG"]
    pairs = plan.tokens // 4 if plan.split > 1 else 0
    assert report.opcodes["STG"] == pairs + (plan.split > 1), "pieces leave by 8 bytes a thread"


@pytest.mark.parametrize("tokens", moe_gemm.SWAP_STAGES)
def test_grouped_swap(tokens: int) -> None:
    descriptors = fp8_gemm_swap.describe(X, X_SCALE, W, tokens)
    report = compile_kernel(
        moe_gemm.swap_kernel,
        (*descriptors, W_SCALE, K // 128, OUT, N, TABLE, N // 64, N, K // 128),
        {"STAGES": moe_gemm.SWAP_STAGES[tokens], "ORDER": moe_gemm.SWAP_ORDER},
        gluon=True,
        maxnreg=fp8_gemm_swap.MAX_REGISTERS[tokens],
    )
    fits(report)
    assert report.opcodes["QGMMA"] == 4
    assert 2 * report.smem <= MAX_SMEM, "two blocks are to fit an SM"


@pytest.mark.parametrize(
    ("arch", "tokens"), [(80, 128), (90, 16), (90, 64), (90, 128), (100, 16), (100, 128)]
)
@pytest.mark.parametrize("kind", ["plain", "scaled", "dequant"])
def test_dot(kind: str, arch: int, tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    bits = arch == 80
    monkeypatch.setattr(fp8_gemm_dot, "has_fp8", lambda x: not bits)
    fp8 = torch.uint8 if bits else FP8
    x = torch.empty(M, K, dtype=fp8 if kind == "scaled" else BF16)
    w = torch.empty(1, N, K, dtype=BF16 if kind == "plain" else fp8)
    tile = fp8_gemm_dot.choose_tile(tokens, kind, x)
    strides: tuple[Any, ...] = (K, 1, M, N * K, K, N // 128 * K // 128, K // 128, N)
    shape = {"BM": tile.bm, "BN": tile.bn, "BK": tile.bk}
    report = compile_kernel(
        fp8_gemm_dot.dot_kernel,
        (x, X_SCALE, w, W_SCALE, OUT, TABLE, 4, N // 128, M, N, K, *strides),
        {"KIND": kind, "BITS": bits, "GROUPED": tokens != 64, "EVEN": tokens != 16, **shape},
        arch=arch,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    fits(report)
    if arch == 90:
        assert report.opcodes["QGMMA" if kind == "scaled" else "HGMMA"]


@pytest.mark.parametrize("arch", [90, 100])
def test_item_table(arch: int) -> None:
    sizes = torch.empty(256, dtype=torch.int64)
    constexprs = {"BM": 16, "PADDED": 256}
    fits(compile_kernel(moe_items.item_table_kernel, (sizes, TABLE, 256, 0), constexprs, arch))


@pytest.mark.parametrize(("n", "k"), V3)
def test_every_shape_gets_a_plan_that_the_kernel_can_run(n: int, k: int) -> None:
    for m in (*range(1, 130), 256, 512, 4096, 8192):
        plan = fp8_gemm_swap.choose_plan(m, n, k, H100_SMS)
        assert plan.split <= -(-k // 128), "every piece of K has a block"
        tiles = -(-n // 64) * -(-m // plan.tokens)
        assert plan.split == 1 or tiles <= split_k.MAX_COUNTERS


@pytest.mark.parametrize(("n", "k"), V3)
def test_every_tile_of_a_map_is_in_its_work(n: int, k: int) -> None:
    for m in (65, 128, 129, 300, 512, 1000, 4096, 8192):
        tile, whole, pieces = fp8_gemm_work.choose_work(m, n, k, H100_SMS)
        tiles = -(-m // tile.bm) * -(-n // tile.bn)
        assert tile in fp8_gemm_work.TILES and 1 <= pieces <= -(-k // 128)
        rest = tiles - whole
        assert rest == 0 if pieces == 1 else whole % H100_SMS == 0 and 0 < rest < H100_SMS
        assert 2 * rest <= split_k.MAX_COUNTERS


def test_tile_scales() -> None:
    args = (torch.empty(64, 56), 56, 1, TABLE, torch.empty(56, 512), 512, 56)
    for bm, groups in ((16, 64), (128, 16)):
        tile = {"BM": bm, "GROUPS": groups}
        fits(compile_kernel(moe_items.tile_scales_kernel, args, tile, 90))
