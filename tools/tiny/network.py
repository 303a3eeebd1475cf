"""The small model as a torch module, for training: whole sequences, no cache, with gradients.

The arithmetic is that of `model/`, and the parts of it that can carry gradients are the same
functions (`kernels.reference`). Parameter names are the published checkpoint's, so an export is a
copy; only the experts are stacked. `tests/tools/test_tiny.py` holds this module against `model/`.

Every expert computes every token, and the gate's weights (zero for those not chosen) sum them up:
at this size one wide matrix product is faster than sorting tokens by expert.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...kernels import reference
from ...model import rope
from ...model.config import ModelConfig

BIAS_UPDATE_SPEED = 1e-3
"""gamma of auxiliary-loss-free balancing, arXiv 2412.19437, section 2.1.2."""


class Packed(NamedTuple):
    """Rows of several documents each."""

    input_ids: Tensor
    """[B, S] int64."""
    positions: Tensor
    """[B, S] int64, counted from each document's start."""
    mask: Tensor
    """[B, 1, S, S] bool: may the query (row) see the key (column)?"""


class RMSNorm(nn.Module):
    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return reference.rms_norm(x, self.weight, self.eps)


def linear(n: int, k: int) -> nn.Linear:
    layer = nn.Linear(k, n, bias=False)
    nn.init.normal_(layer.weight, std=k**-0.5)
    return layer


class Attention(nn.Module):
    """Plain multi-head latent attention."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        assert config.q_lora_rank is not None
        self.config, heads = config, config.num_attention_heads
        self.q_a_proj = linear(config.q_lora_rank, config.hidden_size)
        self.q_a_layernorm = RMSNorm(config.q_lora_rank, config.rms_norm_eps)
        self.q_b_proj = linear(heads * config.qk_head_dim, config.q_lora_rank)
        self.kv_a_proj_with_mqa = linear(config.latent_dim, config.hidden_size)
        self.kv_a_layernorm = RMSNorm(config.kv_lora_rank, config.rms_norm_eps)
        kv_width = heads * (config.qk_nope_head_dim + config.v_head_dim)
        self.kv_b_proj = linear(kv_width, config.kv_lora_rank)
        self.o_proj = linear(config.hidden_size, heads * config.v_head_dim)

    def forward(self, x: Tensor, batch: Packed, cos: Tensor, sin: Tensor) -> Tensor:
        config, heads = self.config, self.config.num_attention_heads
        shape = (*x.shape[:2], heads, -1)
        nope, pe = config.qk_nope_head_dim, config.qk_rope_head_dim
        q = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x))).view(shape)
        q_nope, q_pe = q.split([nope, pe], dim=-1)
        latent, k_pe = self.kv_a_proj_with_mqa(x).split([config.kv_lora_rank, pe], dim=-1)
        kv = self.kv_b_proj(self.kv_a_layernorm(latent)).view(shape)
        k_nope, v = kv.split([nope, config.v_head_dim], dim=-1)
        q_pe = reference.apply_rope(q_pe.flatten(0, 1), cos, sin).view(q_pe.shape)
        k_pe = reference.apply_rope(k_pe.flatten(0, 1), cos, sin).view(k_pe.shape)
        q = torch.cat((q_nope, q_pe), dim=-1)
        k = torch.cat((k_nope, k_pe[:, :, None].expand_as(q_pe)), dim=-1)
        out = F.scaled_dot_product_attention(
            q.transpose(1, 2),
            k.transpose(1, 2),
            v.transpose(1, 2),
            attn_mask=batch.mask,
            scale=config.softmax_scale,
        )
        return self.o_proj(out.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    def __init__(self, hidden: int, width: int) -> None:
        super().__init__()
        self.gate_proj = linear(width, hidden)
        self.up_proj = linear(width, hidden)
        self.down_proj = linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Gate(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(
            torch.randn(config.n_routed_experts, config.hidden_size) * config.hidden_size**-0.5
        )
        self.register_buffer("e_score_correction_bias", torch.zeros(config.n_routed_experts))
        self.register_buffer("load", torch.zeros(config.n_routed_experts), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """x: [T, hidden] -> [T, E]: each expert's weight, 0 where it was not chosen."""
        config = self.config
        with torch.autocast(x.device.type, enabled=False):
            logits = x.float() @ self.weight.float().t()
            ids, weights = reference.moe_gate(
                logits,
                self.e_score_correction_bias,
                config.n_group,
                config.topk_group,
                config.num_experts_per_tok,
                config.norm_topk_prob,
                config.routed_scaling_factor,
            )
        if self.training:
            ones = torch.ones_like(ids, dtype=self.load.dtype).flatten()
            self.load.scatter_add_(0, ids.flatten(), ones)
        return torch.zeros_like(logits).scatter(1, ids, weights)

    def update_bias(self) -> None:
        """Towards equal load: up for experts below the mean, down for those above."""
        self.e_score_correction_bias += BIAS_UPDATE_SPEED * torch.sign(self.load.mean() - self.load)
        self.load.zero_()


class Experts(nn.Module):
    """All experts of a layer, stacked."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        experts, hidden = config.n_routed_experts, config.hidden_size
        width = config.moe_intermediate_size
        self.gate_proj = nn.Parameter(torch.randn(experts, width, hidden) * hidden**-0.5)
        self.up_proj = nn.Parameter(torch.randn(experts, width, hidden) * hidden**-0.5)
        self.down_proj = nn.Parameter(torch.randn(experts, hidden, width) * width**-0.5)

    def forward(self, x: Tensor, weights: Tensor) -> Tensor:
        """x: [T, hidden], weights: [T, E] -> [T, hidden]."""
        experts, width, _ = self.gate_proj.shape
        gate = F.linear(x, self.gate_proj.flatten(0, 1))
        up = F.linear(x, self.up_proj.flatten(0, 1))
        inner = (F.silu(gate) * up).view(-1, experts, width) * weights[..., None].to(gate.dtype)
        return F.linear(inner.flatten(1), self.down_proj.transpose(0, 1).flatten(1))


class MoE(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate = Gate(config)
        self.experts = Experts(config)
        shared = config.moe_intermediate_size * config.n_shared_experts
        self.shared_experts = MLP(config.hidden_size, shared)

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(0, 1)
        return self.experts(flat, self.gate(flat)).view(x.shape) + self.shared_experts(x)


class Layer(nn.Module):
    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.self_attn = Attention(config)
        self.mlp = (
            MoE(config)
            if config.is_moe(layer)
            else MLP(config.hidden_size, config.intermediate_size)
        )
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x: Tensor, batch: Packed, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), batch, cos, sin)
        return x + self.mlp(self.post_attention_layernorm(x))


class SharedHead(nn.Module):
    """The MTP module's own norm; its head is the model's."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class MTPLayer(Layer):
    """Predicts token i + 2 from the hidden state at i and token i + 1 (report, section 2.2)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config, config.num_hidden_layers)
        self.enorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.hnorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.eh_proj = linear(config.hidden_size, 2 * config.hidden_size)
        self.shared_head = SharedHead(config)

    def combine(self, hidden: Tensor, next_embedding: Tensor) -> Tensor:
        return self.eh_proj(torch.cat((self.enorm(next_embedding), self.hnorm(hidden)), dim=-1))


class Model(nn.Module):
    """`model.` of the checkpoint: embedding, layers (the MTP layer last), norm."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        nn.init.normal_(self.embed_tokens.weight, std=1.0)
        layers: list[nn.Module] = [Layer(config, i) for i in range(config.num_hidden_layers)]
        self.layers = nn.ModuleList([*layers, MTPLayer(config)])
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class Network(nn.Module):
    """Logits for the next token and, from the MTP module, for the one after it."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Model(config)
        self.lm_head = linear(config.vocab_size, config.hidden_size)
        cos, sin = rope.tables(
            config.rope,
            config.qk_rope_head_dim,
            config.max_position_embeddings,
            torch.device("cpu"),
        )
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def forward(self, batch: Packed) -> tuple[Tensor, Tensor]:
        """[B, S, V] twice. The second is meaningless at the last position of a row."""
        positions = batch.positions.flatten()
        cos, sin = self.cos[positions], self.sin[positions]
        embedding = self.model.embed_tokens(batch.input_ids)
        x = embedding
        for layer in self.model.layers[:-1]:
            x = layer(x, batch, cos, sin)
        hidden = self.model.norm(x)
        mtp = self.model.layers[-1]
        x = mtp(mtp.combine(hidden, embedding.roll(-1, dims=1)), batch, cos, sin)
        return self.lm_head(hidden), self.lm_head(mtp.shared_head.norm(x))

    def gates(self) -> list[Gate]:
        return [module for module in self.modules() if isinstance(module, Gate)]
