"""The count of compilations, with a kernel compiled for a card that is not there."""

from pathlib import Path

import pytest
import torch

from dsd.kernels import quant
from dsd.kernels.compilations import compilations
from dsd.tests.kernels.aot import compile_kernel

pytestmark = pytest.mark.slow


def test_compilations_second_time_is_loaded_from_the_folder_of_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    heard = []
    before = compilations()
    q, scale = torch.empty(4, 128, dtype=torch.float8_e4m3fn), torch.empty(4, 1)
    args = (q, scale, torch.empty(4, 128))
    for _ in range(2):
        compile_kernel(quant._dequantize, args, {"N": 4, "K": 128, "ROWS": 64})
        heard.append(compilations())
    assert list(tmp_path.iterdir())
    assert heard[0] == (before.compiled + 1, before.loaded)
    assert heard[1] == (before.compiled + 1, before.loaded + 1)
