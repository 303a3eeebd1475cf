"""The mailbox between the engine and one HTTP request: events of its sequences, in order."""

import asyncio
from collections.abc import Sequence

from .request import Request, TokenEvent


class TokenStream:
    """Written by the engine, read by one coroutine of the front.

    Events pile up only as fast as tokens are made, and no further than the sequences' max_tokens:
    the mailbox is bounded by what was admitted.
    """

    def __init__(self, requests: Sequence[Request]) -> None:
        self.requests = tuple(requests)
        self._events: list[TokenEvent] = []
        self._wake = asyncio.Event()

    def put(self, event: TokenEvent) -> None:
        self._events.append(event)
        self._wake.set()

    async def next(self) -> list[TokenEvent]:
        """All events that have come since the last call; waits for at least one."""
        await self._wake.wait()
        self._wake.clear()
        events, self._events = self._events, []
        return events
