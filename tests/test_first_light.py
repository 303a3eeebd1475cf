"""One greedy request through every room of the house, over HTTP and over the Unix socket."""

import httpx
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
