"""Deltas as OpenAI's JSON: choices, chunks, log-probabilities, usage."""

from collections.abc import Sequence
from typing import Any

from ...ipc.messages import LogprobEntry
from ..generation import Choice, Delta, Generation
from ..request import FinishReason
from ..tokenizer import Tokenizer


class TokenTexts:
    """Token ids as the strings that log-probabilities name them by."""

    def __init__(self, tokenizer: Tokenizer | None) -> None:
        self._bytes = [] if tokenizer is None else tokenizer.token_bytes

    def bytes_of(self, token_id: int) -> bytes:
        return self._bytes[token_id] if token_id < len(self._bytes) else b""

    def text(self, token_id: int) -> str:
        return self.bytes_of(token_id).decode("utf-8", "replace") or f"token_id:{token_id}"


def usage(generation: Generation) -> dict[str, Any]:
    """OpenAI's usage, with DeepSeek's cache fields."""
    prompt, cached = generation.num_prompt_tokens, generation.num_cached_tokens
    completion = generation.num_completion_tokens
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": cached},
        "completion_tokens_details": {"reasoning_tokens": generation.num_reasoning_tokens},
        "prompt_cache_hit_tokens": cached,
        "prompt_cache_miss_tokens": prompt - cached,
    }


def finish_reason(reason: FinishReason | None) -> str | None:
    return None if reason is None else reason.value


# ---- chat ---------------------------------------------------------------------------------------


def chat_delta(delta: Delta) -> dict[str, Any]:
    """`delta` of a chunk; reasoning goes by both names that clients read."""
    fields: dict[str, Any] = {}
    if delta.reasoning:
        fields["reasoning_content"] = fields["reasoning"] = delta.reasoning
    if delta.content:
        fields["content"] = delta.content
    return fields


def chat_message(content: str, reasoning: str, thinks: bool) -> dict[str, Any]:
    """`message` of a whole answer."""
    thought = reasoning if reasoning or thinks else None
    return {
        "role": "assistant",
        "content": content,
        "reasoning_content": thought,
        "reasoning": thought,
        "refusal": None,
        "tool_calls": None,
    }


def chat_logprobs(entries: Sequence[LogprobEntry], texts: TokenTexts) -> dict[str, Any]:
    def one(token_id: int, logprob: float) -> dict[str, Any]:
        data = texts.bytes_of(token_id)
        return {"token": texts.text(token_id), "logprob": logprob, "bytes": list(data)}

    content = [
        {
            **one(entry.token_id, entry.logprob),
            "top_logprobs": [one(token_id, logprob) for token_id, logprob in entry.top],
        }
        for entry in entries
    ]
    return {"content": content, "refusal": None}


# ---- completions --------------------------------------------------------------------------------


class CompletionLogprobs:
    """The four parallel lists of `/v1/completions`, filled as tokens come."""

    def __init__(self, texts: TokenTexts, num_top: int) -> None:
        self._texts = texts
        self._num_top = num_top
        self._offset = 0

    def first(self, token_id: int) -> dict[str, Any]:
        """The first token of an echoed prompt, which nothing predicted."""
        text = self._texts.text(token_id)
        self._offset += len(text)
        return {"tokens": [text], "token_logprobs": [None], "top_logprobs": [None],
                "text_offset": [self._offset - len(text)]}  # fmt: skip

    def more(self, entries: Sequence[LogprobEntry]) -> dict[str, Any]:
        lists: dict[str, Any] = {
            "tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []
        }  # fmt: skip
        for entry in entries:
            text = self._texts.text(entry.token_id)
            lists["tokens"].append(text)
            lists["token_logprobs"].append(entry.logprob)
            lists["top_logprobs"].append(self._by_text(entry) if self._num_top else None)
            lists["text_offset"].append(self._offset)
            self._offset += len(text)
        return lists

    def _by_text(self, entry: LogprobEntry) -> dict[str, float]:
        """Tokens that are parts of characters have one text, U+FFFD: the best of them counts."""
        values: dict[str, float] = {}
        for token_id, value in entry.top:
            values.setdefault(self._texts.text(token_id), value)
        return values


def join_logprobs(parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    names = ("tokens", "token_logprobs", "top_logprobs", "text_offset")
    return {name: [value for part in parts for value in part[name]] for name in names}


def stop_reason(choice: Choice) -> str | int | None:
    """The stop string, or the stop token's id, that ended the choice."""
    if choice.stop_string is not None:
        return choice.stop_string
    output = choice.request.output_ids
    return output[-1] if output and output[-1] in choice.request.stop_token_ids else None
