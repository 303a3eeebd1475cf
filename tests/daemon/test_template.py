"""The chat template: against transformers, and against templates that mean harm."""

import asyncio
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest
import uvloop

from dsd.daemon import template_process
from dsd.daemon.template import (
    TemplateError,
    TemplateRenderer,
    normalise_messages,
    wants_object_arguments,
)
from dsd.daemon.template_process import Load, Render, frame
from dsd.daemon.tokenizer import Tokenizer

PUBLISHED = Path(__file__).parents[3] / "shared" / "deepseek-v3"
needs_published = pytest.mark.skipif(
    not (PUBLISHED / "tokenizer_config.json").exists(), reason=f"{PUBLISHED} is absent"
)
HI: list[dict[str, Any]] = [{"role": "user", "content": "hi"}]
FOREVER = "{% for i in range(99999) %}" * 3 + "{% endfor %}" * 3
SLOW_IF_ASKED = "{% if slow %}" + FOREVER + "{% endif %}{{ messages[0].content }}"


def call(name: str, arguments: str) -> dict[str, Any]:
    return {"type": "function", "id": "c", "function": {"name": name, "arguments": arguments}}


def render(source: str, messages: list[dict[str, Any]] | None = None, **options: Any) -> str:
    async def main() -> str:
        renderer = TemplateRenderer(source, {"bos_token": "<s>"}, timeout_s=10)
        await renderer.start()
        try:
            return await renderer.render(messages or HI, **options)
        finally:
            await renderer.stop()

    return asyncio.run(main())


# ---- as transformers does ----

TOOL_TURN: list[dict[str, Any]] = [
    {"role": "user", "content": "weather in 北京?"},
    {"role": "assistant", "content": None, "tool_calls": [call("weather", '{"city": "北京"}')]},
    {"role": "tool", "tool_call_id": "c", "content": "☀️ 21 °C"},
]
CONVERSATIONS: dict[str, list[dict[str, Any]]] = {
    "user": HI,
    "system": [{"role": "system", "content": "Be brief."}, *HI],
    "two systems": [{"role": "system", "content": "A"}, {"role": "system", "content": "B"}, *HI],
    "unicode": [{"role": "user", "content": "naïve 你好 🙂 <b>&amp;</b> \u2028 \x00"}],
    "thought": [*HI, {"role": "assistant", "content": "<think>hm</think>yo"}, *HI],
    "tool": TOOL_TURN,
    "tool answered": [*TOOL_TURN, {"role": "assistant", "content": "Sunny."}, *HI],
    "two calls": [
        *HI,
        {
            "role": "assistant",
            "content": "Both.",
            "tool_calls": [call("a", "{}"), call("b", '{"x": "<"}')],
        },
        {"role": "tool", "content": "1"},
        {"role": "tool", "content": "2"},
    ],
}


@pytest.fixture(scope="module")
def theirs() -> Any:
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        patch.setenv("HF_HUB_OFFLINE", "1")
        warnings.simplefilter("ignore")  # transformers' own, while it is imported
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(PUBLISHED)


@needs_published
def test_render_is_that_of_transformers(theirs: Any) -> None:
    async def main() -> None:
        tokenizer = Tokenizer.load(PUBLISHED)
        renderer = TemplateRenderer(tokenizer.chat_template, tokenizer.special_tokens, timeout_s=10)
        for name, messages in CONVERSATIONS.items():
            for prompt in (True, False):
                ours = await renderer.render(messages, add_generation_prompt=prompt)
                # Transformers 5 drops what is null; the template writes null and "" alike.
                as_theirs = [{**m, "content": m["content"] or ""} for m in messages]
                options = {"add_generation_prompt": prompt}
                text = theirs.apply_chat_template(as_theirs, tokenize=False, **options)
                assert ours == text, name
                ids = theirs.apply_chat_template(as_theirs, return_dict=False, **options)
                assert tokenizer.encode(ours, add_special_tokens=False) == ids, name
        await renderer.stop()
        tokenizer.close()

    asyncio.run(main())


@needs_published
def test_render_what_transformers_cannot() -> None:
    """Clients send these, and the published template, taken literally, fails on them or errs."""

    async def main() -> None:
        tokenizer = Tokenizer.load(PUBLISHED)
        renderer = TemplateRenderer(tokenizer.chat_template, tokenizer.special_tokens, timeout_s=10)
        developer = [{"role": "developer", "content": [{"type": "text", "text": "S"}]}, *HI]
        assert (await renderer.render(developer)).endswith("S<｜User｜>hi<｜Assistant｜>")
        echoed = [*HI, {"role": "assistant", "content": None, "tool_calls": []}, *HI]
        assert "<｜Assistant｜><｜end▁of▁sentence｜>" in await renderer.render(echoed)
        call = {"function": {"name": "f", "arguments": {"é": 1}}}
        called = [*HI, {"role": "assistant", "tool_calls": [call]}]
        assert 'function<｜tool▁sep｜>f\n```json\n{"é": 1}\n```' in await renderer.render(called)
        await renderer.stop()
        tokenizer.close()

    asyncio.run(main())


def test_render_names_and_filters_of_transformers() -> None:
    source = "{{ bos_token }}{{ {'b': '<é>', 'a': 1} | tojson }}{{ strftime_now('%Y') | length }}"
    assert render(source) == '<s>{"b": "<é>", "a": 1}4'
    source = "{{ [1, {'b': 1, 'a': 2}] | tojson(separators=(',', ':'), sort_keys=true) }}"
    assert render(source) == '[1,{"a":2,"b":1}]'
    source = (
        "{% for m in 'abc' %}\n  {% if m == 'b' %}\n{% break %}\n  {% endif %}\n{{ m }}{% endfor %}"
    )
    assert render(source) == "a"


def test_render_extra_tools_and_prompt_reach_the_template() -> None:
    source = "{{ thinking }} {{ tools }} {{ add_generation_prompt }}"
    tools = [{"type": "function"}]
    text = render(source, tools=tools, add_generation_prompt=False, extra={"thinking": True})
    assert text == "True [{'type': 'function'}] False"
    assert render("{{ tools is none }} {{ messages | length }}", extra={"messages": 3}) == "True 1"


# ---- what harms ----


@pytest.mark.parametrize(
    ("source", "sentence"),
    [
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ cycler.__init__.__globals__ }}", "unsafe"),
        ("{{ ''['__class__'].__mro__ }}", "unsafe"),
        ("{{ (''|attr('__class__')).__mro__ }}", "failed: .*(unsafe|undefined)"),
        ("{{ '{0.__class__.__mro__}'.format('') }}", "unsafe"),
        ("{{ messages.append(1) }}", "not safely callable|unsafe"),
        ("{% for i in range(10**12) %}{% endfor %}", "Range too big"),
        ("{{ 'a' * 10**10 }}", "needs too much memory"),
        ("{{ 'a' * 9 * 1024 * 1024 }}", "more than 8388608 characters"),
        ("{{ raise_exception('Roles must\n alternate.') }}", r"failed: Roles must alternate\.$"),
        ("{{ nothing.here }}", "'nothing' is undefined"),
        ("{% for", "unexpected"),
        ("{% include '/etc/passwd' %}", "failed"),
    ],
)
def test_render_bad_template_is_refused_in_one_sentence(source: str, sentence: str) -> None:
    with pytest.raises(TemplateError, match=sentence) as caught:
        render(source)
    assert "\n" not in str(caught.value)


def endless(new_loop: Callable[[Coroutine[Any, Any, None]], None]) -> None:
    async def main() -> None:
        renderer = TemplateRenderer(SLOW_IF_ASKED, timeout_s=0.5)
        await renderer.start()
        begun = time.monotonic()
        with pytest.raises(TemplateError, match=r"took more than 0\.5 s"):
            await renderer.render(HI, extra={"slow": True})
        assert time.monotonic() - begun < 2
        assert await renderer.render(HI) == "hi"
        await renderer.stop()

    new_loop(main())


def test_render_endless_template_is_killed_and_the_next_renders() -> None:
    endless(asyncio.run)


@pytest.mark.slow
def test_render_endless_template_is_killed_under_uvloop() -> None:
    endless(uvloop.run)


def test_render_cancelled_leaves_no_answer_for_the_next() -> None:
    async def main() -> None:
        renderer = TemplateRenderer(SLOW_IF_ASKED, timeout_s=10)
        await renderer.start()
        task = asyncio.create_task(renderer.render(HI, extra={"slow": True}))
        await asyncio.sleep(0.1)
        task.cancel()
        await asyncio.wait([task])
        assert await renderer.render(HI) == "hi"
        await renderer.stop()

    asyncio.run(main())


def test_render_after_the_child_was_killed() -> None:
    async def main() -> None:
        renderer = TemplateRenderer(SLOW_IF_ASKED)
        await renderer.start()
        assert renderer._child is not None
        renderer._child.kill()
        await renderer._child.wait()
        assert await renderer.render(HI) == "hi"
        await renderer.stop()

    asyncio.run(main())


def test_render_many_at_once_get_their_own_answers() -> None:
    async def main() -> None:
        renderer = TemplateRenderer(SLOW_IF_ASKED)
        jobs = [renderer.render([{"role": "user", "content": str(i)}]) for i in range(20)]
        assert await asyncio.gather(*jobs) == [str(i) for i in range(20)]
        await renderer.stop()

    asyncio.run(main())


@pytest.mark.parametrize("extra", [{"x": object()}, {"x": 10**30}])
def test_render_variables_that_cannot_be_passed_are_refused(extra: dict[str, Any]) -> None:
    with pytest.raises(TemplateError, match="cannot be passed"):
        render("", extra=extra)


def child(*options: str) -> "subprocess.Popen[bytes]":
    pipe = subprocess.PIPE
    command = [sys.executable, *options, "-P", template_process.__file__]
    return subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe)


def test_child_ends_when_its_input_closes() -> None:
    with child() as process:
        process.communicate(timeout=10)
    assert process.returncode == 0


def test_child_ends_itself_after_the_deadline_if_nobody_kills_it() -> None:
    data = frame(Load(FOREVER)) + frame(Render({}, deadline_s=0.2))
    with child() as process:
        process.communicate(data, timeout=10)
    assert process.returncode == -signal.SIGALRM


def test_child_imports_little() -> None:
    with child("-X", "importtime") as process:
        _, lines = process.communicate(frame(Load("")), timeout=10)
    modules = {line.rpartition("|")[2].strip() for line in lines.decode().splitlines()}
    assert {"jinja2", "msgspec"} <= modules
    assert not {"dsd", "tokenizers", "torch", "transformers", "numpy", "uvloop", "zmq"} & modules


# ---- messages ----


@pytest.mark.parametrize(
    ("message", "result"),
    [
        ({"role": "user", "content": None}, {"role": "user", "content": ""}),
        ({"role": "assistant"}, {"role": "assistant", "content": ""}),
        ({"role": "developer", "content": "x"}, {"role": "system", "content": "x"}),
        (
            {
                "role": "user",
                "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}],
            },
            {"role": "user", "content": "ab"},
        ),
        (
            {"role": "assistant", "content": "a", "tool_calls": None, "reasoning_content": "r"},
            {"role": "assistant", "content": "a", "reasoning_content": "r"},
        ),
        (
            {"role": "assistant", "content": "a", "reasoning": "r"},
            {"role": "assistant", "content": "a", "reasoning": "r", "reasoning_content": "r"},
        ),
        (
            {"role": "tool", "name": "f", "content": []},
            {"role": "tool", "name": "f", "content": ""},
        ),
    ],
)
def test_normalise(message: dict[str, Any], result: dict[str, Any]) -> None:
    assert normalise_messages([message]) == [result]


@pytest.mark.parametrize(
    ("arguments", "as_text", "as_object"),
    [
        ({"a": "é"}, '{"a": "é"}', {"a": "é"}),
        ('{"a":1}', '{"a":1}', {"a": 1}),
        (None, "{}", {}),
        ("not JSON", "not JSON", "not JSON"),
    ],
)
def test_normalise_tool_call_arguments(arguments: Any, as_text: str, as_object: Any) -> None:
    call = {"id": "c", "function": {"name": "f", "arguments": arguments}}
    messages = [{"role": "assistant", "content": None, "tool_calls": [call]}]
    for object_arguments, expected in ((False, as_text), (True, as_object)):
        (message,) = normalise_messages(messages, object_arguments=object_arguments)
        function = {"name": "f", "arguments": expected}
        assert message["content"] is None
        assert message["tool_calls"] == [{"type": "function", "id": "c", "function": function}]
    assert call == {"id": "c", "function": {"name": "f", "arguments": arguments}}, "left as it was"


@pytest.mark.parametrize(
    ("message", "sentence"),
    [
        ({"role": "ctx", "content": "x"}, r"messages\[1\] has the unknown role 'ctx'"),
        ({"content": "x"}, r"messages\[1\] has no role"),
        (
            {"role": "user", "content": [{"type": "image_url"}]},
            r"messages\[1\] .* type 'image_url'",
        ),
        ({"role": "user", "content": ["x"]}, r"messages\[1\] .* type 'str'"),
        ({"role": "user", "content": 3}, r"messages\[1\].content must be text"),
        ({"role": "assistant", "tool_calls": [{}]}, r"messages\[1\] has a tool call without"),
    ],
)
def test_normalise_refuses_and_names_the_message(message: dict[str, Any], sentence: str) -> None:
    with pytest.raises(TemplateError, match=sentence):
        normalise_messages([*HI, message])


@pytest.mark.parametrize(
    ("source", "wants"),
    [
        ("{{ tool['function']['arguments'] + 'x' }}", False),
        ("{{ tool['function']['arguments']|tojson }}", True),
        ("{{ tool.function.arguments | tojson }}", True),
        (
            "{% if f.arguments is string %}{{ f.arguments }}{% else %}{{ f.arguments | tojson }}",
            False,
        ),
    ],
)
def test_wants_object_arguments(source: str, wants: bool) -> None:
    assert wants_object_arguments(source) is wants
