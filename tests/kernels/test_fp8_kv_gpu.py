"""The fp8 latent cache on a GPU against its twins: stores by bits, attention over it with V3's
shapes and odd ones, every bit set in all that must not be read; and captured in CUDA graphs."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from dsd.kernels import latent, latent_store, mla, reference
from dsd.tests.kernels import test_latent, test_mla
from dsd.tests.kernels.test_mla_gpu import (
    BF16,
    EDGES,
    F16,
    F32,
    HOPPER,
    KIND,
    POISON,
    SCALE,
    Case,
    decode,
    inside,
    replays,
)
from dsd.tests.kernels.test_mla_interpret import twin_decode

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]


@pytest.fixture(autouse=True)
def _poisoned_memory() -> None:
    """What torch.empty hands out next is full of NaN."""
    torch.cuda.manual_seed(0)
    torch.full((64 << 20,), float("nan"), device="cuda")


def inputs(case: Case, spread: float = 0.0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    layout = test_mla.Case(case.seq_lens, case.heads, case.block_size, case.rank, case.rope)
    cache, table, _ = test_latent.fp8_paged(layout, spread)
    shape = (len(case.seq_lens), case.query_len, case.heads, case.rank + case.rope)
    q = torch.randn(shape, device="cuda").to(case.dtype)
    lens = torch.tensor(case.seq_lens, dtype=torch.int32, device="cuda")
    return q, cache.cuda(), table.cuda(), lens


CORRECTNESS = [
    Case(EDGES, 128, "seesaw_fp8"),
    Case((700, 0, 4095), 64, "seesaw_fp8"),
    Case((1000,) * 100, 128, "seesaw_fp8"),
    Case((16384,), 128, "seesaw_fp8"),
    Case((2, 64, 65, 129, 1300), 128, "seesaw_fp8", query_len=2),
    Case(EDGES, 16, "transposed_fp8"),
    Case((40000, 3), 16, "transposed_fp8"),
    Case((100, 900) * 100, 16, "transposed_fp8"),
    Case((300, 0, 2049), 32, "transposed_fp8"),
    Case((2, 64, 65, 66, 129, 1300), 16, "transposed_fp8", query_len=2),
    Case(EDGES, 128, "dot_fp8", block_size=16),
    Case(EDGES, 16, "dot_fp8", block_size=128),
]
CORNER = [
    Case((0,), 128, "seesaw_fp8"),
    Case((0, 0), 16, "transposed_fp8"),
    Case((6, 7, 64, 69, 134, 2000), 128, "seesaw_fp8", query_len=6),
    Case((6, 64, 66, 130, 3000), 64, "seesaw_fp8", query_len=3),
    Case((3, 64, 66, 130, 3000), 16, "transposed_fp8", query_len=3),
    Case((6, 64, 66, 130, 3000), 32, "transposed_fp8", query_len=6),
    Case((1, 77, 500), 8, "dot_fp8"),
    Case((1, 77, 500), 8, "dot_fp8", block_size=32, rank=256),
    Case((33, 0, 2000), 24, "dot_fp8", rank=96, rope=32),
    Case((5, 66, 1300), 16, "dot_fp8", query_len=4, rank=128, dtype=F16),
    Case((5, 200), 5, "dot_fp8", block_size=1, rank=33, rope=10, dtype=F32),
    Case((5, 200, 700), 16, "dot_fp8", dtype=F32),
]


@pytest.mark.parametrize("case", CORRECTNESS + CORNER, ids=str)
def test_mla_decode(case: Case, close) -> None:
    q, cache, table, lens = inputs(case)
    odd = (inside(q, float("nan")), cache, inside(table, POISON), inside(lens, POISON))
    if HOPPER:
        tiling = mla.decode_tiling(q, cache, case.query_len, case.heads, case.rank)
        assert tiling.kernel == case.kernel
    got = decode(case, *odd)
    assert torch.equal(got, decode(case, *odd)), "the same inputs gave different bits"
    close(got, twin_decode(q, cache, table, lens, case.rank, SCALE), KIND[case.dtype])


SMALL = [Case((900, 64, 1), 128, "seesaw_fp8"), Case((900, 64, 1), 16, "transposed_fp8")]
SMALL += [Case((900, 64, 1), 16, "dot_fp8", block_size=16)]


@pytest.mark.parametrize("spread", [1.5, -6.0])
@pytest.mark.parametrize("case", SMALL, ids=str)
def test_mla_decode_scales_of_any_size(case: Case, spread: float, close) -> None:
    """Scales of a sequence's tokens within 10^-1.5 ... 10^1.5; or all around 10^-6."""
    q, cache, table, lens = inputs(case, max(spread, 0.0))
    if spread < 0:
        latent.planes(cache, case.rank)[2].mul_(10**spread)
    got = decode(case, q, cache, table, lens)
    close(got, twin_decode(q, cache, table, lens, case.rank, SCALE), "bfloat16")


@pytest.mark.parametrize("size", [1e-2, 1e5])
@pytest.mark.parametrize("case", SMALL, ids=str)
def test_mla_decode_small_and_large_queries(case: Case, size: float, close) -> None:
    q, cache, table, lens = inputs(case)
    q, scale = q * size, SCALE / size
    got = mla.mla_decode(q[:, 0], cache, table, lens, case.rank, scale)
    close(got[:, None], twin_decode(q, cache, table, lens, case.rank, scale), "bfloat16")


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_mla_decode_graph_replayed_with_other_lengths(case: Case, close) -> None:
    static = inputs(replace(case, seq_lens=(3000,) * 3))
    q, cache, table, lens = static
    lens.copy_(torch.tensor(case.seq_lens))
    for other in ((1, 3000, 2000), (0, 0, 5), (3000, 2999, 2998)):

        def change(other: tuple[int, ...] = other) -> None:
            lens.copy_(torch.tensor(other))
            q.normal_()
            table.copy_(table.flip(0))

        got, want = replays(
            lambda: decode(case, *static),
            change,
            lambda: twin_decode(q, cache, table, lens, 512, SCALE),
        )
        close(got, want, "bfloat16")


@pytest.mark.parametrize("dtype", [BF16, F32])
@pytest.mark.parametrize("num_tokens", [0, 1, 77])
def test_latent_stores_write_the_twins_bytes(num_tokens: int, dtype: torch.dtype) -> None:
    """The twin on the CPU: on CUDA torch divides by a constant as it likes."""
    size = torch.logspace(-9, 6, num_tokens + 1)[1:, None]
    kv_a = inside((torch.randn(num_tokens, 576) * size).to("cuda", dtype), float("nan"))
    weight = torch.randn(512, device="cuda").to(dtype)
    angle = torch.rand(num_tokens, 32, device="cuda") * 100
    slots = torch.randperm(50 * 64)[:num_tokens]
    shape = (50, 64, 512, 64, torch.float8_e4m3fn)
    cache = latent.latent_cache(*shape, "cuda").fill_(255)
    want = latent.latent_cache(*shape, "cpu").fill_(255)
    both = latent_store.norm_rope_store(
        kv_a, weight, 1e-6, angle.cos(), angle.sin(), cache, slots.cuda()
    )
    reference.store_latent(want, *(x.cpu() for x in both), slots)
    assert torch.equal(cache.cpu(), want)
    parts = kv_a.split([512, 64], dim=1)
    latent_store.store_latent(cache.fill_(255), *parts, slots.cuda())
    reference.store_latent(want.fill_(255), *(x.cpu() for x in parts), slots)
    assert torch.equal(cache.cpu(), want)


@pytest.mark.parametrize(("start", "stop"), [(0, 0), (0, 3000), (63, 65), (1000, 2047)])
def test_gather_latent(start: int, stop: int) -> None:
    _, cache, table, _ = inputs(Case((3000,), 1, "dot_fp8"))
    for dtype in (BF16, F32):
        got, want = replays(
            lambda dtype=dtype: mla.gather_latent(
                cache, inside(table, POISON)[0], start, stop, 512, dtype
            ),
            lambda: table.__setitem__((0, slice(0, 46)), table[0, :46].flip(0)),
            lambda dtype=dtype: reference.gather_latent(
                cache, inside(table, POISON)[0], start, stop, 512, dtype
            ),
        )
        assert torch.equal(got, want)
