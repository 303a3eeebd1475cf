"""Logits to tokens for the rows of a step.

The order is that of `ipc.messages.Sampling`: penalties, bias, mask; then temperature and filters;
then the noise field of `kernels.sample.gumbel_noise`, and the argmax. So a row's token depends on
its own logits, seed and position alone: not on the batch, the step, or a replay.
"""

import torch
from torch import Tensor

from ..ipc.messages import LogprobEntry, Sampling
from ..kernels import sample
from .rows import Rows

PROMPT_LOGITS_SLICE = 512
"""Prompt positions whose logits exist at once."""


def choose(logits: Tensor, row_ids: list[int], rows: Rows) -> Tensor:
    """logits: [S, V] float32, one for each of `row_ids` -> token ids [S] int64. `logits` is left
    alone."""
    adjusted = _adjust(logits, row_ids, rows)
    chosen = adjusted.argmax(dim=-1)
    noisy = [i for i, row in enumerate(row_ids) if rows.sampling[row].temperature > 0]
    if noisy:
        index = torch.tensor(noisy, device=logits.device)
        which = torch.tensor([row_ids[i] for i in noisy], device=logits.device)
        chosen[index] = _draw(adjusted[index], which, [row_ids[i] for i in noisy], rows)
    return chosen


def _draw(logits: Tensor, which: Tensor, row_ids: list[int], rows: Rows) -> Tensor:
    logits = logits / rows.temperature[which, None]
    if any(_filters(rows.sampling[row]) for row in row_ids):
        logits = sample.filter_logits(
            logits, rows.top_k[which], rows.top_p[which], rows.min_p[which]
        )
    noise = sample.gumbel_noise(rows.seed[which], rows.num_tokens[which], logits.shape[1])
    return (logits + noise).argmax(dim=-1)


def _filters(sampling: Sampling) -> bool:
    return sampling.top_k > 0 or sampling.top_p < 1.0 or sampling.min_p > 0.0


def _adjust(logits: Tensor, row_ids: list[int], rows: Rows) -> Tensor:
    copied = False
    for i, row in enumerate(row_ids):
        sampling = rows.sampling[row]
        if not _adjusts(sampling):
            continue
        if not copied:
            logits, copied = logits.clone(), True
        logits[i] = _adjust_row(logits[i], row, sampling, rows)
    return logits


def _adjusts(sampling: Sampling) -> bool:
    return bool(
        sampling.presence_penalty
        or sampling.frequency_penalty
        or sampling.repetition_penalty != 1.0
        or sampling.logit_bias
        or sampling.min_tokens
    )


def _adjust_row(logits: Tensor, row: int, sampling: Sampling, rows: Rows) -> Tensor:
    num_tokens, num_prompt = int(rows.num_tokens[row]), rows.num_prompt_tokens[row]
    logits = sample.apply_penalties(
        logits,
        rows.token_ids[row, :num_tokens],
        num_prompt,
        sampling.presence_penalty,
        sampling.frequency_penalty,
        sampling.repetition_penalty,
    )
    for token_id, bias in sampling.logit_bias:
        logits[token_id] += bias
    if num_tokens - num_prompt < sampling.min_tokens:
        logits[list(sampling.masked_token_ids)] = float("-inf")
    return logits


def entries(logits: Tensor, chosen: Tensor, num_top: int) -> tuple[LogprobEntry, ...]:
    """logits: [S, V], chosen: [S] -> one entry for each position, with its `num_top` best."""
    logprobs, top, top_ids = sample.top_logprobs(logits, chosen, num_top)
    columns = zip(chosen.tolist(), logprobs.tolist(), top_ids.tolist(), top.tolist(), strict=True)
    return tuple(
        LogprobEntry(token_id, logprob, tuple(zip(ids, values, strict=True)))
        for token_id, logprob, ids, values in columns
    )
