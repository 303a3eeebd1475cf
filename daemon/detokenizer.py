"""Tokens to text, as they come: never half a character, nothing of a stop string.

Knows only the tokenizer's table of bytes. One Detokenizer belongs to one sequence.
"""

import codecs
from collections.abc import Collection, Sequence
from functools import lru_cache


class StopMatcher:
    """Finds one string in a text that comes in chunks (Knuth, Morris, Pratt): linear time."""

    __slots__ = ("_fallback", "num_matched", "stop")

    def __init__(self, stop: str) -> None:
        self.stop = stop
        self.num_matched = 0
        """How many characters at the end of the text so far are the beginning of `stop`."""
        self._fallback = _borders(stop)

    def push(self, text: str) -> int:
        """Where in `text` the first occurrence ends (one past its last character); else -1."""
        stop, matched, position = self.stop, self.num_matched, 0
        while position < len(text):
            if matched == 0:
                # Most text has nothing of the stop string: let C look for its first character.
                position = text.find(stop[0], position)
                if position < 0:
                    break
            while matched and text[position] != stop[matched]:
                matched = self._fallback[matched - 1]
            if text[position] == stop[matched]:
                matched += 1
            position += 1
            if matched == len(stop):
                self.num_matched = 0
                return position
        self.num_matched = matched
        return -1


@lru_cache(maxsize=256)
def _borders(word: str) -> list[int]:
    """For each prefix of `word`: the length of its longest proper prefix that also ends it."""
    borders = [0] * len(word)
    length = 0
    for i in range(1, len(word)):
        while length and word[i] != word[length]:
            length = borders[length - 1]
        if word[i] == word[length]:
            length += 1
        borders[i] = length
    return borders


class Detokenizer:
    """`push` every token, `flush` at the end; what they return, joined, is the text.

    Of several stop strings the one that is complete first wins, and of those that end together
    the longest. So the result does not depend on how the text came in tokens, and generation
    need not run on to see whether a longer one would have followed.
    """

    __slots__ = (
        "_held",
        "_hidden",
        "_include_stop",
        "_matchers",
        "_pending",
        "_token_bytes",
        "stopped",
    )

    def __init__(
        self,
        token_bytes: Sequence[bytes],
        special_ids: Collection[int],
        skip_special_tokens: bool,
        stop: Sequence[str] = (),
        include_stop: bool = False,
    ) -> None:
        self._token_bytes = token_bytes
        self._hidden = special_ids if skip_special_tokens else ()
        self._include_stop = include_stop
        self._matchers = [StopMatcher(text) for text in stop if text]
        self._pending = b""
        """The beginning of a character."""
        self._held = ""
        """Text that may turn out to be the beginning of a stop string."""
        self.stopped: str | None = None
        """The stop string that was hit. From then on nothing more comes out."""

    def push(self, token_id: int) -> str:
        """The text that may be sent now; often "", never half a character."""
        # The model's vocabulary is padded: it may sample an id that no token has.
        if token_id in self._hidden or not 0 <= token_id < len(self._token_bytes):
            return ""
        data = self._token_bytes[token_id]
        if self._pending or not data.isascii():
            text = self._decode(data, final=False)
        else:
            text = data.decode()
        return self._match(text) if self._matchers else text

    def flush(self) -> str:
        """What was held back. Bytes that never became a character are U+FFFD."""
        text = self._match(self._decode(b"", final=True)) + self._held
        self._held = ""
        return text

    def _decode(self, data: bytes, final: bool) -> str:
        data = self._pending + data
        text, num_used = codecs.utf_8_decode(data, "replace", final)
        self._pending = data[num_used:]
        return text

    def _match(self, text: str) -> str:
        if self.stopped is not None:
            return ""
        num_held = len(self._held)
        text = self._held + text
        if (hit := self._first_hit(text, num_held)) is not None:
            end, self.stopped = hit
            self._held = ""
            return text[: end if self._include_stop else end - len(self.stopped)]
        num_safe = len(text) - max((m.num_matched for m in self._matchers), default=0)
        self._held = text[num_safe:]
        return text[:num_safe]

    def _first_hit(self, text: str, num_seen: int) -> tuple[int, str] | None:
        """(end in `text`, stop string); the first `num_seen` characters were looked at before."""
        fresh = text[num_seen:]
        ends = [(matcher.push(fresh), matcher.stop) for matcher in self._matchers]
        hits = [(num_seen + end, stop) for end, stop in ends if end >= 0]
        return min(hits, key=lambda hit: (hit[0], -len(hit[1])), default=None)
