"""Messages to the prompt's text, by the checkpoint's own chat template.

The template is Jinja from a stranger: it renders in a child process (`template_process.py`) that
is killed when it takes too long. Before that the messages are brought into the one shape that the
published templates expect.
"""

import asyncio
import json
import re
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from . import template_process
from .template_process import Failed, FromTemplate, Load, Render, ToTemplate, frame

TIMEOUT_S = 2.0
START_TIMEOUT_S = 30.0
SELF_DESTRUCT_S = 5.0
"""The child outlives its time-out by this much at most, should the daemon die before it kills."""
MAX_REPLY_BYTES = 4 * template_process.MAX_OUTPUT_CHARS + 1024

Message = dict[str, Any]


class TemplateError(Exception):
    """The messages cannot be rendered; one sentence for the client."""


# ---- the messages ----

_ROLES = {role: role for role in ("system", "user", "assistant", "tool")} | {"developer": "system"}

# Templates that write `arguments | tojson` and never ask `arguments is string`.
_TOJSON_ARGUMENTS = re.compile(r"arguments['\"]?\]?\s*\|\s*tojson")
_ASKS_FOR_STRING = re.compile(r"arguments['\"]?\]?\s+is\s+string")


def wants_object_arguments(template: str) -> bool:
    """Whether a tool call's arguments must reach the template as an object.

    The published V3 and R1 templates concatenate them: text. Others pipe them through `tojson`,
    which would encode text twice.
    """
    return bool(_TOJSON_ARGUMENTS.search(template)) and not _ASKS_FOR_STRING.search(template)


def normalise_messages(
    messages: Sequence[Mapping[str, Any]], *, object_arguments: bool = False
) -> list[Message]:
    """New messages: text content, known roles, tool calls whose arguments have one type."""
    return [_normalise(index, message, object_arguments) for index, message in enumerate(messages)]


def _normalise(index: int, message: Mapping[str, Any], object_arguments: bool) -> Message:
    if message.get("role") is None:
        raise TemplateError(f"messages[{index}] has no role.")
    role = _ROLES.get(str(message.get("role")))
    if role is None:
        raise TemplateError(f"messages[{index}] has the unknown role {message.get('role')!r}.")
    # V3's template asks `'tool_calls' in message`, so a null or an empty list must go.
    result = {key: value for key, value in message.items() if key != "tool_calls"}
    result["role"] = role
    content = _join_parts(index, message.get("content"))
    calls = message.get("tool_calls") if role == "assistant" else None
    if calls:
        result["tool_calls"] = [_tool_call(index, call, object_arguments) for call in calls]
    # V3's template asks `content is none`, but only where there are tool calls.
    result["content"] = "" if content is None and not calls else content
    if role == "assistant" and "reasoning_content" not in message and message.get("reasoning"):
        result["reasoning_content"] = message["reasoning"]
    return result


def _join_parts(index: int, content: Any) -> str | None:
    if content is None or isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise TemplateError(f"messages[{index}].content must be text, a list of parts or null.")
    texts: list[str] = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else type(part).__name__
        if kind != "text" or not isinstance(part.get("text"), str):
            raise TemplateError(
                f"messages[{index}] has a content part of type {kind!r}; only text is supported."
            )
        texts.append(part["text"])
    return "".join(texts)


def _tool_call(index: int, call: Any, object_arguments: bool) -> Message:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise TemplateError(f"messages[{index}] has a tool call without a function's name.")
    arguments = _arguments(function.get("arguments"), object_arguments)
    return {"type": "function", **call, "function": {**function, "arguments": arguments}}


def _arguments(arguments: Any, as_object: bool) -> Any:
    if not as_object:
        if arguments is None:
            return "{}"
        return (
            arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
        )
    if not isinstance(arguments, str):
        return {} if arguments is None else arguments
    try:
        return json.loads(arguments)
    except ValueError:  # a model wrote it, and so it goes back as it came
        return arguments


# ---- the renderer ----


class TemplateRenderer:
    """One child process, one rendering at a time."""

    def __init__(
        self,
        template: str,
        special_tokens: Mapping[str, str] | None = None,
        *,
        timeout_s: float = TIMEOUT_S,
    ) -> None:
        """`special_tokens`: bos_token, eos_token, ... as `Tokenizer.special_tokens` has them."""
        self._template = template
        self._special_tokens = dict(special_tokens or {})
        self._object_arguments = wants_object_arguments(template)
        self._timeout_s = timeout_s
        self._lock = asyncio.Lock()
        self._child: asyncio.subprocess.Process | None = None
        self._out_of_step = False
        """A request has no answer yet. If it was cancelled, the next may not take its answer."""
        self._decoder: msgspec.msgpack.Decoder[FromTemplate] = msgspec.msgpack.Decoder(FromTemplate)

    async def start(self) -> None:
        """Raises TemplateError if the template does not compile."""
        async with self._lock:
            await self._ensure_child()

    async def stop(self) -> None:
        async with self._lock:
            await self._end_child()

    async def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Any] | None = None,
        add_generation_prompt: bool = True,
        extra: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt's text, its BOS included: encode it without special tokens.

        `extra` is what `chat_template_kwargs` asks for, such as `thinking`.
        """
        variables = {
            **self._special_tokens,
            **(extra or {}),
            "messages": normalise_messages(messages, object_arguments=self._object_arguments),
            "tools": tools or None,
            "add_generation_prompt": add_generation_prompt,
        }
        data = _encode(Render(variables, self._timeout_s + SELF_DESTRUCT_S))
        async with self._lock:
            child = await self._ensure_child()
            return await self._exchange(child, data, self._timeout_s)

    async def _ensure_child(self) -> asyncio.subprocess.Process:
        if self._child is not None and self._child.returncode is None and not self._out_of_step:
            return self._child
        await self._end_child()
        # By path, so that it needs no PYTHONPATH; -P, so that our files shadow no module of its.
        self._child = await asyncio.create_subprocess_exec(
            sys.executable,
            "-P",
            template_process.__file__,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
        )
        try:
            await self._exchange(self._child, _encode(Load(self._template)), START_TIMEOUT_S)
        except TemplateError:
            await self._end_child()
            raise
        return self._child

    async def _exchange(
        self, child: asyncio.subprocess.Process, data: bytes, timeout_s: float
    ) -> str:
        self._out_of_step = True
        try:
            async with asyncio.timeout(timeout_s):
                reply = self._decoder.decode(await _ask(child, data))
        except TimeoutError as error:
            await self._end_child()
            raise TemplateError(f"The chat template took more than {timeout_s:g} s.") from error
        except (ConnectionError, asyncio.IncompleteReadError, msgspec.DecodeError) as error:
            await self._end_child()
            raise TemplateError("The chat template's process ended before it answered.") from error
        self._out_of_step = False
        if isinstance(reply, Failed):
            raise TemplateError(f"The chat template failed: {reply.message.rstrip('.')}.")
        return reply.text

    async def _end_child(self) -> None:
        child, self._child = self._child, None
        if child is None:
            return
        _kill(child)
        await child.wait()
        assert child.stdin is not None
        assert child.stdout is not None
        child.stdin.close()
        await child.stdout.read()  # to its end: so the transport closes now, not in a destructor


async def _ask(child: asyncio.subprocess.Process, data: bytes) -> bytes:
    assert child.stdin is not None
    assert child.stdout is not None
    child.stdin.write(data)
    await child.stdin.drain()
    size = int.from_bytes(await child.stdout.readexactly(4), "big")
    if size > MAX_REPLY_BYTES:
        raise ConnectionError(f"{size=} > {MAX_REPLY_BYTES=}")
    return await child.stdout.readexactly(size)


def _kill(child: asyncio.subprocess.Process) -> None:
    try:
        child.kill()
    except ProcessLookupError:  # it has ended by itself
        return


def _encode(message: ToTemplate) -> bytes:
    try:
        return frame(message)
    except (TypeError, ValueError, OverflowError) as error:
        raise TemplateError(
            f"The messages cannot be passed to the chat template: {error}."
        ) from error
