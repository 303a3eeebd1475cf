"""Drafts that are accepted as often as somebody says, whatever they are, and experts that all
tokens share: for measuring steps of random weights, whose drafts are never right and whose tokens
choose by themselves. What such a row holds means nothing."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..kernels.compat import overlap, runs_kernels, wait_previous
from ..model.decodes import Accepts
from ..model.graphs import drafts_of
from ..model.moe import MoE
from ..model.rows import Rows
from ..model.runner import Runner

GRAIN = 4096
WORD = 0xFFFFFFFF
BLOCK = 128
"""Lines that one program looks at."""
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

    def accepts(rows: Rows, lines: Tensor, place: int) -> Tensor:
        return hashed_below(limits[place], lines, rows.tokens.num_tokens, place + 1)

    return accepts


def hashed_below(limit: int, rows: Tensor, num_tokens: Tensor, back: int) -> Tensor:
    """Whether the hash, of GRAIN values, of each row and of its num_tokens - back is below limit.
    rows: [B] int32; num_tokens: [R] int32 -> [B] bool"""
    if not runs_kernels(rows):
        row, start = rows.long(), num_tokens[rows.long()].long() - back
        hashed = (start * 2_654_435_761 + row * 2_246_822_507) & WORD
        for shift, factor in ((15, 739_982_445), (12, 695_872_825)):
            hashed = ((hashed ^ (hashed >> shift)) * factor) & WORD
        return (hashed ^ (hashed >> 15)) % GRAIN < limit
    out = torch.empty(len(rows), dtype=torch.bool, device=rows.device)
    _hashed_below[(triton.cdiv(len(rows), BLOCK),)](
        rows, num_tokens, out, len(rows), limit, back, GRAIN=GRAIN, BLOCK=BLOCK, num_warps=1,
        **overlap(rows)
    )  # fmt: skip
    return out


@triton.jit(
    do_not_specialize=["num_lines", "limit", "back"], do_not_specialize_on_alignment=["rows"]
)
def _hashed_below(
    rows, num_tokens, out, num_lines, limit, back, GRAIN: tl.constexpr, BLOCK: tl.constexpr,
    PDL: tl.constexpr
):  # fmt: skip
    wait_previous(PDL)
    line = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = line < num_lines
    row = tl.load(rows + line, inside, 0).to(tl.int64)
    start = (tl.load(num_tokens + row, inside, 0) - back).to(tl.int64)
    hashed = (start * 2654435761 + row * 2246822507) & 0xFFFFFFFF
    hashed = ((hashed ^ (hashed >> 15)) * 739982445) & 0xFFFFFFFF
    hashed = ((hashed ^ (hashed >> 12)) * 695872825) & 0xFFFFFFFF
    tl.store(out + line, (hashed ^ (hashed >> 15)) % GRAIN < limit, inside)


@torch.inference_mode()
def share_experts(runner: Runner) -> None:
    """From now on every token takes the same experts: their bias outweighs any score."""
    drafter = runner.drafter
    layers = runner.model.layers + ([drafter.mtp.layer] if drafter is not None else [])
    for layer in layers:
        if isinstance(moe := layer.mlp, MoE):
            config = moe.config
            groups = moe.gate_bias.zero_().view(config.n_group, -1)
            for i in range(config.num_experts_per_tok):
                groups[i % config.topk_group, i // config.topk_group] = OUTWEIGHS
    if runner.device.type == "cuda":
        torch.cuda.synchronize()  # kernels read constants early


def force(runner: Runner, length: float) -> None:
    """From now on; graphs are captured anew. length: tokens of a step and row, in the mean."""
    num_nextn = runner.rows.num_nextn
    runner.accepts = forced(length, num_nextn)
    if runner.graphs.sizes:
        torch.cuda.synchronize()
        runner.graphs.capture(runner.graphs.sizes, drafts_of(num_nextn), lambda done, total: None)
