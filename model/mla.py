"""Multi-head latent attention, twice: plain for prefill, absorbed for decode.

DeepSeek-V2 (arXiv 2405.04434), section 2.1. The cache holds, per token, the normed latent c_kv and
the rotated k_pe that all heads share:

    plain      k_h = [W_UK_h c_kv ; k_pe]    v_h = W_UV_h c_kv   softmax(q k) v, per head
    absorbed   q_h' = [W_UK_h^T q_nope ; q_pe]                   keys are cache entries as they are;
               out_h = W_UV_h (softmax(q_h' entry) c_kv)         values their first kv_lora_rank
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from ..kernels import fused, mla, quant
from .batch import ForwardBatch, PrefillSlice
from .config import ModelConfig
from .layers import Arithmetic, Linear, RMSNorm

CONTEXT_SLICE = 1024
"""Cached tokens that are up-projected at once; bounds the memory of a long prefix."""


class MLA:
    def __init__(
        self,
        config: ModelConfig,
        weights: Mapping[str, Tensor],
        name: str,
        arithmetic: Arithmetic,
        dtype: torch.dtype,
    ) -> None:
        self.config = config
        self.heads = config.num_attention_heads
        self.q_a: Linear | None = None
        if config.q_lora_rank is not None:
            self.q_a = Linear(weights, f"{name}.q_a", arithmetic)
            self.q_a_norm = RMSNorm(weights[f"{name}.q_a_norm"], config.rms_norm_eps)
        self.q = Linear(weights, f"{name}.q", arithmetic)
        self.kv_a = Linear(weights, f"{name}.kv_a", arithmetic)
        self.kv_a_norm = RMSNorm(weights[f"{name}.kv_a_norm"], config.rms_norm_eps)
        self.kv_b = Linear(weights, f"{name}.kv_b", arithmetic)
        self.o = Linear(weights, f"{name}.o", arithmetic)
        self.w_uk, self.w_uv = self._split_kv_b(dtype)

    def _split_kv_b(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """kv_b's rows by head: W_UK [H, nope, R] and W_UV [H, v, R], in the activations' dtype."""
        weight = self.kv_b.weight
        if self.kv_b.scale is None:
            weight = weight.to(dtype)
        else:
            weight = quant.dequantize_128x128(weight, self.kv_b.scale, dtype)
        nope, v_dim = self.config.qk_nope_head_dim, self.config.v_head_dim
        by_head = weight.view(self.heads, nope + v_dim, self.config.kv_lora_rank)
        w_uk, w_uv = by_head.split([nope, v_dim], dim=1)
        return w_uk, w_uv

    def __call__(
        self, x: Tensor, batch: ForwardBatch, cache: Tensor, cos: Tensor, sin: Tensor
    ) -> Tensor:
        """x: [T, hidden], cache: this layer's, cos and sin: [T, P/2] of the tokens ->
        [T, hidden]."""
        config, num_decodes = self.config, batch.num_decodes
        q = self.q(x if self.q_a is None else self.q_a_norm(self.q_a(x)))
        q = q.view(-1, self.heads, config.qk_head_dim)
        q_nope, q_pe = q.split([config.qk_nope_head_dim, config.qk_rope_head_dim], dim=-1)
        q_pe = fused.apply_rope(q_pe, cos, sin)
        kv_latent, k_pe = self.kv_a(x).split([config.kv_lora_rank, config.qk_rope_head_dim], dim=-1)
        kv_latent, k_pe = self.kv_a_norm(kv_latent), fused.apply_rope(k_pe, cos, sin)
        fused.store_latent(cache, kv_latent, k_pe, batch.slot_mapping)

        out = x.new_empty(x.shape[0], self.heads, config.v_head_dim)
        if num_decodes:
            out[:num_decodes] = self._decode(q_nope[:num_decodes], q_pe[:num_decodes], batch, cache)
        q = torch.cat((q_nope, q_pe), dim=-1)
        for prefill in batch.prefills:
            rows = slice(prefill.first, prefill.first + prefill.num_tokens)
            out[rows] = self._prefill(q[rows], kv_latent[rows], k_pe[rows], prefill, cache)
        return self.o(out.flatten(1))

    def _decode(self, q_nope: Tensor, q_pe: Tensor, batch: ForwardBatch, cache: Tensor) -> Tensor:
        """Absorbed. q_nope: [B, H, nope], q_pe: [B, H, P] -> [B, H, v]."""
        absorbed = torch.einsum("bhn,hnr->bhr", q_nope, self.w_uk)
        q = torch.cat((absorbed, q_pe), dim=-1)
        rank, scale = self.config.kv_lora_rank, self.config.softmax_scale
        latent = mla.mla_decode(q, cache, batch.block_table, batch.seq_lens, rank, scale)
        return torch.einsum("bhr,hvr->bhv", latent, self.w_uv)

    def _prefill(
        self, q: Tensor, kv_latent: Tensor, k_pe: Tensor, prefill: PrefillSlice, cache: Tensor
    ) -> Tensor:
        """Plain, over the slice itself and then over what is cached before it. q: [Tq, H, D]."""
        scale = self.config.softmax_scale
        out, lse = mla.mla_prefill(q, *self._expand(kv_latent, k_pe), scale, causal=True)
        for start in range(0, prefill.num_cached, CONTEXT_SLICE):
            stop = min(start + CONTEXT_SLICE, prefill.num_cached)
            latent = mla.gather_latent(cache, prefill.block_table, start, stop).to(q.dtype)
            kv_latent, k_pe = latent.split([self.config.kv_lora_rank, k_pe.shape[-1]], dim=-1)
            more = mla.mla_prefill(q, *self._expand(kv_latent, k_pe), scale, causal=False)
            out, lse = mla.merge_attention(out, lse, *more)
        return out

    def _expand(self, kv_latent: Tensor, k_pe: Tensor) -> tuple[Tensor, Tensor]:
        """Keys [T, H, D] and values [T, H, v] of latents [T, R] and [T, P]."""
        nope, v_dim = self.config.qk_nope_head_dim, self.config.v_head_dim
        expanded = self.kv_b(kv_latent).view(-1, self.heads, nope + v_dim)
        k_nope, v = expanded.split([nope, v_dim], dim=-1)
        k_pe = k_pe[:, None].expand(-1, self.heads, -1)
        return torch.cat((k_nope, k_pe), dim=-1), v
