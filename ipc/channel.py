"""The two ends of a daemon-worker socket: asyncio in the daemon, blocking in the worker.

Every socket has its limits set: ZeroMQ's defaults are no maximum message size and an endless
linger. Messages are single frames; a multipart message is refused, because the size limit holds
for each frame and not for their sum. Peers of another uid are not let in.
"""

import os
from types import TracebackType
from typing import Any, Generic, TypeVar

import msgspec
import zmq
import zmq.asyncio

MAX_MESSAGE_BYTES = 64 * 1024 * 1024
HIGH_WATER_MARK = 64

In = TypeVar("In")
Out = TypeVar("Out")


class ChannelError(Exception):
    """The other side sent what the protocol does not allow, or is not there."""


def _limit(socket: "zmq.Socket[Any]") -> None:
    socket.setsockopt(zmq.MAXMSGSIZE, MAX_MESSAGE_BYTES)
    socket.setsockopt(zmq.LINGER, 0)
    socket.setsockopt(zmq.SNDHWM, HIGH_WATER_MARK)
    socket.setsockopt(zmq.RCVHWM, HIGH_WATER_MARK)


class _Codec(Generic[In, Out]):
    def __init__(self, receives: Any) -> None:
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder: msgspec.msgpack.Decoder[In] = msgspec.msgpack.Decoder(receives)

    def encode(self, message: Out) -> bytes:
        return self._encoder.encode(message)

    def decode(self, frames: list[bytes]) -> In:
        if len(frames) != 1:
            raise ChannelError(f"a message of {len(frames)} frames, where one is allowed")
        try:
            return self._decoder.decode(frames[0])
        except msgspec.DecodeError as error:
            raise ChannelError(f"a message that cannot be read: {error}") from error


class AsyncChannel(Generic[In, Out]):
    """The daemon's end: binds, and lets in peers of its own uid only."""

    def __init__(self, address: str, receives: Any) -> None:
        self._codec: _Codec[In, Out] = _Codec(receives)
        self._context = zmq.asyncio.Context()
        self._socket = self._context.socket(zmq.PAIR)
        _limit(self._socket)
        self._socket.setsockopt(zmq.IPC_FILTER_UID, os.geteuid())
        self._socket.bind(address)

    async def send(self, message: Out) -> None:
        """Raises ChannelError if nobody takes it. Never waits: a sender that waits for a dead peer
        would be cancelled by `close`. The pipeline is far below the high-water mark."""
        try:
            await self._socket.send(self._codec.encode(message), zmq.NOBLOCK)
        except zmq.Again as error:
            raise ChannelError("the other side is gone") from error

    async def receive(self) -> In:
        """The next message. Raises ChannelError for one that breaks the protocol."""
        return self._codec.decode(await self._socket.recv_multipart())

    def close(self) -> None:
        self._context.destroy(linger=0)


class BlockingChannel(Generic[In, Out]):
    """The worker's end: connects."""

    def __init__(self, address: str, receives: Any) -> None:
        self._codec: _Codec[In, Out] = _Codec(receives)
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.PAIR)
        _limit(self._socket)
        # A worker that ends with Failed must get that message out before it exits.
        self._socket.setsockopt(zmq.LINGER, 2000)
        self._socket.connect(address)

    def send(self, message: Out) -> None:
        self._socket.send(self._codec.encode(message))

    def has_message(self) -> bool:
        """Whether `receive` would return at once."""
        return bool(self._socket.poll(0))

    def receive(self) -> In:
        """The next message; blocks. Raises ChannelError for one that breaks the protocol."""
        return self._codec.decode(self._socket.recv_multipart())

    def __enter__(self) -> "BlockingChannel[In, Out]":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._socket.close()
        self._context.term()
