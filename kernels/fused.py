"""Per-token work between the GEMMs: norms, activation, rope, embedding, cache store."""

from torch import Tensor, dtype, float32

from . import reference


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x: [T, N] -> [T, N] in x's dtype."""
    assert x.shape[-1] == weight.shape[0], (x.shape, weight.shape)
    return reference.rms_norm(x, weight, eps)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x, residual: [T, N] -> rms_norm(x + residual), x + residual."""
    assert x.shape == residual.shape, (x.shape, residual.shape)
    return reference.add_rms_norm(x, residual, weight, eps)


def silu_mul(gate_up: Tensor) -> Tensor:
    """gate_up: [T, 2N], gate first -> [T, N]."""
    assert gate_up.shape[-1] % 2 == 0, gate_up.shape
    return reference.silu_mul(gate_up)


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x: [T, H, P] or [T, P], cos and sin: [T, P/2] float32 -> x's shape and dtype."""
    assert cos.dtype == float32 and cos.shape == (x.shape[0], x.shape[-1] // 2), (
        cos.shape,
        x.shape,
    )
    return reference.apply_rope(x, cos, sin)


def embedding(weight: Tensor, ids: Tensor, out_dtype: dtype) -> Tensor:
    """weight: [V, N], ids: [T] integer -> [T, N] out_dtype."""
    assert ids.dim() == 1, ids.shape
    return reference.embedding(weight, ids, out_dtype)


def store_latent(cache: Tensor, kv_latent: Tensor, k_pe: Tensor, slot_mapping: Tensor) -> None:
    """Writes [T, R] and [T, P] into cache [num_blocks, block_size, R + P] at slot_mapping: [T]
    int64."""
    assert cache.is_contiguous() and cache.shape[-1] == kv_latent.shape[-1] + k_pe.shape[-1]
    assert slot_mapping.shape == kv_latent.shape[:1], (slot_mapping.shape, kv_latent.shape)
    reference.store_latent(cache, kv_latent, k_pe, slot_mapping)
