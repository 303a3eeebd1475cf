"""Which part of an output is reasoning and which is the answer.

Where an output begins is decided by the prompt alone: R1's template ends in `<think>\\n`, V3.1's
in `<think>` or `</think>`, V3's in neither. A tag that a user wrote changes nothing, and when
nobody opened a thought nothing may go to "reasoning".
"""

from typing import Literal

Kind = Literal["reasoning", "content"]

OPEN, CLOSE = "<think>", "</think>"
MAX_BLANKS = 64
"""An opening tag counts at the very start only, after at most this many blank characters."""


def starts_inside(prompt_text: str) -> bool:
    """Whether the model's first token is already reasoning."""
    return prompt_text[-2 * MAX_BLANKS :].rstrip().endswith(OPEN)


class ThinkingSplitter:
    """Splits text that comes in chunks. What comes out does not depend on the chunking.

        ⎵⎵<think>  reasoning  </think>  content … to the end, whatever tags are in it
       └── opening ─┘└─ "reasoning" ──┘└─ "content" ─┘

    The tags, and blanks before the opening and after the closing one, are not emitted: the model
    writes two line breaks there that no reader of an answer wants (DeepSeek's own API drops them).
    R1-0528 writes `<think>` even after a prompt that ends with it, so an opening tag is dropped
    there too.
    """

    __slots__ = ("_at_answer", "_held", "_kind", "_opening")

    def __init__(self, starts_inside: bool) -> None:
        self._kind: Kind = "reasoning" if starts_inside else "content"
        self._opening = True
        self._at_answer = False
        """The closing tag was there, and since then only blanks."""
        self._held = ""
        """What may be the beginning of a tag (while opening: blanks before it, too)."""

    @property
    def inside(self) -> bool:
        """Whether text now is reasoning."""
        return self._kind == "reasoning"

    def push(self, text: str) -> list[tuple[Kind, str]]:
        """At most one piece of reasoning, then at most one of content; none is empty."""
        text, self._held = self._held + text, ""
        if self._opening:
            text = self._open(text)
        if self._opening:
            return []
        if self._kind == "content":
            return _pieces("", self._answer(text))
        reasoning, tag, content = text.partition(CLOSE)
        if tag:
            self._kind, self._at_answer = "content", True
            return _pieces(reasoning, self._answer(content))
        num_safe = len(text) - _num_partial(text, CLOSE)
        self._held = text[num_safe:]
        return _pieces(text[:num_safe], "")

    def flush(self) -> list[tuple[Kind, str]]:
        """What was held back; the output ended within a tag, or before one."""
        text, self._held = self._held, ""
        self._opening = False
        return [(self._kind, text)] if text else []

    def _answer(self, text: str) -> str:
        """The answer's text; its leading blanks are dropped."""
        if self._at_answer:
            text = text.lstrip()
            self._at_answer = not text
        return text

    def _open(self, text: str) -> str:
        """The text after the opening tag, if there is one; "" while that is not known."""
        start = text.lstrip()
        num_blanks = len(text) - len(start)
        if num_blanks <= MAX_BLANKS and len(start) < len(OPEN) and OPEN.startswith(start):
            self._held = text
            return ""
        self._opening = False
        if num_blanks <= MAX_BLANKS and start.startswith(OPEN):
            self._kind = "reasoning"
            return start.removeprefix(OPEN)
        return text


def _pieces(reasoning: str, content: str) -> list[tuple[Kind, str]]:
    both: tuple[tuple[Kind, str], ...] = (("reasoning", reasoning), ("content", content))
    return [(kind, text) for kind, text in both if text]


def _num_partial(text: str, tag: str) -> int:
    """How many characters at the end of `text` may be the beginning of `tag`."""
    start = text.rfind(tag[0], max(0, len(text) - len(tag) + 1))
    return len(text) - start if start >= 0 and tag.startswith(text[start:]) else 0
