"""The real `openai` client against the real daemon and model, over TCP and over the Unix socket."""

import asyncio
import math
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import httpx
import openai
import pytest
from openai import AsyncOpenAI, OpenAI

PROMPT = "Where is New York?"
MESSAGES: list[Any] = [{"role": "user", "content": PROMPT}]
GREEDY: dict[str, Any] = {"model": "Tiny-V3", "prompt": PROMPT, "max_tokens": 8, "temperature": 0}
TALK: dict[str, Any] = {
    "model": "Tiny-V3",
    "messages": MESSAGES,
    "max_completion_tokens": 8,
    "temperature": 0,
}
IDS = {"return_token_ids": True}


@pytest.fixture(scope="module")
def uds(daemon) -> Iterator[OpenAI]:
    transport = httpx.HTTPTransport(uds=daemon.uds)
    with (
        httpx.Client(transport=transport) as http,
        OpenAI(base_url="http://dsd/v1", api_key="none", http_client=http) as client,
    ):
        yield client


@pytest.fixture(scope="module")
def tcp(daemon) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{daemon.url}/v1", api_key="none", max_retries=0) as client:
        yield client
    daemon.assert_clean()


@pytest.fixture(scope="module", params=["tcp", pytest.param("uds", marks=pytest.mark.slow)])
def client(request) -> OpenAI:
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="module")
def greedy(tcp) -> Any:
    """The text and tokens that everything else is compared with."""
    body = GREEDY | {"max_tokens": 16, "logprobs": 5}
    return tcp.completions.create(**body, extra_body=IDS).choices[0]


def first(completion: Any) -> Any:
    return completion.choices[0]


def extra(model: Any) -> dict[str, Any]:
    return model.model_extra or {}


def join_completion(chunks: Any) -> dict[int, dict[str, Any]]:
    """Streamed completions, put together by choice."""
    joined: dict[int, dict[str, Any]] = {}
    for chunk in chunks:
        for choice in chunk.choices:
            mine = joined.setdefault(
                choice.index,
                {"text": "", "finish": None, "token_ids": [], "tokens": [], "logprobs": [],
                 "top": [], "offsets": []},
            )  # fmt: skip
            assert mine["finish"] is None, "a chunk after the last one"
            mine["text"] += choice.text
            mine["finish"] = choice.finish_reason
            mine["token_ids"] += extra(choice).get("token_ids", [])
            if choice.logprobs is not None:
                mine["tokens"] += choice.logprobs.tokens
                mine["logprobs"] += choice.logprobs.token_logprobs
                mine["top"] += choice.logprobs.top_logprobs
                mine["offsets"] += choice.logprobs.text_offset
    return joined


def join_chat(chunks: Any) -> dict[int, dict[str, Any]]:
    joined: dict[int, dict[str, Any]] = {}
    for chunk in chunks:
        for choice in chunk.choices:
            mine = joined.setdefault(
                choice.index, {"content": "", "reasoning": "", "token_ids": [], "logprobs": []}
            )
            delta = extra(choice.delta)
            assert delta.get("reasoning") == delta.get("reasoning_content")
            mine["content"] += choice.delta.content or ""
            mine["reasoning"] += delta.get("reasoning") or ""
            mine["token_ids"] += extra(choice).get("token_ids", [])
            mine["logprobs"] += choice.logprobs.content if choice.logprobs else []
            mine["finish"] = choice.finish_reason
    return joined


# ---- models -------------------------------------------------------------------------------------


def test_models_lists_and_retrieves_the_served_one(client) -> None:
    [model] = client.models.list().data
    assert (model.id, model.object) == ("Tiny-V3", "model")
    assert extra(model)["max_model_len"] == 4096
    assert client.models.retrieve("deepseek-ai/Tiny-V3").id == "deepseek-ai/Tiny-V3"


def test_unknown_model_raises_not_found_that_lists_the_known(client) -> None:
    with pytest.raises(openai.NotFoundError, match="served: Tiny-V3"):
        client.chat.completions.create(**TALK | {"model": "gpt-5"})
    with pytest.raises(openai.NotFoundError, match="served: Tiny-V3"):
        client.models.retrieve("gpt-5")


def test_bad_field_raises_bad_request_that_names_it(client) -> None:
    with pytest.raises(openai.BadRequestError, match="temperature") as caught:
        client.completions.create(**GREEDY | {"temperature": 3})
    assert (caught.value.param, caught.value.type) == ("temperature", "invalid_request_error")
    with pytest.raises(openai.BadRequestError, match="min_token") as caught:
        client.completions.create(**GREEDY, extra_body={"min_token": 3})


# ---- streamed and whole -------------------------------------------------------------------------


def test_completion_streamed_is_whole_byte_for_byte(client, greedy) -> None:
    body = GREEDY | {"max_tokens": 16, "logprobs": 5}
    with client.completions.create(**body, stream=True, extra_body=IDS) as stream:
        joined = join_completion(stream)[0]
    assert joined["text"] == greedy.text
    assert joined["finish"] == greedy.finish_reason == "length"
    assert joined["token_ids"] == extra(greedy)["token_ids"]
    assert len(joined["token_ids"]) == 16
    assert joined["tokens"] == greedy.logprobs.tokens
    assert joined["logprobs"] == greedy.logprobs.token_logprobs
    assert joined["top"] == greedy.logprobs.top_logprobs
    assert joined["offsets"] == greedy.logprobs.text_offset


def test_chat_streamed_is_whole_byte_for_byte(client) -> None:
    body = TALK | {"logprobs": True, "top_logprobs": 3}
    whole = first(client.chat.completions.create(**body, extra_body=IDS))
    with client.chat.completions.create(**body, stream=True, extra_body=IDS) as stream:
        joined = join_chat(stream)[0]
    message = extra(whole.message)
    assert message["reasoning"] == message["reasoning_content"] == joined["reasoning"]
    assert whole.message.content == joined["content"]
    assert joined["reasoning"], "the template opens a thought, so the text begins in it"
    assert extra(whole)["token_ids"] == joined["token_ids"]
    assert whole.logprobs.content == joined["logprobs"]
    assert whole.finish_reason == joined["finish"] == "length"


def test_chat_thought_that_ends_is_split_from_the_answer(client, tcp) -> None:
    """`</think>` is forced by logit_bias; the next token cannot be biased away, so by tokens."""
    [close] = tokenize(tcp, "</think>")
    body = TALK | {"logit_bias": {str(close): 100}, "max_completion_tokens": 3}
    whole = client.chat.completions.create(**body, extra_body=IDS)
    message = first(whole).message
    assert extra(first(whole))["token_ids"] == [close] * 3
    assert extra(message)["reasoning_content"] == ""
    assert message.content == "</think></think>"
    assert whole.usage.completion_tokens_details.reasoning_tokens == 1
    with client.chat.completions.create(**body, stream=True) as stream:
        joined = join_chat(stream)[0]
    assert (joined["reasoning"], joined["content"]) == ("", "</think></think>")


def test_chat_stream_begins_with_the_role_and_ends_with_usage(client) -> None:
    options = {"include_usage": True}
    with client.chat.completions.create(**TALK, stream=True, stream_options=options) as stream:
        chunks = list(stream)
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == 8
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert len({chunk.id for chunk in chunks}) == 1


def test_stream_without_include_usage_has_none(client) -> None:
    with client.completions.create(**GREEDY, stream=True) as stream:
        chunks = list(stream)
    assert all(chunk.usage is None and chunk.choices for chunk in chunks)


def test_async_client_runs_many_at_once_and_all_agree(daemon, greedy) -> None:
    async def many() -> list[str]:
        async with AsyncOpenAI(base_url=f"{daemon.url}/v1", api_key="none") as client:
            whole = [client.completions.create(**GREEDY) for _ in range(4)]

            async def streamed() -> str:
                stream = await client.completions.create(**GREEDY, stream=True)
                return "".join([chunk.choices[0].text async for chunk in stream])

            texts = await asyncio.gather(*[streamed() for _ in range(4)])
            return [answer.choices[0].text for answer in await asyncio.gather(*whole)] + texts

    texts = asyncio.run(many())
    assert set(texts) == {greedy.text[: len(texts[0])]}


# ---- what is sampled ----------------------------------------------------------------------------


def test_logprobs_of_greedy_are_the_argmax_and_sum_below_one(greedy) -> None:
    logprobs = greedy.logprobs
    assert len(logprobs.tokens) == len(logprobs.top_logprobs) == 16
    for token, value, top in zip(
        logprobs.tokens, logprobs.token_logprobs, logprobs.top_logprobs, strict=True
    ):
        assert value == max(top.values())
        assert top[token] == value or list(top.values()).count(value) > 1
        assert sum(math.exp(v) for v in top.values()) <= 1 + 1e-5
        assert list(top.values()) == sorted(top.values(), reverse=True)


@pytest.mark.parametrize("num_top", [0, 20])
def test_chat_top_logprobs_at_their_bounds(client, num_top) -> None:
    body = TALK | {"logprobs": True, "top_logprobs": num_top, "max_completion_tokens": 2}
    content = first(client.chat.completions.create(**body)).logprobs.content
    assert [len(entry.top_logprobs) for entry in content] == [num_top] * 2
    for entry in content:
        assert bytes(entry.bytes).decode("utf-8", "replace") == entry.token
        if num_top:
            assert entry.top_logprobs[0].logprob == entry.logprob


def test_seed_repeats_and_another_seed_differs(client) -> None:
    body = GREEDY | {"temperature": 1.5, "max_tokens": 12}
    texts = [first(client.completions.create(**body, seed=seed)).text for seed in (5, 5, 6)]
    assert texts[0] == texts[1] != texts[2]


def test_same_prompt_twice_in_a_list_has_its_own_noise(tcp) -> None:
    body = GREEDY | {"temperature": 2.0, "max_tokens": 12, "prompt": ["What is"] * 3}
    assert len({choice.text for choice in tcp.completions.create(**body).choices}) == 3


@pytest.mark.parametrize("seed", [0, -1, 2**63 - 1, -(2**63)])
def test_seed_at_its_bounds_repeats(tcp, seed) -> None:
    body = GREEDY | {"temperature": 1.0, "max_tokens": 4, "seed": seed}
    texts = {first(tcp.completions.create(**body)).text for _ in range(2)}
    assert len(texts) == 1


def test_no_seed_differs_from_request_to_request(tcp) -> None:
    body = GREEDY | {"temperature": 2.0}
    assert len({first(tcp.completions.create(**body)).text for _ in range(3)}) > 1


def test_n_choices_with_a_seed_differ_and_repeat_streamed(client) -> None:
    body = GREEDY | {"temperature": 1.5, "seed": 3, "n": 3}
    whole = client.completions.create(**body)
    texts = [choice.text for choice in whole.choices]
    assert [choice.index for choice in whole.choices] == [0, 1, 2]
    assert len(set(texts)) == 3
    assert whole.usage.completion_tokens == 24
    assert whole.usage.prompt_tokens == client.completions.create(**GREEDY).usage.prompt_tokens
    with client.completions.create(**body, stream=True) as stream:
        joined = join_completion(stream)
    assert [joined[index]["text"] for index in range(3)] == texts


def test_top_k_of_one_is_greedy_at_any_temperature(client, greedy) -> None:
    body = GREEDY | {"temperature": 2.0}
    for knob in ({"top_k": 1}, {"min_p": 1.0}):
        answer = first(client.completions.create(**body, extra_body=knob))
        assert answer.text == greedy.text[: len(answer.text)]
    answer = first(client.completions.create(**body, top_p=1e-9))
    assert answer.text == greedy.text[: len(answer.text)]


def test_logit_bias_forces_and_bans_a_token(client, greedy) -> None:
    top = extra(greedy)["token_ids"][0]
    forced = client.completions.create(**GREEDY, logit_bias={"300": 100}, extra_body=IDS)
    assert extra(first(forced))["token_ids"] == [300] * 8
    banned = client.completions.create(**GREEDY, logit_bias={str(top): -100}, extra_body=IDS)
    assert top not in extra(first(banned))["token_ids"]


def test_penalties_end_a_repetition(client, tcp) -> None:
    body = GREEDY | {"logit_bias": {"300": 100, "301": 98.5}, "max_tokens": 6}
    plain = extra(first(client.completions.create(**body, extra_body=IDS)))["token_ids"]
    fined = client.completions.create(**body, frequency_penalty=2.0, extra_body=IDS)
    once = client.completions.create(**body, presence_penalty=2.0, extra_body=IDS)
    counts = [
        ids.count(301)
        for ids in (plain, extra(first(fined))["token_ids"], extra(first(once))["token_ids"])
    ]
    assert counts[1] > counts[0]
    assert counts[2] > counts[0]
    never = client.completions.create(**GREEDY, extra_body={**IDS, "repetition_penalty": 2.0})
    ids = extra(first(never))["token_ids"]
    assert len({*ids, *tokenize(tcp, PROMPT)}) == 8 + len(set(tokenize(tcp, PROMPT)))


# ---- where it ends ------------------------------------------------------------------------------


def test_stop_string_across_token_borders_cuts_before_it(client, greedy) -> None:
    tokens = greedy.logprobs.tokens
    pairs = [
        (i, left[-1] + right[0])
        for i, (left, right) in enumerate(pairwise(tokens))
        if left.isprintable() and right.isprintable() and "�" not in left + right
    ]
    stop = next(s for i, s in pairs if greedy.text.find(s) == len("".join(tokens[: i + 1])) - 1)
    expected = greedy.text[: greedy.text.index(stop)]
    body = GREEDY | {"max_tokens": 16, "stop": [stop, "never in the text"]}
    whole = first(client.completions.create(**body))
    assert (whole.text, whole.finish_reason) == (expected, "stop")
    assert extra(whole)["stop_reason"] == stop
    with client.completions.create(**body, stream=True) as stream:
        joined = join_completion(stream)[0]
    assert (joined["text"], joined["finish"]) == (expected, "stop")
    kept = first(client.completions.create(**body, extra_body={"include_stop_str_in_output": True}))
    assert kept.text == expected + stop


def test_stop_token_id_ends_and_its_text_is_left_out(client, greedy) -> None:
    ids = extra(greedy)["token_ids"]
    index = next(i for i in range(1, 8) if ids[i] not in ids[:i])
    body = {"stop_token_ids": [ids[index]], "return_token_ids": True}
    answer = client.completions.create(**GREEDY, extra_body=body)
    assert first(answer).finish_reason == "stop"
    assert extra(first(answer))["stop_reason"] == ids[index]
    assert extra(first(answer))["token_ids"] == ids[: index + 1]
    assert greedy.text.startswith(first(answer).text)
    assert answer.usage.completion_tokens == index + 1


def test_eos_ends_unless_ignored_or_before_min_tokens(client) -> None:
    body = GREEDY | {"logit_bias": {"1": 100}}
    ended = client.completions.create(**body)
    assert (first(ended).text, first(ended).finish_reason) == ("", "stop")
    assert ended.usage.completion_tokens == 1
    ignored = client.completions.create(**body, extra_body={"ignore_eos": True, **IDS})
    assert extra(first(ignored))["token_ids"] == [1] * 8
    assert first(ignored).finish_reason == "length"
    late = client.completions.create(**body, extra_body={"min_tokens": 3, **IDS})
    ids = extra(first(late))["token_ids"]
    assert (len(ids), ids[-1], ids.count(1)) == (4, 1, 1)


def test_chat_max_tokens_works_by_both_names(client) -> None:
    body = {key: value for key, value in TALK.items() if key != "max_completion_tokens"}
    old = client.chat.completions.create(**body, max_tokens=2)
    new = client.chat.completions.create(**body, max_tokens=5, max_completion_tokens=2)
    assert old.usage.completion_tokens == new.usage.completion_tokens == 2


@pytest.mark.slow
def test_max_tokens_beyond_the_model_ends_with_length(tcp) -> None:
    body = GREEDY | {"prompt": [5] * 4090, "max_tokens": 2**31 - 1}
    answer = tcp.completions.create(**body, extra_body={"ignore_eos": True})
    assert first(answer).finish_reason == "length"
    assert answer.usage.total_tokens == 4096


# ---- prompts ------------------------------------------------------------------------------------


def tokenize(client: OpenAI, text: str, **fields: Any) -> list[int]:
    url = str(client.base_url).removesuffix("v1/") + "tokenize"
    return client._client.post(url, json={"prompt": text, **fields}).json()["tokens"]


def test_prompt_as_text_ids_and_lists_of_either_say_the_same(client, greedy) -> None:
    ids = tokenize(client, PROMPT)
    prompts: list[Any] = [PROMPT, ids, [PROMPT], [ids], [PROMPT, PROMPT], [ids, ids]]
    for prompt in prompts:
        answer = client.completions.create(**GREEDY | {"prompt": prompt, "max_tokens": 2})
        assert [choice.index for choice in answer.choices] == list(range(len(answer.choices)))
        assert len({choice.text for choice in answer.choices}) == 1
        assert greedy.text.startswith(first(answer).text)
        assert answer.usage.prompt_tokens == len(ids) * len(answer.choices)
    mixed = client.completions.create(**GREEDY | {"prompt": [PROMPT, ids]})
    assert mixed.choices[0].text == mixed.choices[1].text


def test_lists_of_prompts_with_n_number_the_choices_prompt_by_prompt(client) -> None:
    body = GREEDY | {"prompt": ["one two", "def f"], "n": 2, "max_tokens": 3, "echo": True}
    answer = client.completions.create(**body)
    starts = [choice.text[:5] for choice in answer.choices]
    assert starts == ["one t", "one t", "def f", "def f"]


def test_echo_without_tokens_scores_the_prompt(client) -> None:
    ids = tokenize(client, PROMPT)
    body = GREEDY | {"echo": True, "max_tokens": 0, "logprobs": 2}
    answer = client.completions.create(**body)
    logprobs = first(answer).logprobs
    assert first(answer).text == PROMPT == "".join(logprobs.tokens)
    assert first(answer).finish_reason == "length"
    assert answer.usage.completion_tokens == 0
    assert len(logprobs.tokens) == len(ids)
    assert logprobs.token_logprobs[0] is None
    assert all(value <= 0 for value in logprobs.token_logprobs[1:])
    assert logprobs.top_logprobs[0] is None
    assert logprobs.text_offset == [
        len("".join(logprobs.tokens[:index])) for index in range(len(ids))
    ]
    with client.completions.create(**body, stream=True) as stream:
        joined = join_completion(stream)[0]
    assert (joined["text"], joined["logprobs"]) == (PROMPT, logprobs.token_logprobs)


def test_echoed_logprobs_agree_with_those_of_generation(client, greedy) -> None:
    ids = tokenize(client, PROMPT) + extra(greedy)["token_ids"][:6]
    body = GREEDY | {"prompt": ids, "echo": True, "max_tokens": 1, "logprobs": 0}
    values = first(client.completions.create(**body)).logprobs.token_logprobs
    generated = greedy.logprobs.token_logprobs[:6]
    assert values[-7:-1] == pytest.approx(generated, abs=1e-3)
    assert values[-1] == pytest.approx(greedy.logprobs.token_logprobs[6], abs=1e-3)


def test_long_prompt_again_is_counted_as_cached(client) -> None:
    prompt = tokenize(client, "thirty-seven plus eighty-five " * 30)[:200]
    body = GREEDY | {"prompt": prompt, "max_tokens": 3}
    texts, cached = [], []
    for _ in range(2):
        answer = client.completions.create(**body)
        texts.append(first(answer).text)
        cached.append(answer.usage.prompt_tokens_details.cached_tokens)
        usage = extra(answer.usage)
        assert usage["prompt_cache_hit_tokens"] == cached[-1]
        assert usage["prompt_cache_miss_tokens"] == 200 - cached[-1]
    assert cached[1] == 192
    assert texts[0] == texts[1]


def test_text_of_every_plane_goes_through_prompt_echo_and_tokenizer(client) -> None:
    text = "naïve 你好 🙂‍↕️ \u202e ￿ \x00 é Ω"
    answer = client.completions.create(**GREEDY | {"prompt": text, "echo": True, "max_tokens": 0})
    assert first(answer).text == text
    url = str(client.base_url).removesuffix("v1/") + "detokenize"
    body = {"tokens": tokenize(client, text)}
    assert client._client.post(url, json=body).json() == {"prompt": text}


def test_character_of_several_tokens_comes_whole_or_not_at_all(client, tcp) -> None:
    """The bytes of an emoji are forced one by one: no chunk may hold a part of it."""
    ids = tokenize(tcp, "🙂")
    assert len(ids) > 1
    prompt = tokenize(tcp, "x") + ids[:-1]
    body = GREEDY | {"prompt": prompt, "max_tokens": 2, "logit_bias": {str(ids[-1]): 100}}
    with client.completions.create(**body, stream=True) as stream:
        texts = [chunk.choices[0].text for chunk in stream]
    whole = first(client.completions.create(**body)).text
    assert "".join(texts) == whole
    for text in texts:
        text.encode()


# ---- the other routes ---------------------------------------------------------------------------


def test_tokenize_counts_and_renders_chats(client) -> None:
    url = str(client.base_url).removesuffix("v1/") + "tokenize"
    answer = client._client.post(url, json={"messages": MESSAGES}).json()
    usage = client.chat.completions.create(**TALK | {"max_completion_tokens": 1}).usage
    assert answer["count"] == len(answer["tokens"]) == usage.prompt_tokens
    assert answer["max_model_len"] == 4096


def test_version_metrics_and_health_answer(client) -> None:
    root = str(client.base_url).removesuffix("v1/")
    get = client._client.get
    assert get(root + "version").json()["version"]
    assert get(root + "livez").text == "ok\n"
    assert get(root + "readyz").text == get(root + "health").text == "ready\n"
    text = get(root + "metrics").text
    for name in (
        "dsd:generation_tokens_total",
        "dsd:num_requests_running 0.0",
        "dsd:ready 1.0",
        "dsd:time_to_first_token_seconds_count",
        "dsd:prefix_cache_hits_total",
    ):
        assert name in text


def test_request_id_of_the_client_comes_back(client) -> None:
    answer = client.completions.with_raw_response.create(
        **GREEDY | {"max_tokens": 1}, extra_headers={"x-request-id": "mine-7"}
    )
    assert answer.headers["x-request-id"] == "mine-7"
    assert first(answer.parse()).finish_reason == "length"
