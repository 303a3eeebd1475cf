"""The fp8 layout of the latent cache, and the twins that write and read it."""

import pytest
import torch
from torch import Tensor

from dsd.kernels import latent, latent_store, reference
from dsd.kernels.mla import gather_latent, mla_decode
from dsd.tests.kernels.test_mla import Case, paged

FP8 = torch.float8_e4m3fn
WIDTHS = [(512, 64, 64), (256, 64, 16), (33, 10, 1), (24, 6, 128)]


def fp8_paged(case: Case, spread: float = 0.0) -> tuple[Tensor, Tensor, list[Tensor]]:
    """`test_mla.paged` with an fp8 cache: every byte of an unread slot is set, which is NaN in each
    plane. The latents are the unquantised ones; their magnitudes differ by 10^(2 spread)."""
    plain, table, latents = paged(case)
    cache = latent.latent_cache(len(plain), case.block_size, case.rank, case.rope, FP8, "cpu")
    cache.fill_(255)
    for row, entries in enumerate(latents):
        entries[:, : case.rank] *= 10 ** ((torch.rand(len(entries), 1) * 2 - 1) * spread)
        token = torch.arange(len(entries))
        slots = table[row, token // case.block_size] * case.block_size + token % case.block_size
        parts = entries.split([case.rank, case.rope], dim=1)
        reference.store_latent(cache, *parts, slots.long())
    return cache, table, latents


def as_float(cache: Tensor, rank: int) -> Tensor:
    """The cache in the other layout, [num_blocks, block_size, R + P] float32."""
    value, rope, scale = latent.planes(cache, rank)
    return torch.cat((value.float() * scale[..., None], rope.float()), dim=-1)


@pytest.mark.parametrize(("rank", "rope", "block_size"), WIDTHS)
def test_planes_share_a_block_without_overlap(rank: int, rope: int, block_size: int) -> None:
    cache = latent.latent_cache(3, block_size, rank, rope, FP8, "cpu").fill_(255)
    assert cache.shape[2] == latent.entry_bytes(rank, rope, FP8)
    assert latent.holds(cache, rank, rope) and latent.rope_width(cache, rank) == rope
    value, rope_part, scale = latent.planes(cache, rank)
    assert value.shape == (3, block_size, rank) and value.dtype == FP8
    assert rope_part.shape == (3, block_size, rope) and scale.shape == (3, block_size)
    for plane, number in ((value.view(torch.uint8), 7), (rope_part, 2.0), (scale, 3.0)):
        plane[1] = number
    assert (value.view(torch.uint8)[1] == 7).all()
    assert (rope_part[1] == 2).all() and (scale[1] == 3).all()
    assert (cache[0] == 255).all() and (cache[2] == 255).all()
    pad = (-rank % 4) * block_size
    assert (cache[1].flatten()[cache[1].numel() - pad :] == 255).all()


def test_entry_bytes_of_deepseek_v3() -> None:
    assert latent.entry_bytes(512, 64, FP8) == 644
    assert latent.entry_bytes(512, 64, torch.bfloat16) == 1152
    cache = latent.latent_cache(2, 64, 512, 64, torch.bfloat16, "cpu")
    assert cache.shape == (2, 64, 576) and not latent.is_fp8(cache)


def test_quantize_latent_is_within_half_a_step() -> None:
    x = torch.randn(40, 64) * torch.logspace(-8, 6, 40)[:, None]
    value, scale = reference.quantize_latent(x)
    assert torch.equal(scale, x.abs().amax(1) / 448)
    # Three bits behind the leading one; below 2^-6 steps of 2^-9.
    step = (x.abs() / scale[:, None]).clamp(min=2.0**-6).log2().floor().exp2() / 8 * scale[:, None]
    assert ((value.float() * scale[:, None] - x).abs() <= step / 2 * 1.0001).all()


def test_quantize_latent_of_nothing_has_a_scale() -> None:
    value, scale = reference.quantize_latent(torch.zeros(2, 8))
    assert (scale > 0).all() and scale.log2().isfinite().all() and (1 / scale).isfinite().all()
    assert (value.float() == 0).all()


@pytest.mark.parametrize(("rank", "rope", "block_size"), WIDTHS)
def test_store_latent_then_gather_dequantises_and_touches_no_other_slot(
    rank: int, rope: int, block_size: int
) -> None:
    cache = latent.latent_cache(5, block_size, rank, rope, FP8, "cpu").fill_(255)
    slots = (torch.randperm(4 * block_size) + block_size)[:3]
    kv_latent, k_pe = torch.randn(3, rank).bfloat16(), torch.randn(3, rope).bfloat16() * 30
    latent_store.store_latent(cache, kv_latent, k_pe, slots)
    value, scale = reference.quantize_latent(kv_latent)
    entries = as_float(cache, rank).flatten(0, 1)
    assert torch.equal(entries[slots, :rank], value.float() * scale[:, None])
    assert torch.equal(entries[slots, rank:], k_pe.float()), "bf16 of this size is an fp16"
    entries[slots] = float("nan")
    assert entries.isnan().all()
    table = (slots // block_size).int()
    for i, slot in enumerate((slots % block_size).tolist()):
        start = i * block_size + slot
        for dtype in (torch.float32, torch.bfloat16):
            got = gather_latent(cache, table, start, start + 1, rank, dtype)
            want = torch.cat((value.float() * scale[:, None], k_pe.float()), 1)[i : i + 1]
            assert torch.equal(got, want.to(dtype))


def test_store_latent_clamps_rope_parts_that_fp16_does_not_hold() -> None:
    cache = latent.latent_cache(2, 4, 8, 2, FP8, "cpu")
    k_pe = torch.tensor([[1e6, -1e6]]).bfloat16()
    latent_store.store_latent(cache, torch.ones(1, 8), k_pe, torch.tensor([5]))
    assert latent.planes(cache, 8)[1][1, 1].tolist() == [65504.0, -65504.0]


def test_a_block_can_be_copied_as_a_whole() -> None:
    case = Case((40,), 1, 16, rank=33, rope=10)
    cache, table, _ = fp8_paged(case)
    before = gather_latent(cache, table[0], 0, 40, 33, torch.float32)
    first, spare = int(table[0, 0]), 0
    cache[spare] = cache[first]
    cache[first] = 255
    table[0, 0] = spare
    assert torch.equal(gather_latent(cache, table[0], 0, 40, 33, torch.float32), before)


@pytest.mark.parametrize("query_len", [1, 3])
@pytest.mark.parametrize(
    "case", [Case((7, 3, 100), 5, 16, rank=33, rope=10), Case((65, 130), 16, 64)], ids=str
)
def test_mla_decode_over_fp8_is_that_over_the_dequantised_cache(
    case: Case, query_len: int, close
) -> None:
    cache, table, _ = fp8_paged(case, spread=1.0)
    lens = torch.tensor(case.seq_lens, dtype=torch.int32)
    shape = (query_len, case.heads) if query_len > 1 else (case.heads,)
    q = torch.randn(len(lens), *shape, case.rank + case.rope) * 0.3
    got = mla_decode(q, cache, table, lens, case.rank, 0.2)
    want = mla_decode(q, as_float(cache, case.rank), table, lens, case.rank, 0.2)
    close(got, want, "float32")


def test_mla_decode_over_fp8_is_near_that_over_what_was_stored(close) -> None:
    case = Case((300, 65), 16, 64)
    cache, table, _ = fp8_paged(case)
    torch.manual_seed(0)
    plain, same_table, _ = paged(case)
    assert torch.equal(table, same_table)
    q, lens = torch.randn(2, 16, 576) * 0.3, torch.tensor(case.seq_lens, dtype=torch.int32)
    got = mla_decode(q, cache, table, lens, 512, 192**-0.5)
    close(got, mla_decode(q, plain, table, lens, 512, 192**-0.5), "fp8")
