"""The GEMMs on a GPU against their twins: V3's shapes, odd ones, rows of wider tensors, poison in
all that must not be read and a mark in all that must not be written; captured in CUDA graphs."""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from dsd.kernels import fp8_gemm_dot, gemm, moe_gemm, quant, reference
from dsd.kernels.bf16_gemm import gemm_nt
from dsd.kernels.fp8_gemm import fp8_gemm_nt_dense
from dsd.kernels.fp8_gemm_swap import fp8_gemm_nt_swap
from dsd.kernels.fp8_gemm_torch import fp8_gemm_nt_torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]
BF16, F32, FP8 = torch.bfloat16, torch.float32, torch.float8_e4m3fn
MARK = 7.0
"""In outputs, where nothing may be written."""


@pytest.fixture(autouse=True)
def _cuda() -> None:
    torch.cuda.manual_seed(0)
    # What torch.empty finds is NaN.
    poison = torch.full((1 << 24,), float("nan"), device="cuda")
    del poison


def needs_hopper() -> None:
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs Hopper")


def rand(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
    return torch.randn(shape, device="cuda", dtype=BF16).to(dtype)


def inside(x: Tensor, rows: int = 3, columns: int = 16, fill: float = float("nan")) -> Tensor:
    """x as rows of a taller and wider tensor full of `fill`."""
    wide = torch.full((x.shape[0] + rows, x.shape[1] + columns), fill, device="cuda").to(x.dtype)
    wide[: x.shape[0], : x.shape[1]] = x
    return wide[: x.shape[0], : x.shape[1]]


def scales(*shape: int) -> Tensor:
    """Of blocks of different magnitude, so that one in the wrong place shows."""
    return torch.rand(shape, device="cuda") * 4 + 0.1


def activations(m: int, k: int) -> tuple[Tensor, Tensor]:
    """e4m3 [m, k] before rows of NaN, and its scales as TMA reads them, between NaN."""
    groups = -(-k // 128)
    scale = torch.full((groups, -(-m // 4) * 4 + 4), float("nan"), device="cuda")
    scale[:, :m] = scales(groups, m)
    return inside(rand(m, k, dtype=FP8), rows=130), scale.t()[:m]


def weight(n: int, k: int) -> tuple[Tensor, Tensor]:
    return inside(rand(n, k, dtype=FP8), rows=130), scales(-(-n // 128), -(-k // 128))


def weights(experts: int, n: int, k: int, dtype: torch.dtype = FP8) -> tuple[Tensor, Tensor]:
    return rand(experts, n, k, dtype=dtype), scales(experts, -(-n // 128), -(-k // 128))


def marked(m: int, n: int) -> Tensor:
    return inside(torch.full((m, n), MARK, device="cuda", dtype=BF16), 130, 8, MARK)


def check_marks(out: Tensor) -> None:
    """Nothing was written beside `out`, which `marked` made."""
    base = out._base
    assert base is not None
    assert (base[out.shape[0] :] == MARK).all() and (base[:, out.shape[1] :] == MARK).all()


# ---- one matrix ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    m: int
    n: int
    k: int


V3 = [
    (2112, 7168), (24576, 1536), (32768, 512), (7168, 16384), (4096, 7168), (7168, 2048),
    (36864, 7168), (7168, 18432), (3072, 1536), (4608, 7168), (7168, 2304), (512, 7168),
    (7168, 256),
]  # fmt: skip
CORRECTNESS = [Case(m, n, k) for n, k in V3 for m in (1, 16, 64, 128, 512)]
CORRECTNESS += [Case(m, 4096, 7168) for m in (5, 8, 9, 17, 32, 33, 65, 129, 300, 1024, 4096)]
CORRECTNESS += [Case(8192, 2112, 7168), Case(300, 512, 7168), Case(1000, 7168, 2048)]
CORNER = [
    Case(m, n, k)
    for m in (1, 3, 130, 600)
    for n, k in ((8, 16), (72, 144), (136, 128), (576, 272), (1000, 1040))
]


@pytest.mark.parametrize("case", CORRECTNESS + CORNER, ids=str)
def test_fp8_gemm_equals_twin(case: Case, close) -> None:
    needs_hopper()
    x, x_scale = activations(case.m, case.k)
    w, w_scale = weight(case.n, case.k)
    out = marked(case.m, case.n)
    run = fp8_gemm_nt_swap if gemm.streams_weight(case.m, case.n) else fp8_gemm_nt_dense
    run(x, x_scale, w, w_scale, out)
    close(out, reference.fp8_gemm_nt(x, x_scale, w, w_scale, BF16), "bfloat16")
    check_marks(out)


@pytest.mark.parametrize("case", [Case(40, 4096, 7168), Case(200, 512, 1024)], ids=str)
def test_fp8_gemm_same_result_every_time(case: Case) -> None:
    needs_hopper()
    (x, x_scale), (w, w_scale) = activations(case.m, case.k), weight(case.n, case.k)
    first = gemm.fp8_gemm_nt(x, x_scale, w, w_scale, BF16)
    for _ in range(20):
        assert torch.equal(first, gemm.fp8_gemm_nt(x, x_scale, w, w_scale, BF16))


DOT = [
    Case(1, 1, 1),
    Case(5, 100, 300),
    Case(70, 130, 130),
    Case(16, 2112, 7168),
    Case(33, 80, 256),
]


@pytest.mark.parametrize("has_fp8", [True, False])
@pytest.mark.parametrize("case", DOT, ids=str)
def test_dot_equals_twin(case: Case, has_fp8: bool, close, monkeypatch) -> None:
    if has_fp8 and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("needs fp8")
    monkeypatch.setattr(fp8_gemm_dot, "has_fp8", lambda x: has_fp8)
    (x, x_scale), (w, w_scale) = activations(case.m, case.k), weight(case.n, case.k)
    out = marked(case.m, case.n)
    fp8_gemm_dot.fp8_gemm_nt_dot(x, x_scale, w, w_scale, out)
    close(out, reference.fp8_gemm_nt(x, x_scale, w, w_scale, BF16), "bfloat16")
    check_marks(out)
    plain = inside(rand(case.m, case.k), columns=5)
    want = reference.dequant_gemm_nt(plain, w, w_scale)
    close(fp8_gemm_dot.dequant_gemm_nt(plain, w, w_scale), want, "bfloat16")


def test_dot_float32_equals_twin(close) -> None:
    (x, x_scale), (w, w_scale) = activations(20, 300), weight(100, 300)
    got = gemm.fp8_gemm_nt(x, x_scale, w, w_scale, F32)
    # The tensor core adds fp8 products with about 14 bits.
    close(got, reference.fp8_gemm_nt(x, x_scale, w, w_scale, F32), "bfloat16")
    plain = rand(20, 300, dtype=F32)
    got = fp8_gemm_dot.dequant_gemm_nt(plain, w, w_scale)
    close(got, reference.dequant_gemm_nt(plain, w, w_scale), "float32")


@pytest.mark.parametrize(
    "case", [Case(0, 576, 512), Case(7, 576, 512), Case(200, 576, 512)], ids=str
)
def test_linear_equals_twin_of_what_it_quantised(case: Case, close) -> None:
    x, (w, w_scale) = rand(case.k, case.m).t(), weight(case.n, case.k)
    q, q_scale = quant.quantize_1x128(x.contiguous(), ue8m0=True)
    got = gemm.linear(x, w, w_scale, act_quant=True, ue8m0=True)
    close(got, reference.fp8_gemm_nt(q, q_scale, w, w_scale, BF16), "bfloat16")
    close(gemm.linear(x, w, w_scale), reference.dequant_gemm_nt(x, w, w_scale), "bfloat16")


def test_gate_logits_are_float32(close) -> None:
    x, w = rand(33, 7168, dtype=F32), rand(256, 7168, dtype=F32)
    close(gemm_nt(x, w), (x.double() @ w.double().t()).float(), "float32")


# ---- experts ------------------------------------------------------------------------------------

COUNTS = {
    "tile_16": [1, 0, 5, 2, 0, 3, 17, 4],
    "tile_32": [10, 0, 30, 17, 8, 1, 33, 20],
    "tile_64": [64, 65, 0, 1, 63, 40, 20, 130],
    "dense_128": [100, 0, 129, 257, 1, 128, 64, 200],
    "dense_256": [0, 1000, 1, 2049, 256, 3000, 700, 255],
    "one_takes_all": [0, 0, 0, 300, 0, 0, 0, 0],
    "none": [0] * 8,
}
EXPERTS = [(4096, 7168), (7168, 2048)]


def offsets_of(counts: list[int], dtype: torch.dtype = torch.int64) -> Tensor:
    return torch.tensor(counts, device="cuda").cumsum(0).to(dtype)


@pytest.mark.parametrize(("n", "k"), [*EXPERTS, (136, 144)])
@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS.keys())
def test_contiguous_equals_twin(counts: list[int], n: int, k: int, close) -> None:
    rows = sum(counts) + 2
    (x, x_scale), (w, w_scale) = activations(rows, k), weights(len(counts), n, k)
    x[-2:] = rand(2, k).fill_(float("nan")).to(FP8)
    out, offsets = marked(rows, n), offsets_of(counts, torch.int32)
    moe_gemm.grouped_fp8_gemm_nt_contiguous(x, x_scale, w, w_scale, offsets, out)
    want = torch.full_like(out, MARK)
    moe_gemm.by_expert(x, x_scale, w, w_scale, moe_gemm.contiguous_bounds(offsets), want)
    close(out[:-2], want[:-2], "bfloat16")
    assert (out[-2:] == MARK).all()
    check_marks(out)


@pytest.mark.parametrize("experts", [160, 256])
def test_contiguous_many_experts_most_without_rows(experts: int, close) -> None:
    counts = (torch.rand(experts) * 24 - 14).clamp(min=0).int().tolist()
    n, k, rows = 256, 1024, sum(counts)
    (x, x_scale), (w, w_scale) = activations(rows, k), weights(experts, n, k)
    out, offsets = marked(rows, n), offsets_of(counts)
    moe_gemm.grouped_fp8_gemm_nt_contiguous(x, x_scale, w, w_scale, offsets, out)
    want = torch.empty_like(out)
    moe_gemm.by_expert(x, x_scale, w, w_scale, moe_gemm.contiguous_bounds(offsets), want)
    close(out, want, "bfloat16")


def slots_of(counts: list[int], rows: int, k: int) -> tuple[Tensor, Tensor]:
    """x [E, rows, k] and scales: NaN from counts[e] on."""
    x, x_scale = rand(len(counts), rows, k), scales(-(-k // 128), len(counts) * rows).t()
    x_scale = x_scale.unflatten(0, (len(counts), rows))
    for e, count in enumerate(counts):
        x[e, count:], x_scale[e, count:] = float("nan"), float("nan")
    return x, x_scale


@pytest.mark.parametrize("dtype", [FP8, BF16])
@pytest.mark.parametrize("expected_m", [3, 16, 50, None])
def test_masked_equals_twin(expected_m: int | None, dtype: torch.dtype, close) -> None:
    counts, rows, n, k = [3, 0, 16, 200, 1, 64, 65, 128], 200, 512, 1040
    x, x_scale = slots_of(counts, rows, k)
    w, w_scale = weights(len(counts), n, k, dtype)
    sizes = torch.tensor(counts, device="cuda", dtype=torch.int32)
    out = torch.full((len(counts), rows, n), MARK, device="cuda", dtype=BF16)
    want, bounds = out.clone(), moe_gemm.masked_bounds(sizes, rows)
    if dtype == FP8:
        x = x.to(FP8)
        moe_gemm.grouped_fp8_gemm_nt_masked(x, x_scale, w, w_scale, sizes, out, expected_m)
        flat = (x.flatten(0, 1), x_scale.flatten(0, 1), w, w_scale)
    else:
        moe_gemm.grouped_gemm_nt_masked(x, w, sizes, out, expected_m)
        flat = (x.flatten(0, 1), None, w, None)
    moe_gemm.by_expert(*flat, bounds, want.flatten(0, 1))
    close(out, want, "bfloat16")
    for e, count in enumerate(counts):
        assert (out[e, count:] == MARK).all()


@pytest.mark.parametrize("kind", ["plain", "dequant", "scaled_without_hopper"])
@pytest.mark.parametrize("name", ["tile_16", "tile_64", "dense_128"])
def test_contiguous_plain_triton_equals_twin(name: str, kind: str, close, monkeypatch) -> None:
    counts, n, k = COUNTS[name], 712, 1032
    w, w_scale = weights(len(counts), n, k, BF16 if kind == "plain" else FP8)
    offsets, out = offsets_of(counts), marked(sum(counts), n)
    bounds, want = moe_gemm.contiguous_bounds(offsets), torch.empty_like(out)
    if kind == "scaled_without_hopper":
        monkeypatch.setattr(moe_gemm, "has_wgmma", lambda x: False)
        x, x_scale = activations(sum(counts), k)
        moe_gemm.grouped_fp8_gemm_nt_contiguous(x, x_scale, w, w_scale, offsets, out)
        moe_gemm.by_expert(x, x_scale, w, w_scale, bounds, want)
    else:
        x, scale = inside(rand(sum(counts), k)), None if kind == "plain" else w_scale
        moe_gemm.grouped_gemm_nt_contiguous(x, w, offsets, out, scale)
        moe_gemm.by_expert(x, None, w, scale, bounds, want)
    close(out, want, "bfloat16")
    check_marks(out)


# ---- CUDA graphs --------------------------------------------------------------------------------


def captured(run: Callable[[], Tensor]) -> tuple[torch.cuda.CUDAGraph, Tensor]:
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run()
    return graph, out


@pytest.mark.parametrize("act_quant", [True, False])
@pytest.mark.parametrize(
    "case", [Case(16, 4096, 7168), Case(3, 100, 300), Case(300, 576, 1024)], ids=str
)
def test_linear_in_a_graph_follows_its_input(case: Case, act_quant: bool) -> None:
    x, (w, w_scale) = rand(case.m, case.k), weight(case.n, case.k)
    graph, out = captured(lambda: gemm.linear(x, w, w_scale, act_quant))
    for _ in range(5):
        x.copy_(rand(case.m, case.k))
        graph.replay()
        assert torch.equal(out, gemm.linear(x, w, w_scale, act_quant))


@pytest.mark.parametrize("kind", ["plain", "dequant", "act_quant"])
@pytest.mark.parametrize("name", ["tile_16", "tile_64", "dense_128", "dense_256"])
def test_grouped_linear_in_a_graph_follows_its_counts(name: str, kind: str, close) -> None:
    n, k, total = 576, 1024, sum(COUNTS[name])
    x = rand(total, k)
    w, w_scale = weights(8, n, k, BF16 if kind == "plain" else FP8)
    scale = None if kind == "plain" else w_scale
    counts = torch.tensor(COUNTS[name], device="cuda")
    offsets = counts.cumsum(0)
    act_quant = kind == "act_quant"
    graph, out = captured(lambda: gemm.grouped_linear(x, w, scale, offsets, act_quant))
    for new in (COUNTS[name][::-1], [0, 0, total, 0, 0, 0, 0, 0], [total - 7, *[1] * 7]):
        offsets.copy_(torch.tensor(new).cumsum(0))
        x.copy_(rand(total, k))
        graph.replay()
        q, q_scale = quant.quantize_1x128(x) if act_quant else (x, None)
        bounds, want = moe_gemm.contiguous_bounds(offsets), torch.empty_like(out)
        close(out, moe_gemm.by_expert(q, q_scale, w, scale, bounds, want), "bfloat16")


def test_chain_of_programmatic_launches_equals_one_by_one() -> None:
    needs_hopper()
    maps = [weight(1024, 1024) for _ in range(6)]
    maps = [(w, s * 2e-3) for w, s in maps]
    x = rand(8, 1024)

    def chain(pause: bool) -> Tensor:
        h = x
        for w, w_scale in maps:
            h = gemm.linear(h, w, w_scale, act_quant=True)
            if pause:
                torch.cuda.synchronize()
        return h

    graph, out = captured(lambda: chain(False))
    for _ in range(20):
        x.copy_(rand(8, 1024))
        graph.replay()
        assert torch.equal(out, chain(True)) and torch.isfinite(out).all()


@pytest.mark.parametrize("m", [1, 2, 5, 16, 100, 1000])
@pytest.mark.parametrize(("n", "k"), [(2112, 7168), (7168, 2048), (7168, 2304), (576, 512)])
def test_torchs_fp8_gemm_equals_its_twin(m: int, n: int, k: int, close) -> None:
    needs_hopper()
    x, x_scale = quant.quantize_1x128(rand(m, k), scale_k_major=True)
    w, w_scale = weight(n, k)
    got = fp8_gemm_nt_torch(x, x_scale, w, w_scale, BF16)
    close(got, reference.fp8_gemm_nt(x, x_scale, w, w_scale, BF16), "bfloat16")
