"""The control socket: what `dsctl` says to the daemon.

One JSON line in, one JSON line out: `{"command": "status"}` -> `{"ok": true, ...}` or
`{"ok": false, "error": "..."}`. Only root and the daemon's own user are served.
"""

import asyncio
import os
import socket
import struct
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import msgspec

from . import logs

log = logs.get("control")
MAX_LINE_BYTES = 64 * 1024
LINE_TIMEOUT_S = 5.0
MAX_CONNECTIONS = 16

Command = Callable[[], Awaitable[dict[str, Any]]]


class CommandFailed(Exception):
    """The command could not be carried out; one sentence for the operator."""


class Request(msgspec.Struct, forbid_unknown_fields=True):
    command: str


class Control:
    """Answers commands on a listening socket until cancelled."""

    def __init__(self, listener: socket.socket, commands: Mapping[str, Command]) -> None:
        self._listener = listener
        self._commands = commands
        self._slots = asyncio.Semaphore(MAX_CONNECTIONS)

    async def run(self) -> None:
        server = await asyncio.start_unix_server(
            self._connection, sock=self._listener, limit=MAX_LINE_BYTES
        )
        async with server:
            await server.serve_forever()

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            async with self._slots:
                if _peer_uid(writer) not in (0, os.geteuid()):
                    reply: dict[str, Any] = _error("only root and the daemon's user may ask")
                else:
                    reply = await self._answer(reader)
                writer.write(msgspec.json.encode(reply) + b"\n")
                await writer.drain()
        except (ConnectionError, TimeoutError):
            pass  # the asker has gone; there is nobody to tell
        finally:
            writer.close()

    async def _answer(self, reader: asyncio.StreamReader) -> dict[str, Any]:
        try:
            async with asyncio.timeout(LINE_TIMEOUT_S):
                line = await reader.readline()
            request = msgspec.json.decode(line, type=Request)
        except (msgspec.DecodeError, ValueError) as error:
            return _error(f"not a command: {error}")
        command = self._commands.get(request.command)
        if command is None:
            known = ", ".join(sorted(self._commands))
            return _error(f"unknown command {request.command!r}; known: {known}")
        try:
            return {"ok": True, **await command()}
        except CommandFailed as error:
            return _error(str(error))


def _error(message: str) -> dict[str, Any]:
    return {"ok": False, "error": message}


def _peer_uid(writer: asyncio.StreamWriter) -> int:
    connection = writer.get_extra_info("socket")
    data = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    _, uid, _ = struct.unpack("3i", data)
    return int(uid)
