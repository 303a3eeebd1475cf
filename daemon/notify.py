"""systemd's notification protocol (sd_notify(3)): READY, STATUS, STOPPING."""

import socket


class Notifier:
    """Sends state to the service manager; does nothing where there is none."""

    def __init__(self, address: str | None) -> None:
        self._socket: socket.socket | None = None
        self._address = ""
        self._ready = False
        if address:
            self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
            self._socket.setblocking(False)
            # A leading "@" is systemd's spelling of the abstract namespace.
            self._address = "\0" + address[1:] if address[0] == "@" else address

    def status(self, text: str) -> None:
        self._send(_status(text))

    def ready(self) -> None:
        """The sockets accept and the checkpoint has been checked. Sent until the manager has taken
        it once."""
        if not self._ready:
            self._ready = self._send("READY=1")

    def stopping(self, text: str) -> None:
        self._send(f"STOPPING=1\n{_status(text)}")

    def _send(self, message: str) -> bool:
        """Whether the manager took it."""
        if self._socket is None:
            return False
        try:
            self._socket.sendto(message.encode(), self._address)
        except OSError:
            return False  # the manager is busy or gone: the next message says more
        return True

    def close(self) -> None:
        if self._socket is not None:
            self._socket.close()


def _status(text: str) -> str:
    """A line break would begin another field."""
    return "STATUS=" + " ".join(text.split())
