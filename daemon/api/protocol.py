"""uvicorn's HTTP/1.1 protocol, and what it lacks: a deadline for the head of a request, and a
client that leaves being noticed although it had sent bytes beyond its request."""

import asyncio
from typing import Any

import h11
import msgspec
from uvicorn.protocols.http.h11_impl import H11Protocol

from .errors import ApiError

HEAD_TIMEOUT_S = 10.0
MAX_PIPELINED_BYTES = 64 * 1024
ABORT = "dsd.abort"
"""In the scope: drops the connection with what it has not sent. Closing waits for a client that
does not read."""


class Protocol(H11Protocol):
    """One connection."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._head_deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._await_head()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.scope is not None:
            self.scope[ABORT] = self.transport.abort  # type: ignore[literal-required]
        state = self.conn.their_state
        # What still comes of a body whose request has been answered has a deadline too.
        answered = state is h11.SEND_BODY and self.conn.our_state is h11.DONE
        if state is h11.IDLE or answered:
            self._await_head()
        else:
            self._forget_head()
        if state is h11.DONE and self.flow.read_paused:
            self._read_on()

    def connection_lost(self, exc: Exception | None) -> None:
        self._forget_head()
        super().connection_lost(exc)

    def send_400_response(self, msg: str) -> None:
        """What h11 cannot read, in the shape of every other error."""
        body = ApiError(400, f"the request cannot be read: {msg}").body()
        headers = [(b"content-type", b"application/json"), (b"connection", b"close")]
        for event in (
            h11.Response(status_code=400, headers=headers, reason=b"Bad Request"),
            h11.Data(data=msgspec.json.encode(body)),
            h11.EndOfMessage(),
        ):
            self.transport.write(self.conn.send(event) or b"")
        self.transport.close()

    def _read_on(self) -> None:
        """uvicorn stops reading when bytes follow the request at hand, and would not see the
        connection end then. They wait in h11's buffer, which is bounded here."""
        waiting, _ = self.conn.trailing_data
        if len(waiting) > MAX_PIPELINED_BYTES:
            self.transport.close()
        else:
            self.flow.resume_reading()

    def _await_head(self) -> None:
        if self._head_deadline is None:
            self._head_deadline = self.loop.call_later(HEAD_TIMEOUT_S, self.transport.close)

    def _forget_head(self) -> None:
        if self._head_deadline is not None:
            self._head_deadline.cancel()
            self._head_deadline = None
