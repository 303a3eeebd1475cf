"""Mixture of experts: gate, routed experts, shared expert."""

from collections.abc import Mapping

from torch import Tensor

from ..kernels import gemm, moe_route
from ..kernels.moe_items import Tables
from .config import ModelConfig
from .layers import MLP, Arithmetic, Linear, Quantized, gather_rows, silu_mul


class MoE:
    """Routed experts chosen per token, plus a shared expert that every token takes."""

    def __init__(
        self, config: ModelConfig, weights: Mapping[str, Tensor], name: str, arithmetic: Arithmetic
    ) -> None:
        self.config = config
        self.gate_weight = weights[f"{name}.gate"]
        if self.gate_weight.dtype != arithmetic.dtype or not self.gate_weight.is_cuda:
            self.gate_weight = self.gate_weight.float()
        self.gate_bias = weights[f"{name}.gate_bias"]
        self.gate_up = Linear.load(weights, f"{name}.experts.gate_up", arithmetic)
        self.down = Linear.load(weights, f"{name}.experts.down", arithmetic)
        has_shared = config.n_shared_experts > 0
        self.shared = MLP(weights, f"{name}.shared", arithmetic) if has_shared else None
        self._arithmetic = arithmetic

    def __call__(self, x: Tensor | Quantized, plain: Tensor) -> Tensor:
        """x: [T, hidden] as the experts take it, `plain`: the same as it is -> [T, hidden]."""
        config, top_k = self.config, self.config.num_experts_per_tok
        topk_ids, topk_weights = self.route(plain)
        order, offsets, place = moe_route.permute_by_expert(topk_ids, config.n_routed_experts)
        expected = topk_ids.numel() / config.n_routed_experts
        tables: Tables = {}
        rows = gather_rows(x, order, offsets, top_k)
        rows = self.gate_up.grouped(rows, offsets, expected, tables)
        rows = self.down.grouped(silu_mul(rows, self._arithmetic), offsets, expected, tables)
        shared = None if self.shared is None else self.shared(x)
        return moe_route.combine_experts(rows, place, topk_weights, shared)

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """topk_ids [T, top_k] and topk_weights. Logits are float32 whatever x is, as published."""
        config = self.config
        if self.gate_weight.dtype != x.dtype:
            x = x.to(self.gate_weight.dtype)
        return moe_route.moe_gate(
            gemm.linear_float32(x, self.gate_weight),
            self.gate_bias,
            config.n_group,
            config.topk_group,
            config.num_experts_per_tok,
            config.norm_topk_prob,
            config.routed_scaling_factor,
        )
