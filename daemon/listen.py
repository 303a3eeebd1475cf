"""Listening sockets, bound before anything slow begins: a busy port is known at once."""

import errno
import os
import socket
from pathlib import Path

BACKLOG = 2048
SEND_BUFFER_BYTES = 128 * 1024
"""Of each connection: what a client that does not read may cost (the kernel doubles it)."""


class ListenError(Exception):
    """An address cannot be listened on; one sentence that names it."""


def tcp(host: str, port: int) -> socket.socket:
    """A bound, listening TCP socket. Raises ListenError."""
    try:
        family, kind, proto, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, proto)
    except OSError as error:
        raise ListenError(f"cannot listen on {host}: {error.strerror or error}") from error
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)
        listener.bind(address)
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        why = "is in use" if error.errno == errno.EADDRINUSE else f"fails: {error.strerror}"
        raise ListenError(f"port {port} on {host} {why}") from error
    listener.setblocking(False)
    return listener


def unix(path: Path, mode: int) -> socket.socket:
    """A bound, listening Unix socket with these permissions. A socket file that nobody listens on
    is replaced; any other file is left alone. Raises ListenError."""
    if path.exists():
        if not path.is_socket():
            raise ListenError(f"cannot listen on {path}: it exists and is not a socket")
        if _is_alive(path):
            raise ListenError(f"{path} is in use by another process")
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        path.unlink(missing_ok=True)
        old_mask = os.umask(0o777 & ~mode)
        try:
            listener.bind(str(path))
        finally:
            os.umask(old_mask)
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        raise ListenError(f"cannot listen on {path}: {error.strerror or error}") from error
    listener.setblocking(False)
    return listener


def _is_alive(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(str(path))
        except (ConnectionRefusedError, FileNotFoundError):
            return False
        except OSError:
            return True  # its queue is full, say: somebody has it
    return True
