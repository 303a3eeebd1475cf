"""Runs a small case of every GPU kernel, for compute-sanitizer to watch:

    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck \\
        python -P -m dsd.tools.sanitize_kernels [--only NAME] [--tokens 1,5,70]

Without that variable torch cuts its tensors out of large allocations, and an access behind one is
an access to the next. The last line says how many kernels were compiled: none, the second time
with the same TRITON_CACHE_DIR.
"""

import argparse

import torch

from ..kernels.compilations import compilations
from .kernel_runs import RUNS

TOKENS = "1,5,70,131"
"""One; an odd few; more than a tile of 64 has; more than one of 128 has."""


def main() -> None:
    parser = argparse.ArgumentParser(description="a small case of every GPU kernel")
    parser.add_argument("--only", action="append", choices=list(RUNS), help="all by default")
    parser.add_argument("--tokens", default=TOKENS, help=f"numbers of tokens (default: {TOKENS})")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("sanitize_kernels needs a GPU")
    for name in options.only or RUNS:
        for m in map(int, options.tokens.split(",")):
            RUNS[name](m, "cuda")
            torch.cuda.synchronize()
            print(f"ran {name}, {m} tokens", flush=True)
    compiled, loaded = compilations()
    print(f"kernels compiled: {compiled}, loaded: {loaded}")


if __name__ == "__main__":
    main()
