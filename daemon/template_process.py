"""The child process that renders chat templates. It imports nothing of ours.

A template is code from a checkpoint. It runs in Jinja's sandbox, in this process, which has a
bound on memory and on output, and which the daemon kills when it takes too long. Frames on stdin
and stdout: four bytes of length, big-endian, then msgpack. One request, one reply.

The daemon imports this file for the messages, so jinja2 is imported where it is used.
"""

import json
import os
import resource
import signal
import sys
from collections.abc import Iterator
from datetime import datetime
from typing import TYPE_CHECKING, Any, BinaryIO

import msgspec

if TYPE_CHECKING:
    from jinja2 import Template

MAX_OUTPUT_CHARS = 8 * 1024 * 1024
MAX_MEMORY_BYTES = 1024 * 1024 * 1024
MAX_MESSAGE_CHARS = 500


class Load(msgspec.Struct, frozen=True, array_like=True, tag=1):
    """First message: compile this template. The reply's text is empty."""

    source: str


class Render(msgspec.Struct, frozen=True, array_like=True, tag=2):
    variables: dict[str, Any]
    deadline_s: float
    """The process ends itself then: nobody may be left to kill it."""


class Rendered(msgspec.Struct, frozen=True, array_like=True, tag=1):
    text: str


class Failed(msgspec.Struct, frozen=True, array_like=True, tag=2):
    message: str


ToTemplate = Load | Render
FromTemplate = Rendered | Failed


def frame(message: ToTemplate | FromTemplate) -> bytes:
    data = msgspec.msgpack.encode(message)
    return len(data).to_bytes(4, "big") + data


# ---- what a template may call, as in transformers ----


def _raise_exception(message: str) -> None:
    from jinja2 import TemplateError

    raise TemplateError(message)


def _strftime_now(format_: str) -> str:
    return datetime.now().astimezone().strftime(format_)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own filter escapes HTML, which is noise to a model."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def compile_template(source: str) -> "Template":
    from jinja2.ext import loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment.from_string(source)


def render(template: "Template", variables: dict[str, Any]) -> str:
    parts: list[str] = []
    num_chars = 0
    for part in template.generate(variables):
        num_chars += len(part)
        if num_chars > MAX_OUTPUT_CHARS:
            raise ValueError(f"the prompt has more than {MAX_OUTPUT_CHARS} characters")
        parts.append(part)
    return "".join(parts)


def _sentence(error: Exception) -> str:
    """One line. Jinja's errors (`raise_exception` too) speak for themselves."""
    text = " ".join(str(error).split())
    if not type(error).__module__.startswith("jinja2"):
        text = f"{type(error).__name__}: {text}"
    return text[:MAX_MESSAGE_CHARS]


# ---- the loop ----


class Child:
    """Holds the one template, and answers one request at a time."""

    def __init__(self) -> None:
        self._template: Template | None = None

    def answer(self, request: ToTemplate) -> FromTemplate:
        """A template may raise anything: whatever it is becomes one sentence."""
        try:
            return Rendered(self._work(request))
        except MemoryError:
            return Failed("it needs too much memory")
        except Exception as error:
            return Failed(_sentence(error))

    def _work(self, request: ToTemplate) -> str:
        if isinstance(request, Load):
            self._template = compile_template(request.source)
            return ""
        assert self._template is not None, "Load comes first"
        signal.setitimer(signal.ITIMER_REAL, request.deadline_s)
        try:
            return render(self._template, request.variables)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)


def requests(stream: BinaryIO) -> Iterator[ToTemplate]:
    """Until the daemon closes its end, or dies."""
    decoder: msgspec.msgpack.Decoder[ToTemplate] = msgspec.msgpack.Decoder(ToTemplate)
    while len(head := stream.read(4)) == 4:
        size = int.from_bytes(head, "big")
        if len(data := stream.read(size)) < size:
            return
        yield decoder.decode(data)


def main() -> None:
    for number in (signal.SIGINT, signal.SIGTERM):  # to the whole group: the daemon's to handle
        signal.signal(number, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY_BYTES, MAX_MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    child = Child()
    for request in requests(sys.stdin.buffer):
        try:
            sys.stdout.buffer.write(frame(child.answer(request)))
            sys.stdout.buffer.flush()
        except BrokenPipeError:
            os._exit(0)  # the daemon has gone; an ordinary exit would flush, and complain


if __name__ == "__main__":
    main()
