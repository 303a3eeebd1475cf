"""A second start compiles nothing, nor does serving after a warm-up, whatever the token counts."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dsd.kernels.compilations import compilations
from dsd.tools.kernel_runs import RUNS, WARM_TOKENS

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.slow,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]


@pytest.mark.parametrize("name", RUNS)
def test_up_to_300_tokens_after_the_warm_up_compile_nothing(name: str) -> None:
    for m in WARM_TOKENS:
        RUNS[name](m, "cuda")
    warm = compilations()
    for m in range(1, 301):
        RUNS[name](m, "cuda")
    torch.cuda.synchronize()
    assert compilations() == warm


def test_second_process_with_the_same_folder_loads_and_compiles_nothing(tmp_path: Path) -> None:
    command = [sys.executable, "-P", "-m", "dsd.tools.sanitize_kernels", "--tokens", "5"]
    command += ["--only", "quant", "--only", "fp8_gemm_swap", "--only", "mla transposed"]
    found = []
    for _ in range(2):
        environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
        ran = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        found.append([int(word.strip(",")) for word in ran.stdout.split() if word[0].isdigit()])
    (*_, first_compiled, first_loaded), (*_, compiled, loaded) = found
    assert first_compiled > 0 and first_loaded == 0
    assert compiled == 0 and loaded == first_compiled
