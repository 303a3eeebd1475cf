"""Makes Triton's interpreter compute what a GPU does.

In 3.6 and 3.7 it truncates float32 to bf16, loses the carry of the rounding to fp8, rounds between
the two halves of an fma, and multiplies the raw bits of bf16 in `tl.dot`; 3.6 cannot `range` over
a loaded number with numpy 2.4. `patch()` sends conversions through torch, widens fma and `tl.dot`,
and mends `range`.
"""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import triton.language as tl

ROOT = Path(__file__).resolve().parent.parent.parent
TORCH = {
    "fp8e4nv": (torch.float8_e4m3fn, np.uint8),
    "fp8e5": (torch.float8_e5m2, np.uint8),
    "bf16": (torch.bfloat16, np.uint16),
    "fp16": (torch.float16, np.uint16),
    "fp32": (torch.float32, np.uint32),
    "fp64": (torch.float64, np.uint64),
}
"""Triton's name -> torch's type, and the unsigned integer that holds its bits."""


def patch() -> None:
    """Call once, in a process with TRITON_INTERPRET=1."""
    from triton.runtime import interpreter

    def convert(value: Any, source: Any, target: Any, rounding_mode: Any) -> Any:
        torch_source, bits = TORCH[str(source.scalar)]
        torch_target, out_bits = TORCH[str(target.scalar)]
        raw = np.ascontiguousarray(value).view(bits)
        converted = torch.from_numpy(raw.copy()).view(torch_source).to(torch_target)
        return converted.view(getattr(torch, np.dtype(out_bits).name)).numpy()

    def widen(handle: Any) -> Any:
        if handle.dtype.scalar in (tl.float32, tl.float64) or not handle.dtype.is_floating():
            return handle.data
        return convert(handle.data, handle.dtype, tl.float32, None).view(np.float32)

    def dot(
        self: Any, a: Any, b: Any, d: Any, input_precision: Any, max_num_imprecise_acc: Any
    ) -> Any:
        product = np.matmul(widen(a), widen(b), dtype=d.data.dtype) + d.data
        return interpreter.TensorHandle(product, d.dtype.scalar)

    def fma(self: Any, x: Any, y: Any, z: Any) -> Any:
        wide = x.data.astype(np.float64) * y.data + z.data  # the product is exact
        return interpreter.TensorHandle(wide.astype(x.data.dtype), x.dtype.scalar)

    patch_tensor = interpreter._patch_lang_tensor

    def patch_tensor_and_index(tensor: Any, scope: Any) -> None:
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.squeeze()))

    interpreter._patch_lang_tensor = patch_tensor_and_index
    interpreter._convert_float = convert
    interpreter.InterpreterBuilder.create_dot = dot
    interpreter.InterpreterBuilder.create_fma = fma
    np.seterr(all="ignore")  # overflow to infinity is no event on a GPU


def run_interpreted(test_file: str) -> None:
    """Runs a file's tests again, in a process of their own where kernels are interpreted."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT / ".typing")}
    command = [sys.executable, "-P", "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"]
    result = subprocess.run(
        [*command, test_file], env=environment, cwd=ROOT, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]
