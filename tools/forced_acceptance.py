"""Drafts that are accepted as often as somebody says, whatever they are, and experts that all
tokens share: for measuring steps of random weights, whose drafts are never right and whose tokens
choose by themselves. What such a row holds means nothing."""

import torch
from torch import Tensor

from ..model.decodes import Accepts
from ..model.graphs import drafts_of
from ..model.moe import MoE
from ..model.rows import Rows
from ..model.runner import Runner

GRAIN = 4096
OUTWEIGHS = 100.0
"""Scores are below 1."""


def chance_of(length: float, num_nextn: int) -> float:
    """The chance of each draft, were all before it right, that gives a mean of `length` tokens a
    step: 1 + p + p^2 + ... + p^num_nextn."""
    low, high = 0.0, 1.0
    for _ in range(50):
        chance = (low + high) / 2
        if sum(chance**i for i in range(num_nextn + 1)) < length:
            low = chance
        else:
            high = chance
    return high


def forced(length: float, num_nextn: int) -> Accepts:
    """Accepts from 1 to num_nextn + 1 tokens of a row, `length` in the mean; by row and position
    alone, so that it may be captured."""
    chance = chance_of(length, num_nextn)
    limits = [round(GRAIN * chance ** (i + 1)) for i in range(num_nextn)]

    def accepts(rows: Rows, row: Tensor, place: int, _draft: Tensor, _chosen: Tensor) -> Tensor:
        start = rows.tokens.num_tokens[row] - (place + 1)
        return (start * 7919 + row * 104_729) * 2_654_435_761 // 65_536 % GRAIN < limits[place]

    return accepts


@torch.inference_mode()
def share_experts(runner: Runner) -> None:
    """From now on every token takes the same experts: their bias outweighs any score."""
    drafter = runner.drafter
    layers = runner.model.layers + ([drafter.mtp.layer] if drafter is not None else [])
    for layer in layers:
        if isinstance(moe := layer.mlp, MoE):
            config = moe.config
            groups = moe.gate_bias.zero_().view(config.n_group, -1)
            each = -(-config.num_experts_per_tok // config.topk_group)
            groups[: config.topk_group, :each] = OUTWEIGHS


def force(runner: Runner, length: float) -> None:
    """From now on; graphs are captured anew. length: tokens of a step and row, in the mean."""
    num_nextn = runner.rows.num_nextn
    runner.accepts = forced(length, num_nextn)
    if runner.graphs.sizes:
        torch.cuda.synchronize()
        runner.graphs.capture(runner.graphs.sizes, drafts_of(num_nextn), lambda done, total: None)
