"""Attention: FlashMLA's decode cases of ANCHORS.md section 3, and prefill as V3 does it."""

import torch
from torch import Tensor

from ...kernels import latent, mla
from . import BenchCase, Run, rotation

RANK, ROPE, BLOCK = 512, 64, 64
SCALE = 192**-0.5
BF16, FP8 = torch.bfloat16, torch.float8_e4m3fn
PEER_US = {
    (128, 1): (13.9, 19.6, 35.7, 23.4, 46.5, 131.7, 41.3, 128.7, 524.6, 82.0, 252.6, 1020.7),
    (128, 2): (14.8, 20.8, 44.4, 35.3, 66.9, 222.3, 72.5, 221.7, 871.9, 144.2, 449.2, 1744.0),
    (16, 1): (12.3, 22.9, 41.2, 17.3, 36.5, 114.0, 37.5, 113.0, 416.5, 58.2, 212.4, 819.9),
    (16, 2): (12.1, 23.3, 41.8, 18.1, 37.3, 113.5, 40.6, 115.0, 426.5, 59.8, 213.9, 853.2),
}
"""FlashMLA's microseconds by (heads, query_len), in the order of SHAPES."""
SHAPES = [(batch, length) for batch in (1, 16, 64, 128) for length in (1024, 4096, 16384)]
FP8_SHAPES = [(batch, length) for batch in (1, 16, 64) for length in (1024, 4096, 8192)]
PREFILL = [(4096, 4096, True), (1024, 4096, True), (2048, 1024, False)]


def cases() -> list[BenchCase]:
    decode = [
        _decode(heads, query_len, batch, length, peer_us)
        for (heads, query_len), times in PEER_US.items()
        for (batch, length), peer_us in zip(SHAPES, times, strict=True)
    ]
    for heads, query_len in ((16, 1), (16, 2), (32, 1), (64, 1), (128, 1), (128, 2)):
        decode += [_decode(heads, query_len, *shape, None, FP8) for shape in FP8_SHAPES]
    small = [_merge(2048), _gather(1024, BF16), _gather(1024, FP8)]
    return decode + [_prefill(*shape) for shape in PREFILL] + small


def _random_cache(num_blocks: int, dtype: torch.dtype) -> Tensor:
    cache = latent.latent_cache(num_blocks, BLOCK, RANK, ROPE, dtype, "cuda")
    if dtype != FP8:
        return cache.normal_()
    value, rope, scale = latent.planes(cache, RANK)
    value.copy_((torch.randn(value.shape, dtype=BF16, device="cuda") * 100).clamp(-448, 448))
    rope.copy_(torch.randn(rope.shape, dtype=BF16, device="cuda"))
    scale.uniform_(0.005, 0.02)
    return cache


def _decode(
    heads: int,
    query_len: int,
    batch: int,
    length: int,
    peer_us: float | None,
    dtype: torch.dtype = BF16,
) -> BenchCase:
    """The schedule is made outside of the timing, as FlashMLA's is: once a step, for all layers.
    dtype: of the cache."""
    width, rows = RANK + ROPE, batch * query_len * heads
    cache_bytes = batch * length * latent.entry_bytes(RANK, ROPE, dtype)
    rotate = rotation(cache_bytes)

    def build() -> Run:
        blocks = batch * length // BLOCK
        cache = [_random_cache(blocks, dtype) for _ in range(rotate)]
        shape = (batch, query_len, heads, width) if query_len > 1 else (batch, heads, width)
        q = torch.randn(rotate, *shape, dtype=BF16, device="cuda")
        order = [torch.randperm(blocks, device="cuda").int() for _ in range(rotate)]
        tables = [pages.view(batch, -1) for pages in order]
        lens = torch.full((batch,), length, dtype=torch.int32, device="cuda")
        schedule = mla.decode_schedule(q[0], cache[0], tables[0], lens, RANK)
        return lambda i: mla.mla_decode(q[i], cache[i], tables[i], lens, RANK, SCALE, schedule)

    kind = "fp8 " if dtype == FP8 else ""
    return BenchCase(
        name=f"mla_decode {kind}h={heads} sq={query_len} b={batch} k={length}",
        build=build,
        bytes=cache_bytes + rows * (width + RANK) * 2,
        flops=2 * rows * length * (width + RANK),
        flop_kind="bf16",
        rotate=rotate,
        peer_us=peer_us,
    )


def _prefill(num_q: int, num_k: int, causal: bool, heads: int = 128) -> BenchCase:
    pairs = num_q * num_k - (num_q * (num_q - 1) // 2 if causal else 0)

    def build() -> Run:
        q = torch.randn(num_q, heads, 192, dtype=BF16, device="cuda")
        kv = torch.randn(num_k, heads, 320, dtype=BF16, device="cuda")
        k, v = kv.split([192, 128], dim=-1)
        return lambda _: mla.mla_prefill(q, k, v, SCALE, causal)

    return BenchCase(
        name=f"mla_prefill h={heads} q={num_q} k={num_k} {'causal' if causal else 'full'}",
        build=build,
        bytes=heads * (num_q * (192 + 128) + num_k * 320) * 2,
        flops=2 * heads * pairs * (192 + 128),
        flop_kind="bf16",
    )


def _merge(num_tokens: int, heads: int = 128, width: int = 128) -> BenchCase:
    num_bytes = num_tokens * heads * (3 * width * 2 + 3 * 4)
    rotate = rotation(num_bytes)

    def build() -> Run:
        a, b = torch.randn(2, rotate, num_tokens, heads, width, dtype=BF16, device="cuda")
        x, y = torch.randn(2, rotate, heads, num_tokens, device="cuda")
        return lambda i: mla.merge_attention(a[i], x[i], b[i], y[i])

    return BenchCase(f"merge_attention t={num_tokens}", build, num_bytes, 0, "none", rotate)


def _gather(num_tokens: int, dtype: torch.dtype) -> BenchCase:
    num_blocks = 4096

    def build() -> Run:
        cache = _random_cache(num_blocks, dtype)
        table = torch.randperm(num_blocks, device="cuda").int().view(64, -1)
        return lambda i: mla.gather_latent(cache, table[i], 0, num_tokens, RANK, BF16)

    num_bytes = num_tokens * (latent.entry_bytes(RANK, ROPE, dtype) + 2 * (RANK + ROPE))
    name = f"gather_latent{' fp8' if dtype == FP8 else ''} t={num_tokens}"
    return BenchCase(name, build, num_bytes, 0, "none", 32)
