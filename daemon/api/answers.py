"""A Generation as the body of an HTTP answer, whole or streamed, in OpenAI's two dialects."""

import asyncio
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from ..generation import Choice, Delta, Generation
from ..model_info import ModelInfo
from ..request import FinishReason
from . import render
from .errors import ApiError, retry_later
from .http import SSE_DONE, sse
from .openai_types import ChatRequest, Common, CompletionRequest


def failure(delta: Delta) -> ApiError | None:
    """What went wrong with a choice, if its end was not of its own making."""
    if delta.finish is FinishReason.ERROR:
        return retry_later(delta.message)
    if delta.finish is FinishReason.ABORT:
        return retry_later(delta.message or "the request was aborted by the daemon")
    return None


class Answer:
    """What the two dialects share: identity, the stream's frame, and the whole body's."""

    chunk_object = ""
    whole_object = ""

    def __init__(
        self, request_id: str, body: Common, generation: Generation, info: ModelInfo
    ) -> None:
        self.request_id = request_id
        self.body = body
        self.generation = generation
        self.texts = render.TokenTexts(info.tokenizer)
        self.created = int(time.time())
        self.choices = {choice.index: choice for choice in generation.choices}
        options = body.stream_options
        self._usage_at_end = options is not None and options.include_usage
        self._usage_always = options is not None and options.continuous_usage_stats

    # ---- the dialect's ----

    def opening(self) -> list[dict[str, Any]]:
        """Choices of chunks that come before the first token."""
        return []

    def chunk_choice(self, delta: Delta) -> dict[str, Any] | None:
        """One choice of a chunk; None: nothing to tell yet."""
        raise NotImplementedError

    def whole_choice(self, choice: Choice, deltas: list[Delta]) -> dict[str, Any]:
        raise NotImplementedError

    # ---- shared ----

    async def events(self) -> AsyncGenerator[bytes]:
        """The answer as server-sent events. Raises ApiError if a choice fails before the first."""
        async with aclosing(self.generation.deltas()) as deltas:
            is_open = False
            async for delta in deltas:
                if (error := failure(delta)) is not None:
                    if not is_open:
                        raise error
                    yield sse(error.body())
                    return
                for choice in () if is_open else self.opening():
                    yield sse(self._chunk([choice]))
                is_open = True
                if (choice_fields := self.chunk_choice(delta)) is not None:
                    yield sse(self._chunk([choice_fields]))
        if self._usage_at_end:
            yield sse({**self._chunk([]), "usage": render.usage(self.generation)})
        yield SSE_DONE

    async def whole(self) -> dict[str, Any]:
        """The answer as one JSON object. Raises ApiError if a choice failed."""
        collected: dict[int, list[Delta]] = {index: [] for index in self.choices}
        async with aclosing(self.generation.deltas()) as deltas:
            async for delta in deltas:
                if (error := failure(delta)) is not None:
                    raise error
                collected[delta.index].append(delta)
        # A thread gives way to the loop; the log-probabilities of a long prompt take a while.
        choices = await asyncio.to_thread(self._whole_choices, collected)
        return {
            "id": self.request_id,
            "object": self.whole_object,
            "created": self.created,
            "model": self.body.model,
            "choices": choices,
            "usage": render.usage(self.generation),
        }

    def _whole_choices(self, collected: dict[int, list[Delta]]) -> list[dict[str, Any]]:
        return [
            self.whole_choice(self.choices[index], deltas) for index, deltas in collected.items()
        ]

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        fields: dict[str, Any] = {
            "id": self.request_id,
            "object": self.chunk_object,
            "created": self.created,
            "model": self.body.model,
            "choices": choices,
        }
        if self._usage_always:
            fields["usage"] = render.usage(self.generation)
        elif self._usage_at_end:
            fields["usage"] = None
        return fields

    def _ending(self, choice: Choice, delta: Delta, fields: dict[str, Any]) -> None:
        """What every choice and chunk carries: why it ended, and token ids where asked."""
        fields["finish_reason"] = render.finish_reason(delta.finish)
        if delta.finish is not None:
            fields["stop_reason"] = render.stop_reason(choice)
        if self.body.return_token_ids:
            fields["token_ids"] = delta.token_ids


def merge(deltas: list[Delta]) -> Delta:
    """All of one choice's deltas as one."""
    return Delta(
        index=deltas[0].index,
        content="".join(delta.content for delta in deltas),
        reasoning="".join(delta.reasoning for delta in deltas),
        token_ids=[token_id for delta in deltas for token_id in delta.token_ids],
        logprobs=[entry for delta in deltas for entry in delta.logprobs],
        prompt_logprobs=[entry for delta in deltas for entry in delta.prompt_logprobs],
        finish=deltas[-1].finish,
    )


class ChatAnswer(Answer):
    """/v1/chat/completions."""

    chunk_object = "chat.completion.chunk"
    whole_object = "chat.completion"

    def __init__(
        self,
        request_id: str,
        body: ChatRequest,
        generation: Generation,
        info: ModelInfo,
        thinks: bool,
    ) -> None:
        super().__init__(request_id, body, generation, info)
        self._wants_logprobs = bool(body.logprobs)
        self._thinks = thinks

    def opening(self) -> list[dict[str, Any]]:
        delta: dict[str, Any] = {"role": "assistant", "content": ""}
        if self._thinks:
            delta["reasoning_content"] = delta["reasoning"] = ""
        return [
            {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}
            for index in self.choices
        ]

    def chunk_choice(self, delta: Delta) -> dict[str, Any] | None:
        fields = render.chat_delta(delta)
        wanted = (self._wants_logprobs or self.body.return_token_ids) and delta.token_ids
        if not fields and not wanted and delta.finish is None:
            return None
        choice = {"index": delta.index, "delta": fields, "logprobs": self._logprobs(delta)}
        self._ending(self.choices[delta.index], delta, choice)
        return choice

    def whole_choice(self, choice: Choice, deltas: list[Delta]) -> dict[str, Any]:
        delta = merge(deltas)
        message = render.chat_message(delta.content, delta.reasoning, self._thinks)
        fields = {"index": choice.index, "message": message, "logprobs": self._logprobs(delta)}
        self._ending(choice, delta, fields)
        return fields

    def _logprobs(self, delta: Delta) -> dict[str, Any] | None:
        return render.chat_logprobs(delta.logprobs, self.texts) if self._wants_logprobs else None


class CompletionAnswer(Answer):
    """/v1/completions."""

    chunk_object = "text_completion"
    whole_object = "text_completion"

    def __init__(
        self,
        request_id: str,
        body: CompletionRequest,
        generation: Generation,
        info: ModelInfo,
        echoes: list[str],
    ) -> None:
        super().__init__(request_id, body, generation, info)
        self._echoes = dict(enumerate(echoes))
        """Prompt text by choice, until it has been sent."""
        wants_logprobs = body.logprobs is not None
        self._lists = {
            index: render.CompletionLogprobs(self.texts, body.logprobs or 0)
            for index in (self.choices if wants_logprobs else ())
        }
        self._echoes_logprobs = wants_logprobs and bool(body.echo)

    def chunk_choice(self, delta: Delta) -> dict[str, Any] | None:
        lists, text = self._logprobs(delta), self._echoes.pop(delta.index, "") + delta.content
        wanted = (lists and lists["tokens"]) or (self.body.return_token_ids and delta.token_ids)
        if not text and not wanted and delta.finish is None:
            return None
        fields = {"index": delta.index, "text": text, "logprobs": lists}
        self._ending(self.choices[delta.index], delta, fields)
        return fields

    def whole_choice(self, choice: Choice, deltas: list[Delta]) -> dict[str, Any]:
        fields = self.chunk_choice(merge(deltas))
        assert fields is not None  # a merged delta has a finish
        if self.body.return_token_ids:
            fields["prompt_token_ids"] = list(choice.request.prompt_ids)
        return fields

    def _logprobs(self, delta: Delta) -> dict[str, Any] | None:
        lists = self._lists.get(delta.index)
        if lists is None:
            return None
        parts = []
        if self._echoes_logprobs and delta.index in self._echoes:
            parts.append(lists.first(self.choices[delta.index].request.prompt_ids[0]))
        parts.append(lists.more(delta.prompt_logprobs))
        parts.append(lists.more(delta.logprobs))
        return render.join_logprobs(parts)
