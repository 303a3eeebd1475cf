"""Text comes out as the tokens go in: compared with the whole text, however it is cut."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsd.daemon.detokenizer import Detokenizer, StopMatcher

BYTES = [bytes([i]) for i in range(256)]
"""A vocabulary of bytes; words are put behind it."""
END = 256
"""A special token."""

SMALL = st.text(st.sampled_from("abé🙂"), max_size=40)
STOPS = st.lists(st.text(st.sampled_from("abé🙂"), min_size=1, max_size=5), max_size=4)


def cut(data: bytes, cuts: list[int]) -> list[bytes]:
    edges = sorted({0, len(data), *(cut % (len(data) + 1) for cut in cuts)})
    return [data[start:end] for start, end in itertools.pairwise(edges)]


def outputs(
    pieces: list[bytes], stop: list[str] | None = None, include_stop: bool = False
) -> tuple[list[str], str | None]:
    """What each push returns, and flush at the end; and the stop string that was hit."""
    table = [*BYTES, b"<end>", *pieces]
    detokenizer = Detokenizer(table, {END}, True, stop or [], include_stop)
    texts = [detokenizer.push(END + 1 + i) for i in range(len(pieces))]
    return [*texts, detokenizer.flush()], detokenizer.stopped


def search(text: str, stops: list[str]) -> tuple[int, str] | None:
    """(start, stop string): the one that is complete first, and of those the longest."""
    for end in range(1, len(text) + 1):
        hits = [stop for stop in stops if text[:end].endswith(stop)]
        if hits:
            longest = max(hits, key=len)
            return end - len(longest), longest
    return None


@given(data=st.text().map(str.encode) | st.binary(), cuts=st.lists(st.integers(0, 1000)))
def test_any_bytes_in_any_pieces_give_the_whole_text(data: bytes, cuts: list[int]) -> None:
    texts, stopped = outputs(cut(data, cuts))
    assert "".join(texts) == data.decode("utf-8", "replace")
    assert stopped is None


@given(text=st.text(), cuts=st.lists(st.integers(0, 1000)))
def test_never_half_a_character(text: str, cuts: list[int]) -> None:
    texts, _ = outputs(cut(text.encode(), cuts))
    sent = ""
    for piece in texts:
        sent += piece
        assert text.startswith(sent)


@pytest.mark.parametrize("include_stop", [False, True])
@given(text=SMALL, cuts=st.lists(st.integers(0, 1000)), stops=STOPS)
def test_stop_strings_are_found_as_in_the_whole_text(
    include_stop: bool, text: str, cuts: list[int], stops: list[str]
) -> None:
    texts, stopped = outputs(cut(text.encode(), cuts), stops, include_stop)
    hit = search(text, stops)
    assert stopped == (hit[1] if hit else None)
    if hit:
        start, stop = hit
        text = text[: start + len(stop) if include_stop else start]
    assert "".join(texts) == text


@given(text=SMALL, stops=STOPS)
def test_only_the_beginning_of_a_stop_string_is_held_back(text: str, stops: list[str]) -> None:
    detokenizer = Detokenizer(BYTES, (), True, stops)
    sent = ""
    for i, char in enumerate(text, start=1):
        sent += "".join(detokenizer.push(byte) for byte in char.encode())
        if detokenizer.stopped:
            return
        held = text[:i].removeprefix(sent)
        assert sent + held == text[:i]
        assert not held or any(stop.startswith(held) for stop in stops)


@given(text=st.text("ab"), stop=st.text("ab", min_size=1), cuts=st.lists(st.integers(0, 1000)))
def test_matcher_ends_where_find_says(text: str, stop: str, cuts: list[int]) -> None:
    matcher, position = StopMatcher(stop), 0
    for piece in cut(text.encode(), cuts):
        if (end := matcher.push(piece.decode())) >= 0:
            assert position + end == text.find(stop) + len(stop)
            return
        position += len(piece)
    assert stop not in text


def test_stop_across_token_borders_cuts_before_it() -> None:
    texts, stopped = outputs([b"one</", b"st", b"op>two"], ["</stop>"])
    assert texts == ["one", "", "", ""]
    assert stopped == "</stop>"


def test_stop_that_does_not_come_is_sent_at_the_end() -> None:
    texts, stopped = outputs([b"one</", b"st"], ["</stop>"])
    assert texts == ["one", "", "</st"]
    assert stopped is None


def test_stop_first_complete_wins_and_of_those_the_longest() -> None:
    assert outputs([b"xabcd"], ["abcd", "bc"]) == (["xa", ""], "bc")
    assert outputs([b"xabc"], ["c", "abc", "bc"]) == (["x", ""], "abc")


def test_stop_nothing_comes_after_it() -> None:
    detokenizer = Detokenizer(BYTES, (), True, ["b"])
    assert [detokenizer.push(byte) for byte in b"abab"] == ["a", "", "", ""]
    assert detokenizer.flush() == ""


def test_empty_stop_string_matches_nothing() -> None:
    assert outputs([b"ab"], [""]) == (["ab", ""], None)


@pytest.mark.parametrize(("skip", "text"), [(True, "ab"), (False, "a<end>b")])
def test_special_token_is_skipped_if_asked(skip: bool, text: str) -> None:
    detokenizer = Detokenizer([*BYTES, b"<end>"], {END}, skip)
    pushed = [detokenizer.push(i) for i in (ord("a"), END, ord("b"))]
    assert "".join(pushed) + detokenizer.flush() == text


def test_id_without_a_token_gives_nothing() -> None:
    detokenizer = Detokenizer(BYTES, (), True)
    assert [detokenizer.push(i) for i in (END, 10**6, -1)] == ["", "", ""]


def test_incomplete_character_at_the_end_is_one_replacement_character() -> None:
    texts, _ = outputs(["é".encode(), "🙂".encode()[:3]])
    assert texts == ["é", "", "\ufffd"]
