"""What the Gluon decode kernels over an fp8 cache share: e4m3 in memory to fp16 tiles in shared
memory, queries as fp16, scores with a scale for each token.

Values go through registers, as wgmma takes e4m3 only against e4m3: a warpgroup loads the tile after
next, and converts a tile when its place in shared memory falls free. With blocks of 64 tokens of
512 + 64 the planes of a block (`latent.py`) are whole rows of 128 bytes, which is how TMA sees
rope parts.
"""

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from .compat import describe_box, tma_load
from .latent import as_words, fp8_entry_bytes
from .mla_dot_fp8 import QUERY_SCALE

BLOCK_BYTES = gl.constexpr(64 * fp8_entry_bytes(512, 64))
ROPE_ROWS = gl.constexpr(BLOCK_BYTES.value // 128)
FIRST_ROPE_ROW = gl.constexpr(64 * 4 // 128)
FIRST_VALUE = gl.constexpr(64 * (4 + 2 * 64))
HALF_SCALE = gl.constexpr(QUERY_SCALE)
RAW = gl.constexpr(gl.BlockedLayout([1, 4], [8, 4], [4, 1], [1, 0]))
"""16 bytes a thread; fp16 stores of eight threads then meet in no bank of a swizzled tile."""
WORDS = gl.constexpr(gl.NVMMASharedLayout.get_default_for([64, 128], gl.int32))


@gluon.jit
def load_values(words, page, first, last_row, wanted):
    """words: the cache as int32 -> [64, 64] int32, the values of a block's columns first ... first
    + 255; rows past last_row, which may hold anything, are copies of it. Undefined unless `wanted`.
    Words, as LLVM carries single bytes through a loop in a register each."""
    row = gl.minimum(gl.arange(0, 64, gl.SliceLayout(1, RAW)), last_row)
    column = gl.arange(0, 64, gl.SliceLayout(0, RAW))
    at = gl.expand_dims(row * 128, 1) + gl.expand_dims(column, 0)
    block = words + (page.to(gl.int64) * (BLOCK_BYTES // 4) + (FIRST_VALUE + first) // 4)
    return gl.load(block + at, mask=gl.full([64, 64], wanted, gl.int1, RAW))


@gluon.jit
def store_values(raw, tile):
    """raw: [64, 64] int32, four e4m3 each -> tile: [64, 128] int32, two fp16 each."""
    low, high = gl.inline_asm_elementwise(
        "{ .reg .b16 a, b; mov.b32 {a, b}, $2;"
        " cvt.rn.f16x2.e4m3x2 $0, a; cvt.rn.f16x2.e4m3x2 $1, b; }",
        "=r,=r,r",
        [raw],
        dtype=(gl.int32, gl.int32),
        is_pure=True,
        pack=1,
    )
    tile.store(gl.reshape(gl.join(low, high), [64, 128]))
    fence_async_shared()


@gluon.jit
def prefetch_block(words, page):
    """All of a block into the L2 cache, a line of 128 bytes at a time: scales, rope and some
    values, then all values."""
    FEW: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    block = words + page.to(gl.int64) * (BLOCK_BYTES // 4)
    _prefetch(block + gl.arange(0, 128, FEW) * 32)
    _prefetch(block + FIRST_VALUE // 4 + gl.arange(0, 256, FEW) * 32)


@gluon.jit
def _prefetch(lines):
    gl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.b32 $0, 0;",
        "=r,l",
        [lines],
        dtype=gl.int32,
        is_pure=False,
        pack=1,
    )


@gluon.jit
def tiles_as_words(tiles, NUM: gl.constexpr):
    """fp16 tiles of 64 rows as NUM tiles [64, 128] int32, 256 columns each."""
    return tiles._reinterpret(gl.int32, [NUM, 64, 128], WORDS)


@gluon.jit
def load_rope(rope_desc, page, bar, rope):
    """Of a block, by TMA; arrives once at bar."""
    mbarrier.expect(bar, rope_desc.block_type.nbytes)
    tma_load(rope_desc, [page * ROPE_ROWS + FIRST_ROPE_ROW, 0], bar, rope)


@gluon.jit
def load_scales(words, page, last_row, wanted):
    """-> [64] float32, rows past last_row as in `load_values`."""
    ROW: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    row = gl.minimum(gl.arange(0, 64, ROW), last_row)
    block = words + page.to(gl.int64) * (BLOCK_BYTES // 4)
    scale = gl.load(block + row, mask=gl.full([64], wanted, gl.int1, ROW))
    return scale.to(gl.float32, bitcast=True)


@gluon.jit
def store_scales(scale, scales, place):
    """scale: [64] -> scales: [4 places, 64], three rows of `place`: the scale, its logarithm and
    its reciprocal, which the multiplying warpgroups have less time to compute."""
    scales.index(4 * place).store(scale)
    # One instruction each, exact to 2^-22; the library's logarithm takes registers that spill.
    log2 = gl.inline_asm_elementwise(
        "lg2.approx.f32 $0, $1;", "=f,f", [scale], dtype=gl.float32, is_pure=True, pack=1
    )
    scales.index(4 * place + 1).store(log2)
    scales.index(4 * place + 2).store(1.0 / scale)


@gluon.jit
def store_query(q, row, first, tile):
    """q: [rows, 576], rows row ... and columns first ... -> tile [N, C] fp16, times HALF_SCALE."""
    N: gl.constexpr = tile.type.shape[0]
    C: gl.constexpr = tile.type.shape[1]
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    rows = gl.expand_dims(row + gl.arange(0, N, gl.SliceLayout(1, LAYOUT)), 1)
    columns = gl.expand_dims(gl.arange(0, C, gl.SliceLayout(0, LAYOUT)), 0)
    x = gl.load(q + (rows.to(gl.int64) * 576 + (first + columns))).to(gl.float32) * HALF_SCALE
    tile.store(gl.minimum(gl.maximum(x, -65504.0), 65504.0).to(gl.float16))
    fence_async_shared()


@gluon.jit
def scale_tokens(s, scales, place, TOKENS: gl.constexpr):
    """s: queries times values, tokens along dimension TOKENS -> queries times latents. A product
    with the rope parts is then added where it is."""
    scale = scales.index(4 * place).load(gl.SliceLayout(1 - TOKENS, s.type.layout))
    return s * gl.expand_dims(scale, 1 - TOKENS)


@gluon.jit
def biased_scores(s, scales, place, scale_log2, TOKENS: gl.constexpr):
    """The score in base 2 plus log2 of the token's scale, so that its exponential multiplies
    unscaled values (see `mla_dot_fp8`)."""
    bias = scales.index(4 * place + 1).load(gl.SliceLayout(1 - TOKENS, s.type.layout))
    return s * scale_log2 + gl.expand_dims(bias, 1 - TOKENS)


def describe_rope(cache: Tensor) -> TensorDescriptor:
    """TMA box of a block's rope parts [64, 64]."""
    _, halves, _ = as_words(cache)
    return describe_box(halves.view(-1, 64), (64, 64), gl.float16)


def describe(x: Tensor, box: list[int]) -> TensorDescriptor:
    """TMA box of a result in bf16 or float32."""
    dtype = gl.float32 if x.dtype == torch.float32 else gl.bfloat16
    return describe_box(x, tuple(box), dtype)
