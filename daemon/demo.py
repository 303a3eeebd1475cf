"""`dsd demo`: the daemon, a question over HTTP, and the answer as it streams."""

import asyncio
import http.client
import json
import sys
import tempfile
from collections.abc import Callable

import msgspec

from .config import Config
from .node import Node

QUESTION = "Where is New York?"
MAX_TOKENS = 48


async def show(config: Config, say: Callable[[str], None]) -> None:
    """Starts the daemon on a free port, asks, prints, and stops it."""
    with tempfile.TemporaryDirectory(prefix="dsd-demo-") as directory:
        server = msgspec.structs.replace(config.server, runtime_dir=directory)
        node = Node(msgspec.structs.replace(config, server=server))
        say("starting the daemon ...")
        running = asyncio.ensure_future(node.run())
        asking = asyncio.ensure_future(_ask(node, say))
        try:
            await asyncio.wait({running, asking}, return_when=asyncio.FIRST_COMPLETED)
            if running.done():
                running.result()  # raises what ended the daemon
            await asking
        finally:
            asking.cancel()
            node.stop()
            await asyncio.gather(running, asking, return_exceptions=True)
        say(_what_next(config))


async def _ask(node: Node, say: Callable[[str], None]) -> None:
    await node.wait_ready()
    say(f"ready: {node.info.name} on http://127.0.0.1:{node.port}\n")
    say(f"> {QUESTION}")
    tokens = await asyncio.to_thread(_stream, node.port, node.info.name)
    say(f"\n\n({tokens} tokens. The weights are random, so the words are too; the way is real:")
    say(" HTTP, tokenizer, scheduler, ZeroMQ, worker, MLA and MoE layers, sampler, SSE.)")


def _stream(port: int, model: str) -> int:
    """Asks over HTTP and prints the answer as it comes; returns how many tokens it had."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    body = {
        "model": model,
        "messages": [{"role": "user", "content": QUESTION}],
        "max_tokens": MAX_TOKENS,
        "temperature": 0.6,
        "seed": 7,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    connection.request(
        "POST", "/v1/chat/completions", json.dumps(body), {"content-type": "application/json"}
    )
    response = connection.getresponse()
    tokens = 0
    for line in response:
        if not line.startswith(b"data: ") or line.startswith(b"data: [DONE]"):
            continue
        event = json.loads(line[6:])
        tokens = (event.get("usage") or {}).get("completion_tokens", tokens)
        for choice in event["choices"]:
            delta = choice["delta"]
            sys.stdout.write(delta.get("reasoning_content") or delta.get("content") or "")
            sys.stdout.flush()
    connection.close()
    return tokens


def _what_next(config: Config) -> str:
    return (
        "\nnext:\n"
        "  dsd serve                          the same model, until Ctrl-C\n"
        "  dsd serve /models/DeepSeek-V3      a checkpoint of yours\n"
        "  dsctl status                       what it is doing\n"
        "  curl http://localhost:8000/v1/completions -H 'Content-Type: application/json' \\\n"
        f'    -d \'{{"model": "{config.model.model_dir.rsplit("/", 1)[-1]}", '
        '"prompt": "Where is New York?", "max_tokens": 16}\''
    )
