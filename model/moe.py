"""Mixture of experts: gate, routed experts, shared expert."""

from collections.abc import Mapping

from torch import Tensor

from ..kernels import gemm, moe_route
from ..kernels.moe_items import Tables
from .config import ModelConfig
from .exchange import LocalCopies
from .layers import MLP, Arithmetic, Linear, Quantized, gather_rows, silu_mul
from .parallel import WHOLE, Layout


class MoE:
    """Routed experts chosen per token, plus a shared expert that every token takes.

    A rank of a layout holds some of the experts, or a slice of each, and gives its part of the sum.
    In attention-DP it has tokens of its own: it takes those of the others too, and gets its own
    back.
    """

    def __init__(
        self,
        config: ModelConfig,
        weights: Mapping[str, Tensor],
        name: str,
        arithmetic: Arithmetic,
        layout: Layout = WHOLE,
    ) -> None:
        self.config = config
        self.experts = layout.experts(config)
        self.exchange = LocalCopies(layout.tp_size) if layout.attention_dp else None
        self.gate_weight = weights[f"{name}.gate"]
        if self.gate_weight.dtype != arithmetic.dtype or not self.gate_weight.is_cuda:
            self.gate_weight = self.gate_weight.float()
        self.gate_bias = weights[f"{name}.gate_bias"]
        self.gate_up = Linear.load(weights, f"{name}.experts.gate_up", arithmetic)
        self.down = Linear.load(weights, f"{name}.experts.down", arithmetic)
        has_shared = f"{name}.shared.gate_up" in weights
        self.shared = MLP(weights, f"{name}.shared", arithmetic) if has_shared else None
        self._arithmetic = arithmetic

    def __call__(self, x: Tensor | Quantized, plain: Tensor) -> Tensor:
        """x: [T, hidden] as the experts take it, `plain`: the same as it is -> [T, hidden]."""
        shared = None if self.shared is None else self.shared(x)
        topk_ids, topk_weights = self.route(plain)
        if self.exchange is None:
            return self.routed(x, topk_ids, topk_weights, shared)
        gather = self.exchange.gather
        topk_ids, topk_weights = gather(topk_ids), gather(topk_weights)
        x = self.exchange.gather_rows(x)
        routed = self.exchange.scatter_sum(self.routed(x, topk_ids, topk_weights, None))
        return routed if shared is None else routed + shared

    def routed(
        self, x: Tensor | Quantized, topk_ids: Tensor, topk_weights: Tensor, shared: Tensor | None
    ) -> Tensor:
        """The sum of the experts that this rank holds, by weight, and `shared`."""
        top_k = self.config.num_experts_per_tok
        order, offsets, place = moe_route.permute_by_expert(
            topk_ids, len(self.experts), self.experts.start
        )
        expected = topk_ids.numel() / self.config.n_routed_experts
        tables: Tables = {}
        rows = gather_rows(x, order, offsets, top_k)
        rows = self.gate_up.grouped(rows, offsets, expected, tables)
        rows = self.down.grouped(silu_mul(rows, self._arithmetic), offsets, expected, tables)
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
