"""The second half of `sample.sample_rows`: draws within top-k, top-p and min-p.

What top-k, top-p and min-p keep is a number of best tokens: all that rank before some limit
(equals by index). So:

    rank        0 ........ limit ............................ V
    the token   |  kept   |  if it falls here, the limit moves down to it; its part draws again

With top-p alone the winner over all tokens is nearly always kept, and one pass over the row that
adds up what ranks before it says so. With top-k the tokens from a threshold on, which the parts'
best ones give, are written into a short list, where the rest is done. Parts whose best token is
behind the limit are not read, so a peaked row costs little. All of it is exact: the token is the
argmax of logits and noise over what is kept.
"""

import triton
import triton.language as tl

from .sample_row import (
    _LOG2_E,
    _NO_TOKEN,
    adjusted,
    gumbel,
    gumbel_of_tokens,
    load_logits,
    ranks_before,
    tokens_from,
)

BLOCK = tl.constexpr(4096)
"""Tokens that a pass over a row looks at at once."""
LIST = tl.constexpr(1024)
"""Tokens that a row's list holds; with more of them left, passes over the row go on."""
CHUNK = tl.constexpr(16)
"""Entries of a list that are compared with all others at once."""
MAX_VOCAB = 1 << 20
_LOWEST = tl.constexpr(-3.4028234663852886e38)
_NO_ENTRY = tl.constexpr(-0x7FFFFFFFFFFFFFFF)
_TOKEN_BITS = tl.constexpr(20)
_LAST_TOKEN = tl.constexpr(MAX_VOCAB - 1)
_FAR = tl.constexpr(1e5)
"""Logits differ by less; what is so far below the best may as well be the lowest that there is."""


@triton.jit
def _key(value):
    """An integer that orders as the float does."""
    bits = value.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _value(key):
    """The float of a `_key`."""
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _last_entry(value):
    """Of this logit: no token of it ranks behind."""
    return _key(value + 0.0).to(tl.int64) << _TOKEN_BITS  # -0 and 0 are equals


@triton.jit
def _entry(value, token):
    """The logit's key, and the token counted from the end: larger entries rank before."""
    return _last_entry(value) + (token ^ _LAST_TOKEN)


@triton.jit
def _token_of(entry):
    return ((entry & _LAST_TOKEN) ^ _LAST_TOKEN).to(tl.int32)


@triton.jit
def _value_of(entry):
    return _value((entry >> _TOKEN_BITS).to(tl.int32))


@triton.jit
def _middle(low, high):
    """Of two integers that may be far apart, rounded down."""
    return (low >> 1) + (high >> 1) + (low & high & 1)


@triton.jit
def _next_block(tops, limit, after):
    """The first block behind `after` that has a token before the limit. tops: [blocks]."""
    index = tl.arange(0, tops.shape[0])
    return tl.min(tl.where((index > after) & (tops >= limit), index, _NO_TOKEN), 0)


@triton.jit
def _load_block(block, here, VOCAB: tl.constexpr, WIDTH: tl.constexpr):
    logits, stride, line, _row, _state, _asked = here
    # There is no block _NO_TOKEN; what is loaded ahead of the last one is nothing.
    token = tokens_from(tl.minimum(block, VOCAB // BLOCK + 1) * BLOCK, BLOCK)
    return load_logits(logits, line, token, stride, VOCAB, WIDTH)


@triton.jit
def _hits(raw, block, here, limit, limit_token, VOCAB: tl.constexpr):
    """Adjusted logits of a block, its tokens, and which of them rank before the limit. The limit is
    not -inf, or what is behind the vocabulary would rank before it."""
    _logits, _stride, _line, row, state, asked = here
    token = tokens_from(block * BLOCK, BLOCK)
    value = adjusted(raw, token, token < VOCAB, block * BLOCK, BLOCK, row, state, asked)
    return value, token, ranks_before(value, token, limit, limit_token)


@triton.jit
def _ahead(
    here, tops, limit, limit_token, top, rate, VOCAB: tl.constexpr, WIDTH: tl.constexpr
):  # fmt: skip
    """Of the tokens that rank before a limit: their number, and their sum of 2**((x - top) rate).
    More tokens never have a smaller sum, rounding included: the order of summation is fixed."""
    number = tl.zeros((BLOCK // 4,), tl.int32)
    mass = tl.zeros((BLOCK // 4,), tl.float32)
    # Two blocks are on their way while one is added up: memory takes longer to answer than that.
    block = _next_block(tops, limit, -1)
    raw = _load_block(block, here, VOCAB, WIDTH)
    second = _next_block(tops, limit, block)
    second_raw = _load_block(second, here, VOCAB, WIDTH)
    while block < _NO_TOKEN:
        third = _next_block(tops, limit, second)
        third_raw = _load_block(third, here, VOCAB, WIDTH)
        value, _, hit = _hits(raw, block, here, limit, limit_token, VOCAB)
        number += tl.sum(hit.to(tl.int32), 1)
        mass += tl.sum(tl.where(hit, tl.exp2((value - top) * rate), 0.0), 1)
        block, raw, second, second_raw = second, second_raw, third, third_raw
    return tl.sum(number, 0), tl.sum(mass, 0)


@triton.jit
def _collect(
    here, listed, tops, limit, limit_token, VOCAB: tl.constexpr, WIDTH: tl.constexpr
):  # fmt: skip
    """Lists the tokens that rank before a limit, LIST of them at most. -> the number of all."""
    filled = tl.full((), 0, tl.int32)
    block = _next_block(tops, limit, -1)
    raw = _load_block(block, here, VOCAB, WIDTH)
    while block < _NO_TOKEN:
        second = _next_block(tops, limit, block)
        second_raw = _load_block(second, here, VOCAB, WIDTH)
        value, token, hit = _hits(raw, block, here, limit, limit_token, VOCAB)
        inner = tl.cumsum(hit.to(tl.int32), 1)
        number = tl.sum(hit.to(tl.int32), 1)
        place = filled + (tl.cumsum(number, 0) - number)[:, None] + inner - 1
        tl.store(listed + place, _entry(value, token), hit & (place < LIST))
        filled += tl.sum(number, 0)
        block, raw = second, second_raw
    tl.debug_barrier()
    return filled


@triton.jit
def _ranked(listed, filled, scale):
    """[LIST] each, of a list: entries; their logits; how many rank before; the mass of these."""
    top, rate, _, _ = scale
    at = tl.arange(0, LIST)
    entry = tl.load(listed + at, at < filled, _NO_ENTRY)
    rank = tl.zeros((LIST,), tl.int32)
    before = tl.zeros((LIST,), tl.float32)
    for start in range(0, filled, CHUNK):
        place = start + tl.arange(0, CHUNK)
        other = tl.load(listed + place, place < filled, _NO_ENTRY)
        weight = tl.exp2((_value_of(other) - top) * rate)
        ahead = other[:, None] > entry[None, :]
        rank += tl.sum(ahead.to(tl.int32), 0)
        before += tl.sum(tl.where(ahead, weight[:, None], 0.0), 0)
    return entry, _value_of(entry), rank, before


@triton.jit
def _draw_listed(listed, filled, k, p, target, scale, field):
    """The winner of the list within top-k (0: no more to do), top-p and min-p. target: the mass
    that top-p is to reach, if there is no k. scale: top, rate, cold, floor; field: seed, position.
    """
    top, rate, cold, floor = scale
    seed, position = field
    entry, value, rank, before = _ranked(listed, filled, scale)
    kept = entry > _NO_ENTRY
    if k > 0:
        kept &= rank < k
        target = p * tl.sum(tl.where(kept, tl.exp2((value - top) * rate), 0.0), 0)
    kept &= (before < tl.where(p < 1.0, target, float("inf"))) & (value >= floor)
    kept |= rank == 0
    token = _token_of(entry)
    noisy = tl.fma(value, cold, gumbel_of_tokens(seed, position, token))
    noisy = tl.where(kept, noisy, float("-inf"))
    return tl.min(tl.where(kept & (noisy == tl.max(noisy, 0)), token, _NO_TOKEN), 0)


@triton.jit
def _best_tops(parts, k):
    """The k-th best of the parts' best logits, or the least: as many tokens are no worse."""
    index = tl.arange(0, parts.shape[0])
    ahead = (parts[None, :] > parts[:, None]) | (
        (parts[None, :] == parts[:, None]) & (index[None, :] < index[:, None])
    )
    rank = tl.sum(ahead.to(tl.int32), 1)
    wanted = tl.minimum(k, tl.sum((parts > float("-inf")).to(tl.int32), 0)) - 1
    return tl.maximum(tl.sum(tl.where(rank == wanted, parts, 0.0), 0), _LOWEST)


@triton.jit
def _limit_of_k(
    here, tops, k, threshold, top, rate, VOCAB: tl.constexpr, WIDTH: tl.constexpr
):  # fmt: skip
    """A limit behind the k best tokens, how many rank before it: LIST at most, or just k, or all
    that are not -inf if these are fewer; and their mass. First the threshold falls until there are
    enough, then it is between two entries, as a list would have them, that are brought together."""
    lowest = _last_entry(tl.full((), _LOWEST, tl.float32))
    low, high = _last_entry(threshold), _last_entry(top) + _LAST_TOKEN + 1
    query, step = low, tl.maximum(top - threshold, 1.0)
    number, mass = tl.full((), -1, tl.int32), tl.full((), 0.0, tl.float32)
    searching = number < 0
    while searching:
        limit = _value_of(query)
        found, found_mass = _ahead(here, tops, limit, _token_of(query) + 1, top, rate, VOCAB, WIDTH)
        falls = (found < k) & (query == low) & (low > lowest)
        enough = (found >= k) | (query == low)
        low, high = tl.where(enough, query, low), tl.where(enough, high, query)
        number, mass = tl.where(enough, found, number), tl.where(enough, found_mass, mass)
        if falls:
            below = tl.where(step < _FAR, tl.maximum(limit - step, _LOWEST), _LOWEST)
            step *= 2.0
            high, low = low, _last_entry(below)
            query = low
        else:
            query = _middle(low, high)
        searching = falls | ((number > k) & (number > LIST) & (low + 1 < high))
    return _value_of(low), _token_of(low) + 1, number, mass


@triton.jit
def _redraw(
    here, part, limit, limit_token, cold, field, VOCAB: tl.constexpr, WIDTH: tl.constexpr,
    PART: tl.constexpr
):  # fmt: skip
    """The winner among a part's tokens that rank before a limit."""
    logits, stride, line, row, state, asked = here
    seed, position = field
    start = part * PART
    token = tokens_from(start, PART)
    raw = load_logits(logits, line, token, stride, VOCAB, WIDTH)
    value = adjusted(raw, token, token < VOCAB, start, PART, row, state, asked)
    kept = ranks_before(value, token, limit, limit_token)
    noisy = tl.fma(value, cold, gumbel(seed, position, start, PART))
    noisy = tl.where(kept, noisy, float("-inf"))
    best = tl.max(tl.max(noisy, 1), 0)
    winner = tl.min(tl.min(tl.where(noisy == best, token, _NO_TOKEN), 1), 0)
    return best, winner


@triton.jit
def _draw_parts(
    here, best, token, parts, tops, limit, limit_token, p, target, scale, field,
    VOCAB: tl.constexpr, WIDTH: tl.constexpr, PART: tl.constexpr
):  # fmt: skip
    """Takes the winner of all parts until it is kept. Each turn ends the loop, or moves the limit
    down to the winner, or draws the winner's part anew before the limit. It also ends when no more
    than LIST tokens rank before the limit, the winner aside. -> winner, whether it is right, limit
    """
    logits, stride, line, row, state, asked = here
    top, rate, cold, _ = scale
    index = tl.arange(0, parts.shape[0])
    chosen = tl.full((), 0, tl.int32)
    right, few = chosen > 0, chosen > 0
    while (right | few) == 0:
        best = tl.where(parts >= limit, best, float("-inf"))
        highest = tl.max(best, 0)
        part = tl.min(tl.where(best == highest, index, _NO_TOKEN), 0)
        chosen = tl.sum(tl.where(index == part, token, 0), 0)
        raw = load_logits(logits, line, chosen, stride, VOCAB, WIDTH)
        value = adjusted(raw, chosen, chosen < VOCAB, chosen, 1, row, state, asked)
        right = ranks_before(value, chosen, limit, limit_token)
        if right & (p < 1.0):
            number, mass = _ahead(here, tops, value, chosen, top, rate, VOCAB, WIDTH)
            right = (number == 0) | (mass < target)
            if right == 0:
                limit, limit_token = value, chosen
                few = number <= LIST
        # Logits so large that all quotients by the temperature overflow are no reason to hang.
        right = right | (highest == float("-inf"))
        if (right | few) == 0:
            again, winner = _redraw(here, part, limit, limit_token, cold, field, VOCAB, WIDTH, PART)
            best = tl.where(index == part, again, best)
            token = tl.where(index == part, winner, token)
    return chosen, right, limit, limit_token


@triton.jit
def draw_filtered(
    here, listed, best, token, parts, total, k, p, min_p, heat, field, VOCAB: tl.constexpr,
    WIDTH: tl.constexpr, PART: tl.constexpr
):  # fmt: skip
    """A row's token, of what top-k, top-p and min-p keep. best, token, parts, total: [parts], the
    noisy winner of each part (its value and itself), the best logit, and what `_ahead` adds up, of
    all the part's tokens, with the part's best logit as top. At least one logit is not -inf."""
    cold = tl.div_rn(1.0, heat)
    rate = cold * _LOG2_E
    top = tl.max(parts, 0)
    tops = tl.max(tl.reshape(parts, (parts.shape[0] * PART // BLOCK, BLOCK // PART)), 1)
    floor = tl.where(min_p > 0, top + heat * tl.log(tl.minimum(min_p, 1.0)), float("-inf"))
    scale = (top, rate, cold, floor)
    target = p * tl.sum(total * tl.exp2((parts - top) * rate), 0)
    limit, limit_token = floor, tl.full((), _NO_TOKEN, tl.int32)
    number, filled = tl.full((), _NO_TOKEN, tl.int32), tl.full((), -1, tl.int32)
    if k > 0:
        limit = _best_tops(parts, k)
        number = _collect(here, listed, tops, limit, limit_token, VOCAB, WIDTH)
        filled = number
        if (number < k) | (number > LIST):
            filled = tl.full((), -1, tl.int32)
            limit, limit_token, number, mass = _limit_of_k(
                here, tops, k, limit, top, rate, VOCAB, WIDTH
            )
            if number > LIST:
                target = p * mass
                limit_token = tl.where(floor > limit, _NO_TOKEN, limit_token)
                limit = tl.maximum(limit, floor)
                k = tl.zeros_like(k)
    chosen = tl.full((), 0, tl.int32)
    right = chosen > 0
    if number > LIST:
        chosen, right, limit, limit_token = _draw_parts(
            here, best, token, parts, tops, limit, limit_token, p, target, scale, field, VOCAB,
            WIDTH, PART
        )  # fmt: skip
    if right == 0:
        if filled < 0:
            filled = _collect(here, listed, tops, limit, limit_token, VOCAB, WIDTH)
        chosen = _draw_listed(listed, filled, k, p, target, scale, field)
    return chosen
