"""Torch twins of the sampling kernels; `reference` holds the others."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .sample_state import SamplingState

IN_PROMPT = 1 << 30
"""Bit of a token's count that says that the prompt has it."""
MIN_TEMPERATURE = 1e-6
"""Lower ones, but for 0, count as this: logits / temperature must not overflow."""

_PHILOX_M = (0xD2511F53, 0xCD9E8D57)
_PHILOX_W = (0x9E3779B9, 0xBB67AE85)
_MASK = 0xFFFFFFFF


def philox4x32(counter: tuple[Tensor, Tensor], key: tuple[Tensor, Tensor]) -> Tensor:
    """Philox-4x32-10 (Salmon et al., SC'11): four random words for each counter.

    counter: two int64 tensors of the same shape S holding 32-bit words (the other two are 0), key:
    the same. -> [*S, 4] int64 in [0, 2**32).
    """
    c0, c1 = torch.broadcast_tensors(*counter)
    c2, c3 = torch.zeros_like(c0), torch.zeros_like(c0)
    k0, k1 = key
    for _ in range(10):
        # 32 x 32 -> 64 bits wraps in int64, but its bits are right: shift logically by masking.
        p0, p1 = c0 * _PHILOX_M[0], c2 * _PHILOX_M[1]
        high0, low0 = (p0 >> 32) & _MASK, p0 & _MASK
        high1, low1 = (p1 >> 32) & _MASK, p1 & _MASK
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _PHILOX_W[0]) & _MASK, (k1 + _PHILOX_W[1]) & _MASK
    return torch.stack((c0, c1, c2, c3), dim=-1)


def gumbel_noise(seed: Tensor, position: Tensor, vocab_size: int) -> Tensor:
    """Standard Gumbel noise for every (seed, position, token): the one noise field of dsd.

    seed: [B] int64 (the bits of an unsigned one), position: [B] int64. -> [B, vocab_size] float32.
    Token t of a row uses word t % 4 of the Philox block (t // 4, position). The uniform is small
    where the noise is large, where float32 is finest: noise = -log(-log1p(-u)).
    """
    blocks = torch.arange(-(-vocab_size // 4), dtype=torch.int64, device=seed.device)
    key = (seed[:, None] & _MASK, (seed[:, None] >> 32) & _MASK)
    words = philox4x32((blocks[None], position[:, None].expand(-1, len(blocks))), key)
    uniform = (words.flatten(1)[:, :vocab_size].float() + 0.5) * 2.0**-32
    return -torch.log(-torch.log1p(-uniform.clamp(max=1 - 2.0**-24)))


def filter_logits(
    logits: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, cold: Tensor | float = 1.0
) -> Tensor:
    """Sets what top-k, then top-p, then min-p exclude to -inf.

    logits: [B, V] float32; top_k: [B] int (0: off); top_p, min_p: [B] float32; cold: [B, 1], 1 /
    temperature, if logits have not been divided by it. top-p keeps the smallest set of best tokens
    whose probability reaches it (the best one always); min-p keeps tokens of at least min_p times
    the best one's probability. Of equals the first are the best.
    """
    vocab_size = logits.shape[1]
    ordered, indices = logits.sort(dim=-1, descending=True, stable=True)
    k = torch.where(top_k > 0, top_k, vocab_size)[:, None]
    rank = torch.arange(vocab_size, device=logits.device)[None]
    ordered = ordered.masked_fill(rank >= k, float("-inf"))
    probs = (ordered * cold).double().softmax(dim=-1)
    before = probs.cumsum(dim=-1) - probs
    # A sum near 1 is rounded, so `before` alone would drop tokens of a row whose top-p is off.
    drop = (before >= top_p[:, None]) & (top_p[:, None] < 1.0)
    drop |= probs < min_p[:, None] * probs[:, :1]
    drop[:, 0] = False
    ordered = ordered.masked_fill(drop, float("-inf"))
    return torch.empty_like(logits).scatter_(1, indices, ordered)


def top_logprobs(logits: Tensor, chosen: Tensor, num_top: int) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities of the chosen token and of the best ones.

    logits: [B, V], chosen: [B] int64 -> chosen_logprob [B], top_logprob [B, num_top], top_ids
    [B, num_top].
    """
    logprobs = logits.float().log_softmax(dim=-1)
    top = logprobs.topk(num_top, dim=-1)
    return logprobs.gather(1, chosen[:, None]).squeeze(1), top.values, top.indices


def count_tokens(token_ids: Tensor, num_prompt_tokens: int, counts: Tensor) -> None:
    """Fills a row of `SamplingState.counts`: [V] int32. token_ids: [prompt + generated]."""
    generated = token_ids[num_prompt_tokens:].long()
    counts.copy_(torch.bincount(generated, minlength=len(counts)))
    counts[token_ids[:num_prompt_tokens].long()] |= IN_PROMPT


def adjust_logits(logits: Tensor, rows: Tensor, state: "SamplingState") -> Tensor:
    """Penalties, then bias, then masks; -inf in place of NaN.

    logits: [S, V] float32, left alone; rows: [S] -> [S, V] float32
    """
    out = logits.clone()
    for line, row in enumerate(rows.tolist()):
        _penalise(out[line], row, state)
        for i in range(int(state.num_bias[row])):
            out[line, int(state.bias_ids[row, i])] += state.bias[row, i]
        if state.num_tokens[row] < state.mask_until[row]:
            out[line, state.masked_ids[row, : int(state.num_masked[row])].long()] = float("-inf")
        if state.has_bitmask[row]:
            bits = (state.bitmask[row][:, None] >> torch.arange(32, device=out.device)) & 1
            out[line, bits.flatten()[: out.shape[1]] == 0] = float("-inf")
    return out.nan_to_num_(nan=float("-inf"), posinf=float("inf"), neginf=float("-inf"))


def _penalise(logits: Tensor, row: int, state: "SamplingState") -> None:
    """In place: [V] float32. Off, it must not touch a logit, nor read the counts."""
    presence, frequency = state.presence_penalty[row], state.frequency_penalty[row]
    repetition = state.repetition_penalty[row]
    if presence == 0 and frequency == 0 and repetition == 1:
        return
    count = state.counts[row]
    generated = count & (IN_PROMPT - 1)
    factor = torch.where(logits > 0, repetition.reciprocal(), repetition)
    logits.copy_(torch.where(count != 0, logits * factor, logits))
    logits -= frequency * generated.float()
    logits -= torch.where(generated > 0, presence, torch.zeros_like(presence))


def _whole(logits: Tensor) -> Tensor:
    """[S, V], or [shards, S, V / shards] -> [S, V] float32."""
    return (logits if logits.dim() == 2 else logits.transpose(0, 1).flatten(1)).float()


def _noisy(logits: Tensor, rows: Tensor, state: "SamplingState", draws: Tensor) -> Tensor:
    """logits: [S, V] float32 -> logits / temperature + noise, where a row draws: [S] bool."""
    scaled = logits * _cold(rows, state)
    noise = gumbel_noise(state.seed[rows], state.num_tokens[rows].long(), state.vocab_size)
    return torch.where(draws[:, None], scaled + noise, logits)


def _cold(rows: Tensor, state: "SamplingState") -> Tensor:
    """[S, 1]: 1 / temperature."""
    return state.temperature[rows].clamp(min=MIN_TEMPERATURE).reciprocal()[:, None]


def _draws(rows: Tensor, state: "SamplingState") -> Tensor:
    """[S] bool: which rows have more to do than to take their best token."""
    return (state.temperature[rows] > 0) & (state.top_k[rows] != 1) & (state.top_p[rows] > 0)


def sample_rows(
    logits: Tensor, rows: Tensor, state: "SamplingState", token_ids: Tensor | None = None
) -> Tensor:
    """logits: [S, V] or [shards, S, V / shards], rows: [S] -> [S] int64, which are appended to
    token_ids: [R, L] int32 if there are such."""
    rows = rows.long()
    logits = adjust_logits(_whole(logits), rows, state)
    draws = _draws(rows, state)
    top_k, top_p, min_p = state.top_k[rows], state.top_p[rows], state.min_p[rows]
    filters = draws & ((top_k > 0) | (top_p < 1) | (min_p > 0))
    if filters.any():
        options = (top_k[filters], top_p[filters], min_p[filters])
        logits[filters] = filter_logits(logits[filters], *options, _cold(rows[filters], state))
    if draws.any():
        logits = _noisy(logits, rows, state, draws)
    chosen = logits.argmax(dim=-1)
    if token_ids is not None:
        _append(chosen, rows, state, token_ids)
    return chosen


def _append(chosen: Tensor, rows: Tensor, state: "SamplingState", token_ids: Tensor) -> None:
    rows, chosen = (x[state.num_tokens[rows] < token_ids.shape[1]] for x in (rows, chosen))
    token_ids[rows, state.num_tokens[rows].long()] = chosen.int()
    state.num_tokens[rows] += 1
    penalises = _penalises(rows, state)
    state.counts[rows[penalises], chosen[penalises]] += 1


def _penalises(rows: Tensor, state: "SamplingState") -> Tensor:
    """[S] bool."""
    penalises = (state.presence_penalty[rows] != 0) | (state.frequency_penalty[rows] != 0)
    return penalises | (state.repetition_penalty[rows] != 1)


def near_best(
    logits: Tensor, drafts: Tensor, rows: Tensor, state: "SamplingState", top_k: int, delta: float
) -> Tensor:
    """logits: [S, V] or [shards, S, V / shards], drafts, rows: [S] -> [S] bool."""
    rows, drafts = rows.long(), drafts.long()[:, None]
    logits = adjust_logits(_whole(logits), rows, state)
    draws = _draws(rows, state)
    probs = torch.where(draws[:, None], logits * _cold(rows, state), logits).double().softmax(-1)
    own, prob = logits.gather(1, drafts), probs.gather(1, drafts)[:, 0]
    token = torch.arange(logits.shape[1], device=logits.device)
    before = (logits > own) | ((logits == own) & (token < drafts))
    rank, mass, best = before.sum(dim=1), (probs * before).sum(dim=1), probs.amax(dim=1)
    near = (own[:, 0] > float("-inf")) & (rank < top_k) & (prob >= best - delta)
    k, p = state.top_k[rows], state.top_p[rows]
    kept = ((k == 0) | (rank < k)) & (prob >= state.min_p[rows] * best)
    kept &= (p >= 1) | (mass < p * torch.where(k > 0, mass + prob, 1.0))
    return near & (kept | ~draws)


def settle(
    chosen: Tensor,
    rows: Tensor,
    state: "SamplingState",
    token_ids: Tensor,
    thinking: Tensor,
    think_ids: tuple[int, int],
    near: Tensor | None,
    drafts: Tensor | None,
) -> None:
    """In place: chosen [S] int64, token_ids [R, L], thinking [R], and the counts of `state`."""
    rows = rows.long()
    if near is not None and drafts is not None:
        takes = near & (thinking[rows] != 0) & (drafts != chosen)
        taking, old, new = rows[takes], chosen[takes], drafts[takes].long()
        token_ids[taking, state.num_tokens[taking].long() - 1] = new.int()
        penalises = _penalises(taking, state)
        state.counts[taking[penalises], old[penalises]] -= 1
        state.counts[taking[penalises], new[penalises]] += 1
        chosen[takes] = new
    start, end = think_ids
    ended = thinking[rows].masked_fill(chosen == end, 0)
    thinking[rows] = ended.masked_fill(chosen == start, 1)


def shard_best(
    logits: Tensor, vocab_start: int, rows: Tensor, state: "SamplingState"
) -> tuple[Tensor, Tensor]:
    """logits: [S, W], of tokens from vocab_start on -> value [S] float32, token [S] int64."""
    rows = rows.long()
    whole = torch.full((len(rows), state.vocab_size), float("-inf"), device=logits.device)
    own = slice(vocab_start, vocab_start + logits.shape[1])
    whole[:, own] = logits.float()
    whole = adjust_logits(whole, rows, state)
    own_values = _noisy(whole, rows, state, _draws(rows, state))[:, own]
    token = own_values.argmax(dim=-1)
    return own_values.gather(1, token[:, None]).squeeze(1), token + vocab_start


def merge_shards(values: Tensor, tokens: Tensor) -> Tensor:
    """values, tokens: [shards, S] of `shard_best` -> [S] int64."""
    return tokens.gather(0, values.argmax(dim=0, keepdim=True)).squeeze(0)


def shard_sumexp(logits: Tensor) -> tuple[Tensor, Tensor]:
    """logits: [B, W] -> the largest [B] float32, and the sum of exp(logit - largest) [B]."""
    largest = logits.float().amax(dim=-1).clamp(min=-3e38)
    return largest, (logits.float() - largest[:, None]).exp().sum(dim=-1)


def merge_sumexp(largest: Tensor, total: Tensor) -> Tensor:
    """largest, total: [shards, B] of `shard_sumexp` -> logsumexp over all [B] float32."""
    top = largest.amax(dim=0)
    return top + (total * (largest - top).exp()).sum(dim=0).log()
