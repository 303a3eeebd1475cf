"""The torch twin of every kernel: what the GPU kernels must equal, and what runs on a CPU.

Written to be read, not to be fast. Arithmetic is float32 unless a docstring says otherwise; results
have the dtype of the inputs. Shapes use: T tokens, B sequences, H heads, N and K the output and
input width of a linear map, E experts, R = kv_lora_rank, P = qk_rope_head_dim.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from . import latent as layout

BLOCK = 128
"""Width of a quantisation block, DeepSeek-V3 technical report (arXiv 2412.19437), section 3.3.2."""
FP8_MAX = 448.0
"""Largest finite e4m3fn value."""
SLAB_ROWS = 8 * BLOCK
"""Rows of a weight that are dequantised at once."""
LEAST_LATENT = 1e-12
"""A token whose latent is smaller everywhere is quantised as if it had this."""


# ---- quantisation -------------------------------------------------------------------------------


def quantize_1x128(x: Tensor, ue8m0: bool = False) -> tuple[Tensor, Tensor]:
    """Quantises activations to e4m3 with one scale for 128 neighbours of a token.

    x: [T, K] float. Returns q: [T, K] float8_e4m3fn and scale: [T, ceil(K/128)] float32 with
    x ~ q * scale. `ue8m0` rounds scales up to powers of two (DeepSeek-V3.1's scale_fmt).
    """
    num_tokens, width = x.shape
    num_blocks = -(-width // BLOCK)
    padded = F.pad(x.float(), (0, num_blocks * BLOCK - width)).view(num_tokens, num_blocks, BLOCK)
    scale = padded.abs().amax(dim=-1).clamp(min=1e-4) / FP8_MAX
    if ue8m0:
        # By bits: log2 is rounded, so a scale just above a power of two would become that power.
        bits = scale.view(torch.int32)
        scale = ((bits + 0x7FFFFF) & 0x7F800000).view(torch.float32)
    q = (padded / scale[..., None]).clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)
    return q.view(num_tokens, num_blocks * BLOCK)[:, :width], scale


def quantize_128x128(w: Tensor) -> tuple[Tensor, Tensor]:
    """Quantises a weight [N, K] to e4m3 with one scale for each 128x128 block.

    Returns q: [N, K] float8_e4m3fn and scale: [ceil(N/128), ceil(K/128)] float32, as the
    published checkpoints name it `weight_scale_inv`: w ~ q * scale.
    """
    n, k = w.shape
    padded = F.pad(w.float(), (0, -k % BLOCK, 0, -n % BLOCK))
    blocks = padded.view(padded.shape[0] // BLOCK, BLOCK, padded.shape[1] // BLOCK, BLOCK)
    scale = blocks.abs().amax(dim=(1, 3)).clamp(min=1e-8) / FP8_MAX
    q = (blocks / scale[:, None, :, None]).clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)
    return q.view(padded.shape)[:n, :k].contiguous(), scale


def dequantize_128x128(q: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The reverse of `quantize_128x128`; also for stacked weights [..., N, K]."""
    n, k = q.shape[-2:]
    if n % BLOCK or k % BLOCK:
        full = scale.repeat_interleave(BLOCK, dim=-2)[..., :n, :]
        return (q.float() * full.repeat_interleave(BLOCK, dim=-1)[..., :k]).to(dtype)
    blocks = q.float().view(*q.shape[:-2], n // BLOCK, BLOCK, k // BLOCK, BLOCK)
    return (blocks * scale[..., :, None, :, None]).to(dtype).view(q.shape)


# ---- linear maps --------------------------------------------------------------------------------


def gemm_nt(x: Tensor, w: Tensor) -> Tensor:
    """x: [T, K], w: [N, K] of any float dtype -> [T, N] in x's dtype, multiplied in x's dtype."""
    return x @ w.to(x.dtype).t()


def dequant_gemm_nt(x: Tensor, w: Tensor, w_scale: Tensor) -> Tensor:
    """The same for an fp8 weight with 128x128 scales, dequantised to x's dtype as it is used: a
    slab of rows at a time, so that it is still in the cache when it is multiplied."""
    out = x.new_empty(x.shape[0], w.shape[0])
    for start in range(0, w.shape[0], SLAB_ROWS):
        rows = slice(start, start + SLAB_ROWS)
        blocks = slice(start // BLOCK, (start + SLAB_ROWS) // BLOCK)
        out[:, rows] = x @ dequantize_128x128(w[rows], w_scale[blocks], x.dtype).t()
    return out


def fp8_gemm_nt(
    x: Tensor, x_scale: Tensor, w: Tensor, w_scale: Tensor, out_dtype: torch.dtype
) -> Tensor:
    """e4m3 x e4m3, partial sums of 128 promoted to float32 with both scales.

    x: [T, K] float8_e4m3fn, x_scale: [T, ceil(K/128)] float32, w: [N, K] float8_e4m3fn,
    w_scale: [ceil(N/128), ceil(K/128)] float32 -> [T, N] out_dtype.
    """
    n, k = w.shape
    out = torch.zeros(x.shape[0], n, dtype=torch.float32, device=x.device)
    row_scale = w_scale.repeat_interleave(BLOCK, dim=0)[:n]
    for block, start in enumerate(range(0, k, BLOCK)):
        part = x[:, start : start + BLOCK].float() @ w[:, start : start + BLOCK].float().t()
        out += part * x_scale[:, block, None] * row_scale[None, :, block]
    return out.to(out_dtype)


# ---- experts ------------------------------------------------------------------------------------


def moe_gate(
    logits: Tensor,
    bias: Tensor,
    n_group: int,
    topk_group: int,
    top_k: int,
    norm_topk_prob: bool,
    routed_scaling_factor: float,
) -> tuple[Tensor, Tensor]:
    """Sigmoid gate with correction bias and group-limited top-k (arXiv 2412.19437, section 2.1.2).

    logits: [T, E] float32, bias: [E] float32. Experts are chosen by score + bias, weighted by the
    score alone. A group counts by the sum of its two best. Returns topk_ids [T, top_k] int64 and
    topk_weights [T, top_k] float32.
    """
    scores = logits.float().sigmoid()
    choice = scores + bias.float()
    if n_group > 1:
        grouped = choice.unflatten(1, (n_group, -1))
        group_scores = grouped.topk(min(2, grouped.shape[-1]), dim=-1).values.sum(dim=-1)
        kept = group_scores.topk(topk_group, dim=-1).indices
        mask = torch.ones_like(group_scores, dtype=torch.bool).scatter_(1, kept, False)
        choice = grouped.masked_fill(mask[..., None], float("-inf")).flatten(1)
    topk_ids = choice.topk(top_k, dim=-1).indices
    topk_weights = scores.gather(1, topk_ids)
    if norm_topk_prob:
        topk_weights = topk_weights / (topk_weights.sum(dim=-1, keepdim=True) + 1e-20)
    return topk_ids, topk_weights * routed_scaling_factor


def permute_by_expert(
    topk_ids: Tensor, n_experts: int, first_expert: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """Sorts (token, choice) pairs by expert, stably; pairs of experts outside of first_expert ...
    first_expert + n_experts - 1 come last.

    topk_ids: [T, top_k]. Returns order: [T * top_k] int64, indices into the flattened pairs;
    offsets: [n_experts] int64, the place behind each expert's last pair; place: [T * top_k] int64,
    where each pair went, -1 for those outside.
    """
    expert = topk_ids.flatten() - first_expert
    outside = (expert < 0) | (expert >= n_experts)
    expert = expert.masked_fill(outside, n_experts)
    order = expert.argsort(stable=True)
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order), device=order.device)
    offsets = torch.bincount(expert, minlength=n_experts)[:n_experts].cumsum(0)
    return order, offsets, place.masked_fill(outside, -1)


def dispatch(
    q: Tensor, scale: Tensor, topk_ids: Tensor, n_experts: int, first_expert: int, bm: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Rows in the order of `permute_by_expert`, and the items of `bm` into which each expert's are
    cut: (rows [P, K], scales in the items' order [G, items * bm], place [P], table, columns [P]),
    the last two as `moe_items.Tiles` has them."""
    order, offsets, place = permute_by_expert(topk_ids, n_experts, first_expert)
    sizes = offsets.diff(prepend=offsets.new_zeros(1))
    items = (sizes + bm - 1) // bm
    first = items.cumsum(0) - items
    each = torch.arange(n_experts, device=q.device)
    entries = torch.stack((each, first, offsets - sizes, offsets), 1).repeat_interleave(items, 0)
    table = torch.zeros(1 + n_experts + len(order) // bm, 4, dtype=torch.int32, device=q.device)
    table[0, 0] = len(entries)
    table[1 : 1 + len(entries)] = entries
    columns = torch.full((len(order),), -1, dtype=torch.int32, device=q.device)
    expert = each.repeat_interleave(sizes)
    row = torch.arange(len(expert), device=q.device)
    columns[: len(expert)] = (first[expert] * bm + row - (offsets - sizes)[expert]).int()
    token = order // topk_ids.shape[1]
    rows = q.view(torch.uint8)[token].view(q.dtype)
    return rows, tiled(scale[token], columns, (len(table) - 1) * bm), place, table, columns


def tiled(scale: Tensor, columns: Tensor, size: int) -> Tensor:
    """scale: [P, G] -> [G, size], each row at its column; zero elsewhere."""
    out = torch.zeros(scale.shape[1], size, device=scale.device)
    taken = columns >= 0
    out[:, columns[taken].long()] = scale[taken].t()
    return out


def combine_experts(y: Tensor, place: Tensor, topk_weights: Tensor) -> Tensor:
    """Undoes `permute_by_expert` and sums each token's experts by weight.

    y: [T * top_k, N] in expert order, place: [T * top_k], topk_weights: [T, top_k] -> [T, N] in y's
    dtype; pairs whose place is -1 count nothing.
    """
    num_tokens, top_k = topk_weights.shape
    back = y[place.clamp(min=0)].masked_fill((place < 0)[:, None], 0.0)
    weighted = back.view(num_tokens, top_k, y.shape[1]).float() * topk_weights[..., None]
    return weighted.sum(dim=1).to(y.dtype)


# ---- norms, activation, rope --------------------------------------------------------------------


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x: [..., N] / rms(x) * weight [N]; normalised in float32, rounded to x's dtype before the
    weight is applied, as the published model code does."""
    wide = x.float()
    normed = wide * torch.rsqrt(wide.pow(2).mean(dim=-1, keepdim=True) + eps)
    return weight.to(x.dtype) * normed.to(x.dtype)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """residual + x, and its `rms_norm`: returns (normed, new residual), both in x's dtype."""
    residual = residual + x
    return rms_norm(residual, weight, eps), residual


def silu_mul(gate_up: Tensor) -> Tensor:
    """gate_up: [T, 2N], gate first -> silu(gate) * up [T, N]."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates neighbouring pairs of the last dimension.

    x: [T, H, P] or [T, P]; cos, sin: [T, P/2] float32. Pairs are (2i, 2i + 1), as DeepSeek's
    checkpoints store them; the result keeps that order. Computed in float32.
    """
    if x.dim() == 3:
        cos, sin = cos[:, None], sin[:, None]
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    rotated = torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1)
    return rotated.flatten(-2).to(x.dtype)


def absorb(q: Tensor, w_uk: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """q: [T, H, N + P], w_uk: [H, N, R], cos, sin: [T, P/2] -> [T, H, R + P] in q's dtype."""
    nope = w_uk.shape[1]
    absorbed = torch.bmm(q[..., :nope].transpose(0, 1), w_uk).transpose(0, 1)
    return torch.cat((absorbed, apply_rope(q[..., nope:], cos, sin)), dim=-1)


def expand(latent: Tensor, w_uv: Tensor) -> Tensor:
    """latent: [T, H, R], w_uv: [H, R, V] -> [T, H, V] in latent's dtype."""
    return torch.bmm(latent.transpose(0, 1), w_uv).transpose(0, 1).contiguous()


def embedding(weight: Tensor, ids: Tensor, dtype: torch.dtype) -> Tensor:
    """weight: [V, N], ids: [T] -> [T, N] in dtype."""
    return F.embedding(ids, weight).to(dtype)


def joined(
    weight: Tensor,
    ids: Tensor,
    enorm: Tensor,
    hidden: Tensor,
    hnorm: Tensor,
    eps: float,
    dtype: torch.dtype,
) -> Tensor:
    """weight: [V, N], ids: [T], hidden: [T, N] -> [T, 2N] in dtype."""
    following = rms_norm(embedding(weight, ids, dtype), enorm, eps)
    return torch.cat((following, rms_norm(hidden, hnorm, eps)), dim=-1)


# ---- attention over the latent cache ------------------------------------------------------------


def quantize_latent(kv_latent: Tensor) -> tuple[Tensor, Tensor]:
    """One scale for a token: kv_latent [T, R] -> value [T, R] float8_e4m3fn, scale [T] float32,
    never 0: its logarithm and its reciprocal are used."""
    wide = kv_latent.float()
    scale = wide.abs().amax(dim=-1).clamp(min=LEAST_LATENT) / FP8_MAX
    value = (wide / scale[:, None]).clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)
    return value, scale


def store_latent(cache: Tensor, kv_latent: Tensor, k_pe: Tensor, slot_mapping: Tensor) -> None:
    """Writes a step's latents into the paged cache.

    cache: as `latent.py` says, of either kind; kv_latent: [T, R] (normed), k_pe: [T, P] (rotated),
    slot_mapping: [T] int64, block * block_size + offset; block 0 takes padding and is never read.
    """
    if not layout.is_fp8(cache):
        latent = torch.cat((kv_latent, k_pe), dim=-1).to(cache.dtype)
        cache.view(-1, cache.shape[-1])[slot_mapping] = latent
        return
    at = (slot_mapping // cache.shape[1], slot_mapping % cache.shape[1])
    value, rope, scale = layout.planes(cache, kv_latent.shape[-1])
    quantized, scale[at] = quantize_latent(kv_latent)
    value.view(torch.uint8)[at] = quantized.view(torch.uint8)
    rope[at] = k_pe.float().clamp(-layout.F16_MAX, layout.F16_MAX).to(torch.float16)


def gather_latent(
    cache: Tensor,
    block_table: Tensor,
    start: int,
    stop: int,
    kv_lora_rank: int,
    dtype: torch.dtype,
) -> Tensor:
    """Tokens start ... stop - 1 of one sequence. block_table: [num_blocks_of_it] ->
    [stop - start, R + P] in dtype."""
    block_size = cache.shape[1]
    first, last = start // block_size, -(-stop // block_size)
    blocks = block_table[first:last].long()
    if layout.is_fp8(cache):
        value, rope, scale = layout.planes(cache, kv_lora_rank)
        latent = value.view(torch.uint8)[blocks].view(value.dtype).float()
        latent *= scale[blocks][..., None]
        pages = torch.cat((latent, rope[blocks].float()), dim=-1).flatten(0, 1)
    else:
        pages = cache[blocks].flatten(0, 1)
    return pages[start - first * block_size : stop - first * block_size].to(dtype)


def mla_decode(
    q: Tensor, cache: Tensor, block_table: Tensor, seq_lens: Tensor, kv_lora_rank: int, scale: float
) -> Tensor:
    """Absorbed attention of one new token per sequence over its latents.

    q: [B, H, R + P], the nope part already multiplied by W_UK; cache: as `latent.py` says, of
    either kind; block_table: [B, max_blocks] int32; seq_lens: [B] int32, the new token included.
    Every head reads the same latent: key = the whole of it, value = its first R. -> [B, H, R] in
    q's dtype.
    """
    out = torch.empty(*q.shape[:2], kv_lora_rank, dtype=q.dtype, device=q.device)
    for row, seq_len in enumerate(seq_lens.tolist()):
        latent = gather_latent(cache, block_table[row], 0, seq_len, kv_lora_rank, torch.float32)
        scores = q[row].float() @ latent.t() * scale
        out[row] = (scores.softmax(dim=-1) @ latent[:, :kv_lora_rank]).to(q.dtype)
    return out


def mla_prefill(
    q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool
) -> tuple[Tensor, Tensor]:
    """Plain multi-head attention of one sequence's slice over one slice of keys.

    q: [Tq, H, D], k: [Tk, H, D], v: [Tk, H, Dv]. `causal`: the two slices end at the same token,
    and a query sees keys up to its own. -> out [Tq, H, Dv] in q's dtype, lse [H, Tq] float32.
    """
    scores = torch.einsum("qhd,khd->hqk", q.float(), k.float()) * scale
    if causal:
        num_q, num_k = scores.shape[1:]
        hidden = torch.ones(num_q, num_k, dtype=torch.bool, device=q.device)
        scores = scores.masked_fill(hidden.triu(num_k - num_q + 1), float("-inf"))
    lse = scores.logsumexp(dim=-1)
    probs = (scores - lse[..., None]).exp()
    return torch.einsum("hqk,khd->qhd", probs, v.float()).to(q.dtype), lse


def merge_attention(a: Tensor, a_lse: Tensor, b: Tensor, b_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Joins attention over two disjoint sets of keys. out: [T, H, Dv], lse: [H, T]."""
    lse = torch.logaddexp(a_lse, b_lse)
    weight_a = (a_lse - lse).exp().t()[..., None]
    weight_b = (b_lse - lse).exp().t()[..., None]
    return (a.float() * weight_a + b.float() * weight_b).to(a.dtype), lse
