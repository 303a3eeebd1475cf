"""The queue in front of the rows."""

from bisect import bisect_left, insort
from collections.abc import Iterator

from .request import Request


def place_in_line(request: Request) -> tuple[int, int]:
    return request.priority, request.arrival


class WaitingQueue:
    """By (priority, arrival). A preempted request comes back with its old arrival, so to its old
    place. Kept in reverse, so that taking the first one moves nothing."""

    __slots__ = ("_entries",)

    def __init__(self) -> None:
        self._entries: list[tuple[int, int, Request]] = []

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[Request]:
        """First to last."""
        return (entry[2] for entry in reversed(self._entries))

    def __contains__(self, request: Request) -> bool:
        return any(entry[2] is request for entry in self._entries)

    def push(self, request: Request) -> None:
        # Arrivals differ, so that comparing never reaches the requests.
        insort(self._entries, (-request.priority, -request.arrival, request))

    def first(self) -> Request:
        return self._entries[-1][2]

    def remove(self, request: Request) -> None:
        index = bisect_left(self._entries, (-request.priority, -request.arrival))
        assert self._entries[index][2] is request
        del self._entries[index]
