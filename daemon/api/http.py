"""What Starlette leaves to us: bounded bodies, clients that leave, server-sent events."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine
from contextlib import aclosing
from typing import Any, TypeVar

import msgspec
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from .errors import ApiError

MAX_BODY_BYTES = 4 * 1024 * 1024
BODY_TIMEOUT_S = 30.0
SEND_TIMEOUT_S = 30.0
"""A client that reads nothing for so long is cut off."""

T = TypeVar("T")


class ClientGone(Exception):
    """The client closed its connection, or does not read."""


async def read_body(scope: Scope, receive: Receive) -> bytes:
    """The whole body. Raises ApiError (413, 408) and ClientGone."""
    declared = next((v for k, v in scope["headers"] if k == b"content-length"), b"0")
    if declared.isdigit() and int(declared) > MAX_BODY_BYTES:
        raise _too_large()
    parts: list[bytes] = []
    size = 0
    try:
        async with asyncio.timeout(BODY_TIMEOUT_S):
            while True:
                message: Message = await receive()
                if message["type"] == "http.disconnect":
                    raise ClientGone
                parts.append(message.get("body", b""))
                size += len(parts[-1])
                if size > MAX_BODY_BYTES:
                    raise _too_large()
                if not message.get("more_body", False):
                    return b"".join(parts)
    except TimeoutError:
        why = f"the body did not arrive within {BODY_TIMEOUT_S:.0f} s"
        raise ApiError(408, why, headers={"connection": "close"}) from None


def _too_large() -> ApiError:
    message = f"the body is larger than {MAX_BODY_BYTES} bytes"
    return ApiError(413, message, headers={"connection": "close"})


async def while_connected(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """Runs `work` unless the client leaves first: then cancels it and raises ClientGone.

    Starlette does this for streams only; a handler that does not stream would run to its end. Call
    it after the body has been read.
    """
    working = asyncio.ensure_future(work)
    watching = asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait({working, watching}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise ClientGone
    finally:
        for task in (working, watching):
            task.cancel()
        await asyncio.gather(working, watching, return_exceptions=True)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def send_response(response: Response, scope: Scope, receive: Receive, send: Send) -> None:
    """A whole response, to a client that may not read it."""
    try:
        async with asyncio.timeout(SEND_TIMEOUT_S):
            await response(scope, receive, send)
    except TimeoutError:
        raise ClientGone from None


async def send_events(events: AsyncGenerator[bytes], send: Send) -> None:
    """Server-sent events. The first event is awaited before the status line is sent, so that what
    fails at once is answered with its own status."""
    async with aclosing(events):
        await _send_events(await anext(events), events, send)


async def _send_events(first: bytes, events: AsyncIterator[bytes], send: Send) -> None:
    headers = [
        (b"content-type", b"text/event-stream; charset=utf-8"),
        (b"cache-control", b"no-cache"),
        (b"x-accel-buffering", b"no"),
    ]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await _send_part(send, first)
    async for event in events:
        await _send_part(send, event)
    await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _send_part(send: Send, body: bytes) -> None:
    try:
        async with asyncio.timeout(SEND_TIMEOUT_S):
            await send({"type": "http.response.body", "body": body, "more_body": True})
    except TimeoutError:
        raise ClientGone from None


_encoder = msgspec.json.Encoder()


def sse(data: Any) -> bytes:
    """One event of the stream."""
    return b"data: " + _encoder.encode(data) + b"\n\n"


SSE_DONE = b"data: [DONE]\n\n"


def json_response(data: Any, status: int = 200) -> Response:
    return Response(_encoder.encode(data), status_code=status, media_type="application/json")
