"""Multi-head latent attention, twice: plain for prefill, absorbed for decode.

DeepSeek-V2 (arXiv 2405.04434), section 2.1. The cache holds, per token, the normed latent c_kv and
the rotated k_pe that all heads share:

    plain      k_h = [W_UK_h c_kv ; k_pe]    v_h = W_UV_h c_kv   softmax(q k) v, per head
    absorbed   q_h' = [W_UK_h^T q_nope ; q_pe]                   keys are cache entries as they are;
               out_h = W_UV_h (softmax(q_h' entry) c_kv)         values their first kv_lora_rank
"""

from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor

from ..kernels import fused, latent_store, mla, mla_absorb, quant
from ..kernels.compat import has_wgmma
from ..kernels.mla_schedule import Schedule
from ..kernels.step import Inputs
from .batch import Context, ForwardBatch, Prefills
from .beside import beside, nothing
from .config import FP8_BLOCK, ModelConfig
from .layers import Arithmetic, Linear, Quantized

LazySchedule = Callable[[], Schedule | None]


class MLA:
    def __init__(
        self,
        config: ModelConfig,
        weights: Mapping[str, Tensor],
        name: str,
        arithmetic: Arithmetic,
    ) -> None:
        self.config = config
        self._arithmetic = arithmetic
        self.heads = config.num_attention_heads
        self.down = _down_projections(config, weights, name, arithmetic)
        self.q_a_norm = None if config.q_lora_rank is None else weights[f"{name}.q_a_norm"]
        self.q = Linear.load(weights, f"{name}.q", arithmetic)
        self.kv_a_norm = weights[f"{name}.kv_a_norm"]
        self.kv_b = Linear.load(weights, f"{name}.kv_b", arithmetic)
        self.o = Linear.load(weights, f"{name}.o", arithmetic)
        self.w_uk, self.w_uv = self._split_kv_b(arithmetic.dtype)

    def _split_kv_b(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """kv_b's rows by head: W_UK [H, nope, R], W_UV^T [H, R, v], in the activations' dtype."""
        weight = self.kv_b.weight
        if self.kv_b.scale is None:
            weight = weight.to(dtype)
        else:
            weight = quant.dequantize_128x128(weight, self.kv_b.scale, dtype)
        nope, v_dim = self.config.qk_nope_head_dim, self.config.v_head_dim
        by_head = weight.view(self.heads, nope + v_dim, self.config.kv_lora_rank)
        w_uk, w_uv = by_head.split([nope, v_dim], dim=1)
        return w_uk, w_uv.transpose(1, 2)

    def schedule(self, batch: ForwardBatch, cache: Tensor) -> LazySchedule:
        """How decode shares its work out: the same for every layer of a pass. On the second stream:
        it is short of nothing but time, and the first attention is kernels away."""
        if not (batch.num_decodes and cache.is_cuda):
            return nothing
        config = self.config
        shape = (batch.num_decode_tokens, self.heads, config.latent_dim)
        q = torch.empty(shape, dtype=self.w_uk.dtype, device=cache.device)
        q = _by_sequence(q, batch)
        args = (q, cache, batch.block_table, batch.seq_lens, config.kv_lora_rank)
        return beside(partial(mla.decode_schedule, *args), cache.device)

    def __call__(
        self,
        x: Tensor | Quantized,
        batch: ForwardBatch,
        cache: Tensor,
        schedule: LazySchedule,
    ) -> Tensor:
        """x: [T, hidden], cache: this layer's -> [T, hidden]."""
        config, inputs, num_decodes = self.config, batch.inputs, batch.num_decode_tokens
        q, kv_latent, k_pe = self._queries(x, inputs, cache)
        q = q.view(-1, self.heads, config.qk_head_dim)
        if batch.prefills is None:
            return self.o(self._values(self._decode(q, batch, cache, schedule)))
        rest = slice(num_decodes, None)
        out = self._prefill(
            q[rest], kv_latent[rest], k_pe[rest], inputs, num_decodes, batch.prefills, cache
        )
        if num_decodes:
            latent = self._decode(q[:num_decodes], batch, cache, schedule)
            out = torch.cat((mla_absorb.expand(latent, self.w_uv), out))
        return self.o(out.flatten(1))

    def store(self, x: Tensor | Quantized, inputs: Inputs, cache: Tensor) -> None:
        """Writes the tokens' KV, and computes nothing else. x: [T, hidden]."""
        _, store = self._down(x, inputs, cache)
        latent_store.norm_rope_store(*store)

    def _queries(
        self, x: Tensor | Quantized, inputs: Inputs, cache: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Writes the tokens' KV. x: [T, hidden] -> q [T, H * D], latents [T, R], k_pe [T, P]."""
        q_in, store = self._down(x, inputs, cache)
        if self.q_a_norm is None:
            return q_in, *latent_store.norm_rope_store(*store)
        weight, mode = self.q_a_norm, self._arithmetic
        if not mode.fp8:
            normed, kv_latent, k_pe = latent_store.norms_rope_store(q_in, weight, store)
            return self.q(normed), kv_latent, k_pe
        values, scale, kv_latent, k_pe = latent_store.norms_rope_store_quant(
            q_in, weight, store, mode.ue8m0, has_wgmma(q_in)
        )
        return self.q(Quantized(values, scale)), kv_latent, k_pe

    def _down(
        self, x: Tensor | Quantized, inputs: Inputs, cache: Tensor
    ) -> tuple[Tensor, latent_store.Store]:
        """x: [T, hidden] -> what q is made of [T, q_lora_rank, or all heads of q], and the rest on
        its way into the cache."""
        config = self.config
        parts = [down(x) for down in self.down]
        q_in, kv_a = (
            parts
            if len(parts) == 2
            else parts[0].split([parts[0].shape[1] - config.latent_dim, config.latent_dim], dim=1)
        )
        return q_in, latent_store.Store(
            kv_a, self.kv_a_norm, config.rms_norm_eps, inputs.cos, inputs.sin, cache,
            inputs.slot_mapping,
        )  # fmt: skip

    def _decode(
        self, q: Tensor, batch: ForwardBatch, cache: Tensor, schedule: LazySchedule
    ) -> Tensor:
        """Absorbed. q: [T, H, D], `query_len` tokens of each sequence -> latents [T, H, R]."""
        config, rank, inputs = self.config, self.config.kv_lora_rank, batch.inputs
        absorbed = mla_absorb.absorb(q, self.w_uk, inputs.cos[: len(q)], inputs.sin[: len(q)])
        return mla.mla_decode(
            _by_sequence(absorbed, batch), cache, batch.block_table, batch.seq_lens, rank,
            config.softmax_scale, schedule()
        ).view(-1, self.heads, rank)  # fmt: skip

    def _values(self, latent: Tensor) -> Tensor | Quantized:
        """latent: [T, H, R] -> values [T, H * v], for the output projection to take."""
        mode = self._arithmetic
        if not mode.fp8 or self.config.v_head_dim % FP8_BLOCK:
            return mla_absorb.expand(latent, self.w_uv).flatten(1)
        quantized = mla_absorb.expand_quant(latent, self.w_uv, mode.ue8m0, has_wgmma(latent))
        return Quantized(*quantized)

    def _prefill(
        self,
        q: Tensor,
        kv_latent: Tensor,
        k_pe: Tensor,
        inputs: Inputs,
        first: int,
        prefills: Prefills,
        cache: Tensor,
    ) -> Tensor:
        """Plain, over the slices themselves and then over what is cached before them. q: [T, H, D]
        of tokens `first` ... of the batch; rotated in place."""
        config, bounds = self.config, prefills.cu_seqlens
        q_pe = q[..., config.qk_nope_head_dim :]
        fused.apply_rope(q_pe, inputs.cos[first:], inputs.sin[first:], out=q_pe)
        size, scale = prefills.max_tokens, config.softmax_scale
        k, v = self._expand(kv_latent)
        out, lse = mla.mla_prefill_varlen(q, k, v, bounds, bounds, size, scale, True, k_pe)
        for context in prefills.contexts:
            kv_latent, k_pe = self._gather(context, prefills, cache, q.dtype)
            k, v = self._expand(kv_latent)
            more = mla.mla_prefill_varlen(
                q, k, v, bounds, context.cu_seqlens, size, scale, False, k_pe
            )
            out, lse = mla.merge_attention(out, lse, *more)
        return out

    def _gather(
        self, context: Context, prefills: Prefills, cache: Tensor, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        """Latents [n, R] and k_pe [n, P] of a context's tokens, one piece after the other."""
        rank = self.config.kv_lora_rank
        parts = [
            mla.gather_latent(cache, prefills.slices[i].block_table, start, stop, rank, dtype)
            for i, start, stop in context.pieces
        ]
        latent = parts[0] if len(parts) == 1 else torch.cat(parts)
        return latent[:, :rank], latent[:, rank:]

    def _expand(self, kv_latent: Tensor) -> tuple[Tensor, Tensor]:
        """Keys without their rope part [T, H, nope] and values [T, H, v] of latents [T, R]."""
        nope, v_dim = self.config.qk_nope_head_dim, self.config.v_head_dim
        expanded = self.kv_b(kv_latent).view(-1, self.heads, nope + v_dim)
        k_nope, v = expanded.split([nope, v_dim], dim=-1)
        return k_nope, v


def _by_sequence(q: Tensor, batch: ForwardBatch) -> Tensor:
    """[T, H, D] as `mla_decode` takes it: of several tokens a sequence [B, Sq, H, D]."""
    if batch.query_len == 1:
        return q
    return q.view(batch.num_decodes, batch.query_len, *q.shape[1:])


def _down_projections(
    config: ModelConfig, weights: Mapping[str, Tensor], name: str, arithmetic: Arithmetic
) -> list[Linear]:
    """What reads the layer's input: q_a (or q) and kv_a; as one map where their scales' blocks do
    not straddle."""
    q_name = f"{name}.q" if config.q_lora_rank is None else f"{name}.q_a"
    first = Linear.load(weights, q_name, arithmetic)
    second = Linear.load(weights, f"{name}.kv_a", arithmetic)
    if first.scale is None or second.scale is None:
        return [Linear(torch.cat((first.weight, second.weight)), None, arithmetic)]
    if first.weight.shape[0] % FP8_BLOCK:
        return [first, second]
    weight = torch.cat([each.weight.view(torch.uint8) for each in (first, second)])
    scale = torch.cat((first.scale, second.scale))
    return [Linear(weight.view(first.weight.dtype), scale, arithmetic)]
