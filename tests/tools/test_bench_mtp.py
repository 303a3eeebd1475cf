"""The measurement of drafting counts what it says."""

from pathlib import Path

import pytest

from dsd.ipc.messages import Sampling
from dsd.tools import bench_mtp
from dsd.tools.tiny import export

TINY = Path(export.__file__).parent / "dsd-tiny"


@pytest.mark.slow
def test_bench_with_drafts_takes_fewer_steps_for_the_same_tokens() -> None:
    lines: list[str] = []
    rows = bench_mtp.bench(
        TINY, [0, 1], [4], 1, 30, Sampling(temperature=0.0), lines.append,
        device="cpu", dtype="float32", act_quant="none",
    )  # fmt: skip
    plain, drafted = rows
    assert plain.tokens_per_step == 1.0 and plain.right == []
    assert drafted.tokens_per_step == pytest.approx(1 + drafted.right[0])
    assert drafted.right[0] > 0.97
    assert drafted.num_steps < 0.6 * plain.num_steps
    assert len(lines) == 3
