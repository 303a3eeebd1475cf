"""Torch twins of the sampling kernels; `reference` holds the others."""

import torch
from torch import Tensor

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


def apply_penalties(
    logits: Tensor,
    token_ids: Tensor,
    num_prompt_tokens: int,
    presence_penalty: float,
    frequency_penalty: float,
    repetition_penalty: float,
) -> Tensor:
    """Penalties of one row, as OpenAI (presence, frequency: over the generated tokens) and CTRL
    (repetition: over all tokens, arXiv 1909.05858) define them.

    logits: [V] float32, token_ids: [prompt + generated] int64. -> [V] float32.
    """
    vocab_size = logits.shape[0]
    if repetition_penalty != 1.0:
        seen = torch.zeros(vocab_size, dtype=torch.bool, device=logits.device)
        seen[token_ids] = True
        penalised = torch.where(
            logits > 0, logits / repetition_penalty, logits * repetition_penalty
        )
        logits = torch.where(seen, penalised, logits)
    counts = torch.bincount(token_ids[num_prompt_tokens:], minlength=vocab_size)
    return logits - frequency_penalty * counts - presence_penalty * (counts > 0)


def filter_logits(logits: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> Tensor:
    """Sets what top-k, then top-p, then min-p exclude to -inf.

    logits: [B, V] float32, already divided by the temperature; top_k: [B] int64 (0: off); top_p,
    min_p: [B] float32. top-p keeps the smallest set of best tokens whose probability reaches it
    (the best one always); min-p keeps tokens of at least min_p times the best one's probability.
    """
    vocab_size = logits.shape[1]
    ordered, indices = logits.sort(dim=-1, descending=True)
    k = torch.where(top_k > 0, top_k, vocab_size)[:, None]
    rank = torch.arange(vocab_size, device=logits.device)[None]
    ordered = ordered.masked_fill(rank >= k, float("-inf"))
    probs = ordered.softmax(dim=-1)
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
