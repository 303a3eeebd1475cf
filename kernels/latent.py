"""How the latent cache lies in memory: one tensor a layer, its first dimension is blocks.

float32, bf16, fp16: [num_blocks, block_size, R + P], for each token its latent and its rope part.

fp8: [num_blocks, block_size, entry bytes] uint8, and the bytes of a block lie by kind, so that TMA
and 16-byte loads find rows of even width:

    | scale: [block_size] float32 | rope: [block_size, P] fp16 | value: [block_size, R] e4m3 | pad |

A latent is value * scale of its token; the rope part is not quantised. It is fp16, not bf16: the
tensor cores multiply the values as fp16, to which Hopper converts e4m3 in one instruction for two
(for bf16 it takes four times as many), and fp16 holds every bf16 from 2^-14 to 65504 exactly.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

F16_MAX = 65504.0
"""Rope parts beyond it are clamped."""


def is_fp8(cache: Tensor) -> bool:
    return cache.dtype == torch.uint8


def fp8_entry_bytes(kv_lora_rank: int, rope_dim: int) -> int:
    """Of one token in one layer: 644 for DeepSeek-V3. A multiple of 4, as scales need it."""
    assert rope_dim % 2 == 0, rope_dim
    return 4 + 2 * rope_dim + -(-kv_lora_rank // 4) * 4


def entry_bytes(kv_lora_rank: int, rope_dim: int, dtype: torch.dtype) -> int:
    """The same for a cache of any dtype; fp8 is float8_e4m3fn."""
    if dtype == torch.float8_e4m3fn:
        return fp8_entry_bytes(kv_lora_rank, rope_dim)
    return (kv_lora_rank + rope_dim) * dtype.itemsize


def latent_cache(
    num_blocks: int,
    block_size: int,
    kv_lora_rank: int,
    rope_dim: int,
    dtype: torch.dtype,
    device: torch.device | str,
) -> Tensor:
    """One layer's cache, not initialised. dtype: of the entries; float8_e4m3fn gives the layout
    above in uint8."""
    if dtype == torch.float8_e4m3fn:
        width, dtype = fp8_entry_bytes(kv_lora_rank, rope_dim), torch.uint8
    else:
        width = kv_lora_rank + rope_dim
    return torch.empty(num_blocks, block_size, width, dtype=dtype, device=device)


def rope_width(cache: Tensor, kv_lora_rank: int) -> int:
    """P of a cache of either kind."""
    if not is_fp8(cache):
        return cache.shape[-1] - kv_lora_rank
    return (cache.shape[-1] - fp8_entry_bytes(kv_lora_rank, 0)) // 2


def holds(cache: Tensor, kv_lora_rank: int, rope_dim: int) -> bool:
    """Whether entries of these widths are what the cache was made for."""
    if is_fp8(cache):
        return cache.shape[-1] == fp8_entry_bytes(kv_lora_rank, rope_dim)
    return cache.shape[-1] == kv_lora_rank + rope_dim


def planes(cache: Tensor, kv_lora_rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Views of an fp8 cache: value [num_blocks, block_size, R] float8_e4m3fn, rope [num_blocks,
    block_size, P] float16, scale [num_blocks, block_size] float32."""
    num_blocks, block_size, width = cache.shape
    rope_dim = rope_width(cache, kv_lora_rank)
    sizes = [4 * block_size, 2 * rope_dim * block_size, kv_lora_rank * block_size]
    sizes.append(width * block_size - sum(sizes))
    scale, rope, value, _ = cache.view(num_blocks, -1).split(sizes, dim=1)
    return (
        value.view(torch.float8_e4m3fn).unflatten(1, (block_size, kv_lora_rank)),
        rope.view(torch.float16).unflatten(1, (block_size, rope_dim)),
        scale.view(torch.float32),
    )


def as_words(cache: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The whole fp8 cache as e4m3, fp16 and float32, for kernels that compute addresses."""
    return cache.view(torch.float8_e4m3fn), cache.view(torch.float16), cache.view(torch.float32)


@triton.jit
def scale_at(page, slot, BLOCK_SIZE: tl.constexpr, ENTRY: tl.constexpr):
    """Index in float32 words of the scale of a block's slot. page: int64. ENTRY: entry bytes."""
    return page * (BLOCK_SIZE * ENTRY // 4) + slot


@triton.jit
def rope_at(page, slot, P: tl.constexpr, BLOCK_SIZE: tl.constexpr, ENTRY: tl.constexpr):
    """Index in 16-bit words where a slot's rope part begins."""
    return page * (BLOCK_SIZE * ENTRY // 2) + (2 * BLOCK_SIZE + slot * P)


@triton.jit
def value_at(
    page, slot, R: tl.constexpr, P: tl.constexpr, BLOCK_SIZE: tl.constexpr, ENTRY: tl.constexpr
):  # fmt: skip
    """Index in bytes where a slot's values begin."""
    return page * (BLOCK_SIZE * ENTRY) + ((4 + 2 * P) * BLOCK_SIZE + slot * R)


@triton.jit
def half_of_e4m3(x, NATIVE: tl.constexpr):
    """x: float8_e4m3fn, or where a card does not know it (not NATIVE) the bytes -> fp16, exactly.
    By hand: the exponent's bias is 7 there and 15 here; NaN becomes 480."""
    if NATIVE:
        return x.to(tl.float16)
    else:  # noqa: RET505  Triton compiles what follows a return, but not the other branch
        wide = x.to(tl.uint16)
        bits = ((wide & 0x80) << 8) | ((wide & 0x7F) << 7)
        return bits.to(tl.float16, bitcast=True) * 256.0
