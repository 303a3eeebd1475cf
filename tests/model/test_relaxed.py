"""Relaxed acceptance in the model: what begins a thought, and what drafts do in it."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from dsd.ipc.messages import Join, Load, Sampling, pack_int32
from dsd.model.build import build
from dsd.model.config import CheckpointError
from dsd.model.relaxed import Relaxed, read_think_ids
from dsd.model.rows import Delta, Rows
from dsd.tests.model.mtp_kit import add_mtp_layer
from dsd.tools.hand_driver import HandDriver
from dsd.tools.tiny import export

TINY = Path(export.__file__).parent / "dsd-tiny"
THINK, END = 40, 41
ALL = Relaxed(10**6, 1.0, (THINK, END))
NUM_NEXTN = 3


@pytest.mark.parametrize(
    ("token_ids", "num_prompt", "thinks"),
    [
        ([1, 2, THINK], 3, True),
        ([1, 2, THINK, 5], 4, True),
        ([1, THINK, 2, 3, 4, 5], 6, False),  # a user wrote it
        ([1, 2, END], 3, False),
        ([1, THINK, END, 5], 4, False),
        ([1, 2, THINK, 5, 6, 7, 8, 9], 3, True),  # resumed in its thought
        ([1, 2, THINK, 5, 6, END, 8, 9, 9, 9], 3, False),
        ([1, 2, 3, 4, 5, THINK, 6, 7, 8, 9], 5, True),
        ([1], 1, False),
    ],
)
def test_row_thinks_where_the_prompt_ends_in_a_tag_or_the_output_has_one(
    token_ids, num_prompt, thinks
) -> None:
    assert ALL.thinks(np.array(token_ids, np.int32), num_prompt) is thinks
    rows = Rows(2, 64, 8, 50, torch.device("cpu"), NUM_NEXTN, ALL)
    rows.thinking[:] = 1
    delta = Delta()
    rows.join(delta, Join(1, pack_int32(token_ids), num_prompt, 0, (1, 2), Sampling()))
    delta.send(rows.words)
    assert rows.thinking.tolist() == [1, int(thinks), 1]


def test_think_ids_of_the_small_model_are_its_tokenizers() -> None:
    added = json.loads((TINY / "tokenizer.json").read_text())["added_tokens"]
    ids = {token["content"]: token["id"] for token in added}
    assert read_think_ids(TINY) == (ids["<think>"], ids["</think>"])


def test_think_ids_may_be_in_the_tokenizers_configuration(tmp_path: Path) -> None:
    tokens = {"7": {"content": "<think>"}, "9": {"content": "</think>"}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": tokens}))
    assert read_think_ids(tmp_path) == (7, 9)


@pytest.mark.parametrize(
    ("text", "piece"),
    [
        ("{}", "no token <think>"),
        ('{"added_tokens": [{"content": "<think>", "id": 1}]}', "no token </think>"),
        ("{", "cannot be read"),
        ("[]", "no token <think>"),
    ],
)
def test_tokenizer_without_the_tags_is_refused_in_a_sentence(tmp_path, text, piece) -> None:
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(CheckpointError, match=piece):
        read_think_ids(tmp_path)


def test_build_with_relaxed_acceptance_says_so() -> None:
    load = Load(
        0, str(TINY), "cpu", "float32", "none", 2, 64, 256, 64, 0.01, 0.9,
        num_nextn=2, relaxed_topk=10, relaxed_delta=0.5,
    )  # fmt: skip
    runner, ready = build(load, lambda stage, done, total: None)
    assert runner.rows.relaxed == Relaxed(10, 0.5, read_think_ids(TINY))
    assert any("10 best tokens" in note and "0.5" in note for note in ready.notes)


@pytest.fixture(scope="module")
def mtp_dir(make_checkpoint, make_case, tmp_path_factory) -> Path:
    source = make_checkpoint(make_case("mtp")).directory
    return add_mtp_layer(source, tmp_path_factory.mktemp("relaxed_mtp"))


@pytest.fixture
def open_driver(mtp_dir, open_runner) -> Callable[..., HandDriver]:
    def open_(relaxed: Relaxed | None) -> HandDriver:
        runner = open_runner(mtp_dir, num_nextn=NUM_NEXTN, max_batch_size=8)
        runner.rows.relaxed = relaxed
        return HandDriver(runner)

    return open_


SAMPLINGS = (
    Sampling(temperature=0.0),
    Sampling(temperature=0.0, frequency_penalty=0.4, repetition_penalty=1.5),
    Sampling(temperature=0.9, seed=5, presence_penalty=0.3),
)


def run(driver: HandDriver, prompts: list[list[int]], num_drafts: int = NUM_NEXTN) -> list:
    for prompt, sampling in zip(prompts, SAMPLINGS, strict=True):
        driver.add(prompt, 24, sampling, chunk_size=7)
    return driver.run(num_drafts)


def test_thoughts_take_every_draft_where_all_are_near(open_driver, prompt_of) -> None:
    """And what follows a thought takes none but the choice."""
    prompts = [[*prompt_of(9 + i, i), THINK] for i in range(len(SAMPLINGS))]
    strict = run(open_driver(None), prompts)
    driver = open_driver(ALL)
    outputs = run(driver, prompts)
    assert all(a != b for a, b in zip(outputs, strict, strict=True))
    for i, row in enumerate(driver.rows):
        thought = row.token_ids.index(END) if END in row.token_ids else len(row.token_ids)
        done = 1
        for count in row.accepted[:-1]:
            assert count == NUM_NEXTN + 1 or done + count > thought, (row.token_ids, row.accepted)
            done += count
        counts = driver.runner.rows.choice.counts[i]
        if i:  # of the rows with penalties
            generated = driver.runner.rows.tokens.token_ids[i, len(row.prompt) :]
            length = int(driver.runner.rows.tokens.num_tokens[i]) - len(row.prompt)
            want = torch.bincount(generated[:length].long(), minlength=len(counts))
            assert torch.equal(counts & ((1 << 30) - 1), want.int())


def test_rows_that_do_not_think_get_their_own_tokens(open_driver, prompt_of) -> None:
    prompts = [prompt_of(9 + i, i) for i in range(len(SAMPLINGS))]
    strict = run(open_driver(None), prompts)
    seen = {token for output in strict for token in output}
    think, end = [token for token in range(100) if token not in seen][:2]
    assert run(open_driver(Relaxed(10**6, 1.0, (think, end))), prompts) == strict


def test_thoughts_take_only_the_choice_where_only_the_best_is_near(open_driver, prompt_of) -> None:
    """Greedy rows: what is chosen is the best."""
    prompts = [[*prompt_of(9 + i, i), THINK] for i in range(len(SAMPLINGS))]
    strict = run(open_driver(None), prompts)
    outputs = run(open_driver(Relaxed(1, 1.0, (THINK, END))), prompts)
    assert outputs[:2] == strict[:2]
