"""What differs by version of Triton (3.6 to 3.9) and by card, and how kernels are launched."""

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import tma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

VERSION = tuple(int(part) for part in triton.__version__.split(".")[:2])

tma_load = tma.async_load if VERSION >= (3, 8) else tma.async_copy_global_to_shared
tma_store = tma.async_store if VERSION >= (3, 8) else tma.async_copy_shared_to_global
barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier
"""Of the threads of one partition; renamed in 3.7."""
REINTERPRET_IS_PUBLIC = VERSION >= (3, 9)
"""Else a shared-memory descriptor's `reinterpret` is `_reinterpret`."""
LOW_REGISTERS = "--register-usage-level=0"
"""`ptx_options` of a launch: keeps ptxas from hoisting every wgmma descriptor, which spills."""


def runs_kernels(x: Tensor) -> bool:
    """Whether a wrapper launches its kernel for x, rather than call the torch twin: on a GPU, and
    on a CPU under Triton's interpreter (tests)."""
    return x.is_cuda or triton.knobs.runtime.interpret


def has_fp8(x: Tensor) -> bool:
    """Tensor cores multiply e4m3; elsewhere Triton refuses the type."""
    return not x.is_cuda or _capability(x.device) >= (8, 9)


def has_wgmma(x: Tensor) -> bool:
    """Hopper, and nothing else: wgmma and TMA as our Gluon kernels use them."""
    return x.is_cuda and _capability(x.device) == (9, 0)


def overlap(x: Tensor) -> dict[str, bool]:
    """Options for launching a kernel that begins with `wait_previous(PDL)`: from Hopper on it is
    set up while the kernel before it still runs (programmatic dependent launch)."""
    able = x.is_cuda and _capability(x.device) >= (9, 0)
    return {"PDL": able, "launch_pdl": True} if able else {"PDL": False}


@triton.jit
def wait_previous(PDL: tl.constexpr):
    """Lets the next kernel be set up, and waits until the one before has ended and its writes are
    seen. Every program must pass here, before it writes and before it reads what kernels write: the
    next kernel waits for this one alone. Constants may be read before: what no kernel has written
    since the last launch without `overlap`, since several kernels may be waiting here at once."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()


def describe_box(x: Tensor, box: tuple[int, ...], dtype: tl.dtype) -> TensorDescriptor:
    """TMA's view of x in boxes, which lie swizzled in shared memory as wgmma reads them."""
    return TensorDescriptor.from_tensor(x, list(box), _shared_layout(box, dtype))


@cache
def _shared_layout(box: tuple[int, ...], dtype: tl.dtype) -> gl.NVMMASharedLayout:
    return gl.NVMMASharedLayout.get_default_for(list(box), dtype)


@cache
def flat_layout() -> gl.NVMMASharedLayout:
    """Of boxes of float32 that are not swizzled."""
    return gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=32, rank=2)


@triton.jit
def prefetch_l2(address):
    """Asks for the lines at these addresses (int64), to be in L2 when they are read."""
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [address], dtype=tl.int32,
        is_pure=False, pack=1,
    )  # fmt: skip


def num_sms(x: Tensor) -> int:
    """1 for a CPU tensor."""
    return _num_sms(x.device) if x.is_cuda else 1


@cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


@cache
def _num_sms(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count
