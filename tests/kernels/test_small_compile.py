"""The small kernels compile for Hopper and Blackwell, without spills; no GPU is needed."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch

from dsd.kernels import fused, latent_store, moe_dispatch, moe_gate, moe_route, quant
from dsd.tests.kernels.aot import MAX_SMEM, compile_kernel

pytestmark = pytest.mark.slow

BF16, F32, FP8 = torch.bfloat16, torch.float32, torch.float8_e4m3fn
I64 = torch.int64


def meta(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    """A stand-in with an aligned address, like everything that torch allocates."""
    return torch.empty(shape or (64, 64), dtype=dtype)


@dataclass(frozen=True)
class Case:
    name: str
    kernel: Any
    args: tuple[Any, ...]
    constexprs: dict[str, Any]
    num_warps: int = 4
    also_blackwell: bool = False

    def __str__(self) -> str:
        return self.name


X, Q, S, W, IDS = (meta(dtype) for dtype in (BF16, FP8, F32, BF16, I64))
U8, I32 = meta(torch.uint8), meta(torch.int32)
HIDDEN = {"WIDTH": 7168, "GROUPS": 64, "UE8M0": False}
CACHES = [
    ("bf16", (X, X, X), {"BLOCK_SIZE": 64, "ENTRY": 576, "FP8": False}),
    ("fp8", (Q, meta(torch.float16), S), {"BLOCK_SIZE": 64, "ENTRY": 644, "FP8": True}),
]
QUERIES = [
    ("no query", (None, None, None, None, 0, 0, 0), 0, 1),
    ("query", (X, W, X, None, 2112, 0, 0), 1536, 16),
    ("query quantised", (X, W, Q, S, 2112, 1, 64), 1536, 16),
]

CASES = [
    Case(
        "quantize",
        quant._quantize,
        (X, Q, S, 7168, 56, 1),
        {"WIDTH": 7168, "GROUPS": quant.GROUPS, "UE8M0": True},
        also_blackwell=True,
    ),
    Case(
        "dequantize",
        quant._dequantize,
        (Q, S, X),
        {"N": 32768, "K": 512, "ROWS": quant.DEQUANT_ROWS},
    ),
    Case("norm", fused._norm, (X, None, W, X, None, None, None, 1e-6, 576, 0, 0, 0), {**HIDDEN}, 8),
    Case(
        "add_norm_quant",
        fused._norm,
        (X, X, W, Q, X, S, X, 1e-6, 7168, 7168, 56, 1),
        {**HIDDEN},
        8,
        also_blackwell=True,
    ),
    Case(
        "silu_mul_quant",
        fused._silu_mul,
        (X, Q, S, 4096, 16, 1),
        {"WIDTH": 2048, "GROUPS": fused.SILU_GROUPS, "UE8M0": False},
    ),
    Case(
        "rope",
        fused._rope,
        (X, S, S, X, 24576, 192, 8192, 64),
        {"num_heads": 128, "WIDTH": 64, "HEADS": fused.ROPE_HEADS, "PAIRS": 32},
    ),
    *(
        Case(
            f"norm_rope_store {kind}, {name}",
            latent_store._norm_rope_store,
            (X, W, S, S, *cache, IDS, X, X, 1e-6, 2112, *query),
            {"RANK": 512, "ROPE": 64, "RANK_BLOCK": 512, "PAIRS": 32, **layout}
            | {"Q_WIDTH": width, "GROUPS": groups, "UE8M0": False},
            latent_store.WARPS,
            also_blackwell=True,
        )
        for kind, cache, layout in CACHES
        for name, query, width, groups in QUERIES
    ),
    *(
        Case(
            f"store_latent {kind}",
            latent_store._store_latent,
            (*cache, X, X, IDS, 576, 576),
            {"RANK": 512, "ROPE": 64, "RANK_BLOCK": 512, "ROPE_BLOCK": 64, **layout},
            2,
        )
        for kind, cache, layout in CACHES
    ),
    Case("embedding", fused._embedding, (X, IDS, X), {"WIDTH": 7168, "BLOCK": fused.EMBED_BLOCK}),
    Case(
        "joined",
        fused._joined,
        (X, IDS, W, X, W, X, 1e-6, 7168),
        {"WIDTH": 7168, "GROUPS": 64},
        fused.norm_warps(64),
        also_blackwell=True,
    ),
    *(
        Case(
            f"gate of {pieces} pieces",
            moe_gate._gate,
            (S, S, IDS, S, 2.5),
            {"GROUPS": 8, "PIECES": pieces, "SIZE": 32, "KEPT": 4, "TOP_K": 8, "NORM": True}
            | {"GROUPS_BLOCK": 8, "SIZE_BLOCK": 32, "TOP_K_BLOCK": 8},
            1,
            also_blackwell=True,
        )
        for pieces in (1, 7168 // moe_gate.PIECE)
    ),
    *(
        Case(
            f"partial logits, tiles of {tokens}",
            moe_gate._partial_logits,
            (X, W, S, 5, 7168),
            {"EXPERTS": 256, "K": 7168, "TOKENS": tokens}
            | {"COLUMNS": moe_gate.COLUMNS, "PIECE": moe_gate.PIECE},
            8,
            also_blackwell=True,
        )
        for tokens in (16, moe_gate.ROWS)
    ),
    Case(
        "gate of 384",
        moe_gate._gate,
        (S, S, IDS, S, 2.5),
        {"GROUPS": 1, "PIECES": 1, "SIZE": 384, "KEPT": 1, "TOP_K": 8, "NORM": True}
        | {"GROUPS_BLOCK": 1, "SIZE_BLOCK": 512, "TOP_K_BLOCK": 8},
        1,
    ),
    *(
        Case(
            f"permute {pairs}", moe_route._permute, (IDS, IDS, IDS, IDS, pairs, 0), {"BLOCK": b}, w
        )
        for pairs, (b, w) in ((p, moe_route.permute_tile(p)) for p in (512, 65536))
    ),
    Case(
        "gather quantized",
        moe_route._gather,
        (meta(torch.uint8), S, IDS, IDS, meta(torch.uint8), S, 256, 7168, 1, 64, 1, 512),
        {"WIDTH": 7168, "GROUPS": 56, "GROUPS_BLOCK": 64, "TOP_K": 8}
        | {"BLOCK": moe_route.GATHER_BLOCK},
        also_blackwell=True,
    ),
    Case(
        "gather",
        moe_route._gather,
        (X, None, IDS, IDS, X, None, 256, 7168, 0, 0, 0, 0),
        {"WIDTH": 7168, "GROUPS": 56, "GROUPS_BLOCK": 64, "TOP_K": 8}
        | {"BLOCK": moe_route.GATHER_BLOCK},
    ),
    *(
        Case(
            f"dispatch {pairs}",
            moe_dispatch._dispatch,
            (U8, S, IDS, U8, S, IDS, I32, I32, pairs, 256, 0, 1, 64, 4096),
            {"WIDTH": 7168, "GROUPS": 56, "GROUPS_BLOCK": 64, "TOP_K": 8, "BM": 16}
            | {"EXPERTS": 256, "PAIRS": room, "BLOCK": block},
            warps,
            also_blackwell=True,
        )
        for pairs in (8, 128, 512, 1024, 2048)
        for room, block, warps in (moe_dispatch.dispatch_shape(pairs),)
    ),
    Case(
        "silu_mul dispatched",
        moe_dispatch._silu_mul_dispatched,
        (X, I32, Q, S, 4096, 4096),
        {"WIDTH": 2048, "GROUPS": fused.SILU_GROUPS, "UE8M0": False},
        also_blackwell=True,
    ),
    Case(
        "combine",
        moe_route._combine,
        (X, IDS, S, X, X, 7168),
        {"WIDTH": 7168, "TOP_K": 8, "BLOCK": moe_route.COMBINE_BLOCK},
    ),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_small_kernel_compiles_without_spills(case: Case) -> None:
    for arch in (90, 100) if case.also_blackwell else (90,):
        report = compile_kernel(case.kernel, case.args, case.constexprs, arch, case.num_warps)
        assert report.spills == 0, report
        assert report.smem <= MAX_SMEM, report
