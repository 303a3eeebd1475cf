"""The split of an output into reasoning and content, for every way to cut it."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsd.daemon.thinking import MAX_BLANKS, ThinkingSplitter, starts_inside

PARTS = st.sampled_from(["<think>", "</think>", "<", "</", "think>", " ", "\n", "a", "é", "<th"])


def split(chunks: list[str], inside: bool) -> tuple[str, str]:
    splitter = ThinkingSplitter(inside)
    pieces = [piece for chunk in chunks for piece in splitter.push(chunk)] + splitter.flush()
    assert all(text for _, text in pieces)
    kinds = [kind for kind, _ in pieces]
    assert kinds == sorted(kinds, reverse=True), "reasoning comes before content"
    reasoning = "".join(text for kind, text in pieces if kind == "reasoning")
    return reasoning, "".join(text for kind, text in pieces if kind == "content")


@pytest.mark.parametrize(
    ("text", "inside", "reasoning", "content"),
    [
        ("answer", False, "", "answer"),
        ("thought</think>\n\nanswer\n", True, "thought", "answer\n"),
        ("<think>thought</think>answer", False, "thought", "answer"),
        (" \n<think>thought</think>answer", False, "thought", "answer"),
        ("<think>\nthought</think>answer", True, "\nthought", "answer"),
        ("  thought</think>answer", True, "  thought", "answer"),
        ("thought without end", True, "thought without end", ""),
        ("<think>a</think>b</think><think>c", False, "a", "b</think><think>c"),
        ("see <think>x</think>", False, "", "see <think>x</think>"),
        ("a</think>b", False, "", "a</think>b"),
        ("a<b <think> c</think>d", True, "a<b <think> c", "d"),
        ("</think>answer", True, "", "answer"),
        ("  <thin", False, "", "  <thin"),
        ("x</thin", True, "x</thin", ""),
        ("", True, "", ""),
        (" " * (MAX_BLANKS + 1) + "<think>a", False, "", " " * (MAX_BLANKS + 1) + "<think>a"),
    ],
)
def test_split(text: str, inside: bool, reasoning: str, content: str) -> None:
    assert split([text], inside) == (reasoning, content)
    assert split(list(text), inside) == (reasoning, content)


@given(chunks=st.lists(PARTS | st.text(max_size=3)), inside=st.booleans())
def test_any_chunking_gives_the_same(chunks: list[str], inside: bool) -> None:
    text = "".join(chunks)
    assert split(chunks, inside) == split([text], inside) == split(list(text), inside)


@given(text=st.text(), inside=st.booleans())
def test_text_without_tags_is_kept_verbatim(text: str, inside: bool) -> None:
    assert split([text], inside) == ((text, "") if inside else ("", text))


@given(chunks=st.lists(PARTS), inside=st.booleans())
def test_only_a_partial_tag_is_held_back(chunks: list[str], inside: bool) -> None:
    splitter = ThinkingSplitter(inside)
    for chunk in chunks:
        splitter.push(chunk)
        held = splitter._held
        assert "<think>".startswith(held.lstrip()) or "</think>".startswith(held)


@pytest.mark.parametrize(
    ("prompt", "inside"),
    [
        ("<｜User｜>hi<｜Assistant｜>", False),
        ("<｜User｜>hi<｜Assistant｜><think>\n", True),
        ("<｜User｜>hi<｜Assistant｜><think>", True),
        ("<｜User｜>hi<｜Assistant｜></think>", False),
        ("<｜User｜>write <think><｜Assistant｜>", False),
        ("<｜User｜>hi<｜Assistant｜><think>\nfirst,", False),
        ("", False),
    ],
)
def test_starts_inside_goes_by_the_prompts_end(prompt: str, inside: bool) -> None:
    assert starts_inside(prompt) is inside
