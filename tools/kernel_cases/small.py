"""Norms, activation, rope and routing at DeepSeek-V3's sizes, for decode and for
prefill. No peers were measured."""

from collections.abc import Callable

import torch
from torch import Tensor

from ...kernels import fused, latent, latent_store, moe_dispatch, moe_gate, moe_route, quant
from . import BenchCase, Run, rotation

BF16 = torch.bfloat16
TOKENS = (1, 64, 4096)
HIDDEN, EXPERTS, TOP_K = 7168, 256, 8
Build = Callable[[int], Run]
"""Told how many sets to make."""


def rand(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
    return torch.randn(shape, device="cuda", dtype=torch.float32).to(dtype)


def case(name: str, num_bytes: int, build: Build) -> BenchCase:
    rotate = rotation(num_bytes)
    return BenchCase(name, lambda: build(rotate), num_bytes, 0, "none", rotate)


def quantize_case(m: int, k: int) -> BenchCase:
    def build(sets: int) -> Run:
        xs = [rand(m, k) for _ in range(sets)]
        return lambda i: quant.quantize_1x128(xs[i], scale_k_major=True)

    return case(f"quantize_1x128 m={m} k={k}", m * k * 3 + m * k // 32, build)


def norm_case(m: int, quantized: bool) -> BenchCase:
    def build(sets: int) -> Run:
        weight = rand(HIDDEN)
        xs = [(rand(m, HIDDEN), rand(m, HIDDEN)) for _ in range(sets)]
        op = fused.add_rms_norm_quant if quantized else fused.add_rms_norm
        return lambda i: op(*xs[i], weight, 1e-6)

    name = "add_rms_norm_quant" if quantized else "add_rms_norm"
    return case(f"{name} m={m}", m * HIDDEN * (9 if quantized else 8), build)


def silu_case(m: int, n: int) -> BenchCase:
    def build(sets: int) -> Run:
        xs = [rand(m, 2 * n) for _ in range(sets)]
        return lambda i: fused.silu_mul_quant(xs[i], scale_k_major=True)

    return case(f"silu_mul_quant m={m} n={n}", m * n * 5, build)


def rope_case(m: int, heads: int) -> BenchCase:
    def build(sets: int) -> Run:
        angle = torch.rand(m, 32, device="cuda")
        cos, sin = angle.cos(), angle.sin()
        xs = [rand(m, heads, 192)[..., 128:] for _ in range(sets)]
        return lambda i: fused.apply_rope(xs[i], cos, sin)

    return case(f"apply_rope m={m} heads={heads}", m * heads * 64 * 4, build)


def store_case(m: int, dtype: torch.dtype) -> BenchCase:
    def build(sets: int) -> Run:
        weight, angle = rand(512), torch.rand(m, 32, device="cuda")
        cos, sin, slots = angle.cos(), angle.sin(), torch.randperm(m, device="cuda")
        shape = (-(-m // 64), 64, 512, 64, dtype, "cuda")
        xs = [(rand(m, 576), latent.latent_cache(*shape)) for _ in range(sets)]
        return lambda i: latent_store.norm_rope_store(
            xs[i][0], weight, 1e-6, cos, sin, xs[i][1], slots
        )

    name = f"norm_rope_store{' fp8' if dtype == torch.float8_e4m3fn else ''} m={m}"
    return case(name, m * (576 * 4 + latent.entry_bytes(512, 64, dtype)), build)


def gate_case(m: int) -> BenchCase:
    def build(sets: int) -> Run:
        bias = torch.zeros(EXPERTS, device="cuda")
        logits = [rand(m, EXPERTS, dtype=torch.float32) for _ in range(sets)]
        return lambda i: moe_gate.moe_gate(logits[i], bias, 8, 4, TOP_K, True, 2.5)

    return case(f"moe_gate m={m}", m * (EXPERTS * 4 + TOP_K * 12), build)


def route_case(m: int) -> BenchCase:
    """The gate's linear map and the choice."""

    def build(sets: int) -> Run:
        bias, x = torch.zeros(EXPERTS, device="cuda"), rand(m, HIDDEN)
        weights = [rand(EXPERTS, HIDDEN) for _ in range(sets)]
        return lambda i: moe_gate.moe_gate(
            moe_gate.gate_logits(x, weights[i]), bias, 8, 4, TOP_K, True, 2.5
        )

    return case(f"gate_logits, moe_gate m={m}", 2 * HIDDEN * (EXPERTS + m) + m * TOP_K * 12, build)


def permute_case(m: int) -> BenchCase:
    def build(sets: int) -> Run:
        ids = [torch.randint(0, EXPERTS, (m, TOP_K), device="cuda") for _ in range(sets)]
        return lambda i: moe_route.permute_by_expert(ids[i], EXPERTS)

    return case(f"permute_by_expert m={m}", m * TOP_K * 24, build)


def dispatch_case(m: int) -> BenchCase:
    def build(sets: int) -> Run:
        ids = [torch.rand(m, EXPERTS, device="cuda").topk(TOP_K).indices for _ in range(sets)]
        xs = [quant.quantize_1x128(rand(m, HIDDEN), scale_k_major=True) for _ in range(sets)]
        return lambda i: moe_dispatch.dispatch(*xs[i], ids[i], EXPERTS)

    return case(f"dispatch m={m}", m * HIDDEN * (TOP_K + 1), build)


def dispatched_silu_case(m: int, n: int) -> BenchCase:
    def build(sets: int) -> Run:
        ids = torch.rand(m, EXPERTS, device="cuda").topk(TOP_K).indices
        x = quant.quantize_1x128(rand(m, HIDDEN), scale_k_major=True)
        tiles = moe_dispatch.dispatch(*x, ids, EXPERTS).tiles
        xs = [rand(m * TOP_K, 2 * n) for _ in range(sets)]
        return lambda i: moe_dispatch.silu_mul_dispatched(xs[i], tiles)

    return case(f"silu_mul_dispatched m={m} n={n}", m * TOP_K * n * 5, build)


def combine_case(m: int) -> BenchCase:
    def build(sets: int) -> Run:
        place, weights = torch.randperm(m * TOP_K, device="cuda"), torch.rand(m, TOP_K).cuda()
        ys = [rand(m * TOP_K, HIDDEN) for _ in range(sets)]
        return lambda i: moe_route.combine_experts(ys[i], place, weights)

    return case(f"combine_experts m={m}", m * HIDDEN * 2 * (TOP_K + 1), build)


def cases() -> list[BenchCase]:
    found = [silu_case(64, 18432)]
    for m in (1, 16, 64, 128):
        found += [dispatch_case(m), dispatched_silu_case(m, 2048)]
    for m in TOKENS:
        found += [quantize_case(m, HIDDEN), norm_case(m, False), norm_case(m, True)]
        found += [silu_case(m, 2048), rope_case(m, 128), store_case(m, BF16)]
        found += [store_case(m, torch.float8_e4m3fn)]
        found += [gate_case(m), route_case(m), permute_case(m), combine_case(m)]
    return found
