"""`dsd demo`: the daemon, questions over HTTP, and thoughts and answers as they stream."""

import asyncio
import http.client
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

import msgspec

from .config import Config, model_dir
from .node import Node

MAX_TOKENS = 200
WEATHER = """\
## Tools
### get_weather
Tell the weather in a city.
Parameters: {"city": {"type": "string"}}"""
STORY = (
    "Ada lives in Paris. Ada is 37 years old. Ada works as a pilot. Ada likes the colour green.\n"
    "Give a JSON object with name, age and city."
)
QUESTIONS: tuple[tuple[str, ...], ...] = (
    ("What is 37 + 85?",),
    ("Reverse: planet",),
    (STORY,),
    ("What is the weather in Lisbon?", WEATHER),
)
"""(question, system message if any)."""
DIM, BOLD, PLAIN = "\x1b[2m", "\x1b[1m", "\x1b[0m"


class Interrupted(Exception):
    """A signal ended the demonstration."""


async def show(config: Config, say: Callable[[str], None]) -> None:
    """Starts the daemon on a free port, asks, prints, and stops it."""
    with tempfile.TemporaryDirectory(prefix="dsd-demo-") as directory:
        server = msgspec.structs.replace(config.server, runtime_dir=directory)
        node = Node(msgspec.structs.replace(config, server=server))
        say("starting the daemon ...")
        running = asyncio.ensure_future(node.run())
        asking = asyncio.ensure_future(_ask(node, say))
        stopping = asyncio.ensure_future(node.wait_stop())
        tasks = {running, asking, stopping}
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            if running.done():
                running.result()  # raises what ended the daemon
            if stopping.done():
                raise Interrupted
            await asking
        finally:
            asking.cancel()
            stopping.cancel()
            node.stop(hurry=True)
            await asyncio.gather(*tasks, return_exceptions=True)
        say(_what_next(config))


async def _ask(node: Node, say: Callable[[str], None]) -> None:
    started = node.started_at
    await node.wait_ready()
    seconds = time.time() - started
    say(f"ready after {seconds:.1f} s: {node.info.name} on http://127.0.0.1:{node.port}")
    for question, *system in QUESTIONS:
        if system:
            say(f"\n{_styled(DIM, system[0])}")
        say(f"\n{_styled(BOLD, '> ' + question)}")
        begun = time.monotonic()
        tokens = await asyncio.to_thread(_answer, node.port, node.info.name, question, system)
        speed = tokens / (time.monotonic() - begun)
        say(_styled(DIM, f"\n({tokens} tokens, {speed:.0f} a second)"))


def _styled(style: str, text: str) -> str:
    return f"{style}{text}{PLAIN}" if sys.stdout.isatty() else text


def _answer(port: int, model: str, question: str, system: list[str]) -> int:
    """Asks over HTTP and prints thoughts and answer as they come; returns how many tokens."""
    messages = [{"role": "system", "content": text} for text in system]
    messages.append({"role": "user", "content": question})
    tokens, thinking = 0, False
    for event in _stream(port, {"model": model, "messages": messages}):
        tokens = (event.get("usage") or {}).get("completion_tokens", tokens)
        for choice in event["choices"]:
            delta = choice["delta"]
            if thought := delta.get("reasoning_content"):
                thinking = True
                sys.stdout.write(_styled(DIM, thought))
            if content := delta.get("content"):
                sys.stdout.write(("\n" if thinking else "") + content)
                thinking = False
            sys.stdout.flush()
    return tokens


def _stream(port: int, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    body = {
        **body,
        "max_tokens": MAX_TOKENS,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    connection.request(
        "POST", "/v1/chat/completions", json.dumps(body), {"content-type": "application/json"}
    )
    response = connection.getresponse()
    if response.status != 200:
        raise ConnectionError(response.read().decode())
    for line in response:
        if line.startswith(b"data: ") and not line.startswith(b"data: [DONE]"):
            yield json.loads(line[6:])
    connection.close()


def _what_next(config: Config) -> str:
    name = model_dir(config.model).name
    command = sys.argv[0]
    control = command.removesuffix("dsd") + "dsctl"
    return (
        "\nnext:\n"
        f"  {command} serve                       the same model, until Ctrl-C\n"
        f"  {command} serve /models/DeepSeek-V3   a checkpoint of yours\n"
        f"  {control} status                    what it is doing\n"
        "  curl http://localhost:8000/v1/chat/completions -H 'Content-Type: application/json' \\\n"
        f'    -d \'{{"model": "{name}", "messages": [{{"role": "user", '
        '"content": "Sort: 9 2 7"}]}\''
    )
