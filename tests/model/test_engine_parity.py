"""Scheduler and Runner together, over the wire's encoding.

Whatever is joined, chunked, cached, aborted or preempted on the way, a request's tokens are those
that transformers generates for it alone.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest

from dsd.daemon.request import FinishReason
from dsd.ipc.messages import Sampling

BLOCK_SIZE = 16
Prompt = Callable[[int, int], list[int]]


@dataclass(frozen=True)
class Ask:
    """One request of a script."""

    request_id: str
    prompt: list[int]
    max_tokens: int
    at: int = 0
    """Added before so many steps were done."""
    abort_at: int = -1


def play(engine: Any, asks: list[Ask], sampling: Sampling | None = None) -> None:
    """Runs the script, then everything that is left."""
    done = 0
    while any(ask.at >= done or ask.abort_at >= done for ask in asks):
        for ask in asks:
            if ask.at == done:
                engine.add(ask.request_id, ask.prompt, ask.max_tokens, sampling)
            if ask.abort_at == done:
                engine.abort(ask.request_id)
        engine.step()
        done += 1
    engine.run()


def check_all(engine: Any, checkpoint: Any, asks: list[Ask]) -> None:
    """Greedy tokens are the oracle's, and as many as were asked for unless aborted."""
    for ask in asks:
        output = engine.outputs[ask.request_id]
        checkpoint.check_greedy(ask.prompt, output)
        if ask.abort_at < 0:
            assert len(output) == ask.max_tokens
            assert engine.finishes[ask.request_id] is FinishReason.LENGTH


def random_asks(rng: random.Random, prompt_of: Prompt, count: int, max_at: int) -> list[Ask]:
    """Prompts of 1 to 300 tokens, a third of them with a shared beginning; some are aborted."""
    shared = prompt_of(200, 77)
    asks = []
    for i in range(count):
        length = rng.choice([1, 2, 15, 16, 17, 32, rng.randint(1, 300), 300])
        prompt = prompt_of(length, i)
        if i % 3 == 0:
            prompt = (shared[: rng.randint(16, 200)] + prompt)[:300]
        at = rng.randint(0, max_at)
        abort_at = at + rng.randint(0, 30) if rng.random() < 0.2 else -1
        max_tokens = 64 if rng.random() < 0.7 else rng.randint(1, 63)
        asks.append(Ask(f"r{i}", prompt, max_tokens, at, abort_at))
    return asks


@pytest.mark.parametrize(("max_batch_size", "pipeline_depth"), [(1, 2), (3, 1), (5, 2), (8, 2)])
def test_joining_leaving_and_aborting_requests_get_their_own_tokens(
    checkpoint, open_engine, prompt_of: Prompt, max_batch_size: int, pipeline_depth: int
) -> None:
    rng = random.Random(max_batch_size)
    engine = open_engine(
        checkpoint.directory,
        max_num_tokens=rng.choice([37, 64, 128]),
        pipeline_depth=pipeline_depth,
        max_batch_size=max_batch_size,
        block_size=BLOCK_SIZE,
    )
    asks = random_asks(rng, prompt_of, 2 + max_batch_size, max_at=40)
    play(engine, asks)
    check_all(engine, checkpoint, asks)
    assert engine.max_decodes >= min(max_batch_size, 2)
    assert engine.modes >= ({"prefill", "decode"} | ({"mixed"} if max_batch_size > 1 else set()))


def test_engine_64_tokens_equal_transformers_generate(
    checkpoint, open_engine, prompt_of: Prompt
) -> None:
    """By transformers' own loop, once for each case, as `check_greedy` takes a short cut."""
    engine = open_engine(checkpoint.directory, max_num_tokens=30)
    prompts = [prompt_of(length, 5) for length in (3, 77)]
    for i, prompt in enumerate(prompts):
        engine.add(f"r{i}", prompt, 64)
    outputs = engine.run()
    for i, prompt in enumerate(prompts):
        assert outputs[f"r{i}"] == checkpoint.generate(prompt, 64)


@pytest.mark.parametrize("pipeline_depth", [1, 2])
def test_prefix_reuse_gives_the_same_tokens(
    checkpoint, open_engine, prompt_of: Prompt, pipeline_depth: int
) -> None:
    """A second turn, a fork inside a block, a fork at a block's end, and the same prompt again."""
    engine = open_engine(
        checkpoint.directory, max_num_tokens=50, pipeline_depth=pipeline_depth, block_size=8
    )
    first = prompt_of(120, 1)
    engine.add("first", first, 40)
    engine.run()
    turn = first + engine.outputs["first"]
    prompts = {
        "turn": turn + prompt_of(20, 2),
        "again": first,
        "inside": first[:61] + prompt_of(40, 3),
        "edge": first[:64] + prompt_of(1, 4),
        "shorter": first[:64],
        "other": prompt_of(50, 5),
    }
    for request_id, prompt in prompts.items():
        engine.add(request_id, prompt, 20)
    engine.run()
    for request_id, prompt in prompts.items():
        checkpoint.check_greedy(prompt, engine.outputs[request_id])
    cached = {request_id: engine.requests[request_id].num_cached_tokens for request_id in prompts}
    # The last generated token has no KV, and never is the whole prompt taken from the cache.
    assert cached == {
        "turn": 152, "again": 112, "inside": 56, "edge": 64, "shorter": 56, "other": 0,
    }  # fmt: skip


@pytest.mark.parametrize("pipeline_depth", [1, 2])
def test_preempted_requests_get_the_same_tokens(
    checkpoint, open_engine, prompt_of: Prompt, pipeline_depth: int
) -> None:
    engine = open_engine(
        checkpoint.directory,
        max_num_tokens=40,
        pipeline_depth=pipeline_depth,
        num_blocks=24,
        block_size=8,
        max_batch_size=6,
        max_seq_len=200,
    )
    arrivals = [(20, 0), (35, 0), (1, 1), (50, 2), (9, 5), (16, 9), (90, 20)]
    asks = [
        Ask(f"r{i}", prompt_of(length, i), 64, at, abort_at=60 if i == 4 else -1)
        for i, (length, at) in enumerate(arrivals)
    ]
    play(engine, asks)
    check_all(engine, checkpoint, asks)
    assert engine.scheduler.stats().num_preemptions > 0
    preempted = [r for r in engine.requests.values() if r.num_preemptions and len(r.output_ids) > 1]
    assert preempted, "nobody was preempted while decoding"


def test_stop_token_found_late_is_the_last_one(
    make_checkpoint, make_case, open_engine, prompt_of: Prompt
) -> None:
    """With two steps in flight the row computes one token more, which nobody may see or reuse."""
    checkpoint = make_checkpoint(make_case("v3_plain"))
    prompt = prompt_of(30, 8)
    tokens = checkpoint.generate(prompt, 40)
    stop = next(t for i, t in enumerate(tokens) if i >= 20 and t not in tokens[:i])
    for depth in (1, 2, 3):
        engine = open_engine(checkpoint.directory, pipeline_depth=depth, block_size=4)
        engine.add("stops", prompt, 40, stop_token_ids=frozenset({stop}))
        engine.add("goes", prompt, 40)
        outputs = engine.run()
        assert outputs["stops"] == tokens[: tokens.index(stop) + 1]
        assert engine.finishes["stops"] is FinishReason.STOP
        assert outputs["goes"] == tokens
        engine.add("next", prompt + outputs["stops"] + [7], 20)
        engine.run()
        checkpoint.check_greedy([*prompt, *outputs["stops"], 7], engine.outputs["next"])


def test_request_up_to_the_last_position_of_the_model(
    make_checkpoint, make_case, open_engine, prompt_of: Prompt
) -> None:
    checkpoint = make_checkpoint(make_case("v3_plain"))
    engine = open_engine(checkpoint.directory, max_seq_len=100, block_size=16, max_num_tokens=33)
    prompts = {"long": prompt_of(60, 1), "last": prompt_of(99, 2)}
    for request_id, prompt in prompts.items():
        engine.add(request_id, prompt, 1000)
    outputs = engine.run()
    for request_id, prompt in prompts.items():
        assert len(outputs[request_id]) == 100 - len(prompt)
        checkpoint.check_greedy(prompt, outputs[request_id])


# ---- log-probabilities --------------------------------------------------------------------------


def test_logprobs_survive_chunks_batches_and_preemption(
    make_checkpoint, make_case, open_engine, prompt_of: Prompt
) -> None:
    checkpoint = make_checkpoint(make_case("v3_plain"))
    engine = open_engine(
        checkpoint.directory, max_num_tokens=24, num_blocks=22, block_size=8, max_batch_size=5
    )
    asked = Sampling(temperature=0.0, num_logprobs=2, num_prompt_logprobs=1)
    prompts = {f"r{i}": prompt_of(length, i) for i, length in enumerate((40, 17, 1, 60))}
    for i, (request_id, prompt) in enumerate(prompts.items()):
        engine.add(request_id, prompt, 50, asked if i != 1 else None)
    engine.run()
    assert engine.scheduler.stats().num_preemptions > 0
    for request_id, prompt in prompts.items():
        events = [e for e in engine.events if e.request.request_id == request_id]
        prompt_entries = [entry for e in events for entry in e.prompt_logprobs]
        entries = [e.logprob for e in events if e.token_id >= 0]
        output = engine.outputs[request_id]
        checkpoint.check_greedy(prompt, output)
        if request_id == "r1":
            assert prompt_entries == [] and entries == [None] * 50
            continue
        want = checkpoint.logits(prompt + output[:-1]).log_softmax(-1)
        assert [e.token_id for e in prompt_entries] == prompt[1:]
        for i, entry in enumerate([*prompt_entries, *entries]):
            assert entry.logprob == pytest.approx(want[i, entry.token_id].item(), abs=1e-3)
            assert entry.top[0][0] == want[i].argmax().item()
        assert [e.token_id for e in entries] == output


# ---- sampling -----------------------------------------------------------------------------------

SAMPLINGS = {
    "plain": Sampling(temperature=1.0, seed=1),
    "hot": Sampling(temperature=1.7, seed=(1 << 64) - 1),
    "top_p": Sampling(temperature=0.9, top_p=0.8, seed=1 << 63),
    "top_k_min_p": Sampling(temperature=1.2, top_k=20, min_p=0.02, seed=4),
    "penalties": Sampling(
        temperature=0.8,
        presence_penalty=0.5,
        frequency_penalty=0.4,
        repetition_penalty=1.2,
        seed=5,
    ),
    "bias": Sampling(
        temperature=1.0,
        logit_bias=((3, 4.0), (250, -100.0)),
        min_tokens=30,
        masked_token_ids=(1, 7, 9),
        seed=6,
    ),
    "greedy": Sampling(temperature=0.0),
    "greedy_penalties": Sampling(temperature=0.0, repetition_penalty=1.3, presence_penalty=1.0),
}


def prompts_of(prompt_of: Prompt) -> dict[str, list[int]]:
    return {name: prompt_of(11 + 9 * i, i) for i, name in enumerate(SAMPLINGS)}


def run_alone(open_engine, checkpoint, prompt_of: Prompt) -> dict[str, list[int]]:
    outputs = {}
    engine = open_engine(checkpoint.directory, max_num_tokens=512, pipeline_depth=1)
    for name, prompt in prompts_of(prompt_of).items():
        engine.add(name, prompt, 50, SAMPLINGS[name])
        outputs[name] = engine.run()[name]
    return outputs


WAYS: dict[str, dict[str, Any]] = {
    "batch": {"max_num_tokens": 512},
    "chunked": {"max_num_tokens": 13},
    "chunked_depth_1": {"max_num_tokens": 19, "pipeline_depth": 1},
    "two_rows": {"max_num_tokens": 64, "max_batch_size": 2},
    "preempted": {"max_num_tokens": 48, "num_blocks": 28, "block_size": 8},
    "preempted_depth_1": {
        "max_num_tokens": 48, "num_blocks": 28, "block_size": 8, "pipeline_depth": 1,
    },
}  # fmt: skip


@pytest.mark.slow
def test_sampled_tokens_are_the_same_alone_in_a_batch_chunked_and_preempted(
    make_checkpoint, make_case, open_engine, prompt_of: Prompt
) -> None:
    checkpoint = make_checkpoint(make_case("v3_plain"))
    alone = run_alone(open_engine, checkpoint, prompt_of)
    assert len({tuple(tokens) for tokens in alone.values()}) == len(SAMPLINGS)
    for way, options in WAYS.items():
        engine = open_engine(checkpoint.directory, **options)
        for name, prompt in prompts_of(prompt_of).items():
            engine.add(name, prompt, 50, SAMPLINGS[name])
        outputs = engine.run()
        for name in SAMPLINGS:
            assert outputs[name] == alone[name], (way, name)
        preempted = engine.scheduler.stats().num_preemptions
        assert (preempted > 0) == way.startswith("preempted")


@pytest.mark.slow
def test_sampled_tokens_are_the_same_for_every_case(
    checkpoint, open_engine, prompt_of: Prompt
) -> None:
    alone = run_alone(open_engine, checkpoint, prompt_of)
    for way in ("chunked", "preempted"):
        engine = open_engine(checkpoint.directory, **WAYS[way])
        for name, prompt in prompts_of(prompt_of).items():
            engine.add(name, prompt, 50, SAMPLINGS[name])
        assert engine.run() == alone, way


def test_sampled_tokens_obey_their_options(
    make_checkpoint, make_case, open_engine, prompt_of: Prompt
) -> None:
    checkpoint = make_checkpoint(make_case("v3_plain"))
    alone = run_alone(open_engine, checkpoint, prompt_of)
    assert 250 not in alone["bias"] and not {1, 7, 9} & set(alone["bias"][:30])
    prompt = prompts_of(prompt_of)["top_k_min_p"]
    tokens = alone["top_k_min_p"]
    logits = checkpoint.logits(prompt + tokens[:-1])[len(prompt) - 1 :]
    for token, row in zip(tokens, logits, strict=True):
        assert token in row.topk(20).indices.tolist()
        probs = (row / 1.2).softmax(-1)
        assert probs[token] >= 0.0199 * probs.max()


def test_seeds_and_temperatures_matter_and_a_seed_repeats(
    make_checkpoint, make_case, open_engine, prompt_of: Prompt
) -> None:
    checkpoint = make_checkpoint(make_case("v3_plain"))
    prompt, seen = prompt_of(20, 1), []
    for seed in (0, 1, 1, 1 << 32, (1 << 64) - 1):
        engine = open_engine(checkpoint.directory)
        engine.add("r", prompt, 30, Sampling(temperature=1.0, seed=seed))
        seen.append(tuple(engine.run()["r"]))
    assert seen[1] == seen[2] and len(set(seen)) == 4


@pytest.mark.parametrize("temperature", [1e-3, 1e-9, 1e-40, 5e-324])
def test_temperature_near_zero_is_greedy(
    make_checkpoint, make_case, open_engine, prompt_of: Prompt, temperature: float
) -> None:
    checkpoint = make_checkpoint(make_case("v3_plain"))
    prompt = prompt_of(20, 1)
    engine = open_engine(checkpoint.directory)
    engine.add("plain", prompt, 30, Sampling(temperature=temperature, seed=1))
    engine.add("top_p", prompt, 30, Sampling(temperature=temperature, top_p=0.9, seed=1))
    outputs = engine.run()
    assert outputs["plain"] == outputs["top_p"] == checkpoint.generate(prompt, 30)
