"""Mixture of experts: gate, routed experts, shared expert."""

from collections.abc import Callable, Mapping
from functools import partial

from torch import Tensor

from ..kernels import moe_dispatch, moe_gate, moe_route
from ..kernels.moe_items import Tables
from .beside import beside, nothing
from .config import ModelConfig
from .exchange import LocalCopies
from .layers import MLP, Arithmetic, Linear, Quantized, gather_rows, silu_mul
from .parallel import WHOLE, Layout

BESIDE_TOKENS = 256
"""Up to so many the shared expert is computed on the second stream."""


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
        shared = self._start_shared(x, plain)
        topk_ids, topk_weights = self.route(plain)
        if self.exchange is None:
            return self.routed(x, topk_ids, topk_weights, shared)
        gather = self.exchange.gather
        topk_ids, topk_weights = gather(topk_ids), gather(topk_weights)
        x = self.exchange.gather_rows(x)
        routed = self.exchange.scatter_sum(self.routed(x, topk_ids, topk_weights, nothing))
        own = shared()
        return routed if own is None else routed + own

    def _start_shared(self, x: Tensor | Quantized, plain: Tensor) -> Callable[[], Tensor | None]:
        """The shared expert's part, for whoever calls for it. Of few tokens it is computed beside
        the routed experts: until those read their weights the GPU is nearly idle."""
        if self.shared is None:
            return nothing
        if plain.is_cuda and len(plain) <= BESIDE_TOKENS:
            return beside(partial(self.shared, x), plain.device)
        part = self.shared(x)
        return lambda: part

    def routed(
        self,
        x: Tensor | Quantized,
        topk_ids: Tensor,
        topk_weights: Tensor,
        shared: Callable[[], Tensor | None],
    ) -> Tensor:
        """The sum of the experts that this rank holds, by weight, and `shared`'s."""
        pairs, dtype = topk_ids.numel(), self._arithmetic.dtype
        expected = pairs / self.config.n_routed_experts
        maps = self.gate_up.weight, self.down.weight
        if isinstance(x, Quantized) and moe_dispatch.dispatches(pairs, expected, dtype, *maps):
            rows, place = self._dispatched(x, topk_ids, expected)
        else:
            rows, place = self._permuted(x, topk_ids, expected)
        return moe_route.combine_experts(rows, place, topk_weights, shared())

    def _dispatched(self, x: Quantized, topk_ids: Tensor, expected: float) -> tuple[Tensor, Tensor]:
        """What the experts make of few rows, in their order, and the place of each pair there."""
        held = self.experts
        rows, scale, place, tiles = moe_dispatch.dispatch(
            *x, topk_ids, len(held), held.start, expected
        )
        hidden = self.gate_up.tiled(Quantized(rows, scale), tiles)
        active = moe_dispatch.silu_mul_dispatched(hidden, tiles, self._arithmetic.ue8m0)
        return self.down.tiled(Quantized(*active), tiles), place

    def _permuted(
        self, x: Tensor | Quantized, topk_ids: Tensor, expected: float
    ) -> tuple[Tensor, Tensor]:
        """The same of any rows: a kernel for each step."""
        order, offsets, place = moe_route.permute_by_expert(
            topk_ids, len(self.experts), self.experts.start
        )
        tables: Tables = {}
        rows = gather_rows(x, order, offsets, topk_ids.shape[1])
        rows = self.gate_up.grouped(rows, offsets, expected, tables)
        rows = self.down.grouped(silu_mul(rows, self._arithmetic), offsets, expected, tables)
        return rows, place

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """topk_ids [T, top_k] and topk_weights. Logits are float32 whatever x is, as published."""
        config = self.config
        if self.gate_weight.dtype != x.dtype:
            x = x.to(self.gate_weight.dtype)
        return moe_gate.moe_gate(
            moe_gate.gate_logits(x, self.gate_weight),
            self.gate_bias,
            config.n_group,
            config.topk_group,
            config.num_experts_per_tok,
            config.norm_topk_prob,
            config.routed_scaling_factor,
        )
