"""OpenAI's dialect: models, completions, chat completions, and the tokenizer's routes."""

import secrets
import time
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import msgspec
from starlette.types import Receive, Scope, Send

from ..engine import Engine, QueueFull, Unavailable
from ..generation import Generation
from ..metrics import Metrics
from ..model_info import ModelInfo
from ..request import Refused
from ..template import TemplateError, TemplateRenderer
from ..thinking import starts_inside
from . import prepare
from .answers import Answer, ChatAnswer, CompletionAnswer
from .errors import from_validation, invalid, retry_later
from .http import json_response, read_body, send_events, send_response, while_connected
from .openai_types import (
    ChatRequest,
    Common,
    CompletionRequest,
    DetokenizeRequest,
    TokenizeRequest,
)

Body = TypeVar("Body")
MAX_COMMAS = 500_000
"""Three for each token of the longest context. Millions of tiny values would hold the loop up while
they are decoded, before any bound of their types is looked at."""


def decode(raw: bytes, body_type: type[Body]) -> Body:
    """JSON to a typed body. Raises ApiError 400 that names the field or the byte."""
    if not raw:
        raise invalid("the body is empty")
    if raw.count(b",") > MAX_COMMAS:
        raise invalid(f"the body has more than {MAX_COMMAS} commas; no context holds as much")
    try:
        return msgspec.json.decode(raw, type=body_type)
    except msgspec.ValidationError as error:
        raise from_validation(error) from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise invalid(f"the body is not valid JSON: {error}") from error
    except RecursionError as error:
        raise invalid("the body is nested too deeply") from error


class OpenAI:
    """The dialect's endpoints over one engine and one model."""

    def __init__(
        self,
        info: ModelInfo,
        engine: Engine,
        renderer: Callable[[], TemplateRenderer | None],
        metrics: Metrics,
    ) -> None:
        self._info = info
        self._engine = engine
        self._renderer = renderer
        self._metrics = metrics
        self._created = int(time.time())

    # ---- models ----

    def model_card(self, name: str) -> dict[str, Any]:
        ready = self._engine.ready
        return {
            "id": name,
            "object": "model",
            "created": self._created,
            "owned_by": "dsd",
            "root": str(self._info.model_dir.name),
            "max_model_len": None if ready is None else ready.max_seq_len,
        }

    async def models(self, scope: Scope, receive: Receive, send: Send) -> None:
        data = [self.model_card(name) for name in self._info.names]
        await send_response(json_response({"object": "list", "data": data}), scope, receive, send)

    async def model(self, scope: Scope, receive: Receive, send: Send) -> None:
        name = scope["path_params"]["name"]
        prepare.check_model(self._info, name)
        await send_response(json_response(self.model_card(name)), scope, receive, send)

    # ---- completions and chat ----

    async def completions(self, scope: Scope, receive: Receive, send: Send) -> None:
        body = decode(await read_body(scope, receive), CompletionRequest)
        await self._serve(body, lambda: self._completion(body), scope, receive, send)

    async def chat(self, scope: Scope, receive: Receive, send: Send) -> None:
        body = decode(await read_body(scope, receive), ChatRequest)
        await self._serve(body, lambda: self._chat(body), scope, receive, send)

    async def _serve(
        self,
        body: Common,
        prepared: Callable[[], Awaitable[Answer]],
        scope: Scope,
        receive: Receive,
        send: Send,
    ) -> None:
        """Prepares, starts and answers, for as long as the client stays."""

        async def work() -> None:
            answer = await prepared()
            await self._start(answer.generation)
            try:
                if body.stream:
                    await send_events(answer.events(), send)
                else:
                    await send_response(json_response(await answer.whole()), scope, receive, send)
            finally:
                answer.generation.close()

        await while_connected(receive, work())

    async def _start(self, generation: Generation) -> None:
        try:
            await generation.start()
        except Unavailable as error:
            raise retry_later(str(error)) from error
        except QueueFull as error:
            raise retry_later(str(error), status=429, after_s=1) from error
        except Refused as error:
            raise invalid(str(error)) from error

    async def _completion(self, body: CompletionRequest) -> CompletionAnswer:
        info = self._info
        prepare.check_model(info, body.model)
        prepare.check_common(body)
        _check_completion(body)
        ready = prepare.require_ready(self._engine, info)
        prompts = await prepare.completion_prompts(body, info, ready)
        num_logprobs = -1 if body.logprobs is None else body.logprobs
        sampling = prepare.sampling(
            body,
            info.defaults,
            info.eos_token_ids,
            ready,
            num_logprobs,
            num_logprobs if body.echo else -1,
        )
        max_tokens = (
            prepare.DEFAULT_COMPLETION_TOKENS if body.max_tokens is None else body.max_tokens
        )
        request_id = f"cmpl-{secrets.token_hex(12)}"
        generation = prepare.make_generation(
            request_id, prompts, body, sampling, max_tokens, info, self._engine
        )
        self._metrics.watch(generation)
        echoes = self._echoes(body, prompts) if body.echo else []
        return CompletionAnswer(request_id, body, generation, info, echoes)

    def _echoes(self, body: CompletionRequest, prompts: list[list[int]]) -> list[str]:
        """Prompt text for each choice. Text prompts come back as they were sent."""
        tokenizer, sent = self._info.tokenizer, body.prompt
        if isinstance(sent, str):
            texts = [sent]
        else:
            texts = [
                "" if tokenizer is None else tokenizer.decode(ids, skip_special_tokens=False)
                for ids in prompts
            ]
        return [text for text in texts for _ in range(body.n or 1)]

    async def _chat(self, body: ChatRequest) -> ChatAnswer:
        info = self._info
        prepare.check_model(info, body.model)
        prepare.check_common(body)
        _check_chat(body)
        ready = prepare.require_ready(self._engine, info)
        text = await self.render(
            body.messages, body.add_generation_prompt, body.chat_template_kwargs
        )
        prompt_ids = await prepare.encode(text, info, add_special_tokens=False)
        num_logprobs = (body.top_logprobs or 0) if body.logprobs else -1
        sampling = prepare.sampling(
            body, info.defaults, info.eos_token_ids, ready, num_logprobs, -1
        )
        limit = body.max_completion_tokens or body.max_tokens
        max_tokens = ready.max_seq_len if limit is None else limit
        request_id = f"chatcmpl-{secrets.token_hex(12)}"
        thinks = starts_inside(text)
        generation = prepare.make_generation(
            request_id, [prompt_ids], body, sampling, max_tokens, info, self._engine, thinks
        )
        self._metrics.watch(generation)
        return ChatAnswer(request_id, body, generation, info, thinks)

    async def render(
        self,
        messages: list[dict[str, Any]],
        add_generation_prompt: bool,
        extra: dict[str, Any] | None,
    ) -> str:
        """The chat as the prompt's text. Raises ApiError."""
        renderer = self._renderer()
        if renderer is None:
            raise invalid("this checkpoint has no chat template; use /v1/completions", "messages")
        try:
            return await renderer.render(
                messages, add_generation_prompt=add_generation_prompt, extra=extra or {}
            )
        except TemplateError as error:
            raise invalid(str(error), "messages") from error

    # ---- the tokenizer ----

    async def tokenize(self, scope: Scope, receive: Receive, send: Send) -> None:
        body = decode(await read_body(scope, receive), TokenizeRequest)
        prepare.require_loaded(self._info)
        if (body.prompt is None) == (body.messages is None):
            raise invalid("give either prompt or messages", "prompt")
        if body.messages is not None:
            text = await self.render(
                body.messages, body.add_generation_prompt, body.chat_template_kwargs
            )
        ids = await prepare.encode(
            text if body.prompt is None else body.prompt,
            self._info,
            add_special_tokens=body.add_special_tokens and body.messages is None,
        )
        ready = self._engine.ready
        max_model_len = None if ready is None else ready.max_seq_len
        fields = {"count": len(ids), "max_model_len": max_model_len, "tokens": ids}
        await send_response(json_response(fields), scope, receive, send)

    async def detokenize(self, scope: Scope, receive: Receive, send: Send) -> None:
        body = decode(await read_body(scope, receive), DetokenizeRequest)
        prepare.require_loaded(self._info)
        if self._info.tokenizer is None:
            raise invalid("this checkpoint has no tokenizer")
        size = len(self._info.tokenizer.token_bytes)
        if max(body.tokens, default=0) >= size:
            raise invalid(f"token id {max(body.tokens)} is outside the {size} tokens", "tokens")
        text = self._info.tokenizer.decode(
            body.tokens, skip_special_tokens=body.skip_special_tokens
        )
        await send_response(json_response({"prompt": text}), scope, receive, send)


def _check_completion(body: CompletionRequest) -> None:
    if body.suffix is not None:
        raise invalid("suffix is not supported", "suffix")
    if body.best_of is not None and body.best_of != (body.n or 1):
        raise invalid(f"best_of is {body.best_of}; only best_of equal to n is supported", "best_of")
    if body.max_tokens == 0 and not body.echo:
        raise invalid("max_tokens is 0; that is allowed only with echo", "max_tokens")


def _check_chat(body: ChatRequest) -> None:
    if body.tools:
        raise invalid("tools are not supported by this version", "tools")
    if body.tool_choice not in (None, "none", "auto"):
        raise invalid("tool_choice is not supported by this version", "tool_choice")
    if body.max_completion_tokens is not None and body.min_tokens > body.max_completion_tokens:
        raise invalid(
            f"min_tokens {body.min_tokens} is more than max_completion_tokens", "min_tokens"
        )
    kind = (body.response_format or {}).get("type", "text")
    if kind != "text":
        raise invalid(
            f"response_format {kind!r} is not supported by this version", "response_format"
        )
    if body.top_logprobs is not None and not body.logprobs:
        raise invalid("top_logprobs is allowed only with logprobs", "top_logprobs")
    if body.max_tokens == 0:
        raise invalid("max_tokens is 0; it must be at least 1", "max_tokens")
