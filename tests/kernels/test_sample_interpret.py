"""The sampler's kernels against their twins in Triton's interpreter. Outside the interpreter one
test runs this file again inside it."""

import pytest
import torch
import triton
from torch import Tensor

from dsd.kernels import reference_sample, sample
from dsd.kernels.sample_relaxed import near_best, settle
from dsd.tests.kernels.interpreter import patch, run_interpreted
from dsd.tests.kernels.sample_cases import (
    WIDE_OPTIONS,
    Options,
    make_state,
    mixed_options,
    wrong_lines,
)

pytestmark = pytest.mark.slow

INTERPRET = triton.knobs.runtime.interpret
if INTERPRET:
    patch()
else:

    def test_sample_kernels_in_the_interpreter_equal_their_twins() -> None:
        run_interpreted(__file__)


interpreted = pytest.mark.skipif(not INTERPRET, reason="run by the test above")


def check(logits: Tensor, rows: list[Options], lines: Tensor | None = None) -> None:
    state = make_state(rows, logits.shape[1])
    lines = torch.arange(len(rows)) if lines is None else lines
    chosen = sample.sample_rows(logits, lines, state)
    assert wrong_lines(chosen, logits, lines, state) == []
    want = reference_sample.sample_rows(logits, lines, state)
    assert (chosen != want).sum() <= len(rows) // 30, "a margin is met now and then"


@interpreted
@pytest.mark.parametrize(("dtype", "spread"), [(torch.float32, 0.3), (torch.bfloat16, 6.0)])
def test_sample_rows_of_all_options(dtype: torch.dtype, spread: float) -> None:
    rows = mixed_options(1003)
    wide = torch.full((len(rows), 1100), float("nan"), dtype=dtype)
    wide[:, 16:1019] = torch.randn(len(rows), 1003) * spread
    check(wide[:, 16:1019], rows, torch.randperm(len(rows), dtype=torch.int32))


@interpreted
@pytest.mark.parametrize("spread", [0.1, 2.0])
def test_sample_rows_that_keep_more_than_a_list_takes(spread: float) -> None:
    some = WIDE_OPTIONS[::2]
    check(torch.randn(len(some), 9001) * spread, some)


@interpreted
def test_sample_rows_of_equals_keeps_the_first() -> None:
    some = WIDE_OPTIONS[1::4]
    logits = torch.zeros(len(some), 9001)
    check(logits, some)
    logits[:, 4500:] = 1.0
    logits[:, 8999] = -1.0
    check(logits, some)
    logits[:, :] = -0.0
    logits[:, ::2] = 0.0
    check(logits, some)


@interpreted
def test_sample_rows_of_few_that_are_left() -> None:
    some = WIDE_OPTIONS[::3]
    logits = torch.full((len(some), 9001), float("-inf"))
    logits[:, 5000] = -2.0
    check(logits, some)
    logits[:, 3:7] = float("nan")
    logits[:, 4000] = -1e30
    logits[:, 8000:8003] = -1.0
    check(logits, some)
    check(torch.full((len(some), 9001), float("nan")), some)


@interpreted
@pytest.mark.parametrize("shards", [2, 8])
def test_sample_rows_of_gathered_shards(shards: int) -> None:
    rows = mixed_options(1000)[::3]
    state, logits = make_state(rows, 1000), torch.randn(len(rows), 1000).to(torch.bfloat16)
    lines = torch.arange(len(rows))
    gathered = torch.stack(logits.chunk(shards, dim=1))
    want = sample.sample_rows(logits, lines, state)
    assert torch.equal(sample.sample_rows(gathered, lines, state), want)


@interpreted
def test_sample_and_append() -> None:
    rows = [*mixed_options(500), Options(num_tokens=20), Options(num_tokens=19)]
    states = [make_state(rows, 500) for _ in range(2)]
    ids = [torch.full((len(rows), 23), -7, dtype=torch.int32)[:, 2:22] for _ in range(2)]
    lines = torch.randperm(len(rows))[:-4]
    for _ in range(2):
        logits = torch.randn(len(lines), 500) * 3
        got = sample.sample_and_append(logits, lines, states[0], ids[0])
        want = reference_sample.sample_rows(logits, lines, states[1], ids[1])
        assert torch.equal(got, want)
        assert torch.equal(ids[0], ids[1])
        assert torch.equal(states[0].num_tokens, states[1].num_tokens)
        assert torch.equal(states[0].counts, states[1].counts)


@interpreted
@pytest.mark.parametrize(("top_k", "delta", "spread"), [(10, 0.4, 3.0), (3000, 0.01, 0.5)])
def test_near_best(top_k: int, delta: float, spread: float) -> None:
    rows = mixed_options(5003)[::2]
    state, logits = make_state(rows, 5003), torch.randn(len(rows), 5003) * spread
    logits[3, 40:60] = float("nan")
    logits[:, ::500] = 3 * spread
    lines = torch.randperm(len(rows), dtype=torch.int32)
    drafts = torch.zeros(len(rows), 2, dtype=torch.int32)[:, 1]
    found = 0
    for draft in (0, 1, 2500, 5002):
        drafts.fill_(draft)
        got = near_best(logits, drafts, lines, state, top_k, delta)
        assert torch.equal(
            got, reference_sample.near_best(logits, drafts, lines, state, top_k, delta)
        )
        found += int(got.sum())
    assert 5 < found < 4 * len(rows) - 5


@interpreted
def test_settle() -> None:
    rows = mixed_options(500)
    states = [make_state(rows, 500) for _ in range(2)]
    ids = torch.full((2, len(rows), 22), -7, dtype=torch.int32)
    thinking = (torch.arange(len(rows), dtype=torch.int32) % 3 != 0).int().expand(2, -1).clone()
    lines, drafts = torch.randperm(len(rows))[:-2], torch.randint(0, 500, (len(rows) - 2, 2)).int()
    near = torch.rand(len(lines)) < 0.6
    logits = torch.randn(len(lines), 500)
    drafts[:5, 1] = 7
    got, want = (
        reference_sample.sample_rows(logits, lines, state, own)
        for state, own in zip(states, ids, strict=True)
    )
    for given in ((near, drafts[:, 1]), (None, None)):
        settle(got, lines, states[0], ids[0], thinking[0], (7, int(want[6])), *given)
        reference_sample.settle(
            want, lines, states[1], ids[1], thinking[1], (7, int(want[6])), *given
        )
        assert torch.equal(got, want) and torch.equal(*ids) and torch.equal(*thinking)
        assert torch.equal(states[0].counts, states[1].counts)


@interpreted
def test_shards_merged_equal_the_whole() -> None:
    rows = [Options(0.0), Options(0.7, seed=1), Options(2.0, repetition_penalty=1.2, prompt=(4,))]
    rows += [Options(allowed=(4000, 9000)), Options(top_k=1), Options(temperature=0.0, allowed=())]
    state, logits = make_state(rows, 9001), torch.randn(len(rows), 9001)
    logits[0, [3, 4001, 8999]] = 9.0
    lines = torch.arange(len(rows))
    starts = [0, 3, 4096, 7001]
    parts = [logits[:, a:b] for a, b in zip(starts, [*starts[1:], 9001], strict=True)]
    best = [
        sample.shard_best(x, start, lines, state) for x, start in zip(parts, starts, strict=True)
    ]
    values, tokens = (torch.stack(column) for column in zip(*best, strict=True))
    want = sample.sample_rows(logits, lines, state)
    assert torch.equal(sample.merge_shards(values, tokens), want) and want[0] == 3
    logits[1, 4096:] = float("-inf")
    sums = [sample.shard_sumexp(part) for part in parts]
    largest, total = (torch.stack(column) for column in zip(*sums, strict=True))
    torch.testing.assert_close(sample.merge_sumexp(largest, total), logits.logsumexp(dim=1))
    torch.testing.assert_close(sample.logsumexp(logits), logits.logsumexp(dim=1))


@interpreted
def test_count_tokens() -> None:
    ids = torch.randint(0, 60, (1500,), dtype=torch.int32)
    got, want = torch.full((2, 64), 9, dtype=torch.int32)
    sample.count_tokens(ids, 1100, got)
    reference_sample.count_tokens(ids, 1100, want)
    assert torch.equal(got, want)
