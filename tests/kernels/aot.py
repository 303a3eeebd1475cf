"""Compiles a kernel for a card that is not there, and reads what ptxas made of it."""

import re
import subprocess
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.experimental.gluon._runtime import GluonASTSource
from triton.runtime.jit import create_function_from_signature

BIN = Path(triton.__file__).parent / "backends/nvidia/bin"
MAX_SMEM = 232448
"""Bytes of shared memory that a block may have on sm_90 and sm_100. More compiles, and fails when
the module is loaded."""


@dataclass(frozen=True)
class Report:
    registers: int
    """Of a thread at launch; a warp-specialised kernel moves them between its partitions."""
    spills: int
    """Local loads and stores in the machine code, plus bytes of stack."""
    smem: int
    opcodes: Counter[str]
    """How often each SASS instruction occurs, without its suffixes: QGMMA, UTMALDG, FFMA, ..."""


def compile_kernel(
    fn: Any,
    args: tuple[Any, ...] | list[Any],
    constexprs: dict[str, Any],
    arch: int = 90,
    num_warps: int = 4,
    gluon: bool = False,
    **options: Any,
) -> Report:
    """args: what a launch would pass before its constexprs: CPU (or meta) tensors, descriptors,
    numbers. options: what a launch takes besides: num_stages, maxnreg, ..."""
    if "PDL" in fn.arg_names:  # as it is launched on Hopper
        constexprs = {"PDL": arch >= 90, **constexprs}
    target = GPUTarget("cuda", arch, 32)
    backend = make_backend(target)
    keywords = {**constexprs, "num_warps": num_warps, **options}
    binder = create_function_from_signature(fn.signature, fn.params, backend)
    bound, specialization, parsed = binder(*args, **keywords)
    parsed, signature, constants, attrs = fn._pack_args(
        backend, keywords, bound, specialization, parsed
    )
    source = (GluonASTSource if gluon else ASTSource)(fn, signature, constants, attrs)
    kernel = triton.compile(source, target=target, options=parsed.__dict__)
    return _report(kernel)


def _report(kernel: Any) -> Report:
    with TemporaryDirectory() as directory:
        path = Path(directory) / "kernel.cubin"
        path.write_bytes(kernel.asm["cubin"])
        usage = _run("cuobjdump", "-res-usage", str(path))
        sass = _run("nvdisasm", "-c", str(path))
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found, usage
    instruction = re.compile(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9]+)", re.MULTILINE)
    opcodes = Counter(instruction.findall(sass))
    assert opcodes, sass[:500]
    spills = int(found[2]) + opcodes["STL"] + opcodes["LDL"]
    return Report(int(found[1]), spills, kernel.metadata.shared, opcodes)


def _run(tool: str, *arguments: str) -> str:
    result = subprocess.run([str(BIN / tool), *arguments], capture_output=True, text=True)
    return result.stdout + result.stderr
