"""How many tokens to draft.

Pure: counts go in, a number comes out. Two things shorten the drafts:

    load         a step of few rows waits for the weights anyway, and drafts are nearly free; with
                 more rows each draft costs its share. A table by number of rows says how many.
    acceptance   over a window of verified rows, P(position j is accepted) is measured. A step that
                 verifies k drafts yields E(k) = 1 + sum over j <= k of P(j) tokens a row and takes
                 1 + k * DRAFT_COST of the time of one that verifies none; the k of the largest
                 quotient is the best. 0 is a candidate: then nothing is drafted.

What acceptance has shortened is tried at full length again after a pause, which doubles each time
that the trial shows the same.
"""

import enum
from collections import Counter
from collections.abc import Sequence

import msgspec

WINDOW = 512
"""Verified rows between two decisions."""
ENOUGH = WINDOW // 4
"""Of them, those that a position needs to be judged."""
DRAFT_COST = 0.15
"""Time of drafting and verifying one more token, over that of a step without drafts: 0.18 with 1
row, 0.14 with 64, of three drafts on a rank of eight of DeepSeek-V3 (H200)."""
HYSTERESIS = 1.05
"""How much better another length must be than the one at hand."""
FIRST_PAUSE, LONGEST_PAUSE = 256, 16384
"""Steps until a length that acceptance has shortened is tried again."""


class Why(enum.StrEnum):
    """What decided the length."""

    OFF = "off"
    CONFIGURED = "as configured"
    LOAD = "many rows"
    ACCEPTANCE = "few drafts are accepted"


class DraftStats(msgspec.Struct, frozen=True):
    """A moment's numbers. Counters count since the worker's start."""

    num_nextn: int
    length: int
    """Of the newest drafts."""
    why: Why
    num_verified: tuple[int, ...]
    """By position: rows whose draft there was verified; so is the next."""
    num_accepted: tuple[int, ...]

    @property
    def mean_accepted_length(self) -> float:
        """Tokens that a row gets of a step that verifies drafts."""
        if not self.num_verified[0]:
            return 1.0
        return 1 + sum(self.num_accepted) / self.num_verified[0]


class DraftLength:
    """One worker's drafts. `by_batch_size`: (largest number of rows, drafts), sizes rising; none
    above the last."""

    def __init__(self, num_nextn: int, by_batch_size: Sequence[tuple[int, int]] = ()) -> None:
        self.num_nextn = num_nextn
        self._by_batch_size = tuple(by_batch_size) or ((2**31, num_nextn),)
        self._best = num_nextn
        """What acceptance allows."""
        self._pause = FIRST_PAUSE
        self._num_waited = 0
        self._verified = [0] * num_nextn
        """By position, in this window; so is the next."""
        self._accepted = [0] * num_nextn
        self.num_verified = [0] * num_nextn
        """By position, since the start; so is the next."""
        self.num_accepted = [0] * num_nextn
        self.length = 0
        """The last choice."""
        self.why = Why.CONFIGURED if num_nextn else Why.OFF

    def choose(self, num_rows: int) -> int:
        """The drafts for rows that the next step will verify."""
        if not self.num_nextn or not num_rows:
            return 0
        by_load = next((n for size, n in self._by_batch_size if num_rows <= size), 0)
        self.length = min(self.num_nextn, by_load, self._best)
        if self.length == self.num_nextn:
            self.why = Why.CONFIGURED
        else:
            self.why = Why.LOAD if by_load < self._best else Why.ACCEPTANCE
        return self.length

    def note(self, num_drafts: int, num_tokens: Sequence[int]) -> None:
        """A step verified so many drafts of each row, which gave it `num_tokens` by row."""
        if self._best < self.num_nextn:
            self._num_waited += 1
            if self._num_waited >= self._pause:
                self._pause = min(2 * self._pause, LONGEST_PAUSE)
                self._best = self.num_nextn
                self._begin_window()
        if not num_drafts:
            return
        counts = Counter(num_tokens)
        num_rows = len(num_tokens)
        num_left = num_rows
        for j in range(num_drafts):
            num_left -= counts[j + 1]  # j + 1 tokens: draft j was the first to be rejected
            for verified in (self._verified, self.num_verified):
                verified[j] += num_rows
            for accepted in (self._accepted, self.num_accepted):
                accepted[j] += num_left
        if self._verified[0] >= WINDOW:
            self._decide()
            self._begin_window()

    def stats(self) -> DraftStats:
        return DraftStats(
            self.num_nextn,
            self.length,
            self.why,
            tuple(self.num_verified),
            tuple(self.num_accepted),
        )

    def _begin_window(self) -> None:
        self._verified = [0] * self.num_nextn
        self._accepted = [0] * self.num_nextn

    def _decide(self) -> None:
        gains = [1.0]
        num_expected = 1.0
        for j in range(self._best):
            if self._verified[j] < ENOUGH:
                break
            num_expected += self._accepted[j] / self._verified[j]
            gains.append(num_expected / (1 + (j + 1) * DRAFT_COST))
        best = gains.index(max(gains))
        if best < len(gains) - 1 and gains[best] > HYSTERESIS * gains[-1]:
            self._best = best
            self._num_waited = 0
        elif self._best == self.num_nextn:
            self._pause = FIRST_PAUSE
