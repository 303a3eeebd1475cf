from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from dsd.kernels.moe_gate import moe_gate
from dsd.kernels.moe_route import combine_experts, permute_by_expert


@dataclass(frozen=True)
class Case:
    num_tokens: int
    n_experts: int
    n_group: int
    topk_group: int
    top_k: int
    bias: float = 0.1
    """Standard deviation of the correction bias."""
    shift: float = 0.0
    """Added to every bias."""
    norm: bool = True
    factor: float = 2.5


CORRECTNESS = [Case(40, 256, 8, 4, 8), Case(40, 384, 1, 1, 8), Case(40, 64, 1, 1, 6, norm=False)]
CORNER = [
    Case(0, 8, 2, 1, 2),
    Case(20, 8, 8, 3, 3),  # groups of one expert
    Case(20, 8, 4, 4, 3),  # all groups kept
    Case(20, 8, 4, 1, 2),  # one group, taken whole
    Case(20, 8, 2, 1, 1, norm=False, factor=1.0),
    Case(20, 8, 1, 1, 8),  # every expert
    Case(40, 32, 4, 2, 8, bias=3.0),
    Case(40, 32, 4, 2, 16, shift=-5.0),  # every choice negative: masked experts must not win
    Case(40, 32, 4, 2, 16, bias=0.5, shift=-1.0),
]


def naive_gate(logits: Tensor, bias: Tensor, case: Case) -> list[dict[int, float]]:
    """Expert -> weight for each token, in plain Python."""
    found = []
    size = case.n_experts // case.n_group
    for scores in logits.double().sigmoid().tolist():
        choice = [score + float(b) for score, b in zip(scores, bias, strict=True)]
        groups = [choice[g * size : (g + 1) * size] for g in range(case.n_group)]
        best = [sum(sorted(group, reverse=True)[:2]) for group in groups]
        kept = sorted(range(case.n_group), key=lambda g: -best[g])[: case.topk_group]
        allowed = [e for e in range(case.n_experts) if e // size in kept]
        chosen = sorted(allowed, key=lambda e: -choice[e])[: case.top_k]
        total = sum(scores[e] for e in chosen) if case.norm else 1.0
        found.append({e: scores[e] / total * case.factor for e in chosen})
    return found


@pytest.mark.parametrize("case", CORRECTNESS + CORNER, ids=str)
def test_moe_gate_equals_naive_loops(case: Case) -> None:
    logits = torch.randn(case.num_tokens, case.n_experts) * 2
    bias = torch.randn(case.n_experts) * case.bias + case.shift
    ids, weights = moe_gate(
        logits, bias, case.n_group, case.topk_group, case.top_k, case.norm, case.factor
    )
    assert ids.shape == weights.shape == (case.num_tokens, case.top_k)
    assert ids.dtype == torch.int64 and weights.dtype == torch.float32
    want = naive_gate(logits, bias, case)
    for row, (row_ids, row_weights) in enumerate(zip(ids.tolist(), weights.tolist(), strict=True)):
        assert dict(zip(row_ids, row_weights, strict=True)) == pytest.approx(want[row], rel=1e-5)


def test_moe_gate_very_negative_logits_give_finite_weights() -> None:
    ids, weights = moe_gate(torch.full((2, 8), -200.0), torch.zeros(8), 2, 1, 2, True, 2.5)
    assert torch.isfinite(weights).all() and (ids < 8).all()


@pytest.mark.parametrize(("num_tokens", "top_k", "n_experts"), [(0, 2, 4), (1, 1, 1), (50, 6, 64)])
def test_permute_then_combine_with_unit_weights_is_the_sum_of_copies(
    num_tokens: int, top_k: int, n_experts: int
) -> None:
    ids = torch.rand(num_tokens, n_experts).argsort(dim=1)[:, :top_k]
    order, offsets, place = permute_by_expert(ids, n_experts)
    assert offsets.diff(prepend=torch.tensor([0])).tolist() == [
        (ids == e).sum().item() for e in range(n_experts)
    ]
    assert (ids.flatten()[order].diff() >= 0).all()
    assert sorted(order.tolist()) == list(range(num_tokens * top_k))
    x = torch.randn(num_tokens, 5)
    out = combine_experts(x[order // top_k], place, torch.ones(num_tokens, top_k))
    torch.testing.assert_close(out, x * top_k)


def test_permute_by_expert_all_tokens_to_one_expert_keeps_their_order() -> None:
    order, offsets, place = permute_by_expert(torch.full((9, 1), 3), 5)
    assert order.tolist() == place.tolist() == list(range(9))
    assert offsets.tolist() == [0, 0, 0, 9, 9]


def test_permute_by_expert_of_some_experts_leaves_the_others_out() -> None:
    ids = torch.tensor([[5, 2], [9, 3], [2, 4]])
    order, offsets, place = permute_by_expert(ids, 3, first_expert=2)
    assert order[:4].tolist() == [1, 4, 3, 5] and offsets.tolist() == [2, 3, 4]
    assert place.tolist() == [-1, 0, -1, 2, 1, 3]
    y = torch.tensor([[1.0], [10.0], [100.0], [1000.0], [float("nan")], [float("nan")]])
    assert combine_experts(y, place, torch.ones(3, 2)).tolist() == [[1.0], [100.0], [1010.0]]


def test_combine_experts_applies_the_weight_of_the_pair() -> None:
    ids = torch.rand(30, 8).argsort(dim=1)[:, :3]
    weights = torch.rand(30, 3)
    order, _, place = permute_by_expert(ids, 8)
    value_of_expert = torch.randn(8, 4)
    out = combine_experts(value_of_expert[ids.flatten()[order]], place, weights)
    torch.testing.assert_close(out, torch.einsum("tk,tkn->tn", weights, value_of_expert[ids]))
