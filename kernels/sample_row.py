"""Triton functions of one row of logits: its noise, and what is added to it and forbidden.

They are compiled with `enable_fp_fusion=False`: one token's adjusted logit is computed in several
places, and must come out the same to the bit, which a multiplication and an addition do not if
they are fused here and there. Where fusing is wanted it is written: `tl.fma`.
"""

import triton
import triton.language as tl

from .reference_sample import IN_PROMPT, MIN_TEMPERATURE

_LOG2 = tl.constexpr(0.6931471805599453)
_LOG2_E = tl.constexpr(1.4426950408889634)
_LOG_LOG2_E = tl.constexpr(0.36651292058166435)
_NO_TOKEN = tl.constexpr(2147483647)
_MIN_TEMPERATURE = tl.constexpr(MIN_TEMPERATURE)
_IN_PROMPT = tl.constexpr(IN_PROMPT)
_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def _wide_product(a, b):
    """High and low word of uint32 x constant; `umulhi` and `*` would be two multiplications."""
    product = a.to(tl.uint64) * b
    return (product >> 32).to(tl.uint32), product.to(tl.uint32)


@triton.jit
def philox(seed, position, block):
    """Philox-4x32-10 of counter (block, position, 0, 0) under the seed's two words: four uint32."""
    c0 = block.to(tl.uint32)
    zero = tl.zeros_like(c0)
    c1, c2, c3 = zero + position.to(tl.uint32), zero, zero
    k0 = seed.to(tl.uint64).to(tl.uint32)
    k1 = (seed.to(tl.uint64) >> 32).to(tl.uint32)
    for _ in tl.static_range(10):
        high0, low0 = _wide_product(c0, 0xD2511F53)
        high1, low1 = _wide_product(c2, 0xCD9E8D57)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0 = tl.add(k0, 0x9E3779B9, sanitize_overflow=False)
        k1 = tl.add(k1, 0xBB67AE85, sanitize_overflow=False)
    return c0, c1, c2, c3


@triton.jit
def _log2(x):
    """One instruction, good to 2**-22 (absolute from 0.5 to 2, else relative)."""
    if _INTERPRETED:
        return tl.log2(x)
    return tl.inline_asm_elementwise(
        "lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
    )


@triton.jit
def gumbel_of(word):
    """-log(-log1p(-u)) of u = (word + 0.5) / 2**32. The uniform is small where the noise is large,
    where float32 is finest; there a polynomial (relative error 2.7e-8) is -log2(1 - u) / u."""
    uniform = tl.fma(word.to(tl.float32), 2.0**-32, 2.0**-33)
    uniform = tl.minimum(uniform, 0.99999994)
    ratio = tl.fma(uniform, 0.27694955 * _LOG2_E, 0.33225477 * _LOG2_E)
    ratio = tl.fma(ratio, uniform, 0.50001365 * _LOG2_E)
    ratio = tl.fma(ratio, uniform, _LOG2_E)
    exponential = tl.where(uniform < 0.0625, ratio * uniform, -_log2(1.0 - uniform))
    return tl.fma(_log2(exponential), -_LOG2, _LOG_LOG2_E)


@triton.jit
def tokens_from(start, SIZE: tl.constexpr):
    """[SIZE / 4, 4]: start ... start + SIZE - 1; a thread has the tokens of a Philox block."""
    return start + tl.arange(0, SIZE // 4)[:, None] * 4 + tl.arange(0, 4)[None, :]


@triton.jit
def gumbel(seed, position, start, SIZE: tl.constexpr):
    """[SIZE / 4, 4]: noise of tokens start ... start + SIZE - 1 of one row, start a multiple of 4.
    Token t has word t % 4 of the block t // 4: `reference_sample.gumbel_noise`."""
    block = start // 4 + tl.arange(0, SIZE // 4)
    w0, w1, w2, w3 = philox(seed, position, block)
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3))
    return gumbel_of(tl.reshape(words, (SIZE // 4, 4)))


@triton.jit
def gumbel_of_tokens(seed, position, token):
    """The same for tokens in any order: a block for each of them."""
    w0, w1, w2, w3 = philox(seed, position, token >> 2)
    low = tl.where(token & 1 == 0, w0, w1)
    high = tl.where(token & 1 == 0, w2, w3)
    return gumbel_of(tl.where(token & 2 == 0, low, high))


@triton.jit
def options(state, row, VOCAB: tl.constexpr):
    """temperature, top-k, top-p, min-p of a row. 0: a row's best token, which top-k 1 and top-p 0
    ask for too; top-k 0 is off."""
    at = row * state.row_stride
    heat = tl.load(state.temperature + at)
    k = tl.load(state.top_k + at)
    p = tl.load(state.top_p + at)
    min_p = tl.load(state.min_p + at)
    draws = (heat > 0) & (k != 1) & (p > 0)
    heat = tl.where(draws, tl.maximum(heat, _MIN_TEMPERATURE), 0.0)
    return heat, tl.where(k < VOCAB, k, 0), p, min_p


@triton.jit
def load_logits(logits, line, token, stride, VOCAB: tl.constexpr, WIDTH: tl.constexpr):
    """-inf behind the vocabulary. WIDTH < VOCAB: [shards, lines, WIDTH], one after the other."""
    if WIDTH == VOCAB:
        at = line * stride + token
    else:
        at = ((token // WIDTH) * tl.num_programs(0) + line) * WIDTH + token % WIDTH
    return tl.load(logits + at, token < VOCAB, float("-inf"))


@triton.jit
def penalised(value, count, presence, frequency, repetition):
    """Repetition counts prompt and output (CTRL), the other two the output alone (OpenAI)."""
    generated = count & (_IN_PROMPT - 1)
    factor = tl.where(value > 0, tl.div_rn(1.0, repetition), repetition)
    value = tl.where(count != 0, value * factor, value)
    value -= frequency * generated.to(tl.float32)
    return value - tl.where(generated > 0, presence, 0.0)


@triton.jit
def adjustments(state, row):
    """What a row asks for: three penalties; how many biases and banned tokens; has it a bitmask."""
    at = row * state.row_stride
    presence = tl.load(state.presence_penalty + at)
    frequency = tl.load(state.frequency_penalty + at)
    repetition = tl.load(state.repetition_penalty + at)
    num_bias = tl.load(state.num_bias + at)
    num_masked = tl.load(state.num_masked + at)
    masks = tl.load(state.num_tokens + at) < tl.load(state.mask_until + at)
    has_bitmask = tl.load(state.has_bitmask + at)
    return presence, frequency, repetition, num_bias, tl.where(masks, num_masked, 0), has_bitmask


@triton.jit
def adjusted(raw, token, inside, start, SIZE: tl.constexpr, row, state, asked):
    """Logits of tokens within start ... start + SIZE - 1 after penalties, bias and masks, as
    float32. asked: `adjustments`; a row without any takes one branch."""
    value = raw.to(tl.float32)
    presence, frequency, repetition, num_bias, num_masked, has_bitmask = asked
    penalises = (presence != 0) | (frequency != 0) | (repetition != 1)
    if penalises | (num_bias + num_masked > 0) | (has_bitmask != 0):
        if penalises:
            count = tl.load(state.counts + row * state.counts_stride + token, inside, 0)
            value = penalised(value, count, presence, frequency, repetition)
        for i in range(num_bias):
            which = tl.load(state.bias_ids + row * state.bias_stride + i)
            if (which >= start) & (which < start + SIZE):
                bias = tl.load(state.bias + row * state.bias_stride + i)
                value = tl.where(token == which, value + bias, value)
        for i in range(num_masked):
            which = tl.load(state.masked_ids + row * state.masked_stride + i)
            value = tl.where(token == which, float("-inf"), value)
        if has_bitmask != 0:
            word = tl.load(state.bitmask + row * state.bitmask_stride + token // 32, inside, 0)
            value = tl.where((word >> (token % 32)) & 1 != 0, value, float("-inf"))
    return value


@triton.jit
def ranks_before(value, token, limit, limit_token):
    """Tokens are ranked by their logits, equals by their index. A limit is a place between two; NaN
    is before none."""
    return (value > limit) | ((value == limit) & (token < limit_token))
