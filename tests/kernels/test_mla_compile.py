"""The attention kernels compile for Hopper (all) and Blackwell (those in plain Triton), without
spills and within a block's shared memory; no GPU is needed."""

from typing import Any

import pytest
import torch
import triton
from torch import Tensor

from dsd.kernels import (
    latent,
    mla_dot,
    mla_dot_fp8,
    mla_prefill,
    mla_schedule,
    mla_seesaw,
    mla_seesaw_fp8,
    mla_transposed,
    mla_transposed_fp8,
)
from dsd.tests.kernels.aot import MAX_SMEM, Report, compile_kernel

pytestmark = pytest.mark.slow

BF16, F32, I32, FP8 = torch.bfloat16, torch.float32, torch.int32, torch.float8_e4m3fn
TABLE, LENS, ITEMS, SPLITS = (torch.empty(4, n, dtype=I32) for n in (16, 1, 4, 2))
BATCH, SLOTS = 4, 20


def check(report: Report) -> Report:
    assert report.spills == 0 and report.smem <= MAX_SMEM, report
    return report


@pytest.mark.parametrize(
    ("module", "kernel", "heads", "query_len", "cache_dtype", "wgmma"),
    [
        (mla_seesaw, mla_seesaw.seesaw_kernel, 128, 1, BF16, 88),
        (mla_transposed, mla_transposed.transposed_kernel, 16, 1, BF16, 68),
        (mla_transposed, mla_transposed.transposed_kernel, 16, 2, BF16, 68),
        (mla_seesaw_fp8, mla_seesaw_fp8.seesaw_fp8_kernel, 128, 1, FP8, 88),
        (mla_transposed_fp8, mla_transposed_fp8.transposed_fp8_kernel, 16, 1, FP8, 68),
        (mla_transposed_fp8, mla_transposed_fp8.transposed_fp8_kernel, 16, 2, FP8, 68),
    ],
    ids=[f"{name}{kind}" for kind in ("", " fp8") for name in ("seesaw", "16 rows", "32 rows")],
)
def test_gluon_decode(
    module: Any, kernel: Any, heads: int, query_len: int, cache_dtype: torch.dtype, wgmma: int
) -> None:
    rows = heads * query_len
    q = torch.empty(BATCH, query_len, heads, 576, dtype=BF16)
    cache = latent.latent_cache(8, 64, 512, 64, cache_dtype, "cpu")
    out = torch.empty(BATCH, rows, 512, dtype=BF16)
    schedule = mla_schedule.Schedule(ITEMS, SPLITS, module.tiling(heads, query_len))
    partial, lse = torch.empty(SLOTS, rows, 512), torch.empty(SLOTS, rows)
    _, args, options = module.plan(q, cache, TABLE, LENS, schedule, out, partial, lse, 0.1)
    report = check(compile_kernel(kernel, (), {**args, **options}, gluon=True))
    assert report.opcodes["HGMMA"] == wgmma and report.opcodes["UTMALDG"]
    # Once for a chain of wgmma, not around each: else ptxas lacked registers.
    assert report.opcodes["WARPGROUP"] < wgmma / 2, report


DOT = [(128, 512, 64, BF16, 90), (128, 512, 64, BF16, 100), (32, 512, 16, BF16, 90)]
DOT += [(16, 512, 64, BF16, 90), (8, 256, 32, BF16, 90), (24, 96, 64, F32, 90)]


@pytest.mark.parametrize(("heads", "rank", "block_size", "dtype", "arch"), DOT, ids=str)
def test_dot_decode(heads: int, rank: int, block_size: int, dtype: torch.dtype, arch: int) -> None:
    row_tile, tokens, warps = mla_dot.tile(heads, rank, dtype, MAX_SMEM)
    q, cache, out = (torch.empty(8, 64, 576, dtype=dtype) for _ in range(3))
    shape = {"R": rank, "P": 64, "RP": triton.next_power_of_2(rank), "PP": 64}
    tiles = {"BLOCK_SIZE": block_size, "BH": row_tile, "BN": tokens}
    precision = {"PRECISION": "ieee" if dtype == F32 else "tf32"}
    f32 = torch.empty(4)
    args = (q, cache, TABLE, 16, LENS, ITEMS, out, f32, f32, 0.1, heads, 1)
    constexprs = {**shape, **tiles, **precision, "num_stages": 2}
    check(compile_kernel(mla_dot.dot_kernel, args, constexprs, arch, warps))


DOT_FP8 = [(128, 512, 64, BF16, 90), (128, 512, 64, BF16, 100), (16, 512, 16, BF16, 90)]
DOT_FP8 += [(16, 512, 64, BF16, 100), (24, 96, 64, F32, 90), (16, 512, 64, BF16, 80)]


@pytest.mark.parametrize(("heads", "rank", "block_size", "dtype", "arch"), DOT_FP8, ids=str)
def test_dot_fp8_decode(
    heads: int, rank: int, block_size: int, dtype: torch.dtype, arch: int
) -> None:
    row_tile, tokens = mla_dot_fp8.tile(heads, rank, dtype)
    q, out, f32 = torch.empty(8, 64, 576, dtype=dtype), torch.empty(4, dtype=dtype), torch.empty(4)
    cache = latent.latent_cache(8, block_size, rank, 64, FP8, "cpu")
    values, ropes, scales = latent.as_words(cache)
    native = arch >= 90
    shape = {"R": rank, "P": 64, "RP": triton.next_power_of_2(rank), "PP": 64}
    tiles = {"BLOCK_SIZE": block_size, "ENTRY": cache.shape[2], "BH": row_tile, "BN": tokens}
    flags = {"QUERY_SCALE": mla_dot_fp8.QUERY_SCALE, "NATIVE": native, "PRECISION": "ieee"}
    entries = values if native else cache
    args = (q, entries, ropes, scales, TABLE, 16, LENS, ITEMS, out, f32, f32, 0.1, heads, 1)
    constexprs = {**shape, **tiles, **flags, "num_stages": 2}
    check(compile_kernel(mla_dot_fp8.dot_fp8_kernel, args, constexprs, arch, 8))


@pytest.mark.parametrize("arch", [90, 100])
def test_schedule_and_combine(arch: int) -> None:
    sizes = {"UNIT": 128, "MIN_UNITS": 1, "CANDIDATES": 128, "BATCH": 128}
    check(
        compile_kernel(
            mla_schedule.schedule_kernel, (LENS, ITEMS, SPLITS, 4, 20, 66), sizes, arch, 8
        )
    )
    f32, out = torch.empty(4), torch.empty(4, 4, 512, dtype=BF16)
    for rows, splits in ((1, 8), (4, 4)):
        tiles = {"HB": rows, "SB": splits, "R": 512, "RP": 512, "PDL": True, "launch_pdl": True}
        check(
            compile_kernel(mla_schedule.combine_kernel, (f32, f32, SPLITS, out, 128), tiles, arch)
        )


PREFILL = [(192, 0, 128, BF16, True, 90), (192, 0, 128, BF16, True, 100)]
PREFILL += [
    (40, 0, 20, BF16, True, 90),
    (192, 0, 128, BF16, False, 90),
    (128, 0, 64, F32, True, 90),
]
PREFILL += [(128, 64, 128, BF16, True, 90), (128, 64, 128, BF16, True, 100)]
PREFILL += [(32, 16, 32, BF16, True, 90), (128, 64, 128, BF16, False, 90)]


@pytest.mark.parametrize(("width", "rest", "v_width", "dtype", "varlen", "arch"), PREFILL, ids=str)
def test_prefill(
    width: int, rest: int, v_width: int, dtype: torch.dtype, varlen: bool, arch: int
) -> None:
    bm, bn, warps, stages = mla_prefill.tile(dtype, max(width + rest, v_width), MAX_SMEM)
    split = mla_prefill.split_width(width, rest)
    q, k, v, out = (torch.empty(8, 16, 192, dtype=dtype) for _ in range(4))
    strides = (16 * width, width) * 2 + ((64, 0) if rest else (16 * width, width))
    strides += (16 * 256, 256, 16 * v_width, v_width)
    args = (q, k, k, v, out, torch.empty(4), LENS, LENS, 100, 100, 0.1, 100, *strides)
    widths = {"WA": split.a, "WB": split.b, "DA": split.padded_a, "DB": split.padded_b}
    widths["DV"] = v_width
    widths["DVP"] = max(16, triton.next_power_of_2(v_width))
    flags = {"CAUSAL": True, "VARLEN": varlen, "PRECISION": "ieee" if dtype == F32 else "tf32"}
    constexprs = {**widths, **flags, "BM": bm, "BN": bn, "num_stages": stages}
    check(compile_kernel(mla_prefill.prefill_kernel, args, constexprs, arch, warps))


def test_merge_and_gather() -> None:
    lse, x = torch.empty(16, 100), torch.empty(100, 16, 128, dtype=BF16)
    args = (x, lse, x, lse, x, lse, 100, 2048, 128, 2048, 128, 100, 100)
    constexprs = {"H": 16, "DV": 128, "DVP": 128, "BT": 16}
    check(compile_kernel(mla_prefill.merge_kernel, args, constexprs))
    cache: Tensor = torch.empty(8, 64, 576, dtype=BF16)
    constexprs = {"BLOCK_SIZE": 64, "WIDTH": 576, "BT": 32, "BW": 128}
    check(compile_kernel(mla_prefill.gather_kernel, (cache, TABLE, 1, cache, 3, 9), constexprs))


@pytest.mark.parametrize("arch", [80, 90, 100])
def test_gather_fp8(arch: int) -> None:
    cache = latent.latent_cache(8, 64, 512, 64, FP8, "cpu")
    values, ropes, scales = latent.as_words(cache)
    native = arch >= 90
    entries = values if native else cache
    args = (entries, ropes, scales, TABLE, 1, torch.empty(4, dtype=BF16), 3, 9)
    widths = {"R": 512, "P": 64, "RP": 512, "PP": 64, "BLOCK_SIZE": 64, "ENTRY": 644}
    constexprs = {**widths, "NATIVE": native, "BT": 8}
    check(compile_kernel(mla_prefill.gather_fp8_kernel, args, constexprs, arch))
