"""One greedy request through every room of the house, over HTTP and over the Unix socket."""

import shutil
from pathlib import Path

import httpx
import pytest
from openai import OpenAI


def test_completion_greedy_same_over_tcp_uds_streamed_and_whole(daemon) -> None:
    asked = {"model": "Tiny-V3", "prompt": "Where is New York?", "max_tokens": 12, "temperature": 0}
    tcp = OpenAI(base_url=f"{daemon.url}/v1", api_key="none")
    transport = httpx.HTTPTransport(uds=daemon.uds)
    uds = OpenAI(
        base_url="http://dsd/v1", api_key="none", http_client=httpx.Client(transport=transport)
    )
    with tcp, uds:
        whole = tcp.completions.create(**asked)
        streamed = "".join(
            chunk.choices[0].text for chunk in uds.completions.create(**asked, stream=True)
        )
    assert whole.usage.completion_tokens == 12
    assert whole.choices[0].finish_reason == "length"
    assert whole.choices[0].text
    assert streamed == whole.choices[0].text


@pytest.mark.slow
def test_dummy_weights_serve_a_directory_without_any(
    start_daemon, small_checkpoint: Path, tmp_path: Path
) -> None:
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(small_checkpoint / name, tmp_path / name)
    options = tmp_path / "extra.yml"
    options.write_text("load_format: dummy\n")
    for arguments in (["--load-format", "dummy"], ["--extra-llm-api-options", str(options)]):
        daemon = start_daemon(str(tmp_path), *arguments)
        with OpenAI(base_url=f"{daemon.url}/v1", api_key="none") as client:
            answer = client.completions.create(model=tmp_path.name, prompt="Hello", max_tokens=5)
        assert answer.usage.completion_tokens >= 1
        assert "the weights are random" in daemon.log.read_text()
        assert daemon.stop() == 0
