"""The small kernels against their twins in Triton's interpreter: right arithmetic and indices, on
a machine without a GPU. Outside the interpreter one test runs this file again inside it."""

import pytest
import torch
import triton
from torch import Tensor

from dsd.kernels import (
    fused,
    latent_store,
    moe_gate,
    moe_route,
    quant,
    reference,
    reference_sample,
    sample,
)
from dsd.kernels.latent import latent_cache
from dsd.kernels.latent_store import Store
from dsd.tests.kernels.interpreter import patch, run_interpreted

pytestmark = pytest.mark.slow

INTERPRET = triton.knobs.runtime.interpret
if INTERPRET:
    patch()
else:

    def test_small_kernels_in_the_interpreter_equal_their_twins() -> None:
        run_interpreted(__file__)


interpreted = pytest.mark.skipif(not INTERPRET, reason="run by the test above")
BF16 = torch.bfloat16


def same_bits(actual: Tensor, expected: Tensor) -> None:
    assert actual.dtype == expected.dtype and actual.shape == expected.shape
    view = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[actual.element_size()]
    assert torch.equal(actual.contiguous().view(view), expected.contiguous().view(view))


@interpreted
@pytest.mark.parametrize("ue8m0", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, BF16])
@pytest.mark.parametrize("width", [128, 300, 2200])
def test_quantize_1x128(width: int, dtype: torch.dtype, ue8m0: bool) -> None:
    x = (torch.randn(3, width + 8) * torch.logspace(-6, 6, 3)[:, None]).to(dtype)[:, :width]
    want = reference.quantize_1x128(x, ue8m0)
    for k_major in (False, True):
        q, scale = quant.quantize_1x128(x, ue8m0, k_major)
        same_bits(q, want[0])
        same_bits(scale, want[1])


@interpreted
def test_quantize_1x128_ue8m0_at_powers_of_two() -> None:
    largest = 448 * torch.exp2(torch.arange(-8.0, 8.0))
    largest = torch.cat((largest, torch.nextafter(largest, largest * 2), largest * 0.99999994))
    x = torch.zeros(len(largest), 128)
    x[:, 7] = -largest
    for got, want in zip(
        quant.quantize_1x128(x, True), reference.quantize_1x128(x, True), strict=True
    ):
        same_bits(got, want)


@interpreted
@pytest.mark.parametrize("shape", [(128, 256), (130, 257), (2, 3, 200, 100)], ids=str)
def test_dequantize_128x128(shape: tuple[int, ...]) -> None:
    q = (torch.randn(shape) * 100).to(torch.float8_e4m3fn)
    scale = torch.rand(*shape[:-2], -(-shape[-2] // 128), -(-shape[-1] // 128))
    for dtype in (torch.float32, BF16):
        same_bits(
            quant.dequantize_128x128(q, scale, dtype), reference.dequantize_128x128(q, scale, dtype)
        )


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, BF16])
@pytest.mark.parametrize("width", [128, 576, 1000])
def test_norms(width: int, dtype: torch.dtype, close) -> None:
    x, residual = torch.randn(2, 2, width + 8).to(dtype)[..., :width]
    weight = torch.randn(width).to(dtype)
    kind = "float32" if dtype == torch.float32 else "bfloat16"
    close(fused.rms_norm(x, weight, 1e-6), reference.rms_norm(x, weight, 1e-6), kind)
    normed, total = fused.add_rms_norm(x, residual, weight, 1e-6)
    want, want_total = reference.add_rms_norm(x, residual, weight, 1e-6)
    same_bits(total, want_total)
    close(normed, want, kind)
    for ue8m0 in (False, True):
        q, scale, again, total = fused.add_rms_norm_quant(x, residual, weight, 1e-6, ue8m0)
        same_bits(total, want_total)
        same_bits(again, normed)
        want_q, want_scale = reference.quantize_1x128(normed, ue8m0)
        same_bits(q, want_q)
        same_bits(scale, want_scale)
        same_bits(fused.rms_norm_quant(total, weight, 1e-6, ue8m0)[0], want_q)


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, BF16])
@pytest.mark.parametrize("width", [5, 256, 2100])
def test_silu_mul(width: int, dtype: torch.dtype, close) -> None:
    gate_up = (torch.randn(2, 2 * width) * 4).to(dtype)
    active = fused.silu_mul(gate_up)
    close(active, reference.silu_mul(gate_up), "float32" if dtype == torch.float32 else "bfloat16")
    for got, want in zip(
        fused.silu_mul_quant(gate_up), reference.quantize_1x128(active), strict=True
    ):
        same_bits(got, want)


@interpreted
@pytest.mark.parametrize("heads", [None, 1, 3, 20])
@pytest.mark.parametrize("width", [2, 6, 64])
def test_rope_of_slices(heads: int | None, width: int, close) -> None:
    lead = (3,) if heads is None else (3, heads)
    x = torch.randn(*lead, width + 5).to(BF16)[..., 5:]
    angle = torch.rand(3, width // 2) * 100
    want = reference.apply_rope(x, angle.cos(), angle.sin())
    close(fused.apply_rope(x, angle.cos(), angle.sin()), want, "bfloat16")
    wide = torch.full((*lead, width + 4), float("nan"), dtype=BF16)
    fused.apply_rope(x, angle.cos(), angle.sin(), wide[..., 2:-2])
    close(wide[..., 2:-2], want, "bfloat16")
    assert wide[..., :2].isnan().all() and wide[..., -2:].isnan().all()


@interpreted
def test_embedding() -> None:
    weight, ids = torch.randn(11, 2500).to(BF16), torch.tensor([10, 0, 3, 3])
    for dtype in (BF16, torch.float32):
        same_bits(fused.embedding(weight, ids, dtype), reference.embedding(weight, ids, dtype))


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, BF16])
@pytest.mark.parametrize("width", [128, 1000])
@pytest.mark.parametrize("embed_dtype", [torch.float32, BF16])
def test_joined_is_both_norms_apart(
    width: int, dtype: torch.dtype, embed_dtype: torch.dtype, close
) -> None:
    weight, ids = (torch.randn(11, width) * 3).to(embed_dtype), torch.tensor([10, 0, 3, 3])[1:]
    hidden = torch.randn(3, width + 8).to(dtype)[:, :width]
    enorm, hnorm = torch.randn(2, width).to(BF16)
    got = fused.joined(weight, ids, enorm, hidden, hnorm, 1e-6, dtype)
    following = fused.rms_norm(fused.embedding(weight, ids, dtype), enorm, 1e-6)
    same_bits(got, torch.cat((following, fused.rms_norm(hidden, hnorm, 1e-6)), dim=-1))
    want = reference.joined(weight, ids, enorm, hidden, hnorm, 1e-6, dtype)
    close(got, want, "float32" if dtype == torch.float32 else "bfloat16")


@interpreted
def test_latent_stores(close) -> None:
    kv_a, weight = torch.randn(3, 48 + 12).to(BF16), torch.randn(48).to(BF16)
    angle, slots = torch.rand(3, 6) * 100, torch.tensor([9, 31, 16])
    cache, want = torch.full((2, 4, 8, 60), float("nan"), dtype=BF16)
    latent, k_pe = latent_store.norm_rope_store(
        kv_a, weight, 1e-6, angle.cos(), angle.sin(), cache, slots
    )
    close(latent, reference.rms_norm(kv_a[:, :48], weight, 1e-6), "bfloat16")
    close(k_pe, reference.apply_rope(kv_a[:, 48:], angle.cos(), angle.sin()), "bfloat16")
    reference.store_latent(want, latent, k_pe, slots)
    same_bits(cache, want)
    cache.fill_(float("nan"))
    latent_store.store_latent(cache, latent, k_pe, slots)
    same_bits(cache, want)


@interpreted
@pytest.mark.parametrize("width", [128, 300])
@pytest.mark.parametrize("dtype", [BF16, torch.float8_e4m3fn])
def test_norms_with_the_store_equal_both_apart(dtype: torch.dtype, width: int) -> None:
    down, angle = torch.randn(3, width + 60).to(BF16), torch.rand(3, 6) * 100
    q_a, kv_a = down.split([width, 60], dim=1)
    weight, q_weight = torch.randn(48).to(BF16), torch.randn(width).to(BF16)
    caches = [latent_cache(4, 8, 48, 12, dtype, "cpu").fill_(255) for _ in range(2)]
    store = Store(
        kv_a, weight, 1e-6, angle.cos(), angle.sin(), caches[0], torch.tensor([9, 31, 16])
    )
    q, *kv = latent_store.norms_rope_store(q_a, q_weight, store)
    same_bits(q, fused.rms_norm(q_a, q_weight, 1e-6))
    for want in (latent_store.norm_rope_store(*store._replace(cache=caches[1])), kv):
        for ue8m0, k_major in ((False, True), (True, False)):
            got = latent_store.norms_rope_store_quant(q_a, q_weight, store, ue8m0, k_major)
            apart = fused.rms_norm_quant(q_a, q_weight, 1e-6, ue8m0, k_major)
            for a, b in zip(got, (*apart, *want), strict=True):
                same_bits(a, b)
    same_bits(*caches)


@interpreted
@pytest.mark.parametrize(
    ("n_experts", "n_group", "topk_group", "top_k"),
    [(256, 8, 4, 8), (384, 1, 1, 8), (64, 1, 1, 6), (8, 8, 3, 3), (12, 3, 2, 5), (30, 5, 5, 30)],
)
def test_moe_gate(n_experts: int, n_group: int, topk_group: int, top_k: int, close) -> None:
    logits, bias = torch.randn(5, n_experts) * 2, torch.randn(n_experts) * 0.3 - 1
    for norm in (False, True):
        arguments = (bias, n_group, topk_group, top_k, norm, 2.5)
        ids, weights = moe_gate.moe_gate(logits, *arguments)
        want_ids, want_weights = reference.moe_gate(logits, *arguments)
        assert torch.equal(ids, want_ids)
        close(weights, want_weights, "float32")


@interpreted
@pytest.mark.parametrize("num_tokens", [0, 1, 16, 17, 40])
@pytest.mark.parametrize(("n_experts", "width"), [(12, 520), (72, 1100)])
def test_route_of_few_tokens(num_tokens: int, n_experts: int, width: int, close) -> None:
    x = torch.full((num_tokens + 1, width + 8), float("nan"), dtype=BF16)[:num_tokens, :width]
    weight = torch.full((n_experts + 1, width), float("nan"), dtype=BF16)[:n_experts]
    x[:], weight[:] = torch.randn(x.shape), torch.randn(weight.shape) * 0.1
    pieces = moe_gate.partial_logits(x, weight)
    logits = x.float() @ weight.float().t()
    close(pieces.sum(1), logits, "float32")
    for part, k in enumerate(range(0, width, moe_gate.PIECE)):
        span = slice(k, k + moe_gate.PIECE)
        close(pieces[:, part], x[:, span].float() @ weight[:, span].float().t(), "float32")
    bias = torch.randn(n_experts) * 0.3
    ids, weights = moe_gate.moe_gate(moe_gate.gate_logits(x, weight), bias, 3, 2, 5, True, 2.5)
    want_ids, want_weights = reference.moe_gate(logits, bias, 3, 2, 5, True, 2.5)
    assert torch.equal(ids, want_ids)
    close(weights, want_weights, "float32")


@interpreted
def test_moe_gate_adds_pieces_in_order() -> None:
    pieces = torch.randn(4, 5, 12) * torch.logspace(-6, 6, 5)[:, None]
    total = pieces[:, 0].clone()
    for part in range(1, 5):
        total += pieces[:, part]
    for got, want in zip(
        moe_gate.moe_gate(pieces, torch.zeros(12), 3, 2, 5, True, 1.0),
        moe_gate.moe_gate(total, torch.zeros(12), 3, 2, 5, True, 1.0),
        strict=True,
    ):
        assert torch.equal(got, want)


@interpreted
def test_moe_gate_of_ties_and_nans_names_distinct_experts() -> None:
    logits = torch.zeros(3, 12)
    logits[1] = float("nan")
    logits[2] = float("-inf")
    ids, _ = moe_gate.moe_gate(logits, torch.zeros(12), 3, 2, 5, True, 1.0)
    assert ids.tolist() == [[0, 1, 2, 3, 4]] * 3


@interpreted
@pytest.mark.parametrize("num_tokens", [0, 1, 700])
def test_permute_and_combine(num_tokens: int, close) -> None:
    ids = torch.rand(num_tokens, 12).argsort(dim=1)[:, :3].contiguous()
    for first, count in ((0, 12), (4, 5)):
        order, offsets, place = moe_route.permute_by_expert(ids, count, first)
        want_order, want_offsets, want_place = reference.permute_by_expert(ids, count, first)
        used = int(offsets[-1])
        assert torch.equal(order[:used], want_order[:used])
        assert torch.equal(offsets, want_offsets) and torch.equal(place, want_place)
    y, weights = torch.randn(3 * num_tokens, 20).to(BF16)[:40], torch.rand(num_tokens, 3)[:13]
    if num_tokens == 700:
        ids, y = ids[:13], y[:39]
    _, _, place = moe_route.permute_by_expert(ids, 5, 4)
    shared = torch.randn(len(weights), 20).to(BF16)
    want = reference.combine_experts(y, place, weights)
    close(moe_route.combine_experts(y, place, weights), want, "bfloat16")
    close(moe_route.combine_experts(y, place, weights, shared), want + shared, "bfloat16")


@interpreted
@pytest.mark.parametrize("num_tokens", [0, 1, 40])
def test_gather(num_tokens: int) -> None:
    x = torch.randn(num_tokens, 300)[:, 20:276].to(BF16)
    ids = torch.rand(num_tokens, 12).argsort(dim=1)[:, :3].contiguous()
    order, offsets, _ = reference.permute_by_expert(ids, 5, 4)
    used, q = int(offsets[-1]), reference.quantize_1x128(x)
    want = x[order[:used] // 3]
    same_bits(moe_route.gather_rows(x, order, offsets, 3)[:used], want)
    for k_major in (False, True):
        rows, scales = moe_route.gather_quantized(*q, order, offsets, 3, k_major)
        same_bits(rows[:used].view(torch.uint8), q[0].view(torch.uint8)[order[:used] // 3])
        same_bits(scales[:used], q[1][order[:used] // 3])


@interpreted
def test_top_logprobs(close) -> None:
    logits = torch.randn(3, 5001) * 5
    logits[:, 2048:4096] = float("-inf")
    chosen = torch.tensor([0, 5000, 77])
    got, want = (module.top_logprobs(logits, chosen, 4) for module in (sample, reference_sample))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
