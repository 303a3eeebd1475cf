"""Several tokens a step, from the command line to the client, with a fake worker that drafts."""

import json
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from dsd.tests.conftest import FAKE_DSD, Daemon, StartDaemon
from dsd.tests.fake_worker import continuation

pytestmark = pytest.mark.slow
PROMPT = list(range(3, 73))


@pytest.fixture(scope="module")
def drafting(start_daemon: StartDaemon, small_checkpoint, tmp_path_factory) -> Iterator[Daemon]:
    path = tmp_path_factory.mktemp("config") / "dsd.toml"
    path.write_text("[engine]\nblock_size = 16\nnum_nextn_by_batch_size = [[4, 3], [16, 1]]\n")
    arguments = (str(small_checkpoint), "--config", str(path), "--mtp", "3")
    daemon = start_daemon(*arguments, command=FAKE_DSD, worker={"step_s": 0.002})
    yield daemon
    daemon.assert_clean()
    assert daemon.stop() == 0, daemon.log.read_text()


def complete(daemon: Daemon, prompt: list[int] = PROMPT, **fields: object) -> httpx.Response:
    body = {"model": "Tiny-V3", "prompt": prompt, "temperature": 0, "return_token_ids": True}
    url = f"{daemon.url}/v1/completions"
    return httpx.post(url, json=body | {"ignore_eos": True} | fields, timeout=60)


def counter(daemon: Daemon, name: str) -> float:
    text = httpx.get(f"{daemon.url}/metrics").text
    found = re.search(rf"^dsd:{re.escape(name)} (\S+)$", text, re.MULTILINE)
    assert found, text
    return float(found[1])


@pytest.mark.parametrize("max_tokens", [1, 2, 3, 7, 64])
def test_answer_has_the_tokens_and_the_usage_of_one_token_a_step(drafting, max_tokens) -> None:
    response = complete(drafting, max_tokens=max_tokens).json()
    (choice,) = response["choices"]
    assert choice["token_ids"] == continuation(PROMPT, max_tokens)
    assert choice["finish_reason"] == "length"
    assert response["usage"]["completion_tokens"] == max_tokens


def test_stream_has_every_token_once_and_in_order(drafting) -> None:
    body = {
        "model": "Tiny-V3", "prompt": PROMPT, "max_tokens": 50, "stream": True,
        "stream_options": {"include_usage": True}, "return_token_ids": True, "logprobs": 1,
        "ignore_eos": True,
    }  # fmt: skip
    token_ids: list[int] = []
    num_logprobs = 0
    with httpx.stream("POST", f"{drafting.url}/v1/completions", json=body) as response:
        for line in response.iter_lines():
            if not line.startswith("data: {"):
                continue
            chunk = json.loads(line.removeprefix("data: "))
            usage = chunk.get("usage")
            for choice in chunk["choices"]:
                token_ids += choice.get("token_ids") or []
                num_logprobs += len((choice.get("logprobs") or {}).get("tokens", ()))
    assert token_ids == continuation(PROMPT, 50)
    assert (num_logprobs, usage["completion_tokens"]) == (50, 50)


def test_many_at_once_get_their_own_tokens(drafting) -> None:
    """More than the table gives drafts to; the batch grows and shrinks as they come and go."""
    prompts = [list(range(3 + i, 40 + 2 * i)) for i in range(24)]
    with ThreadPoolExecutor(24) as pool:
        answers = pool.map(lambda p: complete(drafting, p, max_tokens=10 + len(p) % 30), prompts)
        for prompt, answer in zip(prompts, answers, strict=True):
            expected = continuation(prompt, 10 + len(prompt) % 30)
            assert answer.json()["choices"][0]["token_ids"] == expected


def test_status_and_metrics_tell_what_became_of_the_drafts(drafting) -> None:
    complete(drafting, max_tokens=200)
    mtp = drafting.status()["mtp"]
    assert (mtp["num_nextn"], len(mtp["acceptance"])) == (3, 3)
    assert 1 > mtp["acceptance"][0] > mtp["acceptance"][2] > 0
    assert mtp["mean_accepted_length"] > 1.2
    table = drafting.dsctl("status").stdout
    assert "of 3 drafts" in table
    verified = counter(drafting, "spec_decode_num_drafts_total")
    accepted = counter(drafting, "spec_decode_num_accepted_tokens_total")
    by_position = [
        counter(drafting, f'spec_decode_num_accepted_tokens_per_pos_total{{position="{i}"}}')
        for i in range(3)
    ]
    assert sum(by_position) == accepted > 0
    assert mtp["mean_accepted_length"] == pytest.approx(1 + accepted / verified, abs=1e-3)
    assert counter(drafting, "spec_decode_draft_length") == mtp["draft_length"]


def test_client_that_leaves_frees_its_blocks(drafting) -> None:
    body = {"model": "Tiny-V3", "prompt": PROMPT, "max_tokens": 1500, "stream": True}
    with httpx.stream("POST", f"{drafting.url}/v1/completions", json=body) as response:
        next(response.iter_lines())
    drafting.assert_clean()
