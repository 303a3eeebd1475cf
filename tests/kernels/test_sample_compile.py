"""The sampler's kernels compile for Hopper and Blackwell; no GPU is needed."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch

from dsd.kernels import sample, sample_relaxed, sample_state
from dsd.tests.kernels.aot import MAX_SMEM, compile_kernel
from dsd.tests.kernels.sample_cases import Options, make_state

pytestmark = pytest.mark.slow

VOCAB = 129280


def meta(dtype: torch.dtype) -> torch.Tensor:
    """A stand-in with an aligned address, like everything that torch allocates."""
    return torch.empty((64, 64), dtype=dtype)


BF16, F32 = meta(torch.bfloat16), meta(torch.float32)
I32, I64 = meta(torch.int32), meta(torch.int64)
STATE = make_state([Options()], VOCAB).pointers
PARTS = -(-VOCAB // sample.PART)
MAX_SPILLS = 300
"""Loads, stores and bytes of stack: of the row kernel 95 on Hopper with Triton 3.6, 73 with 3.7."""
SUMS = {"VOCAB": VOCAB, "PART": sample.PART}


@dataclass(frozen=True)
class Case:
    name: str
    kernel: Any
    args: tuple[Any, ...]
    constexprs: dict[str, Any]
    num_warps: int = 4
    max_registers: int | None = None
    """Where a launch says so; then a version of Triton may spill a little, outside of loops."""
    fp_fusion: bool = True

    def __str__(self) -> str:
        return self.name


def parts_case(name: str, logits: torch.Tensor, width: int, start: int | None) -> Case:
    sums = (None, None) if start is not None else (F32, F32)
    args = (logits, I32, STATE, F32, I32, *sums, width, start)
    sizes = {"VOCAB": VOCAB, "WIDTH": width, "PART": sample.PART}
    return Case(
        name, sample._win_parts, args, sizes, sample.PART_WARPS, sample.PART_REGISTERS, False
    )


def rows_case(name: str, logits: torch.Tensor, width: int, appends: bool) -> Case:
    args = (logits, I32, STATE, F32, I32, F32, F32, I64, I64, I32 if appends else None)
    sizes = {"VOCAB": VOCAB, "WIDTH": width, "PART": sample.PART}
    sizes |= {"PARTS": PARTS, "PARTS_BLOCK": 1 << (PARTS - 1).bit_length()}
    args = (*args, width, 4096, 4096)
    return Case(name, sample._win_rows, args, sizes, sample.ROW_WARPS, sample.ROW_REGISTERS, False)


CASES = [
    parts_case("parts, bf16", BF16, VOCAB, None),
    parts_case("parts, float32", F32, VOCAB, None),
    parts_case("parts, gathered shards", BF16, VOCAB // 8, None),
    parts_case("parts, one shard", BF16, VOCAB // 8, VOCAB // 8 * 3),
    rows_case("rows, bf16, appended", BF16, VOCAB, True),
    rows_case("rows, float32", F32, VOCAB, False),
    rows_case("rows, gathered shards", BF16, VOCAB // 8, True),
    Case("join", sample._join_parts, (F32, I64, F32, I64, 1, 64), {"PARTS": 64, "BLOCK": 64}, 1),
    Case("sumexp parts", sample._sumexp_parts, (BF16, F32, F32, VOCAB), SUMS, sample.PART_WARPS),
    Case(
        "sumexp join",
        sample._join_sumexp,
        (F32, F32, F32, F32, 1, 64),
        {"PARTS": 64, "BLOCK": 64, "AS_LOG": True},
        1,
    ),
    Case(
        "relaxed, parts",
        sample_relaxed._look_at_parts,
        (F32, I32, STATE, I32, F32, F32, F32, F32, F32, VOCAB, 3),
        {"VOCAB": VOCAB, "WIDTH": VOCAB, "PART": sample_relaxed.PART},
        sample_relaxed.PART_WARPS,
        fp_fusion=False,
    ),
    Case(
        "relaxed, join",
        sample_relaxed._decide,
        (I32, STATE, F32, F32, F32, F32, F32, meta(torch.bool), 10, 0.5),
        {"PARTS": PARTS, "PARTS_BLOCK": 1 << (PARTS - 1).bit_length(), "VOCAB": VOCAB},
        1,
    ),
    Case(
        "relaxed, settle",
        sample_relaxed._settle,
        (I64, I32, STATE, I32, I32, meta(torch.bool), I32, 4096, 1, 3, 128798, 128799),
        {},
        1,
    ),
    Case("count", sample_state._count, (I32, I32, 5000, 4000), {"BIT": 1 << 30, "BLOCK": 1024}),
]


@pytest.mark.parametrize("arch", [90, 100])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_sample_kernel_compiles(case: Case, arch: int) -> None:
    report = compile_kernel(
        case.kernel,
        case.args,
        case.constexprs,
        arch,
        case.num_warps,
        enable_fp_fusion=case.fp_fusion,
        **({} if case.max_registers is None else {"maxnreg": case.max_registers}),
    )
    assert report.spills <= (0 if case.max_registers is None else MAX_SPILLS), report
    assert report.smem <= MAX_SMEM, report
