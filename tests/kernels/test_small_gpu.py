"""The small kernels on a GPU against their twins: V3's shapes, odd ones, slices of wider tensors,
poison in all that must not be read; and each captured in a CUDA graph.

Quantisation is compared by bits with the twin on the CPU: torch on CUDA divides by a constant as a
multiplication with its reciprocal, and may be one bit off.
"""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from dsd.kernels import fused, latent_store, moe_gate, moe_route, quant, reference
from dsd.kernels.latent import latent_cache
from dsd.kernels.latent_store import Store

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]
HIDDEN = 7168
BF16, F32 = torch.bfloat16, torch.float32
KIND = {BF16: "bfloat16", F32: "float32"}
"""Row of conftest's tolerance table."""


@pytest.fixture(autouse=True)
def _cuda() -> None:
    torch.cuda.manual_seed(0)


def rand(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
    return torch.randn(shape, device="cuda", dtype=F32).to(dtype)


def inside(x: Tensor, before: int = 64, after: int = 64) -> Tensor:
    """x as a slice of a wider tensor of NaN."""
    wide = x.new_full((*x.shape[:-1], before + x.shape[-1] + after), float("nan"))
    wide[..., before : before + x.shape[-1]] = x
    return wide[..., before : before + x.shape[-1]]


def same_bits(actual: Tensor, expected: Tensor) -> None:
    assert actual.dtype == expected.dtype and actual.shape == expected.shape
    view = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[actual.element_size()]
    got, want = (x.contiguous().cpu().view(view) for x in (actual, expected))
    assert torch.equal(got, want), f"{(got != want).sum().item()} of {got.numel()} differ"


def quantized(x: Tensor, ue8m0: bool) -> tuple[Tensor, Tensor]:
    return reference.quantize_1x128(x.cpu(), ue8m0)


@dataclass(frozen=True)
class Case:
    num_tokens: int
    width: int
    dtype: torch.dtype = BF16
    ue8m0: bool = False


CORRECTNESS = [
    Case(1, HIDDEN),
    Case(515, HIDDEN),
    Case(64, 1536, ue8m0=True),
    Case(128, 2048, F32),
    Case(7, 18432),
]
CORNER = [Case(0, HIDDEN), Case(3, 1), Case(5, 300, F32, ue8m0=True)]


@pytest.mark.parametrize("case", CORRECTNESS + CORNER, ids=str)
def test_quantize_1x128_equals_its_twin_by_bits(case: Case) -> None:
    decades = torch.linspace(-8, 8, case.num_tokens + 1, device="cuda")[1:, None]
    x = inside((rand(case.num_tokens, case.width) * 10**decades).to(case.dtype))
    k_major = case.num_tokens % 2 == 1
    q, scale = quant.quantize_1x128(x, case.ue8m0, k_major)
    for got, want in zip((q, scale), quantized(x, case.ue8m0), strict=True):
        same_bits(got, want)
    assert scale.stride() == (1, -(-case.num_tokens // 4) * 4) if k_major else scale.is_contiguous()


def test_quantize_1x128_ue8m0_next_to_powers_of_two() -> None:
    largest = 448 * torch.exp2(torch.arange(-20.0, 60.0))
    largest = torch.cat((largest, torch.nextafter(largest, 2 * largest), largest * 0.99999994))
    x = torch.zeros(len(largest), 128)
    x[:, 17] = -largest
    for got, want in zip(quant.quantize_1x128(x.cuda(), True), quantized(x, True), strict=True):
        same_bits(got, want)


@pytest.mark.parametrize("shape", [(32768, 512), (3, 300, 200)], ids=str)
def test_dequantize_128x128_equals_its_twin_by_bits(shape: tuple[int, ...]) -> None:
    q = (rand(*shape, dtype=F32) * 100).to(torch.float8_e4m3fn)
    blocks = [-(-n // 128) for n in shape[-2:]]
    scale = torch.rand(*shape[:-2], *blocks, device="cuda")
    got = quant.dequantize_128x128(q, scale, BF16)
    same_bits(got, reference.dequantize_128x128(q, scale, BF16))


NORMS = [Case(1, HIDDEN), Case(515, HIDDEN), Case(64, 1536, ue8m0=True)]
NORM_CORNER = [Case(0, HIDDEN), Case(5, 1000, F32)]


@pytest.mark.parametrize("case", NORMS + NORM_CORNER, ids=str)
def test_norms_equal_their_twins(case: Case, close) -> None:
    shape = (case.num_tokens, case.width)
    x, residual = (inside(rand(*shape, dtype=case.dtype) * 3) for _ in range(2))
    weight, kind = rand(case.width, dtype=case.dtype), KIND[case.dtype]
    close(fused.rms_norm(x, weight, 1e-6), reference.rms_norm(x, weight, 1e-6), kind)
    normed, total = fused.add_rms_norm(x, residual, weight, 1e-6)
    want, want_total = reference.add_rms_norm(x, residual, weight, 1e-6)
    same_bits(total, want_total)
    close(normed, want, kind)
    q, scale, again, total = fused.add_rms_norm_quant(x, residual, weight, 1e-6, case.ue8m0, True)
    same_bits(total, want_total)
    close(again, normed, kind)
    if case.dtype == BF16:  # a float32 norm of another order of summation has other last bits
        for got, want in zip((q, scale), quantized(normed, case.ue8m0), strict=True):
            same_bits(got, want)
    if case.ue8m0:  # one more kernel to compile: once is enough
        same_bits(fused.rms_norm_quant(total, weight, 1e-6, True)[0], q)


@pytest.mark.parametrize("case", [Case(515, 2048), Case(3, 18432, ue8m0=True), Case(4, 5, F32)])
def test_silu_mul_equals_its_twin(case: Case, close) -> None:
    gate_up = inside(rand(case.num_tokens, 2 * case.width, dtype=case.dtype) * 4)
    active = fused.silu_mul(gate_up)
    close(active, reference.silu_mul(gate_up), KIND[case.dtype])
    for got, want in zip(
        fused.silu_mul_quant(gate_up, case.ue8m0), quantized(active, case.ue8m0), strict=True
    ):
        same_bits(got, want)


@pytest.mark.parametrize("lead", [(5, 128), (130, 16), (515,), (0, 4), (3, 20)], ids=str)
def test_apply_rope_of_slices_equals_its_twin(lead: tuple[int, ...], close) -> None:
    x, angle = inside(rand(*lead, 64), 128, 0), torch.rand(lead[0], 32, device="cuda") * 100
    cos, sin = angle.cos(), angle.sin()
    want = reference.apply_rope(x, cos, sin)
    close(fused.apply_rope(x, cos, sin), want, "bfloat16")
    q = torch.full((*lead, 576), float("nan"), device="cuda", dtype=BF16)
    fused.apply_rope(x, cos, sin, q[..., 512:])
    close(q[..., 512:], want, "bfloat16")
    assert q[..., :512].isnan().all()


def test_embedding_beyond_two_to_the_31_elements() -> None:
    weight = torch.empty(300_000, HIDDEN, device="cuda", dtype=BF16)
    ids = torch.tensor([299_999, 0, 299_999, 12345], device="cuda")
    weight[ids] = rand(4, HIDDEN)
    for dtype in (BF16, F32):
        same_bits(fused.embedding(weight, ids, dtype), weight[ids].to(dtype))


@pytest.mark.parametrize("num_tokens", [0, 1, 77])
@pytest.mark.parametrize(("width", "dtype"), [(HIDDEN, BF16), (1000, BF16), (300, F32)], ids=str)
def test_joined_equals_both_norms_apart(num_tokens: int, width: int, dtype, close) -> None:
    """By bits for DeepSeek-V3's width; others are summed in another order when apart."""
    weight, ids = rand(99, width), torch.randint(0, 99, (num_tokens + 1,), device="cuda")[1:]
    hidden, (enorm, hnorm) = inside(rand(num_tokens, width, dtype=dtype)), rand(2, width)
    got = fused.joined(weight, ids, enorm, hidden, hnorm, 1e-6, dtype)
    following = fused.rms_norm(fused.embedding(weight, ids, dtype), enorm, 1e-6)
    want = torch.cat((following, fused.rms_norm(hidden, hnorm, 1e-6)), dim=-1)
    close(got, want, KIND[dtype])
    if width == HIDDEN:
        same_bits(got, want)


@pytest.mark.parametrize("num_tokens", [0, 1, 77])
def test_latent_stores_write_named_slots_alone(num_tokens: int, close) -> None:
    kv_a, weight = inside(rand(num_tokens, 576)), rand(512)
    angle = torch.rand(num_tokens, 32, device="cuda") * 100
    slots = torch.randperm(50 * 64, device="cuda")[:num_tokens]
    cache, want = torch.full((2, 50, 64, 576), float("nan"), device="cuda", dtype=BF16)
    latent, k_pe = latent_store.norm_rope_store(
        kv_a, weight, 1e-6, angle.cos(), angle.sin(), cache, slots
    )
    close(latent, reference.rms_norm(kv_a[:, :512], weight, 1e-6), "bfloat16")
    close(k_pe, reference.apply_rope(kv_a[:, 512:], angle.cos(), angle.sin()), "bfloat16")
    reference.store_latent(want, latent, k_pe, slots)
    same_bits(cache, want)
    cache.fill_(float("nan"))
    latent_store.store_latent(cache, inside(latent), inside(k_pe), slots)
    same_bits(cache, want)


@pytest.mark.parametrize("width", [1536, 1000])
@pytest.mark.parametrize("cache_dtype", [BF16, torch.float8_e4m3fn])
@pytest.mark.parametrize("num_tokens", [0, 1, 77])
def test_norms_with_the_store_equal_both_apart(
    num_tokens: int, cache_dtype: torch.dtype, width: int, close
) -> None:
    """By bits for the query of DeepSeek-V3; others are summed in another order when apart."""
    down = inside(rand(num_tokens, width + 576))
    q_a, kv_a = down.split([width, 576], dim=1)
    weight, q_weight = rand(512), rand(width)
    angle = torch.rand(num_tokens, 32, device="cuda") * 100
    slots = torch.randperm(50 * 64, device="cuda")[:num_tokens]
    caches = [latent_cache(50, 64, 512, 64, cache_dtype, "cuda").fill_(255) for _ in range(2)]
    store = Store(kv_a, weight, 1e-6, angle.cos(), angle.sin(), caches[0], slots)
    want = latent_store.norm_rope_store(*store._replace(cache=caches[1]))
    q, *kv = latent_store.norms_rope_store(q_a, q_weight, store)
    apart = fused.rms_norm(q_a, q_weight, 1e-6)
    close(q, apart, "bfloat16")
    if width == 1536:
        same_bits(q, apart)
    for ue8m0 in (False, True):
        got = latent_store.norms_rope_store_quant(q_a, q_weight, store, ue8m0, not ue8m0)
        apart_quant = fused.rms_norm_quant(q_a, q_weight, 1e-6, ue8m0, not ue8m0)
        values, scale, *again = got
        if width == 1536:
            same_bits(values, apart_quant[0])
            same_bits(scale, apart_quant[1])
        close(values.float() * scale.repeat_interleave(128, 1)[:, :width], q.float(), "fp8")
        for a, b, c in zip(kv, again, want, strict=True):
            same_bits(a, c)
            same_bits(b, c)
    same_bits(*caches)


@pytest.mark.parametrize(
    "gate",
    [
        (256, 8, 4, 8, True, 2.5),
        (384, 1, 1, 8, True, 2.827),
        (64, 1, 1, 6, False, 2.446),
        (12, 3, 2, 5, True, 1.0),
        (8, 8, 3, 3, True, 1.0),
        (512, 8, 2, 16, True, 1.0),
    ],
    ids=str,
)
def test_moe_gate_chooses_what_its_twin_does(gate: tuple, close) -> None:
    """By the worth of the choice: the scores of two experts may differ in their last bit alone."""
    logits, bias = rand(300, gate[0], dtype=F32) * 2, rand(gate[0], dtype=F32) * 0.1 - 1
    ids, weights = moe_gate.moe_gate(logits, bias, *gate[1:])
    want_ids, want_weights = reference.moe_gate(logits, bias, *gate[1:])
    worth = logits.sigmoid() + bias
    close(worth.gather(1, ids), worth.gather(1, want_ids), "float32")
    close(weights, want_weights, "float32")
    assert (ids == want_ids).float().mean() > 0.99
    assert (ids.sort(dim=1).values.diff(dim=1) > 0).all(), "distinct experts"


@pytest.mark.parametrize("num_tokens", [0, 1, 16, 17, 33, 64, 65])
@pytest.mark.parametrize(
    ("n_experts", "width", "groups"), [(256, HIDDEN, (8, 4, 8)), (384, 1000, (1, 1, 8))], ids=str
)
def test_route_equals_the_gate_of_the_logits(
    num_tokens: int, n_experts: int, width: int, groups: tuple[int, int, int], close
) -> None:
    """By the worth of the choice, as above. Of 65 tokens the library makes the logits."""
    bias, x = rand(n_experts, dtype=F32) * 0.1, inside(rand(num_tokens, width))
    behind = torch.full((n_experts + 64, width), float("nan"), device="cuda", dtype=BF16)
    weight = behind[:n_experts].copy_(rand(n_experts, width) * 0.02)
    logits = (x.double() @ weight.double().t()).float()
    close(moe_gate.partial_logits(x, weight).sum(1), logits, "float32")
    ids, weights = moe_gate.moe_gate(moe_gate.gate_logits(x, weight), bias, *groups, True, 2.5)
    want_ids, want_weights = reference.moe_gate(logits, bias, *groups, True, 2.5)
    worth = logits.sigmoid() + bias
    close(worth.gather(1, ids), worth.gather(1, want_ids), "float32")
    close(weights, want_weights, "float32")
    again = moe_gate.moe_gate(moe_gate.gate_logits(x, weight), bias, *groups, True, 2.5)
    assert torch.equal(ids, again[0]) and torch.equal(weights, again[1])


def test_route_does_not_depend_on_the_other_tokens() -> None:
    x, weight, bias = rand(64, HIDDEN), rand(256, HIDDEN) * 0.02, rand(256, dtype=F32) * 0.1
    whole = moe_gate.moe_gate(moe_gate.gate_logits(x, weight), bias, 8, 4, 8, True, 2.5)
    for span in (slice(3, 4), slice(10, 40)):
        few = moe_gate.moe_gate(moe_gate.gate_logits(x[span], weight), bias, 8, 4, 8, True, 2.5)
        assert torch.equal(few[0], whole[0][span]) and torch.equal(few[1], whole[1][span])


def test_moe_gate_ties_go_to_the_lowest_index() -> None:
    bias, logits = torch.zeros(256, device="cuda"), torch.zeros(4, 256, device="cuda")
    logits[1, 100:110] = 1.0
    logits[2] = float("nan")
    logits[3] = float("-inf")
    ids, _ = moe_gate.moe_gate(logits, bias, 8, 4, 8, True, 2.5)
    first = list(range(8))
    assert ids.tolist() == [first, list(range(100, 108)), first, first]


@pytest.mark.parametrize("n_experts", [256, 384])
@pytest.mark.parametrize("num_tokens", [0, 1, 64, 1000])
def test_permute_by_expert_equals_its_twin(num_tokens: int, n_experts: int) -> None:
    ids = torch.rand(num_tokens, n_experts, device="cuda").argsort(dim=1)[:, :8].contiguous()
    for topk_ids in (ids, torch.full_like(ids, n_experts - 1), ids % 3):
        for first, count in ((0, n_experts), (32, 96)):
            order, offsets, place = moe_route.permute_by_expert(topk_ids, count, first)
            want_order, want, want_place = reference.permute_by_expert(topk_ids, count, first)
            used = int(offsets[-1])
            assert torch.equal(order[:used], want_order[:used])
            assert torch.equal(offsets, want) and torch.equal(place, want_place)


@pytest.mark.parametrize("case", [Case(130, HIDDEN), Case(0, HIDDEN), Case(5, 1000)], ids=str)
def test_gather_equals_its_twin(case: Case) -> None:
    x = inside(rand(case.num_tokens, case.width, dtype=case.dtype))
    ids = torch.rand(case.num_tokens, 256, device="cuda").argsort(dim=1)[:, :8].contiguous()
    order, offsets, _ = reference.permute_by_expert(ids, 100, 30)
    used = int(offsets[-1])
    token = order[:used] // 8
    order[used:] = 1 << 40  # is never followed
    same_bits(moe_route.gather_rows(x, order, offsets, 8)[:used], x[token])
    q, scale = quant.quantize_1x128(x, scale_k_major=True)
    for k_major in (False, True):
        rows, scales = moe_route.gather_quantized(q, scale, order, offsets, 8, k_major)
        same_bits(rows[:used].view(torch.uint8), q.view(torch.uint8)[token])
        same_bits(scales[:used], scale[token])


@pytest.mark.parametrize("case", [Case(130, HIDDEN), Case(0, HIDDEN), Case(5, 1000, F32)], ids=str)
def test_combine_experts_equals_its_twin(case: Case, close) -> None:
    y = inside(rand(8 * case.num_tokens, case.width, dtype=case.dtype))
    place = torch.randperm(8 * case.num_tokens, device="cuda")
    place[::5] = -1
    weights = torch.rand(case.num_tokens, 8, device="cuda")
    shared = rand(case.num_tokens, case.width, dtype=case.dtype)
    want, kind = reference.combine_experts(y, place, weights), KIND[case.dtype]
    close(moe_route.combine_experts(y, place, weights), want, kind)
    close(moe_route.combine_experts(y, place, weights, shared), want + shared, kind)


Op = Callable[..., Tensor | tuple[Tensor, ...] | None]


def graph_ops() -> dict[str, tuple[Op, Callable[[], tuple[Tensor, ...]]]]:
    """Name -> the op, and fresh inputs for it; an op that writes in place returns what it wrote."""
    bias = torch.zeros(256, device="cuda")
    weight, w64, gate_weight = rand(HIDDEN), rand(512), rand(256, HIDDEN) * 0.02

    def ints(high: int, *shape: int) -> Tensor:
        return torch.randint(0, high, shape, device="cuda")

    def rows(width: int) -> Callable[[], tuple[Tensor, ...]]:
        return lambda: (rand(16, width),)

    def store(kv_a: Tensor, cos: Tensor, sin: Tensor, slots: Tensor) -> tuple[Tensor, ...]:
        cache = torch.zeros(4, 64, 576, device="cuda", dtype=BF16)
        both = latent_store.norm_rope_store(kv_a, w64, 1e-6, cos, sin, cache, slots)
        latent_store.store_latent(cache, *both, 255 - slots)
        return cache, *both

    def norms_store(down: Tensor, cos: Tensor, sin: Tensor, slots: Tensor) -> tuple[Tensor, ...]:
        cache = torch.zeros(4, 64, 576, device="cuda", dtype=BF16)
        q_a, kv_a = down.split([1536, 576], dim=1)
        stores = Store(kv_a, w64, 1e-6, cos, sin, cache, slots)
        found = latent_store.norms_rope_store_quant(q_a, weight[:1536], stores)
        return cache, *found

    def route(scores: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        ids, weights = moe_gate.moe_gate(scores, bias, 8, 4, 8, True, 2.5)
        order, offsets, place = moe_route.permute_by_expert(ids, 256)
        rows = moe_route.gather_rows(y, order, offsets, 8)[: len(y)]
        return ids, weights, order, offsets, moe_route.combine_experts(rows, place, weights)

    def route_few(x: Tensor) -> tuple[Tensor, ...]:
        return moe_gate.moe_gate(moe_gate.gate_logits(x, gate_weight), bias, 8, 4, 8, True, 2.5)

    def angles() -> tuple[Tensor, Tensor]:
        return torch.rand(16, 32, device="cuda"), torch.rand(16, 32, device="cuda")

    return {
        "quantize": (lambda x: quant.quantize_1x128(x), rows(HIDDEN)),
        "norm": (lambda x: fused.rms_norm(x, weight, 1e-6), rows(HIDDEN)),
        "add_norm_quant": (
            lambda x, y: fused.add_rms_norm_quant(x, y, weight, 1e-6),
            lambda: (rand(16, HIDDEN), rand(16, HIDDEN)),
        ),
        "silu": (lambda x: (fused.silu_mul(x), *fused.silu_mul_quant(x)), rows(4096)),
        "rope": (fused.apply_rope, lambda: (rand(16, 20, 64), *angles())),
        "embedding": (
            lambda i: fused.embedding(weight.view(-1, 64), i, BF16),
            lambda: (ints(99, 7),),
        ),
        "joined": (
            lambda i, x: fused.joined(weight.view(-1, 64), i, w64[:64], x, w64[64:128], 1e-6, BF16),
            lambda: (ints(99, 7), rand(7, 64)),
        ),
        "store": (
            store,
            lambda: (rand(16, 576), *angles(), torch.randperm(128, device="cuda")[:16]),
        ),
        "norms_store": (
            norms_store,
            lambda: (rand(16, 2112), *angles(), torch.randperm(128, device="cuda")[:16]),
        ),
        "route_few": (route_few, rows(HIDDEN)),
        "route": (route, lambda: (rand(16, 256, dtype=F32), rand(128, HIDDEN))),
    }


OP_NAMES = ["quantize", "norm", "add_norm_quant", "silu", "rope", "embedding", "store"]
OP_NAMES += ["joined", "norms_store", "route_few", "route"]


@pytest.mark.parametrize("name", OP_NAMES)
def test_replayed_graph_with_changed_inputs_equals_eager(name: str) -> None:
    op, make = graph_ops()[name]
    inputs = make()
    op(*inputs)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = op(*inputs)
    for _ in range(2):
        for static, fresh in zip(inputs, make(), strict=True):
            static.copy_(fresh)
        graph.replay()
        eager = op(*inputs)
        pairs = (
            [(captured, eager)] if isinstance(eager, Tensor) else zip(captured, eager, strict=True)
        )
        for got, want in pairs:
            assert torch.equal(got.view(torch.uint8), want.view(torch.uint8))
