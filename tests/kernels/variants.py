"""Which compiled kernels a call would launch, found without a GPU: wrappers are told that CPU
tensors lie on an H100, and a launch only notes what Triton would look up in its cache."""

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from dsd.kernels import compat, fp8_gemm_swap
from dsd.tests.kernels.aot import MAX_SMEM

H100 = SimpleNamespace(multi_processor_count=132, shared_memory_per_block_optin=MAX_SMEM)
Variant = tuple[str, str]
"""Name of the kernel, and all that was specialised."""


@contextmanager
def launches_noted() -> Iterator[set[Variant]]:
    """The set of what is launched within."""
    noted: set[Variant] = set()
    backend = make_backend(GPUTarget("cuda", 90, 32))
    binders: dict[JITFunction[Any], Any] = {}

    def run(self: JITFunction[Any], *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        if self not in binders:
            binders[self] = create_function_from_signature(self.signature, self.params, backend)
        _, specialization, options = binders[self](*args, **kwargs)
        named = zip((p.name for p in self.params), specialization, strict=True)
        noted.add((self.fn.__qualname__, f"{dict(named)} {options}"))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(JITFunction, "run", run)
        patch.setattr(torch.Tensor, "is_cuda", True)
        patch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
        patch.setattr(torch.cuda, "get_device_properties", lambda device: H100)
        patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
        cached = (compat._capability, compat._num_sms, fp8_gemm_swap.split_counters)
        try:
            yield noted
        finally:
            for function in cached:
                function.cache_clear()
