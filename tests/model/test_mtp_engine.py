"""Scheduler and Runner together with drafts: whatever is accepted, joined, cached, aborted or
preempted on the way, tokens are those that transformers generates."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dsd.daemon.scheduler import Scheduler
from dsd.ipc.messages import Step
from dsd.model.runner import InFlight
from dsd.tests.model.mtp_kit import add_mtp_layer
from dsd.tests.model.test_engine_parity import Ask, check_all, play, random_asks

OpenDrafting = Callable[..., Any]


@pytest.fixture(scope="session")
def drafting(make_checkpoint, make_case, tmp_path_factory) -> tuple[Any, Path]:
    """A checkpoint with its oracle, and the same with an MTP layer."""
    checkpoint = make_checkpoint(make_case("mtp"))
    return checkpoint, add_mtp_layer(checkpoint.directory, tmp_path_factory.mktemp("mtp_engine"))


@pytest.fixture
def open_drafting(drafting, open_engine) -> OpenDrafting:
    """An engine with drafts; `known`: sequences whose continuations its drafts are taken from, up
    to a random place, as the layer's weights are random."""

    def open_(num_nextn: int, depth: int, known: list[list[int]], seed: int, **options: Any) -> Any:
        engine = open_engine(
            drafting[1], pipeline_depth=depth, max_seq_len=450, num_nextn=num_nextn, **options
        )
        runner = engine.runner
        engine.scheduler = Scheduler(
            max_batch_size=runner.rows.null,
            max_num_tokens=engine.max_num_tokens,
            max_seq_len=450,
            num_blocks=runner.cache.num_blocks,
            block_size=runner.cache.block_size,
            pipeline_depth=depth,
            num_nextn=num_nextn,
        )
        rng, launch = random.Random(seed), runner.launch

        def launch_with_better_drafts(step: Step) -> InFlight:
            launched = launch(step)
            for row in range(runner.rows.null):
                count = int(runner.rows.tokens.num_tokens[row])
                ids = runner.rows.tokens.token_ids[row, :count].tolist()
                whole = next((w for w in known if count and w[:count] == ids), [])
                right = whole[count:][: rng.randint(0, num_nextn)]
                for i, token_id in enumerate(right):
                    runner.rows.drafts[row, i] = token_id
            return launched

        runner.launch = launch_with_better_drafts
        return engine

    return open_


def whole_sequences(checkpoint: Any, asks: list[Ask]) -> list[list[int]]:
    return [ask.prompt + checkpoint.generate(ask.prompt, 70) for ask in asks]


def check_drafts(engine: Any) -> None:
    drafts = engine.scheduler.stats().drafts
    assert 0.1 * drafts.num_verified[0] < drafts.num_accepted[0] < drafts.num_verified[0], drafts


@pytest.mark.slow
@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("num_nextn", [1, 3, 5])
def test_joining_leaving_and_aborted_requests_get_their_own_tokens(
    drafting, open_drafting: OpenDrafting, prompt_of, num_nextn: int, depth: int
) -> None:
    checkpoint, rng = drafting[0], random.Random(num_nextn)
    asks = random_asks(rng, prompt_of, 6, max_at=30)
    known = whole_sequences(checkpoint, asks)
    engine = open_drafting(num_nextn, depth, known, 1, max_num_tokens=64, max_batch_size=4)
    play(engine, asks)
    check_all(engine, checkpoint, asks)
    check_drafts(engine)


@pytest.mark.slow
@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("num_nextn", [1, 3])
def test_preempted_requests_get_the_same_tokens(
    drafting, open_drafting: OpenDrafting, prompt_of, num_nextn: int, depth: int
) -> None:
    checkpoint = drafting[0]
    arrivals = [(20, 0), (35, 0), (1, 1), (50, 2), (9, 5), (16, 9), (90, 20)]
    asks = [Ask(f"r{i}", prompt_of(n, i), 64, at) for i, (n, at) in enumerate(arrivals)]
    known = whole_sequences(checkpoint, asks)
    engine = open_drafting(
        num_nextn, depth, known, 2, max_num_tokens=40, num_blocks=26, block_size=8,
        max_batch_size=6,
    )  # fmt: skip
    play(engine, asks)
    check_all(engine, checkpoint, asks)
    assert engine.scheduler.stats().num_preemptions > 0


@pytest.mark.slow
@pytest.mark.parametrize("depth", [1, 2])
def test_prefix_reuse_gives_the_same_tokens(
    drafting, open_drafting: OpenDrafting, prompt_of, depth: int
) -> None:
    """The MTP layer's KV of a prefix's last token depends on the token behind it, so what is cached
    must not be what another request's drafts are made of; but tokens never change."""
    checkpoint, first = drafting[0], prompt_of(120, 1)
    turn = first + checkpoint.generate(first, 40)
    prompts = {
        "turn": turn + prompt_of(20, 2),
        "again": first,
        "inside": first[:61] + prompt_of(40, 3),
        "edge": first[:64] + prompt_of(1, 4),
    }
    asks = [Ask(name, prompt, 20) for name, prompt in prompts.items()]
    known = whole_sequences(checkpoint, [*asks, Ask("first", first, 40)])
    engine = open_drafting(3, depth, known, 3, max_num_tokens=50, block_size=8)
    engine.add("first", first, 40)
    engine.run()
    play(engine, asks)
    check_all(engine, checkpoint, asks)
    assert engine.requests["turn"].num_cached_tokens >= 144
    check_drafts(engine)
