"""What clients get wrong, and what people send on purpose: each is answered by one sentence."""

import json
import socket
import threading
import time
from typing import Any

import httpx
import psutil
import pytest

from dsd.daemon.api.http import MAX_BODY_BYTES
from dsd.tests.conftest import FAKE_DSD, ROOT, Daemon

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
PROMPT: dict[str, Any] = {"model": "Tiny-V3", "prompt": "Hi", "max_tokens": 1}
TALK: dict[str, Any] = {
    "model": "Tiny-V3",
    "messages": [{"role": "user", "content": "Hi"}],
    "max_tokens": 1,
}
MANY = 5000
"""Digits of a number that Python refuses to read or print."""

# (fields over the good body, param, a piece of the message)
COMMON_FAULTS: list[tuple[dict[str, Any], str | None, str]] = [
    ({"max_tokens": -1}, "max_tokens", ">= 0"),
    ({"max_tokens": 2**31}, "max_tokens", "<= 2147483647"),
    ({"max_tokens": 10**30}, "max_tokens", ""),
    ({"max_tokens": 1.5}, "max_tokens", "`int"),
    ({"max_tokens": "7"}, "max_tokens", "`int"),
    ({"max_tokens": True}, "max_tokens", "`int"),
    ({"min_tokens": -1}, "min_tokens", ">= 0"),
    ({"temperature": -0.1}, "temperature", ">= 0.0"),
    ({"temperature": 2.1}, "temperature", "<= 2.0"),
    ({"temperature": "hot"}, "temperature", "`float"),
    ({"top_p": 0}, "top_p", "> 0.0"),
    ({"top_p": 1.01}, "top_p", "<= 1.0"),
    ({"top_k": -2}, "top_k", ">= -1"),
    ({"min_p": 1.5}, "min_p", "<= 1.0"),
    ({"min_p": -0.5}, "min_p", ">= 0.0"),
    ({"presence_penalty": 2.5}, "presence_penalty", "<= 2.0"),
    ({"presence_penalty": -2.5}, "presence_penalty", ">= -2.0"),
    ({"frequency_penalty": 3}, "frequency_penalty", "<= 2.0"),
    ({"repetition_penalty": 0}, "repetition_penalty", "> 0.0"),
    ({"seed": 2**63}, "seed", ""),
    ({"seed": -(2**63) - 1}, "seed", ""),
    ({"seed": 1.5}, "seed", "`int"),
    ({"n": 0}, "n", ">= 1"),
    ({"n": 9}, "n", "<= 8"),
    ({"n": -1}, "n", ">= 1"),
    ({"stop": ""}, "stop", ""),
    ({"stop": [""]}, "stop", ""),
    ({"stop": ["x"] * 17}, "stop", "16"),
    ({"stop": "x" * 129}, "stop", "128"),
    ({"stop": "é" * 65}, "stop", "128"),
    ({"stop": [7]}, "stop", "`str`"),
    ({"stop_token_ids": [-1]}, "stop_token_ids", ">= 0"),
    ({"stop_token_ids": [1] * 129}, "stop_token_ids", "128"),
    ({"logit_bias": {"5": 101}}, "logit_bias", "<= 100.0"),
    ({"logit_bias": {"5": -101}}, "logit_bias", ">= -100.0"),
    ({"logit_bias": {"x": 1}}, "logit_bias", "'x'"),
    ({"logit_bias": {"-1": 1}}, "logit_bias", "'-1'"),
    ({"logit_bias": {"512": 1}}, "logit_bias", "512"),
    ({"logit_bias": {"٣": 1}}, "logit_bias", "٣"),
    ({"logit_bias": {"1" * MANY: 1}}, "logit_bias", "vocabulary"),
    ({"logit_bias": {str(i): 1 for i in range(1025)}}, "logit_bias", "1024"),
    ({"stream": "yes"}, "stream", "`bool"),
    ({"stream_options": {"include_usage": True}}, "stream_options", "stream"),
    ({"stream": True, "stream_options": {"usage": 1}}, "stream_options", "usage"),
    ({"priority": 10**6}, "priority", "<= 1000"),
    ({"ignore_eos": 1}, "ignore_eos", "`bool`"),
    ({"model": 5}, "model", "`str`"),
    ({"temprature": 1}, "temprature", "temprature"),
    ({"max_new_tokens": 1}, "max_new_tokens", "max_new_tokens"),
]
COMPLETION_FAULTS: list[tuple[dict[str, Any], str | None, str]] = [
    ({"prompt": None}, "prompt", "null"),
    ({"prompt": 5}, "prompt", "`int`"),
    ({"prompt": ""}, "prompt", "no tokens"),
    ({"prompt": []}, "prompt", ""),
    ({"prompt": [[]]}, "prompt", "no tokens"),
    ({"prompt": ["Hi", ""]}, "prompt", "no tokens"),
    ({"prompt": [5, "Hi"]}, "prompt", "mixes"),
    ({"prompt": ["Hi", [5], 5]}, "prompt", "mixes"),
    ({"prompt": [512]}, "prompt", "512"),
    ({"prompt": [-1]}, "prompt", ">= 0"),
    ({"prompt": [10**30]}, "prompt", ""),
    ({"prompt": [10**4000]}, "prompt", ""),
    ({"prompt": [[10**30]]}, "prompt", ""),
    ({"prompt": [1.5]}, "prompt", "`float`"),
    ({"prompt": [True]}, "prompt", "`bool`"),
    ({"prompt": ["a"] * 257}, "prompt", "256"),
    ({"prompt": [5] * 4096}, "prompt", "4095"),
    ({"prompt": [5] * 300_000}, "prompt", "300000"),
    ({"prompt": [[5] * 4095, [5] * 4096]}, "prompt", "4096"),
    ({"prompt": "a b c " * 4000}, "prompt", "context"),
    ({"max_tokens": 0}, "max_tokens", "echo"),
    ({"logprobs": 21}, "logprobs", "<= 20"),
    ({"logprobs": -1}, "logprobs", ">= 0"),
    ({"logprobs": True}, "logprobs", "`int"),
    ({"best_of": 2}, "best_of", "best_of"),
    ({"suffix": "end"}, "suffix", "suffix"),
    ({"messages": TALK["messages"]}, "messages", "messages"),
    ({"max_completion_tokens": 1}, "max_completion_tokens", "max_completion_tokens"),
]
CHAT_FAULTS: list[tuple[dict[str, Any], str | None, str]] = [
    ({"messages": []}, "messages", ""),
    ({"messages": None}, "messages", "null"),
    ({"messages": "Hi"}, "messages", "`array`"),
    ({"messages": [5]}, "messages", "`object`"),
    ({"messages": [{"content": "Hi"}]}, "messages", "role"),
    ({"messages": [{"role": "wizard", "content": "Hi"}]}, "messages", "wizard"),
    ({"messages": [{"role": "user", "content": 5}]}, "messages", "content"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages", "image_url"),
    ({"messages": [{"role": ["user"], "content": "Hi"}]}, "messages", "role"),
    ({"max_tokens": 0}, "max_tokens", "at least 1"),
    ({"max_completion_tokens": 0}, "max_completion_tokens", ">= 1"),
    ({"max_completion_tokens": -5}, "max_completion_tokens", ">= 1"),
    ({"logprobs": 5}, "logprobs", "`bool"),
    ({"top_logprobs": 5}, "top_logprobs", "logprobs"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "<= 20"),
    ({"tools": [{"type": "function"}]}, "tools", "tools"),
    ({"tool_choice": "required"}, "tool_choice", "not supported"),
    ({"response_format": {"type": "json_object"}}, "response_format", "json_object"),
    ({"response_format": {"type": ["json"]}}, "response_format", "json"),
    ({"response_format": "text"}, "response_format", "`object"),
    ({"prompt": "Hi"}, "prompt", "prompt"),
    ({"echo": True}, "echo", "echo"),
    ({"messages": [{"role": "user", "content": "a b c " * 4000}]}, "prompt", "context"),
]
IGNORED_FIELDS: dict[str, Any] = {
    "user": "u", "metadata": {"a": "b"}, "store": True, "service_tier": "auto",
    "safety_identifier": "s", "prompt_cache_key": "k", "prompt_cache_retention": "24h",
    "parallel_tool_calls": False, "reasoning_effort": "low", "verbosity": "low",
}  # fmt: skip
# bytes that are no body at all, and a piece of the message
BAD_BYTES = [
    (b"", "empty"),
    (b"{", "valid JSON"),
    (b"nonsense", "valid JSON"),
    (b"[]", "`object`"),
    (b"null", "`object`"),
    (b'{"model": "Tiny-V3", "prompt": "Hi",}', "valid JSON"),
    (b'{"model": "Tiny-V3", "prompt": "Hi"} x', "valid JSON"),
    (b'{"model": "Tiny-V3", "prompt": "\xff"}', "valid JSON"),
    (b'{"model": "Tiny-V3", "prompt": "\\ud8', "valid JSON"),
    (b'\xef\xbb\xbf{"model": "Tiny-V3", "prompt": "Hi"}', "valid JSON"),
    (b'{"model": "Tiny-V3", "prompt": "Hi", "temperature": NaN}', "valid JSON"),
    (b'{"model": "Tiny-V3", "prompt": "Hi", "temperature": Infinity}', "valid JSON"),
    (b'{"model": "Tiny-V3", "prompt": "Hi", "temperature": 1e999}', "out of range"),
    (b'{"model": "Tiny-V3", "prompt": "Hi", "max_tokens": ' + b"9" * MANY + b"}", "range"),
    (b'{"model": "Tiny-V3", "prompt": "Hi", "seed": ' + b"-" + b"9" * MANY + b"}", "range"),
    (b'{"model": "Tiny-V3", "prompt": [' + b"9" * MANY + b"]}", "range"),
    (b"[" * 100_000, ""),
    (b'{"model": "Tiny-V3", "prompt": "Hi", "metadata": ' + b"[" * 100_000, ""),
    (b'{"model": "Tiny-V3", "messages": [' + b'{"a":' * 100_000, ""),
    (b'{"model": "Tiny-V3", "messages": [{"role": ' + b"[" * 90_000 + b"]" * 90_000 + b"}]}", ""),
    (b'{"model": "Tiny-V3"}', "prompt"),
    (b'{"suffix": "Hi"}', "model"),
    (b"\x80\x04\x95\x10\x00\x00\x00cposix\nsystem\n", "valid JSON"),
]


@pytest.fixture(scope="module")
def daemon(start_daemon, small_checkpoint) -> Daemon:
    """What is refused never reaches a worker, so a fake one will do."""
    worker = {"max_seq_len": 4096}
    return start_daemon(str(small_checkpoint), command=FAKE_DSD, worker=worker)


@pytest.fixture(scope="module")
def client(daemon):
    """Afterwards the daemon still serves, the same processes are there, and nothing is held."""
    process = psutil.Process(daemon.process.pid)
    children = {child.pid for child in process.children(recursive=True)}
    with httpx.Client(base_url=daemon.url, timeout=30) as client:
        yield client
        answer = client.post(COMPLETIONS, json=PROMPT)
    assert answer.status_code == 200
    daemon.assert_clean()
    assert {child.pid for child in process.children(recursive=True)} == children
    assert "Traceback" not in daemon.log.read_text()


def check_error(answer: httpx.Response, status: int, param: str | None, piece: str) -> None:
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers["x-request-id"]
    assert list(answer.json()) == ["error"]
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert (error["param"] or "").partition("[")[0] == (param or "")
    assert piece in error["message"]
    assert len(error["message"]) < 1000
    assert not any(text in answer.text for text in ("Traceback", "0x", ".py", str(ROOT), "dsd."))


def ids(table: list[tuple[dict[str, Any], str | None, str]]) -> list[str]:
    return [f"{index}-{next(iter(fields))}" for index, (fields, _, _) in enumerate(table)]


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
@pytest.mark.parametrize(("fields", "param", "piece"), COMMON_FAULTS, ids=ids(COMMON_FAULTS))
def test_common_field_wrong_is_400_that_names_it(client, path, fields, param, piece) -> None:
    body = {**(PROMPT if path == COMPLETIONS else TALK), **fields}
    check_error(client.post(path, json=body), 400, param, piece)


@pytest.mark.parametrize(
    ("fields", "param", "piece"), COMPLETION_FAULTS, ids=ids(COMPLETION_FAULTS)
)
def test_completion_field_wrong_is_400_that_names_it(client, fields, param, piece) -> None:
    answer = client.post(COMPLETIONS, json={**PROMPT, **fields})
    check_error(answer, 400, param, piece)


@pytest.mark.parametrize(("fields", "param", "piece"), CHAT_FAULTS, ids=ids(CHAT_FAULTS))
def test_chat_field_wrong_is_400_that_names_it(client, fields, param, piece) -> None:
    check_error(client.post(CHAT, json={**TALK, **fields}), 400, param, piece)


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT, "/tokenize", "/detokenize"])
@pytest.mark.parametrize(("raw", "piece"), BAD_BYTES, ids=range(len(BAD_BYTES)))
def test_body_that_is_no_json_object_is_400(client, path, raw, piece) -> None:
    answer = client.post(path, content=raw)
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error["message"]
    assert len(error["message"]) < 1000
    if path == COMPLETIONS:
        assert piece in error["message"]


def test_openai_fields_without_meaning_here_are_accepted(client) -> None:
    for path, body in ((COMPLETIONS, PROMPT), (CHAT, TALK)):
        answer = client.post(path, json={**body, **IGNORED_FIELDS})
        assert answer.status_code == 200, answer.text
        nulls = dict.fromkeys(IGNORED_FIELDS)
        assert client.post(path, json={**body, **nulls}).status_code == 200


def test_null_for_an_optional_field_means_its_default(client) -> None:
    names = ["stream", "stream_options", "max_tokens", "temperature", "top_p", "presence_penalty",
             "frequency_penalty", "seed", "stop", "n", "logit_bias", "logprobs"]  # fmt: skip
    body = {**PROMPT, **dict.fromkeys(names), "max_tokens": 1}
    assert client.post(COMPLETIONS, json=body).status_code == 200
    body = {**TALK, **dict.fromkeys(names), "max_tokens": 1, "tools": None, "tool_choice": None,
            "response_format": None, "top_logprobs": None}  # fmt: skip
    assert client.post(CHAT, json=body).status_code == 200


@pytest.mark.parametrize(
    "content_type", ["application/json; charset=utf-8", "text/plain", "application/xml", ""]
)
def test_json_body_is_read_whatever_its_content_type(client, content_type) -> None:
    headers = {"content-type": content_type}
    answer = client.post(COMPLETIONS, content=json.dumps(PROMPT).encode(), headers=headers)
    assert answer.status_code == 200


@pytest.mark.parametrize("name", ["other", "", "../Tiny-V3", "deepseek-ai/other", "Tiny-V3\0"])
@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
def test_unknown_model_is_404_that_lists_the_known(client, path, name) -> None:
    answer = client.post(path, json={**(PROMPT if path == COMPLETIONS else TALK), "model": name})
    check_error(answer, 404, "model", "served: Tiny-V3")
    assert answer.json()["error"]["code"] == "model_not_found"
    answer = client.get(f"/v1/models/{name}") if name == "other" else answer
    assert answer.status_code == 404


def test_model_goes_by_its_directorys_name_and_by_the_organisations(client, daemon) -> None:
    for name in ("Tiny-V3", "deepseek-ai/Tiny-V3", daemon.status()["model_dir"]):
        assert client.post(COMPLETIONS, json={**PROMPT, "model": name}).status_code == 200
    for name in ("Tiny-V3", "deepseek-ai/Tiny-V3"):
        assert client.get(f"/v1/models/{name}").json()["id"] == name


@pytest.mark.parametrize(
    ("method", "path"),
    [("GET", COMPLETIONS), ("PUT", CHAT), ("DELETE", "/v1/models"), ("POST", "/livez"),
     ("GET", "/tokenize"), ("PATCH", "/version")],
)  # fmt: skip
def test_wrong_method_is_405_with_allow(client, method, path) -> None:
    answer = client.request(method, path)
    check_error(answer, 405, None, method)
    assert answer.headers["allow"]


@pytest.mark.parametrize("path", ["/", "/v1", "/v1/nothing", "/v1/completions/x", "/%00", "/é"])
def test_unknown_route_is_404(client, path) -> None:
    check_error(client.get(path), 404, None, "route")


def test_declared_body_too_large_is_413_before_it_is_sent(client, daemon) -> None:
    with daemon.connect() as connection:
        head = f"POST {COMPLETIONS} HTTP/1.1\r\nhost: x\r\ncontent-length: {MAX_BODY_BYTES + 1}"
        connection.sendall(head.encode() + b"\r\n\r\n")
        assert connection.recv(65536).startswith(b"HTTP/1.1 413 ")


@pytest.mark.parametrize("chunked", [False, True])
def test_body_too_large_costs_little_memory(client, daemon, chunked) -> None:
    process = psutil.Process(daemon.process.pid)
    before = process.memory_info().rss
    piece = b"a" * (1 << 20)
    peak = before
    with daemon.connect() as connection:
        framing = "transfer-encoding: chunked" if chunked else "content-length: 200000000"
        connection.sendall(f"POST {CHAT} HTTP/1.1\r\nhost: x\r\n{framing}\r\n\r\n".encode())
        try:
            for _ in range(64):
                connection.sendall(b"100000\r\n" + piece + b"\r\n" if chunked else piece)
                peak = max(peak, process.memory_info().rss)
        except OSError:
            pass  # the daemon closed, as it should
        else:
            pytest.fail("64 MiB were taken")
    assert peak - before < 24 << 20


def test_head_too_large_is_refused(client, daemon) -> None:
    with daemon.connect() as connection:
        connection.sendall(b"GET /livez HTTP/1.1\r\nhost: x\r\n")
        try:
            for number in range(64):
                connection.sendall(b"x-%d: " % number + b"a" * 1024 + b"\r\n")
            answer = connection.recv(65536)
        except OSError:
            answer = b""  # closed before it was read
    assert answer == b"" or answer.startswith(b"HTTP/1.1 4")


@pytest.mark.parametrize(
    "raw",
    [b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", b"nonsense\r\n\r\n", b"GET\r\n\r\n",
     b"GET / HTTP/X\r\n\r\n", b"\x80\x04cposix\nsystem\n(S'x'\ntR.", b"\r\n" * 10],
)  # fmt: skip
def test_bytes_that_are_no_http_leave_the_daemon_alone(client, daemon, raw) -> None:
    with daemon.connect() as connection:
        connection.sendall(raw)
        connection.shutdown(socket.SHUT_WR)
        connection.settimeout(5)
        assert connection.recv(65536)[:12] in (b"", b"HTTP/1.1 400")


def test_text_with_half_a_surrogate_pair_is_served_or_refused(client) -> None:
    raw = b'{"model": "Tiny-V3", "prompt": "a\\ud800b", "max_tokens": 1}'
    assert client.post(COMPLETIONS, content=raw).status_code in (200, 400)


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": "a", "messages": TALK["messages"]}, "prompt"),
        ("/tokenize", {"prompt": 5}, "prompt"),
        ("/tokenize", {"text": "a"}, "text"),
        ("/detokenize", {"tokens": "a"}, "tokens"),
        ("/detokenize", {"tokens": [-1]}, "tokens "),
        ("/detokenize", {"tokens": [2**31]}, "tokens "),
        ("/detokenize", {"ids": [1]}, "ids"),
    ],
)
def test_tokenizer_routes_name_the_wrong_field(client, path, body, param) -> None:
    answer = client.post(path, json=body)
    assert answer.status_code == 400
    assert param.removesuffix(" ") in answer.text


HOSTILE_BODIES = {
    "4 MB of token ids": b'{"model": "Tiny-V3", "prompt": [' + b"5," * 2_000_000 + b"5]}",
    "4 MB of empty lists": b'{"model": "Tiny-V3", "prompt": [' + b"[]," * 1_300_000 + b"[]]}",
    "4 MB of text": b'{"model": "Tiny-V3", "prompt": "' + b"word " * 800_000 + b'"}',
    "4 MB without a blank": b'{"model": "Tiny-V3", "prompt": "' + b"a" * 4_000_000 + b'"}',
    "4 MB of messages": b'{"model": "Tiny-V3", "messages": [' + b"{}," * 1_300_000 + b"{}]}",
}


@pytest.mark.slow
@pytest.mark.parametrize("name", HOSTILE_BODIES)
def test_hostile_body_is_400_and_does_not_stop_the_loop(client, daemon, name) -> None:
    raw = HOSTILE_BODIES[name]
    path = CHAT if b"messages" in raw[:64] else COMPLETIONS
    answers: list[httpx.Response] = []
    sender = threading.Thread(target=lambda: answers.append(client.post(path, content=raw)))
    worst = 0.0
    with httpx.Client(base_url=daemon.url) as probe:
        probe.get("/livez")
        sender.start()
        while sender.is_alive():
            start = time.monotonic()
            probe.get("/livez")
            worst = max(worst, time.monotonic() - start)
            time.sleep(0.002)
    sender.join()
    print(f"{name}: {worst * 1000:.0f} ms")
    assert answers[0].status_code == 400
    assert worst < 0.1


def test_head_larger_than_32_kib_is_431_though_it_came_whole(client) -> None:
    answer = client.get("/livez", headers={"x-padding": "a" * 40_000})
    check_error(answer, 431, None, "32768 bytes")


def test_slash_at_the_end_is_no_redirect_to_the_clients_host(client) -> None:
    answer = client.get("/livez/", headers={"host": "evil.example"}, follow_redirects=False)
    check_error(answer, 404, None, "/livez/")


def test_bytes_that_are_no_request_get_an_error_of_the_same_shape(daemon) -> None:
    port = int(daemon.url.rsplit(":", 1)[1])
    with socket.create_connection(("127.0.0.1", port), timeout=5) as connection:
        connection.sendall(b"what is this\r\n\r\n")
        answer = b"".join(iter(lambda: connection.recv(65536), b""))
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400 ")
    assert json.loads(body)["error"]["type"] == "invalid_request_error"
