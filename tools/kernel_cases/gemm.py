"""GEMMs of DeepSeek-V3. The peer is DeepGEMM; activations are quantised beforehand, as there."""

import torch
from torch import Tensor

from ...kernels import moe_gemm
from ...kernels.bf16_gemm import gemm_nt
from ...kernels.gemm import fp8_gemm_nt, linear
from . import BenchCase, Run, rotation

BF16, FP8 = torch.bfloat16, torch.float8_e4m3fn
TOKENS = (1, 16, 64, 128, 512, 4096)
DENSE = {
    (2112, 7168): (13.3, 10.6, 9.8, 10.5, 15.3, 102.7),
    (24576, 1536): (18.0, 18.4, 17.7, 19.6, 36.6, 253.3),
    (7168, 16384): (44.7, 46.0, 45.9, 46.9, 127.1, 675.0),
    (4096, 7168): (15.0, 13.9, 14.0, 14.2, 25.0, 180.5),
    (7168, 2048): (8.7, 8.4, 8.4, 9.5, 18.4, 99.6),
    (36864, 7168): (92.9, 93.9, 95.7, 99.2, 235.9, 1539.5),
    (7168, 18432): (51.6, 49.8, 51.4, 51.5, 135.2, 783.0),
}
"""(N, K) -> DeepGEMM's us for each of TOKENS: ANCHORS.md, 2a."""
SHARED_BY_8 = [(3072, 1536), (4608, 7168), (7168, 2304), (512, 7168), (7168, 256), (32768, 512)]
"""(N, K) under tensor parallelism of 8, and kv_b; no peer was measured."""
CONTIGUOUS = {
    (4096, 7168): {1024: 378.3, 4096: 1524.3},
    (7168, 2048): {1024: 217.2, 4096: 824.3},
}
"""(N, K) -> rows of each of 8 experts -> DeepGEMM's us: ANCHORS.md, 2b."""
MASKED = {
    (4096, 7168): {4: 336.4, 16: 335.5, 64: 359.1, 128: 382.8},
    (7168, 2048): {4: 180.2, 16: 179.1, 64: 181.1, 128: 207.9},
}
"""(N, K) -> about so many rows of each of 32 experts -> DeepGEMM's us."""
SLOT_ROWS = 256


def random_fp8(*shape: int) -> Tensor:
    """Random data: zeros draw less power and run faster."""
    return torch.randn(shape, device="cuda", dtype=BF16).to(FP8)


def random_scale(*shape: int) -> Tensor:
    return torch.rand(shape, device="cuda") * 1e-2 + 1e-3


def k_major_scale(m: int, k: int) -> Tensor:
    return random_scale(-(-k // 128), -(-m // 4) * 4).t()[:m]


def dense_case(m: int, n: int, k: int, peer_us: float | None = None) -> BenchCase:
    rotate = rotation(n * k)

    def build() -> Run:
        x, x_scale = random_fp8(m, k), k_major_scale(m, k)
        ws = [random_fp8(n, k) for _ in range(rotate)]
        w_scale = random_scale(-(-n // 128), -(-k // 128))
        return lambda i: fp8_gemm_nt(x, x_scale, ws[i], w_scale, BF16)

    num_bytes = n * k + m * k + 2 * m * n
    name = f"dense m={m} n={n} k={k}"
    return BenchCase(name, build, num_bytes, 2 * m * n * k, "fp8", rotate, peer_us)


def linear_case(m: int, n: int, k: int) -> BenchCase:
    """With the quantisation of the activations."""
    rotate = rotation(n * k)

    def build() -> Run:
        x = torch.randn(m, k, device="cuda", dtype=BF16)
        ws = [random_fp8(n, k) for _ in range(rotate)]
        w_scale = random_scale(-(-n // 128), -(-k // 128))
        return lambda i: linear(x, ws[i], w_scale, act_quant=True)

    num_bytes = n * k + 2 * m * k + 2 * m * n
    return BenchCase(f"linear m={m} n={n} k={k}", build, num_bytes, 2 * m * n * k, "fp8", rotate)


def contiguous_case(m: int, n: int, k: int, peer_us: float | None, experts: int = 8) -> BenchCase:
    rows = experts * m

    def build() -> Run:
        x, x_scale, w = random_fp8(rows, k), k_major_scale(rows, k), random_fp8(experts, n, k)
        w_scale = random_scale(experts, -(-n // 128), -(-k // 128))
        offsets = torch.arange(1, experts + 1, device="cuda") * m
        out = torch.empty(rows, n, device="cuda", dtype=BF16)
        run = moe_gemm.grouped_fp8_gemm_nt_contiguous
        return lambda i: run(x, x_scale, w, w_scale, offsets, out)

    num_bytes = experts * n * k + rows * k + 2 * rows * n
    name = f"contiguous e={experts} m={m} n={n} k={k}"
    return BenchCase(name, build, num_bytes, 2 * rows * n * k, "fp8", 1, peer_us)


def masked_case(m: int, n: int, k: int, peer_us: float | None, quantised: bool) -> BenchCase:
    experts = 32
    # Between 0.7 and 1.3 of m, the same every time.
    counts = [max(1, round(m * (0.7 + 0.6 * (e * 7 % 32) / 31))) for e in range(experts)]
    rows = sum(counts)

    def build() -> Run:
        sizes = torch.tensor(counts, device="cuda", dtype=torch.int32)
        out = torch.empty(experts, SLOT_ROWS, n, device="cuda", dtype=BF16)
        if not quantised:
            x = torch.randn(experts, SLOT_ROWS, k, device="cuda", dtype=BF16)
            w = torch.randn(experts, n, k, device="cuda", dtype=BF16)
            return lambda i: moe_gemm.grouped_gemm_nt_masked(x, w, sizes, out, m)
        x, w = random_fp8(experts, SLOT_ROWS, k), random_fp8(experts, n, k)
        x_scale = k_major_scale(experts * SLOT_ROWS, k).unflatten(0, (experts, SLOT_ROWS))
        w_scale = random_scale(experts, -(-n // 128), -(-k // 128))
        run = moe_gemm.grouped_fp8_gemm_nt_masked
        return lambda i: run(x, x_scale, w, w_scale, sizes, out, m)

    size = 1 if quantised else 2
    num_bytes = size * (experts * n * k + rows * k) + 2 * rows * n
    name = f"masked {'fp8' if quantised else 'bf16'} e={experts} m~{m} n={n} k={k}"
    kind = "fp8" if quantised else "bf16"
    return BenchCase(name, build, num_bytes, 2 * rows * n * k, kind, 1, peer_us)


def gate_case(m: int) -> BenchCase:
    """Logits of the router: float32, 256 experts."""
    n, k = 256, 7168

    def build() -> Run:
        x, w = torch.randn(m, k, device="cuda"), torch.randn(n, k, device="cuda")
        return lambda i: gemm_nt(x, w)

    return BenchCase(f"gate float32 m={m}", build, 4 * (n * k + m * k + m * n), 0, "none")


def cases() -> list[BenchCase]:
    found = []
    for (n, k), peers in DENSE.items():
        found += [dense_case(m, n, k, us) for m, us in zip(TOKENS, peers, strict=True)]
    for n, k in SHARED_BY_8:
        found += [dense_case(m, n, k) for m in TOKENS]
    found += [linear_case(m, 4096, 7168) for m in (1, 64, 4096)]
    for (n, k), by_rows in CONTIGUOUS.items():
        found += [contiguous_case(m, n, k, us) for m, us in by_rows.items()]
    for (n, k), by_rows in MASKED.items():
        found += [masked_case(m, n, k, us, True) for m, us in by_rows.items()]
    found += [contiguous_case(m, 512, 7168, None, experts=256) for m in (1, 4, 16)]
    found += [contiguous_case(m, 7168, 256, None, experts=256) for m in (1, 4, 16)]
    found += [masked_case(m, 4096, 7168, None, False) for m in (4, 64)]
    return found + [gate_case(m) for m in (1, 128, 4096)]
