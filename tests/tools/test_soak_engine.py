"""The soak on a CPU: it fills the cache, preempts, and gets requests done."""

from pathlib import Path

import pytest
import torch

from dsd.tools.local_engine import LocalEngine
from dsd.tools.make_checkpoint import SMALL, write_config
from dsd.tools.soak_engine import Soak


@pytest.mark.slow
@pytest.mark.parametrize("kv_cache_dtype", ["auto", "fp8"])
def test_soak_holds_every_block_and_preempts(tmp_path: Path, kv_cache_dtype: str) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    write_config(tmp_path, SMALL)
    engine = LocalEngine(
        tmp_path, device="cpu", max_batch_size=6, max_num_tokens=48, max_seq_len=320,
        kv_cache_gb=0.0015, load_format="dummy", kv_cache_dtype=kv_cache_dtype,
    )  # fmt: skip
    soak = Soak(engine, seed=1)
    stats = soak.scheduler.stats
    soak.run(
        lambda: soak.num_steps < 4000 and (soak.num_finished < 8 or not stats().num_preemptions)
    )
    torch.set_num_threads(before)
    assert soak.num_finished >= 8 and stats().num_preemptions > 0
    assert soak.fullest >= stats().num_blocks - 1
    soak.scheduler.check()
