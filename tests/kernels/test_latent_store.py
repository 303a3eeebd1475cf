"""The cache store, and what a launch of it does besides: without a GPU, by the twins."""

import pytest
import torch
from torch import Tensor

from dsd.kernels import fused, latent, latent_store
from dsd.kernels.latent_store import Store

FP8 = torch.float8_e4m3fn


def store_of(dtype: torch.dtype) -> tuple[Store, Tensor]:
    """Three tokens of rank 48 and rope 12, and what queries of width 300 are made of."""
    down, angle = torch.randn(3, 300 + 60).bfloat16(), torch.rand(3, 6) * 100
    q_a, kv_a = down.split([300, 60], dim=1)
    cache = latent.latent_cache(4, 8, 48, 12, dtype, "cpu").zero_()
    slots = torch.tensor([9, 31, 16])
    weight = torch.randn(48).bfloat16()
    return Store(kv_a, weight, 1e-6, angle.cos(), angle.sin(), cache, slots), q_a


def test_store_latent_writes_named_slots_and_no_others() -> None:
    cache = torch.full((4, 8, 6), float("nan"))
    latent, k_pe = torch.randn(3, 4), torch.randn(3, 2)
    slots = torch.tensor([9, 31, 16])
    latent_store.store_latent(cache, latent, k_pe, slots)
    assert torch.equal(cache.view(32, 6)[slots], torch.cat((latent, k_pe), dim=-1))
    assert torch.isfinite(cache.view(32, 6)).all(dim=1).nonzero().flatten().tolist() == [9, 16, 31]


@pytest.mark.parametrize("dtype", [torch.bfloat16, FP8])
def test_norms_rope_store_is_the_norm_and_the_store(dtype: torch.dtype) -> None:
    store, q_a = store_of(dtype)
    apart, weight = store._replace(cache=store.cache.clone()), torch.randn(300)
    want = latent_store.norm_rope_store(*apart)
    q, *kv = latent_store.norms_rope_store(q_a, weight, store)
    values, scale, *again = latent_store.norms_rope_store_quant(q_a, weight, store, True)
    assert torch.equal(q, fused.rms_norm(q_a, weight, 1e-6))
    want_values, want_scale = fused.rms_norm_quant(q_a, weight, 1e-6, True)
    assert torch.equal(values.float(), want_values.float()) and torch.equal(scale, want_scale)
    for latents, k_pe in (kv, again):
        assert torch.equal(latents, want[0]) and torch.equal(k_pe, want[1])
    assert torch.equal(store.cache, apart.cache) and store.cache.any()


def test_norms_rope_store_of_other_token_counts_is_refused() -> None:
    store, q_a = store_of(torch.bfloat16)
    with pytest.raises(AssertionError):
        latent_store.norms_rope_store(q_a[:2], torch.randn(300), store)
