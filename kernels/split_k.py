"""Pieces of K: blocks of threads that share a tile of a GEMM leave float32 partial sums in L2, and
the one that comes last adds them up, in the order of K, so that the result is the same every time.
Nobody waits for another.
"""

from functools import cache

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from .compat import barrier

MAX_COUNTERS = 4096


@cache
def split_counters(device: torch.device) -> Tensor:
    """int32 zeros, which every kernel leaves as zeros. Not for two streams at once."""
    assert not torch.cuda.is_current_stream_capturing(), "run once before capturing"
    return torch.zeros(MAX_COUNTERS, dtype=torch.int32, device=device)


@gluon.jit
def piece_order(acc):
    """Where each element of a partial sum [64, B] lies: squares of 8x8 one after another, as they
    lie in a warp's accumulators, so that it writes and reads 256 bytes at once."""
    L: gl.constexpr = acc.type.layout
    B: gl.constexpr = acc.shape[1]
    i = gl.expand_dims(gl.arange(0, 64, gl.SliceLayout(1, L)), 1)
    j = gl.expand_dims(gl.arange(0, B, gl.SliceLayout(0, L)), 0)
    return i // 8 * (8 * B) + i % 8 * 8 + (j // 8 * 64 + j % 8)


@gluon.jit
def leave_piece(piece, acc):
    gl.store(piece + piece_order(acc), acc)


@gluon.jit
def is_last(counter, pieces):
    """Counts this warpgroup's pieces of a tile as left. Whether all others had been, which then are
    seen, and the counter is 0 again."""
    barrier()  # all threads have stored before one of them counts
    last = gl.atomic_add(counter, 1, sem="acq_rel", scope="gpu") == pieces - 1
    if last:
        gl.store(counter, 0)
    return last


@gluon.jit
def load_piece(piece, acc):
    """acc: only says what shape and layout."""
    return gl.load(piece + piece_order(acc), cache_modifier=".cg")


@gluon.jit
def add_pieces(piece, pieces, stride, acc):
    """The sum of pieces that lie `stride` apart. Of small ones the next is under way while one is
    added; with large ones registers would spill."""
    total = load_piece(piece, acc)
    if acc.shape[1] > 64:
        for s in range(1, pieces):
            total += load_piece(piece + s * stride, acc)
    else:
        ahead = load_piece(piece + stride, acc)
        for s in range(2, pieces):
            this = ahead
            ahead = load_piece(piece + s * stride, acc)
            total += this
        total += ahead
    return total
