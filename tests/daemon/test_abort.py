"""Clients that leave: whatever the phase and the way, their blocks are free at once."""

import json
import socket
import struct
import threading
import time
from typing import Any

import httpx
import psutil
import pytest

from dsd.daemon.engine import Engine
from dsd.daemon.generation import Choice, Generation
from dsd.daemon.request import Request
from dsd.ipc.messages import Sampling
from dsd.tests.conftest import Daemon
from dsd.tests.fake_worker import continuation

STEP_S = 0.02
LIMIT_S = 0.25
"""Blocks are free within this and one step; twice it here, for machines that others use too."""
LONG: dict[str, Any] = {"max_tokens": 1500, "ignore_eos": True, "temperature": 0}


def request(path: str, body: dict[str, Any]) -> bytes:
    data = json.dumps({"model": "Tiny-V3", **body}).encode()
    head = f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-length: {len(data)}\r\n\r\n"
    return head.encode() + data


def completion(stream: bool, num_prompt_tokens: int = 70, **fields: Any) -> bytes:
    prompt = [3 + i % 500 for i in range(num_prompt_tokens)]
    return request("/v1/completions", {"prompt": prompt, "stream": stream, **LONG, **fields})


def chat(stream: bool) -> bytes:
    messages = [{"role": "user", "content": "Where is New York?"}]
    return request("/v1/chat/completions", {"messages": messages, "stream": stream, **LONG})


def talk(daemon: Daemon) -> None:
    """A whole chat, so that the template's process is there when descriptors are counted."""
    body = {"model": "Tiny-V3", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1}
    assert httpx.post(f"{daemon.url}/v1/chat/completions", json=body).status_code == 200


def leave(connection: socket.socket, how: str) -> None:
    if how == "RST":
        linger = struct.pack("ii", 1, 0)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
    connection.close()


def wait_running(daemon: Daemon, count: int) -> None:
    deadline = time.monotonic() + 10
    while daemon.status()["requests"]["running"] < count:
        assert time.monotonic() < deadline, daemon.status()
        time.sleep(0.002)


def assert_freed(daemon: Daemon, what: str, step_s: float = STEP_S) -> None:
    took_s = daemon.wait_idle()
    assert took_s < 2 * (LIMIT_S + step_s), f"{what}: blocks were held for {took_s:.3f} s"


@pytest.mark.parametrize("how", ["FIN", "RST"])
@pytest.mark.parametrize("stream", [True, False], ids=["streamed", "whole"])
@pytest.mark.parametrize("make", [completion, chat])
def test_client_that_leaves_in_decode_frees_its_blocks(fake_daemon, make, stream, how) -> None:
    connection = fake_daemon.connect()
    connection.sendall(make(stream))
    wait_running(fake_daemon, 1)
    time.sleep(3 * STEP_S)
    leave(connection, how)
    assert_freed(fake_daemon, f"{make.__name__} {stream=} {how}")
    steps = fake_daemon.status()["requests"]["finished"]["abort"]
    assert steps


@pytest.mark.parametrize("how", ["FIN", "RST"])
@pytest.mark.parametrize("stream", [True, False], ids=["streamed", "whole"])
def test_client_that_leaves_in_prefill_frees_its_blocks(fake_daemon, stream, how) -> None:
    connection = fake_daemon.connect()
    connection.sendall(completion(stream, num_prompt_tokens=2000))  # eight steps of 256
    wait_running(fake_daemon, 1)
    leave(connection, how)
    assert_freed(fake_daemon, f"prefill {stream=} {how}")


@pytest.mark.parametrize("stream", [True, False], ids=["streamed", "whole"])
def test_client_that_leaves_while_queued_leaves_the_queue(fake_daemon, stream) -> None:
    # Each of these holds half of the cache, so that the third must wait.
    running = [fake_daemon.connect() for _ in range(4)]
    for number, connection in enumerate(running):
        prompt = [3 + number] * 1990
        connection.sendall(request("/v1/completions", {"prompt": prompt, "stream": True, **LONG}))
    wait_running(fake_daemon, 3)
    waiting = fake_daemon.connect()
    waiting.sendall(completion(stream, num_prompt_tokens=1990))
    deadline = time.monotonic() + 5
    while not (queued := fake_daemon.status()["requests"]["waiting"]):
        assert time.monotonic() < deadline
    leave(waiting, "FIN")
    while fake_daemon.status()["requests"]["waiting"] >= queued:
        assert time.monotonic() < deadline + 1
    for connection in running:
        leave(connection, "FIN")
    assert_freed(fake_daemon, "queued")


@pytest.mark.parametrize("how", ["FIN", "RST"])
@pytest.mark.parametrize("size", [10, 60, -1])
def test_client_that_leaves_before_its_request_ends_leaves_nothing(fake_daemon, how, size) -> None:
    accepted = fake_daemon.status()["requests"]["accepted"]
    connection = fake_daemon.connect()
    connection.sendall(completion(True)[:size])
    time.sleep(0.02)
    leave(connection, how)
    assert_freed(fake_daemon, "half a request")
    assert fake_daemon.status()["requests"]["accepted"] == accepted


@pytest.mark.parametrize("stream", [True, False], ids=["streamed", "whole"])
@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("extra", [b"\r\n", b"GET /livez HTTP/1.1\r\nhost: x\r\n\r\n"])
def test_client_that_pipelined_and_left_is_noticed(fake_daemon, extra, late, stream) -> None:
    """Bytes after the body: some clients add a line end. They must not hide the end of the
    connection."""
    connection = fake_daemon.connect()
    connection.sendall(completion(stream) + (b"" if late else extra))
    wait_running(fake_daemon, 1)
    if late:
        connection.sendall(extra)
        time.sleep(STEP_S)
    leave(connection, "FIN")
    assert_freed(fake_daemon, f"{extra=}")


def test_pipelined_requests_are_answered_in_order(fake_daemon) -> None:
    livez = b"GET /livez HTTP/1.1\r\nhost: x\r\n\r\n"
    version = b"GET /version HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n"
    with fake_daemon.connect() as connection:
        connection.sendall(completion(False, max_tokens=3) + livez + version)
        answer = b"".join(iter(lambda: connection.recv(65536), b""))
    positions = [answer.find(piece) for piece in (b"cmpl-", b"ok\n", b'"version"')]
    assert -1 < positions[0] < positions[1] < positions[2], answer


def test_client_with_many_choices_that_leaves_frees_all_of_them(fake_daemon) -> None:
    connection = fake_daemon.connect()
    connection.sendall(completion(True, n=8))
    wait_running(fake_daemon, 8)
    leave(connection, "RST")
    assert_freed(fake_daemon, "n=8")


def test_client_that_leaves_does_not_disturb_the_others(fake_daemon) -> None:
    body = {"prompt": [5, 6, 7], "max_tokens": 20, "return_token_ids": True}
    texts = []

    def ask() -> None:
        with fake_daemon.connect() as connection:
            data = request("/v1/completions", body)
            data = data.replace(b"host: x", b"host: x\r\nconnection: close")
            connection.sendall(data)
            answer = b"".join(iter(lambda: connection.recv(65536), b""))
        texts.append(json.loads(answer.partition(b"\r\n\r\n")[2])["choices"][0]["token_ids"])

    staying = [threading.Thread(target=ask) for _ in range(6)]
    leaving = [fake_daemon.connect() for _ in range(6)]
    for thread, connection in zip(staying, leaving, strict=True):
        connection.sendall(completion(True))
        thread.start()
    wait_running(fake_daemon, 6)
    for connection in leaving:
        leave(connection, "RST")
    for thread in staying:
        thread.join(timeout=20)
    assert texts == [continuation([5, 6, 7], 20)] * 6


def test_generation_that_nobody_read_is_aborted_when_closed() -> None:
    """The client left between the acceptance and the first token."""

    class Recorder:
        aborted: list[Any] = []  # noqa: RUF012

        async def submit(self, requests: Any) -> str:
            return "the stream"

        def abort(self, stream: Any) -> None:
            self.aborted.append(stream)

    engine: Any = Recorder()
    request = Request("r", [1], Sampling(), 5)
    generation = Generation(engine, [Choice(0, request, None, None)])
    generation.close()
    assert engine.aborted == []
    coroutine = generation.start()
    with pytest.raises(StopIteration):
        coroutine.send(None)
    generation.close()
    assert engine.aborted == ["the stream"]
    assert Engine.abort  # the method that the recorder stands for


@pytest.mark.slow
@pytest.mark.parametrize("num_cycles", [300])
def test_hundreds_of_clients_that_leave_leak_nothing(start_fake, num_cycles) -> None:
    daemon = start_fake(worker={"step_s": 0.002})
    process = psutil.Process(daemon.process.pid)
    payloads = [completion(True), completion(False), chat(True), chat(False),
                completion(True, n=4), completion(False, num_prompt_tokens=1500)]  # fmt: skip

    def cycle(number: int) -> None:
        payload = payloads[number % len(payloads)]
        connection = daemon.connect()
        is_half = number % 7 == 0
        connection.sendall(payload[: len(payload) // 2] if is_half else payload)
        if number % 3:
            time.sleep(0.003 * (number % 5))
        if number % 5 == 0 and b'"stream": true' in payload and not is_half:
            assert connection.recv(100)
        leave(connection, "RST" if number % 2 else "FIN")

    for number in range(20):
        cycle(number)
    talk(daemon)
    daemon.assert_clean()
    num_fds, rss = process.num_fds(), process.memory_info().rss
    for number in range(num_cycles):
        cycle(number)
        if number % 50 == 49:
            assert_freed(daemon, f"cycle {number}", 0.002)
    talk(daemon)
    daemon.assert_clean()
    time.sleep(0.1)
    assert process.num_fds() <= num_fds
    assert process.memory_info().rss - rss < 16 << 20
    assert daemon.stop() == 0
    assert "Traceback" not in daemon.log.read_text()


@pytest.mark.parametrize("how", ["FIN", "RST"])
@pytest.mark.parametrize("stream", [True, False], ids=["streamed", "whole"])
def test_client_of_the_real_worker_that_leaves_frees_its_blocks(daemon, stream, how) -> None:
    connection = daemon.connect()
    connection.sendall(completion(stream))
    wait_running(daemon, 1)
    leave(connection, how)
    assert_freed(daemon, f"real worker {stream=} {how}", step_s=0.25)
    daemon.assert_clean()
