"""`sample_rows` and what belongs to it on the CPU: the twins against loops in Python."""

import math

import pytest
import torch
from torch import Tensor

from dsd.kernels import sample
from dsd.kernels.reference_sample import gumbel_noise
from dsd.tests.kernels.sample_cases import Options, make_state, mixed_options, wrong_lines

VOCAB = 101


def naive_token(logits: list[float], options: Options) -> int:
    """One row in Python's floats."""
    x = list(logits)
    for token in range(len(x)):
        seen = options.prompt + options.generated
        if options.penalises and token in seen:
            factor = options.repetition_penalty
            x[token] = x[token] / factor if x[token] > 0 else x[token] * factor
        count = options.generated.count(token)
        x[token] -= options.frequency_penalty * count + options.presence_penalty * (count > 0)
    for token, bias in options.bias:
        x[token] += bias
    if options.num_tokens < options.mask_until:
        for token in options.masked:
            x[token] = -math.inf
    if options.allowed is not None:
        x = [v if token in options.allowed else -math.inf for token, v in enumerate(x)]
    order = sorted(range(len(x)), key=lambda token: -x[token])
    if options.temperature == 0 or x[order[0]] == -math.inf:
        return order[0]
    heat = max(options.temperature, 1e-6)
    ids = order[: options.top_k] if options.top_k else order
    weights = [math.exp((x[token] - x[order[0]]) / heat) for token in ids]
    kept, before = [], 0.0
    for token, weight in zip(ids, weights, strict=True):
        reached = options.top_p < 1 and before >= options.top_p * sum(weights)
        if not kept or not (reached or weight < options.min_p):
            kept.append(token)
        before += weight
    field = gumbel_noise(torch.tensor([options.seed]), torch.tensor([options.num_tokens]), len(x))
    noise = field[0].tolist()
    return max(sorted(kept), key=lambda token: x[token] / heat + noise[token])


@pytest.mark.parametrize("spread", [0.3, 3.0])
def test_sample_rows_equals_a_loop_in_python(spread: float) -> None:
    rows = mixed_options(VOCAB)
    state = make_state(rows, VOCAB)
    logits = torch.randn(len(rows), VOCAB) * spread
    lines = torch.randperm(len(rows))
    before = logits.clone()
    got = sample.sample_rows(logits, lines, state).tolist()
    want = [naive_token(logits[i].tolist(), rows[row]) for i, row in enumerate(lines.tolist())]
    assert got == want
    assert torch.equal(logits, before), "log-probabilities are of the unmodified logits"
    assert wrong_lines(torch.tensor(got), logits, lines, state) == []


def test_wrong_lines_finds_what_is_wrong() -> None:
    """The GPU tests rely on it."""
    rows = mixed_options(VOCAB)
    state, logits = make_state(rows, VOCAB), torch.randn(len(rows), VOCAB)
    lines = torch.arange(len(rows))
    chosen = sample.sample_rows(logits, lines, state)
    assert wrong_lines((chosen + 1) % VOCAB, logits, lines, state) == lines.tolist()
    free = make_state([Options(seed=o.seed, num_tokens=o.num_tokens) for o in rows], VOCAB)
    unfiltered = sample.sample_rows(logits, lines, free)
    differ = (unfiltered != chosen).nonzero().flatten().tolist()
    assert len(differ) > 10 and wrong_lines(unfiltered, logits, lines, state) == differ


def test_sample_rows_takes_the_lowest_of_equals_and_no_nan() -> None:
    logits = torch.zeros(3, VOCAB)
    logits[1] = float("nan")
    logits[2, :50] = float("nan")
    state = make_state([Options(temperature=0.0), Options(top_k=1)], VOCAB)
    for row in (0, 1):
        rows = torch.full((3,), row, dtype=torch.int32)
        assert sample.sample_rows(logits, rows, state).tolist() == [0, 0, 50]


def test_sample_rows_of_equals_keeps_the_first_k() -> None:
    rows = [Options(top_k=4, seed=seed) for seed in range(60)]
    state, logits = make_state(rows, VOCAB), torch.zeros(60, VOCAB)
    chosen = sample.sample_rows(logits, torch.arange(60), state)
    assert set(chosen.tolist()) == {0, 1, 2, 3}


def test_sample_rows_of_gathered_shards_equals_whole_vocabulary() -> None:
    rows = mixed_options(96)
    state, logits = make_state(rows, 96), torch.randn(len(rows), 96).to(torch.bfloat16)
    lines = torch.arange(len(rows))
    shards = torch.stack(logits.chunk(4, dim=1))
    want = sample.sample_rows(logits, lines, state)
    assert torch.equal(sample.sample_rows(shards, lines, state), want)


def test_sample_rows_is_distributed_as_what_the_filters_leave() -> None:
    """Chi-square over positions: top-k 6 of 10, then the top-p that leaves 4 of them."""
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0, 1.5, 0.3, -3.0, 0.9, 0.0, -0.5])
    count = 20_000
    rows = [Options(0.8, top_k=6, top_p=0.83, seed=5, num_tokens=i) for i in range(4)]
    chosen = []
    state = make_state(rows * 500, 10)
    for i in range(count // 2000):
        state.num_tokens.copy_(torch.arange(2000) + 2000 * i)
        chosen.append(sample.sample_rows(logits.expand(2000, 10), torch.arange(2000), state))
    found = torch.bincount(torch.cat(chosen), minlength=10).double()
    kept = logits.topk(4).indices
    assert found.nonzero().flatten().tolist() == kept.sort().values.tolist()
    want = (logits[kept] / 0.8).double().softmax(0) * count
    chi_square = ((found[kept] - want) ** 2 / want).sum().item()
    assert chi_square < 16.3, f"{chi_square=}: p < 0.001 for 3 degrees of freedom"


def appended(state: sample.SamplingState, ids: Tensor, lines: Tensor) -> Tensor:
    logits = torch.randn(len(lines), VOCAB)
    want = sample.sample_rows(logits, lines, state)
    got = sample.sample_and_append(logits, lines, state, ids)
    assert torch.equal(got, want)
    return want


def test_sample_and_append_writes_token_length_and_counts() -> None:
    rows = [Options(num_tokens=i + 2) for i in range(3)]
    rows += [Options(num_tokens=9, presence_penalty=0.5, prompt=(1, 2), generated=(3,))]
    state, ids = make_state(rows, VOCAB), torch.full((4, 12), -7, dtype=torch.int32)
    counts = state.counts.clone()
    tokens = appended(state, ids, torch.tensor([3, 0, 2]))
    assert state.num_tokens.tolist() == [3, 3, 5, 10]
    written = {(0, 2): 1, (2, 4): 2, (3, 9): 0}
    for (row, at), line in written.items():
        assert ids[row, at] == tokens[line]
    assert (ids != -7).sum() == 3
    counts[3, tokens[0]] += 1
    assert torch.equal(state.counts, counts), "only a row with penalties is counted"


def test_sample_and_append_of_a_full_row_writes_nothing() -> None:
    state = make_state([Options(num_tokens=4), Options(num_tokens=3)], VOCAB)
    ids = torch.full((2, 4), -7, dtype=torch.int32)
    appended(state, ids, torch.tensor([0, 1]))
    assert state.num_tokens.tolist() == [4, 4]
    assert (ids == -7).all(dim=1).tolist() == [True, False]
    appended(state, ids, torch.tensor([0, 1, 0, 0]))
    assert state.num_tokens.tolist() == [4, 4]


def filters(options: Options) -> bool:
    return options.top_k > 1 or 0 < options.top_p < 1 or options.min_p > 0


def test_shards_merged_equal_the_whole() -> None:
    rows = [o for o in mixed_options(VOCAB) if not filters(o)]
    state, logits = make_state(rows, VOCAB), torch.randn(len(rows), VOCAB)
    logits[0, 50] = logits[1, 20] = logits[1, 90] = 30.0
    lines = torch.arange(len(rows))
    starts = [0, 30, 31, 80]
    parts = [logits[:, a:b] for a, b in zip(starts, [*starts[1:], VOCAB], strict=True)]
    best = [
        sample.shard_best(part, start, lines, state)
        for part, start in zip(parts, starts, strict=True)
    ]
    values, tokens = (torch.stack(column) for column in zip(*best, strict=True))
    assert torch.equal(
        sample.merge_shards(values, tokens), sample.sample_rows(logits, lines, state)
    )
    sums = [sample.shard_sumexp(part) for part in parts]
    largest, total = (torch.stack(column) for column in zip(*sums, strict=True))
    torch.testing.assert_close(sample.merge_sumexp(largest, total), logits.logsumexp(dim=1))


def test_shard_sumexp_of_a_masked_shard_adds_nothing() -> None:
    logits = torch.randn(2, 40)
    logits[:, 20:] = float("-inf")
    sums = [sample.shard_sumexp(part) for part in logits.chunk(2, dim=1)]
    largest, total = (torch.stack(column) for column in zip(*sums, strict=True))
    torch.testing.assert_close(sample.merge_sumexp(largest, total), logits.logsumexp(dim=1))


@pytest.mark.parametrize("field", ["temperature", "counts", "seed"])
def test_state_of_a_wrong_type_is_refused(field: str) -> None:
    state = make_state([Options()], VOCAB)
    wrong = {name: getattr(state, name) for name in state.__dataclass_fields__}
    wrong[field] = wrong[field].to(torch.int16)
    with pytest.raises(AssertionError, match=field):
        _ = sample.SamplingState(**wrong).pointers
