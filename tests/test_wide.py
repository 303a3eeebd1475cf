"""A checkpoint of V3's real width, names, fp8 shards, index, tokenizer and template, served."""

import shutil
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from openai import OpenAI

from dsd.tests.conftest import ENVIRONMENT, ROOT

PUBLISHED = ROOT.parent / "shared" / "deepseek-v3"
MAX_BYTES = 20 * 2**30
DISK_BYTES = 6 * 2**30


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.skipif(not PUBLISHED.exists(), reason="the published tokenizer is not beside us")
def test_serve_real_width_answers_within_20_gib(start_daemon, tmp_path: Path) -> None:
    if shutil.disk_usage(tmp_path).free < DISK_BYTES:
        pytest.skip("less than 6 GiB of disk")
    directory = tmp_path / "DeepSeek-V3"
    maker = [sys.executable, "-P", "-m", "dsd.tools.make_checkpoint", str(directory), "--wide"]
    maker += ["--tokenizer", str(PUBLISHED)]
    subprocess.run(maker, check=True, env=ENVIRONMENT, stdout=subprocess.DEVNULL)
    try:
        daemon = start_daemon(str(directory), "--max-seq-len", "4096")
        with OpenAI(base_url=f"{daemon.url}/v1", api_key="none", timeout=300) as client:
            answer = client.chat.completions.create(
                model="deepseek-ai/DeepSeek-V3",
                messages=[{"role": "user", "content": "Where is New York?"}],
                max_tokens=2,
                temperature=0,
            )
        worker = psutil.Process(daemon.status()["ranks"][0]["pid"])
        peak = _peak_bytes(worker.pid) + _peak_bytes(daemon.process.pid)
        assert daemon.stop() == 0
    finally:
        shutil.rmtree(directory)
    assert answer.usage.prompt_tokens == 8
    assert answer.usage.completion_tokens == 2
    assert answer.choices[0].message.content
    assert peak < MAX_BYTES, f"{peak / 2**30:.1f} GiB"


def _peak_bytes(pid: int) -> int:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
