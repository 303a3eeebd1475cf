"""The sampler's steps one by one, each a pass over the logits; `sample.sample_rows` is all in two.

`model/sampler.py` uses them until it calls that; then only the noise field has a use, in tests.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor, float32, int32, int64

from . import reference_sample as reference
from .compat import runs_kernels
from .sample_row import gumbel, penalised, tokens_from
from .sample_state import count_tokens

PART = 2048
"""Tokens of one row that one program looks at; a multiple of 4 (a Philox block)."""
FILTER_BLOCK = 8192
"""Tokens that a program of `filter_logits`, which has a row to itself, looks at at once."""


def gumbel_noise(seed: Tensor, position: Tensor, vocab_size: int) -> Tensor:
    """The noise field itself; `sample_rows` draws from it without writing it down.

    seed, position: [B] int64 -> [B, vocab_size] float32, the same for a (seed, position, token)
    whatever the batch.
    """
    assert seed.shape == position.shape, (seed.shape, position.shape)
    if not runs_kernels(seed):
        return reference.gumbel_noise(seed, position, vocab_size)
    assert seed.dtype == position.dtype == int64, (seed.dtype, position.dtype)
    assert seed.is_contiguous() and position.is_contiguous()
    noise = torch.empty(len(seed), vocab_size, dtype=float32, device=seed.device)
    grid = (len(seed), triton.cdiv(vocab_size, PART))
    _noise[grid](seed, position, noise, VOCAB=vocab_size, PART=PART, enable_fp_fusion=False)
    return noise


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
def _noise(seed, position, noise, VOCAB: tl.constexpr, PART: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    start = tl.program_id(1) * PART
    token = tokens_from(start, PART)
    value = gumbel(tl.load(seed + row), tl.load(position + row), start, PART)
    tl.store(noise + row * VOCAB + token, value, token < VOCAB)


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
def _penalise_row(
    logits, counts, out, presence, frequency, repetition, VOCAB: tl.constexpr, PART: tl.constexpr
):
    at = tl.program_id(0) * PART + tl.arange(0, PART)
    value = tl.load(logits + at, at < VOCAB, 0.0)
    count = tl.load(counts + at, at < VOCAB, 0)
    tl.store(out + at, penalised(value, count, presence, frequency, repetition), at < VOCAB)
