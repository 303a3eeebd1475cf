"""The plain Triton kernels of the fp8 latent cache in Triton's interpreter, against their twins.
Outside the interpreter one test runs this file again inside it."""

from dataclasses import replace

import pytest
import torch
import triton

from dsd.kernels import latent, latent_store, mla, mla_dot_fp8, mla_prefill, mla_schedule, reference
from dsd.tests.kernels.interpreter import patch, run_interpreted
from dsd.tests.kernels.test_latent import FP8, fp8_paged
from dsd.tests.kernels.test_mla import Case
from dsd.tests.kernels.test_mla_interpret import KIND, twin_decode

pytestmark = pytest.mark.slow

INTERPRET = triton.knobs.runtime.interpret
if INTERPRET:
    patch()
else:

    def test_fp8_cache_kernels_in_the_interpreter_equal_their_twins() -> None:
        run_interpreted(__file__)


interpreted = pytest.mark.skipif(not INTERPRET, reason="run by the test above")
BF16, F32 = torch.bfloat16, torch.float32


@interpreted
@pytest.mark.parametrize("dtype", [BF16, F32])
@pytest.mark.parametrize(("rank", "rope", "block_size"), [(48, 12, 8), (33, 10, 1), (64, 16, 64)])
def test_latent_stores_write_the_twins_bytes(
    rank: int, rope: int, block_size: int, dtype: torch.dtype
) -> None:
    kv_a = (torch.randn(4, rank + rope) * torch.logspace(-9, 6, 4)[:, None]).to(dtype)
    kv_a[2, 0] = 0
    weight, angle = torch.randn(rank).to(dtype), torch.rand(4, rope // 2) * 100
    slots = torch.randperm(6 * block_size)[:4]
    shape = (6, block_size, rank, rope, FP8, "cpu")
    cache, want = (latent.latent_cache(*shape).fill_(255) for _ in range(2))
    both = latent_store.norm_rope_store(kv_a, weight, 1e-6, angle.cos(), angle.sin(), cache, slots)
    assert both[0].dtype == both[1].dtype == dtype
    reference.store_latent(want, *both, slots)
    assert torch.equal(cache, want)
    parts = kv_a.split([rank, rope], dim=1)
    latent_store.store_latent(cache.fill_(255), *parts, slots)
    reference.store_latent(want.fill_(255), *parts, slots)
    assert torch.equal(cache, want)


@interpreted
@pytest.mark.parametrize("native", [True, False])
def test_gather_latent_dequantises_any_range(native: bool, close, monkeypatch) -> None:
    monkeypatch.setattr(mla_prefill, "has_fp8", lambda _: native)
    for case in (Case((77,), 1, 16, rank=130, rope=14), Case((30,), 1, 4, rank=33, rope=10)):
        cache, table, _ = fp8_paged(case, spread=2.0)
        for start, stop in ((0, 0), (0, 30), (15, 29), (16, 17), (29, 30)):
            for dtype in (F32, BF16):
                got = mla.gather_latent(cache, table[0], start, stop, case.rank, dtype)
                want = reference.gather_latent(cache, table[0], start, stop, case.rank, dtype)
                close(got, want, "exact")


@interpreted
def test_half_of_e4m3_by_hand_knows_every_value() -> None:
    case = Case((256,), 1, 16, rank=256, rope=2)
    cache, table, _ = fp8_paged(case)
    value, _, scale = latent.planes(cache, 256)
    every = torch.arange(256).to(torch.uint8)
    every[[0x7F, 0xFF]] = 0
    value.view(torch.uint8)[:] = every
    scale.fill_(1.0)
    want = every.view(FP8).float()
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(mla_prefill, "has_fp8", lambda _: False)
        got = mla.gather_latent(cache, table[0], 0, 1, 256, F32)
    assert torch.equal(got[0, :256], want)


DECODE = [
    (Case((1, 64, 65, 300), 16, 64, rank=64, rope=16), 1, F32),
    (Case((511, 0, 33), 8, 16, rank=48, rope=16), 1, BF16),
    (Case((129, 6, 7), 5, 128, rank=33, rope=10), 6, F32),
    (Case((258, 128), 16, 64, rank=64, rope=16), 2, BF16),
]


@interpreted
@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("spread", [0.0, 3.0])
@pytest.mark.parametrize(("case", "query_len", "dtype"), DECODE, ids=str)
def test_mla_decode(
    case: Case, query_len: int, dtype: torch.dtype, spread: float, native: bool, close, monkeypatch
) -> None:
    """spread: tokens' scales lie within 10^-spread ... 10^spread."""
    monkeypatch.setattr(mla_schedule, "num_sms", lambda _: 6)
    monkeypatch.setattr(mla_dot_fp8, "has_fp8", lambda _: native)
    cache, table, _ = fp8_paged(case, spread)
    lens = torch.tensor(case.seq_lens, dtype=torch.int32)
    q = torch.randn(len(lens), query_len, case.heads, case.rank + case.rope).to(dtype)
    scale = 0.2 * 10**-spread
    want = twin_decode(q, cache, table, lens, case.rank, scale)
    query = q[:, 0] if query_len == 1 else q
    got = mla.mla_decode(query, cache, table, lens, case.rank, scale)
    close(got.view(want.shape), want, KIND[dtype])


@interpreted
@pytest.mark.parametrize("size", [1e-2, 1e5])
def test_mla_decode_small_and_large_queries(size: float, close, monkeypatch) -> None:
    case = replace(DECODE[1][0], seq_lens=(200,))
    cache, table, _ = fp8_paged(case)
    lens = torch.tensor(case.seq_lens, dtype=torch.int32)
    q = (torch.randn(1, 1, case.heads, case.rank + case.rope) * size).to(BF16)
    want = twin_decode(q, cache, table, lens, case.rank, 0.2 / size)
    got = mla.mla_decode(q[:, 0], cache, table, lens, case.rank, 0.2 / size)
    close(got[:, None], want, "bfloat16")
