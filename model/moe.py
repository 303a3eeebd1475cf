"""Mixture of experts: gate, routed experts, shared expert."""

from collections.abc import Mapping

from torch import Tensor

from ..kernels import fused, gemm, moe_route
from .config import ModelConfig
from .layers import MLP, Arithmetic, Linear


class MoE:
    """Routed experts chosen per token, plus a shared expert that every token takes."""

    def __init__(
        self, config: ModelConfig, weights: Mapping[str, Tensor], name: str, arithmetic: Arithmetic
    ) -> None:
        self.config = config
        self.gate_weight = weights[f"{name}.gate"].float()
        self.gate_bias = weights[f"{name}.gate_bias"]
        self.gate_up = Linear(weights, f"{name}.experts.gate_up", arithmetic)
        self.down = Linear(weights, f"{name}.experts.down", arithmetic)
        has_shared = config.n_shared_experts > 0
        self.shared = MLP(weights, f"{name}.shared", arithmetic) if has_shared else None

    def __call__(self, x: Tensor) -> Tensor:
        """x: [T, hidden] -> [T, hidden]."""
        topk_ids, topk_weights = self.route(x)
        order, counts = moe_route.permute_by_expert(topk_ids, self.config.n_routed_experts)
        rows = x[order // topk_ids.shape[1]]
        rows = fused.silu_mul(self.gate_up.grouped(rows, counts))
        rows = self.down.grouped(rows, counts)
        routed = moe_route.combine_experts(rows, order, topk_weights)
        return routed if self.shared is None else routed + self.shared(x)

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """topk_ids [T, top_k] and topk_weights. Logits are float32 whatever x is, as published."""
        config = self.config
        return moe_route.moe_gate(
            gemm.linear(x.float(), self.gate_weight, None),
            self.gate_bias,
            config.n_group,
            config.topk_group,
            config.num_experts_per_tok,
            config.norm_topk_prob,
            config.routed_scaling_factor,
        )
