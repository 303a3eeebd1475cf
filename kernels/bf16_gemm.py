"""Plain GEMMs: the maps of bf16 checkpoints, the head, the float32 logits of the gate.

cuBLAS: nothing is quantised, so there is nothing to fuse, and it is as fast as the card.
"""

import torch
from torch import Tensor

from . import reference


def gemm_nt(x: Tensor, w: Tensor) -> Tensor:
    """x @ w^T, multiplied in x's dtype (float32: not TF32, unless torch was told so).

    x: [T, K] any float dtype, any layout
    w: [N, K] any float dtype, converted if it is another than x's
    -> [T, N] in x's dtype
    """
    assert x.dim() == w.dim() == 2 and x.shape[1] == w.shape[1], (x.shape, w.shape)
    if not x.is_cuda:
        return reference.gemm_nt(x, w)
    return torch.mm(x, w.to(x.dtype).t())
