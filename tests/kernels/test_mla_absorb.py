"""Maps by head: the twins against their definition, the kernels against the twins in Triton's
interpreter and on a GPU, and compiled for Hopper (without spills) and Blackwell."""

from dataclasses import dataclass

import pytest
import torch
import triton
from torch import Tensor

from dsd.kernels import mla_absorb, reference
from dsd.tests.kernels.aot import MAX_SMEM, compile_kernel
from dsd.tests.kernels.interpreter import patch, run_interpreted

BF16, F32, FP8 = torch.bfloat16, torch.float32, torch.float8_e4m3fn
INTERPRET = triton.knobs.runtime.interpret
if INTERPRET:
    patch()
else:

    @pytest.mark.slow
    def test_maps_by_head_in_the_interpreter_equal_their_twins() -> None:
        run_interpreted(__file__)


interpreted = pytest.mark.skipif(not INTERPRET, reason="run by the test above")
on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
KIND = {F32: "float32", BF16: "bfloat16"}


@dataclass(frozen=True)
class Case:
    tokens: int
    heads: int
    nope: int = 128
    rope: int = 64
    rank: int = 512
    value: int = 128
    dtype: torch.dtype = BF16


SMALL = [
    Case(1, 3),
    Case(0, 2),
    Case(17, 2, nope=24, rope=8, rank=40, value=20, dtype=F32),
    Case(33, 2, nope=16, rope=10, rank=130, value=256),
    Case(70, 1, nope=32, rope=16, rank=64, value=128),
]
LARGE = [Case(tokens, heads) for tokens in (1, 16, 19, 64, 200) for heads in (16, 128)]


def queries(case: Case, device: str = "cpu") -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As the model has them: q and W_UK are slices of what lies together."""
    q = torch.randn(case.tokens, case.heads, case.nope + case.rope, device=device).to(case.dtype)
    kv_b = torch.randn(case.heads, case.nope + case.value, case.rank, device=device) * 0.1
    angles = torch.randn(case.tokens, case.rope // 2, device=device)
    return q, kv_b.to(case.dtype)[:, : case.nope], angles.cos(), angles.sin()


def latents(case: Case, device: str = "cpu") -> tuple[Tensor, Tensor]:
    latent = torch.randn(case.tokens, case.heads, case.rank, device=device)
    kv_b = torch.randn(case.heads, case.nope + case.value, case.rank, device=device) * 0.1
    return latent.to(case.dtype), kv_b.to(case.dtype)[:, case.nope :].transpose(1, 2)


def test_twins_are_products_by_head(close) -> None:
    case = Case(5, 3, nope=24, rope=8, rank=40, value=20, dtype=F32)
    q, w_uk, cos, sin = queries(case)
    got = mla_absorb.absorb(q, w_uk, cos, sin)
    close(got[..., :40], torch.einsum("thn,hnr->thr", q[..., :24], w_uk), "float32")
    assert torch.equal(got[..., 40:], reference.apply_rope(q[..., 24:], cos, sin))
    latent, w_uv = latents(case)
    close(mla_absorb.expand(latent, w_uv), torch.einsum("thr,hrv->thv", latent, w_uv), "float32")


def check_absorb(case: Case, close, device: str = "cpu") -> None:
    q, w_uk, cos, sin = queries(case, device)
    got, want = mla_absorb.absorb(q, w_uk, cos, sin), reference.absorb(q, w_uk, cos, sin)
    close(got, want, KIND[case.dtype])
    close(got[..., case.rank :], want[..., case.rank :], KIND[case.dtype])


def check_expand(case: Case, close, device: str = "cpu") -> None:
    latent, w_uv = latents(case, device)
    want = reference.expand(latent, w_uv)
    values = mla_absorb.expand(latent, w_uv)
    close(values, want, KIND[case.dtype])
    if case.value % 128 or case.dtype == F32:
        return
    for ue8m0 in (False, True):
        for k_major in (False, True):
            q, scale = mla_absorb.expand_quant(latent, w_uv, ue8m0, k_major)
            # Of the kernel's own values: sums in another order may round to another neighbour.
            want_q, want_scale = reference.quantize_1x128(values.cpu().flatten(1), ue8m0)
            assert torch.equal(q.cpu().view(torch.uint8), want_q.view(torch.uint8))
            assert torch.equal(scale.cpu(), want_scale)


@interpreted
@pytest.mark.parametrize("case", SMALL, ids=str)
def test_interpreted(case: Case, close) -> None:
    check_absorb(case, close)
    check_expand(case, close)


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("case", SMALL + LARGE, ids=str)
def test_kernels_equal_their_twins(case: Case, close) -> None:
    check_absorb(case, close, "cuda")
    check_expand(case, close, "cuda")


@interpreted
@pytest.mark.parametrize("name", ["absorb", "expand"])
def test_what_is_behind_the_tokens_is_not_written(name: str, monkeypatch) -> None:
    case, rooms, empty = Case(19, 2), [], torch.empty

    def marked(*shape: int, **options) -> Tensor:
        """Followed by marks in the same allocation."""
        rooms.append(torch.full((shape[0] + 16, *shape[1:]), 7.0, dtype=options["dtype"]))
        return rooms[-1][: shape[0]]

    arguments = queries(case) if name == "absorb" else latents(case)
    monkeypatch.setattr(torch, "empty", marked)
    getattr(mla_absorb, name)(*arguments)
    monkeypatch.setattr(torch, "empty", empty)
    (room,) = rooms
    assert (room[case.tokens :] == 7.0).all() and not (room[: case.tokens] == 7.0).all()


@pytest.mark.slow
@pytest.mark.skipif(INTERPRET, reason="compiles")
@pytest.mark.parametrize("arch", [90, 100])
@pytest.mark.parametrize("tokens", [16, 32, 64])
def test_compile(tokens: int, arch: int) -> None:
    x, angles = torch.empty(64, 64, dtype=BF16), torch.empty(64, 64)
    widths = {"RANK": 512, "TOKENS": tokens}
    args = (x, x, angles, angles, x, 5, 3072, 192, 131072, 512)
    shape = {**widths, "NOPE": 128, "ROPE": 64, "NOPE_BLOCK": 128, "PAIRS": 32}
    shape["COLUMNS"] = mla_absorb.COLUMNS
    reports = [compile_kernel(mla_absorb._absorb, args, shape, arch)]
    shape = {**widths, "VALUE": 128, "COLUMNS": 128, "DEPTH": mla_absorb.DEPTH, "UE8M0": False}
    for out, scale, strides in (
        (x, None, (0, 0)),
        (torch.empty(64, 64, dtype=FP8), angles, (1, 64)),
    ):
        args = (x, x, out, scale, 5, 16, 131072, 512, *strides)
        reports.append(compile_kernel(mla_absorb._expand, args, shape, arch))
    for report in reports:
        assert arch > 90 or report.spills == 0, report
        assert report.smem <= MAX_SMEM, report
