"""systemd's notification protocol (sd_notify(3)): READY, STATUS, STOPPING."""

import socket


class Notifier:
    """Sends state to the service manager; does nothing where there is none."""

    def __init__(self, address: str | None) -> None:
        self._socket: socket.socket | None = None
        self._ready = False
        if address:
            self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
            self._socket.setblocking(False)
            # A leading "@" is systemd's spelling of the abstract namespace.
            self._socket.connect("\0" + address[1:] if address[0] == "@" else address)

    def status(self, text: str) -> None:
        self._send(f"STATUS={text}")

    def ready(self) -> None:
        """The sockets accept and the checkpoint has been checked. Sent once."""
        if not self._ready:
            self._ready = True
            self._send("READY=1")

    def stopping(self, text: str) -> None:
        self._send(f"STOPPING=1\nSTATUS={text}")

    def _send(self, message: str) -> None:
        if self._socket is not None:
            try:
                self._socket.send(message.encode())
            except BlockingIOError:
                return  # the manager is busy; the next message says more

    def close(self) -> None:
        if self._socket is not None:
            self._socket.close()
