"""Logits to tokens and log-probabilities for the lines of a step.

The order is that of `ipc.messages.Sampling`: penalties, bias, mask; then temperature and filters;
then the noise field of `reference_sample.gumbel_noise`, and the argmax. So a row's token depends on
its own logits, seed and position alone: not on the batch, the step, or a replay.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..ipc.messages import LogprobEntry
from ..kernels import sample
from ..kernels.sample_relaxed import near_best, settle
from .rows import Rows

PROMPT_LOGITS_SLICE = 512
"""Prompt positions whose logits exist at once."""


def choose(logits: Tensor, lines: Tensor, rows: Rows, drafts: Tensor | None = None) -> Tensor:
    """Chooses a token for each line, and appends it to the line's row. Where acceptance is relaxed
    and the row thinks, a draft that is nearly as good is chosen instead.

    logits: [S, V] float32, left alone; lines: [S] int32, the rows; drafts: [S] int32, of the tokens
    that are chosen; all may be captured in a graph
    -> token ids [S] int64
    """
    state, relaxed, near = rows.choice, rows.relaxed, None
    if relaxed is not None and drafts is not None:
        near = near_best(logits, drafts, lines, state, relaxed.top_k, relaxed.delta)
    chosen = sample.sample_and_append(logits, lines, state, rows.tokens.token_ids)
    if relaxed is not None:
        own = (rows.tokens.token_ids, rows.thinking, relaxed.think_ids)
        settle(chosen, lines, state, *own, near, drafts)
    return chosen


@dataclass(frozen=True)
class Logprobs:
    """Log-probabilities of tokens, in the host's memory once their step has ended."""

    token_ids: Tensor
    logprobs: Tensor
    top_ids: Tensor
    top_logprobs: Tensor
    """[S] and [S, most], in the host's memory."""

    @classmethod
    def of(cls, logits: Tensor, chosen: Tensor, num_top: int) -> "Logprobs":
        """logits: [S, V], chosen: [S]; the `num_top` best besides."""
        logprobs, top, top_ids = sample.top_logprobs(logits, chosen, num_top)
        return cls(*(to_host(each) for each in (chosen, logprobs, top_ids, top)))

    def entries(self, wanted: Sequence[int] | None = None) -> list[LogprobEntry]:
        """One for each position, with as many of the best as `wanted` says (None: all)."""
        columns = zip(
            self.token_ids.tolist(), self.logprobs.tolist(), self.top_ids.tolist(),
            self.top_logprobs.tolist(), strict=True,
        )  # fmt: skip
        return [
            LogprobEntry(token_id, logprob, tuple(zip(ids[:num], values[:num], strict=True)))
            for (token_id, logprob, ids, values), num in zip(
                columns, wanted or [None] * len(self.token_ids), strict=True
            )
        ]


def to_device(values: Sequence[int], device: torch.device) -> Tensor:
    """[len(values)] int64, on its way from pinned memory: the host does not wait for the steps
    before it, as it would for a plain copy."""
    return torch.tensor(values, pin_memory=device.type == "cuda").to(device, non_blocking=True)


def to_host(x: Tensor) -> Tensor:
    """A copy in pinned memory, on its way; x itself, if it is there."""
    if not x.is_cuda:
        return x
    host = torch.empty(x.shape, dtype=x.dtype, pin_memory=True)
    return host.copy_(x, non_blocking=True)
