"""From router logits to rows sorted by expert, and back."""

from torch import Tensor, float32

from . import reference


def moe_gate(
    logits: Tensor,
    bias: Tensor,
    n_group: int,
    topk_group: int,
    top_k: int,
    norm_topk_prob: bool,
    routed_scaling_factor: float,
) -> tuple[Tensor, Tensor]:
    """logits: [T, E] float32, bias: [E] float32 -> topk_ids [T, top_k] int64, topk_weights
    [T, top_k] float32."""
    assert logits.dtype == float32 and logits.shape[1] == bias.shape[0], (logits.shape, bias.shape)
    assert logits.shape[1] % n_group == 0 and topk_group <= n_group
    return reference.moe_gate(
        logits, bias, n_group, topk_group, top_k, norm_topk_prob, routed_scaling_factor
    )


def permute_by_expert(topk_ids: Tensor, n_experts: int) -> tuple[Tensor, Tensor]:
    """topk_ids: [T, top_k] -> order [T * top_k] int64 into the flattened pairs, counts
    [n_experts]."""
    assert topk_ids.dim() == 2, topk_ids.shape
    return reference.permute_by_expert(topk_ids, n_experts)


def combine_experts(y: Tensor, order: Tensor, topk_weights: Tensor) -> Tensor:
    """y: [T * top_k, N] in expert order, topk_weights: [T, top_k] float32 -> [T, N] in y's
    dtype."""
    assert y.shape[0] == order.shape[0] == topk_weights.numel(), (y.shape, topk_weights.shape)
    return reference.combine_experts(y, order, topk_weights)
