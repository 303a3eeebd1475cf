"""When something is due for a row, without looking at the rows that nothing is due for."""


class Calendar:
    """At most one date per row. The owner says what a tick is, and looks at each one once.

    Kept exact: a row that leaves takes its date with it, so that the calendar never holds more
    than one entry a row, however far away the dates of short requests were.
    """

    __slots__ = ("_rows", "_ticks")

    def __init__(self) -> None:
        self._ticks: dict[int, int] = {}
        """By row."""
        self._rows: dict[int, dict[int, None]] = {}
        """By tick; a dict is a set in order of insertion, and order makes runs repeatable."""

    def __len__(self) -> int:
        return len(self._ticks)

    def arm(self, row: int, tick: int) -> None:
        assert row not in self._ticks, f"{row=} is armed for {self._ticks[row]}"
        self._ticks[row] = tick
        self._rows.setdefault(tick, {})[row] = None

    def disarm(self, row: int) -> None:
        tick = self._ticks.pop(row, None)
        if tick is not None:
            rows = self._rows[tick]
            del rows[row]
            if not rows:
                del self._rows[tick]

    def due(self, first: int, last: int) -> list[int]:
        """The rows armed for the ticks `first` to `last`; they stay armed."""
        rows = [*self._rows.get(first, ())]
        for tick in range(first + 1, last + 1):
            rows += self._rows.get(tick, ())
        return rows

    def fire(self, first: int, last: int) -> list[int]:
        """Takes the rows armed for the ticks `first` to `last` off the calendar."""
        rows = [*self._rows.pop(first, ())]
        for tick in range(first + 1, last + 1):
            rows += self._rows.pop(tick, ())
        for row in rows:
            del self._ticks[row]
        return rows

    def dates(self) -> dict[int, int]:
        """Tick by row."""
        return dict(self._ticks)
