"""Numbers of tokens do not choose what is compiled, beyond the few shapes of tiles: found without a
GPU, from what each launch would look up in Triton's cache."""

import pytest
import torch

from dsd.kernels import gemm
from dsd.tests.kernels.variants import Variant, launches_noted
from dsd.tools.kernel_runs import RUNS, WARM_TOKENS

pytestmark = pytest.mark.slow

SERVED = (2, 3, 4, 5, 6, 8, 15, 16, 24, 31, 32, 47, 48, 63, 64, 96, 100, 127, 128, 160, 255, 256)
SERVED += (299, 300)


def launched(name: str, counts: tuple[int, ...]) -> set[Variant]:
    with launches_noted() as noted:
        for m in counts:
            RUNS[name](m, "cpu")
    return noted


@pytest.mark.parametrize("name", RUNS)
def test_kernels_of_other_token_counts_are_those_of_the_warm_up(name: str) -> None:
    warm = launched(name, WARM_TOKENS)
    new = sorted(launched(name, SERVED) - warm)
    assert warm and not new, "\n".join(f"{kernel}: {what}" for kernel, what in new)


MAPS = [(2112, 7168), (3072, 1536), (4608, 7168), (7168, 2048), (7168, 2304), (512, 7168)]
"""(N, K) of a rank of eight of DeepSeek-V3."""


def test_warm_up_tokens_reach_every_kernel_of_the_fp8_maps() -> None:
    maps = [
        (torch.empty(n, k, dtype=torch.float8_e4m3fn), torch.empty(-(-n // 128), k // 128))
        for n, k in MAPS
    ]

    def launched_by(counts: list[int]) -> set[Variant]:
        with launches_noted() as noted:
            for m in counts:
                for w, w_scale in maps:
                    gemm.linear(torch.empty(m, w.shape[1]).bfloat16(), w, w_scale, act_quant=True)
        return noted

    few = gemm.warm_up_tokens(MAPS, 2048, sms=132)
    assert len(few) <= 16, few
    served = [*range(1, 70, 3), 127, 128, 129, 191, 192, 256, 257, 300, 511, 600, 1024, 1500, 2047]
    assert launched_by(served) <= launched_by(few)
