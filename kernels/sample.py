"""From logits to tokens: penalties, filters, the noise field, log-probabilities.

On the GPU a row of logits is cut into parts, so that few rows fill the card; parts are joined by a
second kernel. Nothing here waits for the device: all may be captured in a CUDA graph.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor, float32, int32, int64

from . import reference_sample as reference
from .compat import runs_kernels

PART = 2048
"""Tokens of one row that one program looks at; a multiple of 4 (a Philox block) and 32 (a mask)."""
FILTER_BLOCK = 8192
"""Tokens that a program of `filter_logits`, which has a row to itself, looks at at once."""
IN_PROMPT = 1 << 30
"""Bit of a token's count that says that the prompt has it."""


def gumbel_noise(seed: Tensor, position: Tensor, vocab_size: int) -> Tensor:
    """The noise field itself; `gumbel_argmax` draws from it without writing it down.

    seed, position: [B] int64 -> [B, vocab_size] float32, the same for a (seed, position, token)
    whatever the batch.
    """
    assert seed.shape == position.shape, (seed.shape, position.shape)
    if not runs_kernels(seed):
        return reference.gumbel_noise(seed, position, vocab_size)
    assert seed.dtype == position.dtype == int64, (seed.dtype, position.dtype)
    assert seed.is_contiguous() and position.is_contiguous()
    noise = torch.empty(len(seed), vocab_size, dtype=float32, device=seed.device)
    _noise[_parts(noise)](seed, position, noise, VOCAB=vocab_size, PART=PART)
    return noise


def argmax(logits: Tensor) -> Tensor:
    """logits: [B, V] float32 -> the best token of each row [B] int64, the first of equals."""
    if not runs_kernels(logits):
        return logits.argmax(dim=-1)
    return _launch_argmax(logits, None, None, None)


def gumbel_argmax(logits: Tensor, temperature: Tensor, seed: Tensor, position: Tensor) -> Tensor:
    """Draws each row's token from softmax(logits / temperature) with the noise field.

    logits: [B, V] float32, rows of unit stride; -inf is never drawn while anything else is there
    temperature: [B] float32; a row of 0 takes its best token, without noise
    seed, position: [B] int64
    -> [B] int64
    """
    assert temperature.shape == seed.shape == position.shape == logits.shape[:1]
    if not runs_kernels(logits):
        noise = reference.gumbel_noise(seed, position, logits.shape[1])
        noisy = logits / temperature[:, None] + noise
        return torch.where(temperature[:, None] > 0, noisy, logits).argmax(dim=-1)
    assert temperature.dtype == float32 and seed.dtype == position.dtype == int64
    assert temperature.is_contiguous() and seed.is_contiguous() and position.is_contiguous()
    return _launch_argmax(logits, temperature, seed, position)


def _parts(logits: Tensor) -> tuple[int, int]:
    return logits.shape[0], triton.cdiv(logits.shape[1], PART)


def _launch_argmax(
    logits: Tensor, temperature: Tensor | None, seed: Tensor | None, position: Tensor | None
) -> Tensor:
    assert logits.dtype == float32 and logits.dim() == 2, (logits.dtype, logits.shape)
    assert logits.stride(1) == 1, logits.stride()
    grid = _parts(logits)
    best = torch.empty(grid, dtype=float32, device=logits.device)
    token = torch.empty(grid, dtype=int32, device=logits.device)
    out = torch.empty(grid[0], dtype=int64, device=logits.device)
    _argmax_parts[grid](
        logits, temperature, seed, position, best, token, logits.stride(0),
        VOCAB=logits.shape[1], PART=PART
    )  # fmt: skip
    _join_argmax[grid[:1]](
        best, token, out, PARTS=grid[1], BLOCK=triton.next_power_of_2(grid[1]), num_warps=1
    )
    return out


def filter_logits(logits: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> Tensor:
    """Sets what top-k, then top-p, then min-p exclude to -inf; of equals the first are kept.

    logits: [B, V] float32 after the temperature, rows of unit stride
    top_k: [B] int64 (0: off); top_p (1: off), min_p (0: off): [B] float32
    -> [B, V] float32
    """
    assert logits.dtype == float32 and logits.dim() == 2, (logits.dtype, logits.shape)
    if not runs_kernels(logits):
        return reference.filter_logits(logits, top_k, top_p, min_p)
    assert top_k.dtype == int64 and top_p.dtype == min_p.dtype == float32
    assert logits.stride(1) == 1, logits.stride()
    out = torch.empty(logits.shape, dtype=float32, device=logits.device)
    _filter[logits.shape[:1]](
        logits, top_k, top_p, min_p, out, logits.stride(0),
        VOCAB=logits.shape[1], BLOCK=FILTER_BLOCK, num_warps=16
    )  # fmt: skip
    return out


def top_logprobs(logits: Tensor, chosen: Tensor, num_top: int) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities of the chosen token and of the best ones.

    logits: [B, V] float, rows of unit stride; chosen: [B] int64
    -> chosen_logprob [B], top_logprob and top_ids [B, num_top]
    """
    assert chosen.shape == logits.shape[:1], (chosen.shape, logits.shape)
    if not runs_kernels(logits):
        return reference.top_logprobs(logits, chosen, num_top)
    lse = logsumexp(logits)
    top = logits.topk(num_top, dim=-1)
    chosen_logprob = logits.gather(1, chosen[:, None]).squeeze(1).float() - lse
    return chosen_logprob, top.values.float() - lse[:, None], top.indices


def logsumexp(logits: Tensor) -> Tensor:
    """logits: [B, V] float, rows of unit stride -> [B] float32."""
    if not runs_kernels(logits):
        return logits.float().logsumexp(dim=-1)
    assert logits.dim() == 2 and logits.stride(1) == 1, (logits.shape, logits.stride())
    grid = _parts(logits)
    largest = torch.empty(grid, dtype=float32, device=logits.device)
    total = torch.empty(grid, dtype=float32, device=logits.device)
    out = torch.empty(grid[0], dtype=float32, device=logits.device)
    _sumexp_parts[grid](logits, largest, total, logits.stride(0), VOCAB=logits.shape[1], PART=PART)
    _join_sumexp[grid[:1]](
        largest, total, out, PARTS=grid[1], BLOCK=triton.next_power_of_2(grid[1]), num_warps=1
    )
    return out


@dataclass(frozen=True)
class Adjustments:
    """What `adjust_logits` knows of the R rows of a device, all contiguous."""

    counts: Tensor
    """[R, V] int32: how often the row generated the token; plus IN_PROMPT if its prompt has it."""
    presence_penalty: Tensor
    frequency_penalty: Tensor
    repetition_penalty: Tensor
    """These three: [R] float32; 0, 0 and 1 are off."""
    bias_ids: Tensor
    bias: Tensor
    num_bias: Tensor
    """[R, L] int32, [R, L] float32, [R] int32; what is behind num_bias is never read."""
    masked_ids: Tensor
    num_masked: Tensor
    """[R, M] int32, [R] int32: tokens (stops, mostly) banned while num_tokens < mask_until."""
    num_tokens: Tensor
    mask_until: Tensor
    """[R] int64, prompt and generated."""
    bitmask: Tensor
    has_bitmask: Tensor
    """[R, ceil(V/32)] int32, [R] bool: bit i of word w allows token 32 w + i, if there is one."""


def adjust_logits(logits: Tensor, rows: Tensor, state: Adjustments) -> Tensor:
    """Penalties, then bias, then the masks, for every line of a step at once; GPU only.

    logits: [S, V] float32, rows of unit stride, left alone
    rows: [S] int64, the row in `state` of each line
    -> [S, V] float32
    """
    assert runs_kernels(logits), logits.device
    assert logits.dtype == float32 and logits.dim() == 2, (logits.dtype, logits.shape)
    assert logits.stride(1) == 1 and rows.shape == logits.shape[:1], (logits.stride(), rows.shape)
    assert state.counts.shape[1] == logits.shape[1], (state.counts.shape, logits.shape)
    assert state.bitmask.shape[1] == -(-logits.shape[1] // 32), state.bitmask.shape
    out = torch.empty(logits.shape, dtype=float32, device=logits.device)
    _adjust[_parts(logits)](
        logits, rows, out, state.counts, state.presence_penalty, state.frequency_penalty,
        state.repetition_penalty, state.bias_ids, state.bias, state.num_bias,
        state.masked_ids, state.num_masked, state.num_tokens, state.mask_until,
        state.bitmask, state.has_bitmask, logits.stride(0),
        MAX_BIAS=state.bias_ids.shape[1], MAX_MASKED=state.masked_ids.shape[1],
        VOCAB=logits.shape[1], PART=PART
    )  # fmt: skip
    return out


def count_tokens(token_ids: Tensor, num_prompt_tokens: int, counts: Tensor) -> None:
    """Fills a row of `Adjustments.counts`: [V] int32. token_ids: [prompt + generated] int64."""
    if not runs_kernels(counts):
        counts.zero_()
        counts.index_add_(
            0,
            token_ids[num_prompt_tokens:].long(),
            torch.ones(len(token_ids) - num_prompt_tokens, dtype=int32),
        )
        counts[token_ids[:num_prompt_tokens].long()] |= IN_PROMPT
        return
    assert counts.dtype == int32 and counts.is_contiguous() and token_ids.is_contiguous()
    counts.zero_()
    grid = (triton.cdiv(len(token_ids), 1024),)
    _count[grid](token_ids, counts, len(token_ids), num_prompt_tokens, BLOCK=1024)


def apply_penalties(
    logits: Tensor,
    token_ids: Tensor,
    num_prompt_tokens: int,
    presence_penalty: float,
    frequency_penalty: float,
    repetition_penalty: float,
) -> Tensor:
    """logits: [V] float32 and token_ids: [prompt + generated] int64 of one row -> [V] float32."""
    assert logits.dtype == float32 and logits.dim() == 1, (logits.dtype, logits.shape)
    penalties = (float(presence_penalty), float(frequency_penalty), float(repetition_penalty))
    if not runs_kernels(logits):
        return reference.apply_penalties(logits, token_ids, num_prompt_tokens, *penalties)
    assert logits.stride(0) == 1, logits.stride()
    counts = torch.empty(logits.shape, dtype=int32, device=logits.device)
    count_tokens(token_ids, num_prompt_tokens, counts)
    out = torch.empty_like(logits)
    _penalise_row[(triton.cdiv(len(logits), PART),)](
        logits, counts, out, *penalties, VOCAB=len(logits), PART=PART
    )
    return out


@triton.jit
def _gumbel(seed, position, start, PART: tl.constexpr):
    """Noise of tokens start ... start + PART - 1 of one row: word t % 4 of block (t // 4, position)
    under the seed's two words. `reference_sample.gumbel_noise` says why so; log1p is Kahan's, since
    1 - u alone would lose u's digits."""
    block = start // 4 + tl.arange(0, PART // 4)
    zero = tl.zeros_like(block)
    w0, w1, w2, w3 = tl.philox(seed, block, zero + position.to(tl.int32), zero, zero, 10)
    words = tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3))
    uniform = (words.to(tl.float32) + 0.5) * 2.3283064365386963e-10
    uniform = tl.minimum(uniform, 0.99999994)
    rest = 1.0 - uniform
    gap = tl.where(rest == 1.0, 1.0, 1.0 - rest)
    exponential = tl.where(rest == 1.0, uniform, -tl.log(rest) * (uniform / gap))
    return -tl.log(exponential)


@triton.jit
def _noise(seed, position, noise, VOCAB: tl.constexpr, PART: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    start = tl.program_id(1) * PART
    token = start + tl.arange(0, PART)
    value = _gumbel(tl.load(seed + row), tl.load(position + row), start, PART)
    tl.store(noise + row * VOCAB + token, value, token < VOCAB)


@triton.jit
def _argmax_parts(
    logits, temperature, seed, position, best, token, stride, VOCAB: tl.constexpr,
    PART: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    start = tl.program_id(1) * PART
    at = start + tl.arange(0, PART)
    value = tl.load(logits + row * stride + at, at < VOCAB, float("-inf"))
    if temperature is not None:
        heat = tl.load(temperature + row)
        if heat > 0:
            noise = _gumbel(tl.load(seed + row), tl.load(position + row), start, PART)
            value = tl.div_rn(value, heat) + noise
    # A NaN must not make padding win: the token is an index into the embedding.
    value = tl.where(value == value, value, float("-inf"))
    largest, index = tl.max(value, 0, return_indices=True)
    part = row * tl.num_programs(1) + tl.program_id(1)
    tl.store(best + part, largest)
    tl.store(token + part, start + index)


@triton.jit
def _join_argmax(best, token, out, PARTS: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    part = tl.arange(0, BLOCK)
    value = tl.load(best + row * PARTS + part, part < PARTS, float("-inf"))
    _, index = tl.max(value, 0, return_indices=True)
    tl.store(out + row, tl.load(token + row * PARTS + index).to(tl.int64))


@triton.jit
def _key(value):
    """An integer that orders as the float does."""
    bits = value.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _largest(row, VOCAB: tl.constexpr, BLOCK: tl.constexpr):
    largest = tl.full((BLOCK,), -3.0e38, tl.float32)
    for start in range(0, VOCAB, BLOCK):
        at = start + tl.arange(0, BLOCK)
        largest = tl.maximum(largest, tl.load(row + at, at < VOCAB, float("-inf")))
    return tl.max(largest, 0)


@triton.jit
def _at_least(row, key, top, VOCAB: tl.constexpr, BLOCK: tl.constexpr, MASS: tl.constexpr):
    """Of the tokens of a row with this key or a larger one: their number, or their sum of
    exp(x - top); the smallest of their keys; and the largest key of the others."""
    total = tl.zeros((BLOCK,), tl.float32)
    smallest = tl.full((BLOCK,), 2147483647, tl.int32)
    below = tl.full((BLOCK,), -2147483647, tl.int32)
    for start in range(0, VOCAB, BLOCK):
        at = start + tl.arange(0, BLOCK)
        value = tl.load(row + at, at < VOCAB, float("-inf"))
        own = _key(value)
        hit = (own >= key) & (at < VOCAB)
        counted = tl.exp(value - top) if MASS else 1.0
        total += tl.where(hit, counted, 0.0)
        smallest = tl.minimum(smallest, tl.where(hit, own, 2147483647))
        below = tl.maximum(below, tl.where(own < key, own, -2147483647))
    return tl.sum(total, 0), tl.min(smallest, 0), tl.max(below, 0)


@triton.jit
def _cut(row, top, target, VOCAB: tl.constexpr, BLOCK: tl.constexpr, MASS: tl.constexpr):
    """Bisects for the largest key of `_at_least` target, from key to key of the row. Returns
    it, and how many of the tokens of just that key the target takes."""
    high = _key(top) + 1
    low = tl.full((), -2147483647, tl.int32)
    above = tl.full((), 0.0, tl.float32)
    while low + 1 < high:
        middle = (low >> 1) + (high >> 1) + (low & high & 1)
        found, smallest, below = _at_least(row, middle, top, VOCAB, BLOCK, MASS)
        above = tl.where(found >= target, above, found)
        high = tl.where(found >= target, high, below + 1)
        low = tl.where(found >= target, smallest, low)
    each = tl.exp(_value(low) - top) if MASS else 1.0
    return low, tl.ceil(tl.div_rn(target - above, each))


@triton.jit
def _value(key):
    """The float of a `_key`."""
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _filter(logits, top_k, top_p, min_p, out, stride, VOCAB: tl.constexpr, BLOCK: tl.constexpr):
    """What is kept of a row: the tokens above a key, and the first few of that very key."""
    line = tl.program_id(0).to(tl.int64)
    row = logits + line * stride
    k, p, least = tl.load(top_k + line), tl.load(top_p + line), tl.load(min_p + line)
    top = _largest(row, VOCAB, BLOCK)
    key = tl.full((), -2147483647, tl.int32)
    ties = tl.full((), VOCAB, tl.float32)
    if (k > 0) & (k < VOCAB):
        key, ties = _cut(row, top, k.to(tl.float32), VOCAB, BLOCK, False)
    if p < 1.0:
        mass, _, _ = _at_least(row, key + 1, top, VOCAB, BLOCK, True)
        if (k > 0) & (k < VOCAB):
            mass += ties * tl.exp(_value(key) - top)
        p_key, p_ties = _cut(row, top, tl.maximum(p * mass, 1e-30), VOCAB, BLOCK, True)
        ties = tl.where(p_key > key, p_ties, tl.minimum(ties, p_ties))
        key = tl.maximum(key, p_key)
    ties = tl.maximum(ties, 1.0)
    least = tl.minimum(least, 1.0)
    seen = tl.full((), 0.0, tl.float32)
    for start in range(0, VOCAB, BLOCK):
        at = start + tl.arange(0, BLOCK)
        value = tl.load(row + at, at < VOCAB, float("-inf"))
        tied = ((_key(value) == key) & (at < VOCAB)).to(tl.float32)
        first = (tied > 0) & (seen + tl.cumsum(tied, 0) <= ties)
        kept = ((_key(value) > key) | first) & (tl.exp(value - top) >= least)
        tl.store(out + line * VOCAB + at, tl.where(kept, value, float("-inf")), at < VOCAB)
        seen += tl.sum(tied, 0)


@triton.jit
def _sumexp_parts(logits, largest, total, stride, VOCAB: tl.constexpr, PART: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * PART + tl.arange(0, PART)
    value = tl.load(logits + row * stride + at, at < VOCAB, float("-inf")).to(tl.float32)
    top = tl.maximum(tl.max(value, 0), -3.0e38)  # a part may be -inf throughout
    part = row * tl.num_programs(1) + tl.program_id(1)
    tl.store(largest + part, top)
    tl.store(total + part, tl.sum(tl.exp(value - top), 0))


@triton.jit
def _join_sumexp(largest, total, out, PARTS: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    part = tl.arange(0, BLOCK)
    tops = tl.load(largest + row * PARTS + part, part < PARTS, -3.0e38)
    sums = tl.load(total + row * PARTS + part, part < PARTS, 0.0)
    top = tl.max(tops, 0)
    tl.store(out + row, top + tl.log(tl.sum(sums * tl.exp(tops - top), 0)))


@triton.jit
def _penalised(value, count, presence, frequency, repetition):
    """Repetition counts prompt and output (CTRL), the other two the output alone (OpenAI)."""
    generated = count & 0x3FFFFFFF
    repeated = tl.where(value > 0, tl.div_rn(value, repetition), value * repetition)
    value = tl.where(count != 0, repeated, value)
    value -= frequency * generated.to(tl.float32)
    return value - tl.where(generated > 0, presence, 0.0)


@triton.jit
def _penalise_row(
    logits, counts, out, presence, frequency, repetition, VOCAB: tl.constexpr, PART: tl.constexpr
):
    at = tl.program_id(0) * PART + tl.arange(0, PART)
    value = tl.load(logits + at, at < VOCAB, 0.0)
    count = tl.load(counts + at, at < VOCAB, 0)
    tl.store(out + at, _penalised(value, count, presence, frequency, repetition), at < VOCAB)


@triton.jit(do_not_specialize=["length", "num_prompt"])
def _count(token_ids, counts, length, num_prompt, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    token = tl.load(token_ids + at, at < length, 0)
    tl.atomic_add(counts + token, 1, (at >= num_prompt) & (at < length), sem="relaxed")
    tl.atomic_or(counts + token, 1 << 30, (at < num_prompt) & (at < length), sem="relaxed")


@triton.jit
def _adjust(
    logits, rows, out, counts, presence_penalty, frequency_penalty, repetition_penalty,
    bias_ids, bias, num_bias, masked_ids, num_masked, num_tokens, mask_until, bitmask,
    has_bitmask, stride, MAX_BIAS: tl.constexpr, MAX_MASKED: tl.constexpr, VOCAB: tl.constexpr,
    PART: tl.constexpr
):  # fmt: skip
    line = tl.program_id(0).to(tl.int64)
    start = tl.program_id(1) * PART
    row = tl.load(rows + line)
    token = start + tl.arange(0, PART)
    inside = token < VOCAB
    value = tl.load(logits + line * stride + token, inside, 0.0)
    presence = tl.load(presence_penalty + row)
    frequency = tl.load(frequency_penalty + row)
    repetition = tl.load(repetition_penalty + row)
    if (presence != 0) | (frequency != 0) | (repetition != 1):
        count = tl.load(counts + row * VOCAB + token, inside, 0)
        value = _penalised(value, count, presence, frequency, repetition)
    for i in range(tl.load(num_bias + row)):
        which = tl.load(bias_ids + row * MAX_BIAS + i)
        if (which >= start) & (which < start + PART):
            value += tl.where(token == which, tl.load(bias + row * MAX_BIAS + i), 0.0)
    if tl.load(num_tokens + row) < tl.load(mask_until + row):
        for i in range(tl.load(num_masked + row)):
            which = tl.load(masked_ids + row * MAX_MASKED + i)
            value = tl.where(token == which, float("-inf"), value)
    if tl.load(has_bitmask + row):
        words: tl.constexpr = (VOCAB + 31) // 32
        word = tl.load(bitmask + row * words + token // 32, inside, 0)
        value = tl.where((word >> (token % 32)) & 1 != 0, value, float("-inf"))
    tl.store(out + line * VOCAB + token, value, inside)


@dataclass(frozen=True)
class SamplingState:
    counts: Tensor
    presence_penalty: Tensor
    frequency_penalty: Tensor
    repetition_penalty: Tensor
    bias_ids: Tensor
    bias: Tensor
    num_bias: Tensor
    masked_ids: Tensor
    num_masked: Tensor
    num_tokens: Tensor
    mask_until: Tensor
    bitmask: Tensor
    has_bitmask: Tensor
    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    min_p: Tensor
    seed: Tensor


def sample_and_append(
    logits: Tensor, rows: Tensor, state: SamplingState, token_ids: Tensor
) -> Tensor:
    if logits.is_cuda:
        at = rows.long()
        heat = state.temperature[at]
        n = state.num_tokens[at].long()
        scaled = filter_logits(
            logits / torch.where(heat > 0, heat, torch.ones_like(heat))[:, None],
            state.top_k[at].long(),
            state.top_p[at],
            state.min_p[at],
        )
        chosen = gumbel_argmax(scaled, (heat > 0).float(), state.seed[at], n)
        token_ids[at, n.clamp(max=token_ids.shape[1] - 1)] = chosen.to(int32)
        state.num_tokens[at] = (n + 1).clamp(max=token_ids.shape[1] - 1).to(int32)
        return chosen
    found = []
    for line, row in enumerate(rows.tolist()):
        if row == len(state.num_tokens) - 1:
            found.append(0)
            continue
        n = int(state.num_tokens[row])
        x = logits[line].clone()
        count = state.counts[row]
        gen = count & 0x3FFFFFFF
        rep = float(state.repetition_penalty[row])
        x = torch.where(count != 0, torch.where(x > 0, x / rep, x * rep), x)
        x = x - state.frequency_penalty[row] * gen - state.presence_penalty[row] * (gen > 0)
        for i in range(int(state.num_bias[row])):
            x[int(state.bias_ids[row, i])] += state.bias[row, i]
        if n < int(state.mask_until[row]):
            x[state.masked_ids[row, : int(state.num_masked[row])].long()] = float("-inf")
        t = float(state.temperature[row])
        if t > 0:
            x = x / t
            x = filter_logits(
                x[None],
                state.top_k[row : row + 1].long(),
                state.top_p[row : row + 1],
                state.min_p[row : row + 1],
            )[0]
            x = (
                x
                + gumbel_noise(
                    state.seed[row : row + 1], state.num_tokens[row : row + 1].long(), len(x)
                )[0]
            )
        token = int(x.argmax())
        token_ids[row, n] = token
        state.num_tokens[row] += 1
        state.counts[row, token] += 1
        found.append(token)
    return torch.tensor(found)
