"""GEMMs in plain Triton: any GPU, any shape, one kernel for dense maps and for experts.

The weight is the first operand of `tl.dot` and the tokens the second, so that few tokens still
fill the tensor core. Three kinds:

    plain    x and w of one float dtype
    scaled   x and w e4m3 with block scales, partial sums of 128 promoted to float32
    dequant  x float, w e4m3, dequantised to x's dtype as it is used

Where the card has no fp8, e4m3 is decoded from its bits and multiplied in bf16: the products are
the same.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import reference
from .compat import has_fp8, num_sms, runs_kernels
from .fp8_gemm import check


class Tile(NamedTuple):
    bm: int
    """Tokens."""
    bn: int
    bk: int
    warps: int
    stages: int


def choose_tile(tokens: float, kind: str, x: Tensor) -> Tile:
    """tokens: rows that meet one weight, expected."""
    if x.dtype == torch.float32:
        return Tile(16, 64, 32, 4, 3)
    # Beyond the largest, partial sums (and decoded operands) spill.
    largest = 128 if kind != "scaled" else 64 if has_fp8(x) else 32
    bm = next((t for t in (16, 32, 64) if tokens <= t), 128)
    bm = min(bm, largest)
    bk = 128 if kind == "scaled" else 64
    return Tile(bm, 128, bk, 8 if bm >= 64 else 4, 3 if bm == 128 else 4)


def fp8_gemm_nt_dot(x: Tensor, x_scale: Tensor, w: Tensor, w_scale: Tensor, out: Tensor) -> Tensor:
    """out = x @ w^T, both e4m3 with block scales.

    x: [T, K] float8_e4m3fn
    x_scale: [T, ceil(K/128)] float32, any layout
    w: [N, K] float8_e4m3fn
    w_scale: [ceil(N/128), ceil(K/128)] float32
    out: [T, N] bfloat16, float16 or float32
    Rows of x, w, w_scale and out are adjacent or strided; nothing behind them is read or written.
    """
    check(x, x_scale, w, w_scale, out)
    if not runs_kernels(x):
        return out.copy_(reference.fp8_gemm_nt(x, x_scale, w, w_scale, out.dtype))
    return launch(x, x_scale, w[None], w_scale[None], out, None, x.shape[0])


def dequant_gemm_nt(x: Tensor, w: Tensor, w_scale: Tensor) -> Tensor:
    """x @ dequantised w^T.

    x: [T, K] bfloat16, float16 or float32
    w: [N, K] float8_e4m3fn
    w_scale: [ceil(N/128), ceil(K/128)] float32
    -> [T, N] in x's dtype
    """
    assert w.dtype == torch.float8_e4m3fn and x.is_floating_point(), (x.dtype, w.dtype)
    assert w_scale.shape == tuple(-(-n // 128) for n in w.shape), (w.shape, w_scale.shape)
    if not runs_kernels(x):
        return reference.dequant_gemm_nt(x, w, w_scale)
    out = torch.empty(x.shape[0], w.shape[0], dtype=x.dtype, device=x.device)
    return launch(x, None, w[None], w_scale[None], out, None, x.shape[0])


def launch(
    x: Tensor,
    x_scale: Tensor | None,
    w: Tensor,
    w_scale: Tensor | None,
    out: Tensor,
    table: Tensor | None,
    tokens: float,
) -> Tensor:
    """x: [M, K], w: [E, N, K], w_scale: [E, ceil(N/128), ceil(K/128)] or None, out: [M, N]; which
    rows are whose says `table` (`moe_items.item_table`, made for this tile), or E is 1."""
    kind = "plain" if w_scale is None else "dequant" if x_scale is None else "scaled"
    assert x.stride(1) == w.stride(2) == out.stride(1) == 1, (x.stride(), w.stride())
    tile = choose_tile(tokens, kind, x)
    (m, k), n = x.shape, w.shape[1]
    num_n = -(-n // tile.bn)
    if not m:
        return out
    tiles = -(-m // tile.bm) * num_n if table is None else num_sms(x) * 2
    as_bits = not has_fp8(x)
    if as_bits:
        x, w = (t.view(torch.uint8) if t.dtype == torch.float8_e4m3fn else t for t in (x, w))
    xs, ws = x if x_scale is None else x_scale, w if w_scale is None else w_scale
    dot_kernel[(min(tiles, num_sms(x) * 2),)](
        x, xs, w, ws, out, x if table is None else table,
        -(-m // tile.bm), num_n, m, n, k, x.stride(0), *xs.stride()[-2:], *w.stride()[:2],
        *ws.stride()[:2], out.stride(0),
        KIND=kind, BITS=as_bits, GROUPED=table is not None, EVEN=k % tile.bk == 0,
        BM=tile.bm, BN=tile.bn, BK=tile.bk, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return out


@triton.jit
def decode(bits):
    """e4m3 in a uint8 -> float32: a half with 4 of its exponent's 5 bits, so 2^8 too small."""
    sign = (bits & 0x80).to(tl.uint16) << 8
    half = (sign | ((bits & 0x7F).to(tl.uint16) << 7)).to(tl.float16, bitcast=True)
    return half.to(tl.float32) * 256.0


@triton.jit
def operand(value, BITS: tl.constexpr):
    """An e4m3 operand as the tensor core takes it."""
    if BITS:
        value = decode(value).to(tl.bfloat16)
    return value


@triton.jit
def tile_at(t, table, num_n, m_rows, BM: tl.constexpr, GROUPED: tl.constexpr):
    """Tile t -> its group, first row, the row behind the group's last, its column of tiles."""
    if GROUPED:
        item = table + 4 + t // num_n * 4
        row = tl.load(item + 2) + (t // num_n - tl.load(item + 1)) * BM
        return tl.load(item), row, tl.load(item + 3), t % num_n
    else:  # noqa: RET505  Triton compiles what follows a return, but not the other branch
        return tl.program_id(0) * 0, t // num_n * BM, m_rows, t % num_n


@triton.jit
def product(
    x, xs, w, ws, rows, live_rows, columns, live_columns, k_size, xs_stride, xs_step,
    KIND: tl.constexpr, BITS: tl.constexpr, EVEN: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """w [BN, K] times x [BM, K]^T; x and w: pointers to their rows' beginnings."""
    acc = tl.zeros((BN, BM), dtype=tl.float32)
    ks = tl.arange(0, BK)
    for k in range(0, k_size, BK):
        live_k = ks < (BK if EVEN else k_size - k)
        xk = tl.load(x[None, :] + k + ks[:, None], live_k[:, None] & live_rows[None, :], 0.0)
        wk = tl.load(w[:, None] + k + ks[None, :], live_k[None, :] & live_columns[:, None], 0.0)
        if KIND == "scaled":
            part = tl.dot(operand(wk, BITS), operand(xk, BITS))
            scale = tl.load(xs + rows * xs_stride + k // 128 * xs_step, live_rows, 0.0)
            acc += part * (scale * tl.load(ws + k // 128))[None, :]
        else:
            if KIND == "dequant":
                wide = decode(wk) if BITS else wk.to(tl.float32)
                wk = (wide * tl.load(ws + k // 128)).to(xk.dtype)
            acc = tl.dot(wk, xk, acc, input_precision="ieee")
    return acc


@triton.jit(
    do_not_specialize=["num_m", "num_n", "m_rows", "xs_stride", "xs_step"],
    do_not_specialize_on_alignment=["xs", "ws", "table"],
)
def dot_kernel(
    x, xs, w, ws, out, table, num_m, num_n, m_rows, n_rows, k_size,
    x_stride, xs_stride, xs_step, w_group_stride, w_stride, ws_group_stride, ws_stride, out_stride,
    KIND: tl.constexpr, BITS: tl.constexpr, GROUPED: tl.constexpr, EVEN: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    total = num_m * num_n
    if GROUPED:
        total = tl.load(table) * num_n
    for t in range(tl.program_id(0), total, tl.num_programs(0)):
        group, row, end, n = tile_at(t, table, num_n, m_rows, BM, GROUPED)
        rows = row + tl.arange(0, BM).to(tl.int64)
        columns = n * BN + tl.arange(0, BN)
        live_rows, live_columns = rows < end, columns < n_rows
        of_group = w + group.to(tl.int64) * w_group_stride
        acc = product(
            x + rows * x_stride, xs, of_group + columns.to(tl.int64) * w_stride,
            ws + group * ws_group_stride + n * BN // 128 * ws_stride,
            rows, live_rows, columns, live_columns, k_size, xs_stride, xs_step,
            KIND, BITS, EVEN, BM, BN, BK,
        )  # fmt: skip
        at = out + rows[None, :] * out_stride + columns[:, None]
        tl.store(at, acc.to(out.dtype.element_ty), live_rows[None, :] & live_columns[:, None])
