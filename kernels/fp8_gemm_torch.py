"""The fp8 GEMM of torch's library (cuBLASLt), behind the same contract as ours: to compare with,
and to fall back to.

cuBLASLt multiplies 1x128 by 128x128 scales on Hopper alone, in multiples of 16 rows and columns,
and is trusted only where rows of weight scales are a multiple of 16 bytes long; everything else is
dequantised and multiplied in the dtype of the result.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from . import reference
from .compat import has_wgmma
from .quant import dequantize_128x128

ROWS = 16
DEPTH = 512
"""Four scales. With a K of 2304 torch 2.11 gives wrong numbers, without an error."""


def fp8_gemm_nt_torch(
    x: Tensor, x_scale: Tensor, w: Tensor, w_scale: Tensor, out_dtype: torch.dtype
) -> Tensor:
    """x: [T, K] float8_e4m3fn, x_scale: [T, ceil(K/128)] float32, w: [N, K] float8_e4m3fn, w_scale:
    [ceil(N/128), ceil(K/128)] float32 -> [T, N] out_dtype."""
    (m, k), n = x.shape, w.shape[0]
    if has_wgmma(x) and out_dtype == torch.bfloat16 and k % DEPTH == n % 128 == 0:
        padding = -m % ROWS
        if padding:
            x = F.pad(x.view(torch.uint8), (0, 0, 0, padding)).view(x.dtype)
            x_scale = F.pad(x_scale, (0, 0, 0, padding))
        outer = x_scale.t().contiguous().t()
        return torch._scaled_mm(
            x, w.t(), scale_a=outer, scale_b=w_scale.contiguous().t(), out_dtype=out_dtype
        )[:m]
    scales = x_scale.repeat_interleave(reference.BLOCK, dim=1)[:, :k]
    wide = (x.float() * scales).to(out_dtype)
    return torch.mm(wide, dequantize_128x128(w, w_scale, out_dtype).t())
