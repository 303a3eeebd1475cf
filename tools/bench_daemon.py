"""The whole daemon under streaming clients: does the GPU ever wait for it?

    python -m dsd.tools.make_checkpoint DIR --v3 --layers 6 --config-only
    python -m dsd.tools.bench_daemon DIR --streams 16 -- --load-format dummy --tp 8

Starts `dsd serve DIR` with what follows `--`, opens `--streams` streaming completions over TCP from
a process of its own, and reads of the daemon's step log what the device did while all of them
decoded: how long a step took, and how long the device stood idle before it.
"""

import asyncio
import json
import math
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import click
import psutil

READY_TIMEOUT_S = 300.0
STOP_TIMEOUT_S = 30.0
MAX_PROMPT_ID = 10_000
"""A share of a layout has the first part of the vocabulary."""


class Daemon:
    """`dsd serve`, as a child process; its log goes to a file."""

    def __init__(self, directory: Path, options: Iterable[str], log: Path) -> None:
        self.log = log
        command = [sys.executable, "-P", "-m", "dsd.daemon.cli", "serve", str(directory)]
        command += ["--host", "127.0.0.1", "--port", "0", "--runtime-dir", str(log.parent)]
        command += ["--served-model-name", "bench", "--log-format", "json"]
        command += ["--print-iter-log", *options]
        self.started = time.monotonic()
        with log.open("w") as file:
            self.process = subprocess.Popen(command, stderr=file, stdout=subprocess.DEVNULL)

    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.log.read_text().splitlines() if line[:1] == "{"]

    def wait_ready(self) -> dict[str, Any]:
        """The log's line that says so. Raises ClickException."""
        while time.monotonic() - self.started < READY_TIMEOUT_S and self.process.poll() is None:
            for line in self.lines():
                if line.get("event") == "ready":
                    return line
            time.sleep(0.2)
        raise click.ClickException(f"the daemon is not ready:\n{self.log.read_text()[-3000:]}")

    def stop(self) -> None:
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self.process.kill()


class Client(NamedTuple):
    """What one process of clients saw."""

    tokens: int
    seconds: float
    gaps_ms: list[float]
    """Between events of one stream."""


async def read_stream(port: int, body: bytes) -> list[float]:
    """Times of a stream's events."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n"
    writer.write(head.encode() + b"Content-Type: application/json\r\n\r\n" + body)
    times = []
    while line := await reader.readline():
        if line.startswith(b"data: {"):
            times.append(time.perf_counter())
        elif line.startswith(b"data: [DONE]"):
            break
        elif line.startswith(b"HTTP/1.1") and b" 200 " not in line:
            raise click.ClickException(f"{line.decode().strip()}: {await reader.read(2000)!r}")
    writer.close()
    return times


async def run_clients(
    port: int, streams: int, prompt: int, max_tokens: int, vocab_size: int
) -> Client:
    def body(stream: int) -> bytes:
        ids = [(stream * 7919 + 31 * i) % vocab_size for i in range(prompt)]
        fields = {"prompt": ids, "max_tokens": max_tokens, "ignore_eos": True, "stream": True}
        return json.dumps({"model": "bench", "seed": stream, **fields}).encode()

    started = time.perf_counter()
    found = await asyncio.gather(*(read_stream(port, body(i)) for i in range(streams)))
    gaps = [(b - a) * 1e3 for times in found for a, b in pairwise(times)]
    return Client(streams * max_tokens, time.perf_counter() - started, gaps)


def quantile(values: list[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, math.ceil(share * len(ordered)) - 1)]


def report(daemon: Daemon, client: Client, streams: int, cpu_s: float) -> str:
    """Of the steps in which every stream decoded."""
    steps = [line for line in daemon.lines() if line.get("event") == "step"]
    full = [line for line in steps if line["num_decodes"] == streams and line["mode"] == "decode"]
    if not full:
        raise click.ClickException("no step had all streams in it")
    rows = [
        ("step on the device, us", [line["compute_us"] for line in full]),
        ("idle before it, us", [line["idle_us"] for line in full]),
        ("between a stream's events, us", [gap * 1e3 for gap in client.gaps_ms]),
    ]
    lines = [f"{'':32} {'median':>10} {'p99':>10} {'max':>10}"]
    for name, values in rows:
        median, p99 = statistics.median(values), quantile(values, 0.99)
        lines.append(f"{name:32} {median:10.0f} {p99:10.0f} {max(values):10.0f}")
    lines.append(
        f"{len(full)} of {len(steps)} steps were full; {client.tokens / client.seconds:.0f} "
        f"tokens/s in all, prompts included; the daemon took {cpu_s / client.seconds:.0%} of a core"
    )
    return "\n".join(lines)


@click.command()
@click.argument("directory", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.argument("options", nargs=-1)
@click.option("--streams", default=16, show_default=True)
@click.option("--prompt", default=1024, show_default=True, help="Tokens of each prompt.")
@click.option("--max-tokens", default=512, show_default=True)
def main(
    directory: Path, options: tuple[str, ...], streams: int, prompt: int, max_tokens: int
) -> None:
    """Measure `dsd serve DIRECTORY OPTIONS` under streaming clients."""
    with tempfile.TemporaryDirectory(prefix="dsd") as folder:
        daemon = Daemon(directory, options, Path(folder) / "log")
        try:
            ready = daemon.wait_ready()
            click.echo(f"ready after {time.monotonic() - daemon.started:.1f} s: {ready['url']}")
            port = int(ready["url"].rsplit(":", 1)[1])
            process = psutil.Process(daemon.process.pid)
            before = process.cpu_times()
            vocab_size = json.loads((directory / "config.json").read_text())["vocab_size"]
            client = asyncio.run(
                run_clients(port, streams, prompt, max_tokens, min(vocab_size, MAX_PROMPT_ID))
            )
            after = process.cpu_times()
            cpu_s = after.user + after.system - before.user - before.system
            click.echo(report(daemon, client, streams, cpu_s))
        finally:
            daemon.stop()


if __name__ == "__main__":
    os.environ.setdefault("PYTHONUNBUFFERED", "1")
    main()
