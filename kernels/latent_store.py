"""What becomes of the down projection: the latent is normed, the rope part rotated, and both go to
the paged cache; what queries are made of is normed by the same launch.

Arithmetic is that of `fused.py`, and so are the twins.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor, float32

from . import fused, reference
from .compat import has_fp8, overlap, runs_kernels, wait_previous
from .fused import load_angles, rms_weighted, rotate_pairs
from .latent import as_words, holds, is_fp8, rope_at, scale_at, value_at
from .quant import empty_scale, store_quantized

WARPS = 4
"""With or without a query, so that a latent's sum has one order; and as `fused.norm_warps` says
for the query's 1,536 of DeepSeek-V3."""


def store_latent(cache: Tensor, kv_latent: Tensor, k_pe: Tensor, slot_mapping: Tensor) -> None:
    """Writes latents into the paged cache; the model does so by `norm_rope_store`, tests by this.

    cache: of either kind that `latent.py` knows, contiguous; slots that are not named stay as they
    are; an fp8 one gets the latent with a scale for each token, and k_pe as fp16
    kv_latent: [T, R] (normed), k_pe: [T, P] (rotated)
    slot_mapping: [T] int64, block * block_size + offset; the slots of block 0 may repeat
    """
    rank, rope = kv_latent.shape[1], k_pe.shape[1]
    assert cache.is_contiguous() and holds(cache, rank, rope), (cache.shape, rank, rope)
    assert slot_mapping.shape == kv_latent.shape[:1], (slot_mapping.shape, kv_latent.shape)
    if not stores_by_kernel(cache):
        reference.store_latent(cache, kv_latent, k_pe, slot_mapping)
        return
    assert kv_latent.stride(1) == 1 and k_pe.stride(1) == 1, (kv_latent.stride(), k_pe.stride())
    assert slot_mapping.is_contiguous(), slot_mapping.stride()
    _store_latent[kv_latent.shape[:1]](
        *cache_words(cache), kv_latent, k_pe, slot_mapping, kv_latent.stride(0), k_pe.stride(0),
        RANK=rank, ROPE=rope, RANK_BLOCK=triton.next_power_of_2(rank),
        ROPE_BLOCK=triton.next_power_of_2(rope), BLOCK_SIZE=cache.shape[1], ENTRY=cache.shape[2],
        FP8=is_fp8(cache), num_warps=2
    )  # fmt: skip


def stores_by_kernel(cache: Tensor) -> bool:
    """Triton refuses to make e4m3 where tensor cores do not know it; the twin takes its place."""
    return runs_kernels(cache) and (has_fp8(cache) or not is_fp8(cache))


def cache_words(cache: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The cache as entries, 16-bit and 32-bit words; only an fp8 cache has more than entries."""
    return as_words(cache) if is_fp8(cache) else (cache, cache, cache)


def norm_rope_store(
    kv_a: Tensor,
    weight: Tensor,
    eps: float,
    cos: Tensor,
    sin: Tensor,
    cache: Tensor,
    slot_mapping: Tensor,
) -> tuple[Tensor, Tensor]:
    """What `rms_norm`, `apply_rope` and `store_latent` do to the output of kv_a, at once.

    kv_a: [T, R + P], R = weight's length; cos, sin: [T, P/2] float32, contiguous
    weight: [R] float, constant (see `wait_previous`)
    cache: of either kind, contiguous; slot_mapping: [T] int64
    -> kv_latent [T, R], k_pe [T, P] in kv_a's dtype, as they were before any quantisation
    """
    store = Store(kv_a, weight, eps, cos, sin, cache, slot_mapping)
    check_store(store)
    if stores_by_kernel(cache):
        return _launch(store)
    rank = weight.shape[0]
    kv_latent = reference.rms_norm(kv_a[:, :rank], weight, eps)
    k_pe = reference.apply_rope(kv_a[:, rank:], cos, sin)
    reference.store_latent(cache, kv_latent, k_pe, slot_mapping)
    return kv_latent, k_pe


class Store(NamedTuple):
    """The arguments of `norm_rope_store`."""

    kv_a: Tensor
    weight: Tensor
    eps: float
    cos: Tensor
    sin: Tensor
    cache: Tensor
    slot_mapping: Tensor


def norms_rope_store(q_a: Tensor, q_weight: Tensor, store: Store) -> tuple[Tensor, Tensor, Tensor]:
    """`fused.rms_norm` of q_a and `norm_rope_store`, in one launch where there are kernels.

    q_a: [T, Q], q_weight: [Q] float, constant (see `wait_previous`)
    -> q [T, Q] in q_a's dtype, kv_latent, k_pe
    """
    check_query(q_a, q_weight, store)
    if not stores_by_kernel(store.cache):
        return fused.rms_norm(q_a, q_weight, store.eps), *norm_rope_store(*store)
    q = torch.empty(q_a.shape, dtype=q_a.dtype, device=q_a.device)
    return q, *_launch(store, Query(q_a, q_weight, q))


def norms_rope_store_quant(
    q_a: Tensor, q_weight: Tensor, store: Store, ue8m0: bool = False, scale_k_major: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`fused.rms_norm_quant` of q_a and `norm_rope_store`, in one launch where there are kernels.
    -> q [T, Q] float8_e4m3fn, scale [T, ceil(Q/128)] float32, kv_latent, k_pe"""
    check_query(q_a, q_weight, store)
    if not (stores_by_kernel(store.cache) and has_fp8(q_a)):
        quantized = fused.rms_norm_quant(q_a, q_weight, store.eps, ue8m0, scale_k_major)
        return *quantized, *norm_rope_store(*store)
    q = torch.empty(q_a.shape, dtype=torch.float8_e4m3fn, device=q_a.device)
    scale = empty_scale(q_a, q_a.shape[1], scale_k_major)
    return q, scale, *_launch(store, Query(q_a, q_weight, q, scale, ue8m0))


class Query(NamedTuple):
    """What the second program of a token norms, and where to; quantised where there is a scale."""

    x: Tensor
    weight: Tensor
    out: Tensor
    scale: Tensor | None = None
    ue8m0: bool = False


def check_store(store: Store) -> None:
    kv_a, weight, _, cos, sin, cache, slot_mapping = store
    rank = weight.shape[0]
    rope = kv_a.shape[1] - rank
    assert cache.is_contiguous() and holds(cache, rank, rope), (cache.shape, kv_a.shape)
    assert cos.dtype == float32 and cos.shape == sin.shape == (kv_a.shape[0], rope // 2), cos.shape
    assert slot_mapping.shape == kv_a.shape[:1], (slot_mapping.shape, kv_a.shape)
    if stores_by_kernel(cache):
        assert kv_a.stride(1) == 1 and weight.is_contiguous(), (kv_a.stride(), weight.stride())
        assert cos.is_contiguous() and sin.is_contiguous() and slot_mapping.is_contiguous()


def check_query(q_a: Tensor, q_weight: Tensor, store: Store) -> None:
    check_store(store)
    assert q_a.shape == (store.kv_a.shape[0], *q_weight.shape), (q_a.shape, q_weight.shape)
    assert q_a.stride(1) == 1 and q_weight.is_contiguous(), (q_a.stride(), q_weight.stride())


def _launch(store: Store, query: Query | None = None) -> tuple[Tensor, Tensor]:
    """One program a token, and one more where there is a query."""
    kv_a, weight, eps, cos, sin, cache, slot_mapping = store
    (num_tokens, width), rank = kv_a.shape, weight.shape[0]
    kv_latent = torch.empty(num_tokens, rank, dtype=kv_a.dtype, device=kv_a.device)
    k_pe = torch.empty(num_tokens, width - rank, dtype=kv_a.dtype, device=kv_a.device)
    q_a, q_weight, q, scale, ue8m0 = query or (None, None, None, None, False)
    q_width = 0 if q_a is None else q_a.shape[1]
    _norm_rope_store[(num_tokens, 1 if q_a is None else 2)](
        kv_a, weight, cos, sin, *cache_words(cache), slot_mapping, kv_latent, k_pe, eps,
        kv_a.stride(0), q_a, q_weight, q, scale, 0 if q_a is None else q_a.stride(0),
        *((0, 0) if scale is None else scale.stride()), RANK=rank, ROPE=width - rank,
        RANK_BLOCK=triton.next_power_of_2(rank), PAIRS=triton.next_power_of_2((width - rank) // 2),
        BLOCK_SIZE=cache.shape[1], ENTRY=cache.shape[2], FP8=is_fp8(cache), Q_WIDTH=q_width,
        GROUPS=triton.next_power_of_2(max(triton.cdiv(q_width, reference.BLOCK), 1)),
        UE8M0=ue8m0, num_warps=WARPS, **overlap(cache)
    )  # fmt: skip
    return kv_latent, k_pe


@triton.jit
def _store_entry(
    cache, cache16, cache32, index, latent, rope, at, column, RANK: tl.constexpr,
    ROPE: tl.constexpr, BLOCK_SIZE: tl.constexpr, ENTRY: tl.constexpr, FP8: tl.constexpr
):  # fmt: skip
    """Writes slot `index` of the cache. latent, rope: any shapes, zero behind RANK and ROPE; at,
    column: of which elements."""
    if FP8:
        page = index // BLOCK_SIZE
        slot = index % BLOCK_SIZE
        wide = latent.to(tl.float32)
        scale = tl.div_rn(tl.maximum(tl.max(tl.abs(wide)), 1e-12), 448.0)
        values = cache + value_at(page, slot, RANK, ROPE, BLOCK_SIZE, ENTRY)
        tl.store(values + at, tl.div_rn(wide, scale).to(tl.float8e4nv), at < RANK)
        tl.store(cache32 + scale_at(page, slot, BLOCK_SIZE, ENTRY), scale)
        half = tl.minimum(tl.maximum(rope.to(tl.float32), -65504.0), 65504.0).to(tl.float16)
        tl.store(
            cache16 + rope_at(page, slot, ROPE, BLOCK_SIZE, ENTRY) + column, half, column < ROPE
        )
    else:
        entry = cache + index * ENTRY
        tl.store(entry + at, latent.to(cache.dtype.element_ty), at < RANK)
        tl.store(entry + RANK + column, rope.to(cache.dtype.element_ty), column < ROPE)


@triton.jit(do_not_specialize_on_alignment=["slot_mapping"])
def _store_latent(
    cache, cache16, cache32, kv_latent, k_pe, slot_mapping, latent_stride, pe_stride,
    RANK: tl.constexpr, ROPE: tl.constexpr, RANK_BLOCK: tl.constexpr, ROPE_BLOCK: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, ENTRY: tl.constexpr, FP8: tl.constexpr
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, RANK_BLOCK)
    latent = tl.load(kv_latent + token * latent_stride + at, at < RANK, 0.0)
    column = tl.arange(0, ROPE_BLOCK)
    rope = tl.load(k_pe + token * pe_stride + column, column < ROPE, 0.0)
    index = tl.load(slot_mapping + token)
    _store_entry(
        cache, cache16, cache32, index, latent, rope, at, column, RANK, ROPE, BLOCK_SIZE, ENTRY, FP8
    )


@triton.jit
def _norm_query(
    x, weight, out, scale, eps, scale_stride, WIDTH: tl.constexpr, GROUPS: tl.constexpr,
    UE8M0: tl.constexpr, PDL: tl.constexpr
):  # fmt: skip
    """`fused._norm` of one token: x, out and scale are its rows."""
    group = tl.arange(0, GROUPS)
    at = group[:, None] * 128 + tl.arange(0, 128)[None, :]
    mask = at < WIDTH
    dtype: tl.constexpr = x.dtype.element_ty
    factor = tl.load(weight + at, mask, 0.0)
    wait_previous(PDL)
    value = tl.load(x + at, mask, 0.0).to(tl.float32)
    normed = rms_weighted(value, factor, eps, WIDTH, dtype)
    if scale is None:
        tl.store(out + at, normed, mask)
    else:
        store_quantized(normed.to(tl.float32), group, out, scale, scale_stride, WIDTH, UE8M0)


@triton.jit(
    do_not_specialize=["scale_token", "scale_group"],
    do_not_specialize_on_alignment=["cos", "sin", "slot_mapping"],
)
def _norm_rope_store(
    kv_a, weight, cos, sin, cache, cache16, cache32, slot_mapping, kv_latent, k_pe, eps, stride,
    q_a, q_weight, q, scale, q_stride, scale_token, scale_group, RANK: tl.constexpr,
    ROPE: tl.constexpr, RANK_BLOCK: tl.constexpr, PAIRS: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    ENTRY: tl.constexpr, FP8: tl.constexpr, Q_WIDTH: tl.constexpr, GROUPS: tl.constexpr,
    UE8M0: tl.constexpr, PDL: tl.constexpr
):  # fmt: skip
    """Grid: (tokens, 2), the first of each for the query, which takes longer; or (tokens, 1)."""
    token = tl.program_id(0).to(tl.int64)
    if q_a is not None and tl.program_id(1) == 0:
        if scale is not None:
            scale += token * scale_token
        _norm_query(
            q_a + token * q_stride, q_weight, q + token * Q_WIDTH, scale, eps, scale_group,
            Q_WIDTH, GROUPS, UE8M0, PDL
        )  # fmt: skip
    else:
        dtype: tl.constexpr = kv_a.dtype.element_ty
        at = tl.arange(0, RANK_BLOCK)
        mask = at < RANK
        factor = tl.load(weight + at, mask, 0.0)  # no kernel writes it: it may come early
        wait_previous(PDL)
        latent = tl.load(kv_a + token * stride + at, mask, 0.0).to(tl.float32)
        latent = rms_weighted(latent, factor, eps, RANK, dtype)
        tl.store(kv_latent + token * RANK + at, latent, mask)
        column = tl.arange(0, 2 * PAIRS)[None, :]
        inside = column < ROPE
        value = tl.load(kv_a + token * stride + RANK + column, inside, 0.0).to(tl.float32)
        cosine, sine = load_angles(cos, sin, token, ROPE, PAIRS)
        rotated = rotate_pairs(value, cosine, sine, 1, PAIRS).to(dtype)
        tl.store(k_pe + token * ROPE + column, rotated, inside)
        index = tl.load(slot_mapping + token)
        _store_entry(
            cache, cache16, cache32, index, latent, rotated, at, column, RANK, ROPE, BLOCK_SIZE,
            ENTRY, FP8
        )  # fmt: skip
