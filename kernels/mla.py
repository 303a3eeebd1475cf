"""Multi-head latent attention: absorbed for decode, plain for prefill, how slices are merged."""

from torch import Tensor

from . import reference


def mla_decode(
    q: Tensor, cache: Tensor, block_table: Tensor, seq_lens: Tensor, kv_lora_rank: int, scale: float
) -> Tensor:
    """q: [B, H, R + P], cache: [num_blocks, block_size, R + P], block_table: [B, max_blocks] int32
    (read up to the sequence's length only), seq_lens: [B] int32, the new token included.
    -> [B, H, R]."""
    assert q.shape[-1] == cache.shape[-1] and q.shape[0] == seq_lens.shape[0], (
        q.shape,
        cache.shape,
    )
    return reference.mla_decode(q, cache, block_table, seq_lens, kv_lora_rank, scale)


def mla_prefill(
    q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool
) -> tuple[Tensor, Tensor]:
    """q: [Tq, H, D], k: [Tk, H, D], v: [Tk, H, Dv] of one sequence. `causal`: both end at the same
    token. -> out [Tq, H, Dv], lse [H, Tq] float32."""
    assert k.shape[0] == v.shape[0] and q.shape[1:] == k.shape[1:], (q.shape, k.shape, v.shape)
    return reference.mla_prefill(q, k, v, scale, causal)


def merge_attention(a: Tensor, a_lse: Tensor, b: Tensor, b_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Joins attention over two disjoint sets of keys: out [T, H, Dv], lse [H, T]."""
    return reference.merge_attention(a, a_lse, b, b_lse)


def gather_latent(cache: Tensor, block_table: Tensor, start: int, stop: int) -> Tensor:
    """Latents of tokens start ... stop - 1 of the sequence with this block_table:
    [stop - start, R + P]."""
    assert 0 <= start <= stop, (start, stop)
    return reference.gather_latent(cache, block_table, start, stop)
