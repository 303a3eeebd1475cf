"""The sampler on a GPU: tokens against probabilities in float64 and against the twin; rows that
differ in one batch; graphs replayed with other rows."""

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from dsd.kernels import reference_sample, sample
from dsd.kernels.sample_relaxed import near_best, settle
from dsd.tests.kernels.sample_cases import (
    WIDE_OPTIONS,
    Options,
    make_state,
    mixed_options,
    wrong_lines,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]
V3_VOCAB = 129280
BF16, F32 = torch.bfloat16, torch.float32
NOISE_TOLERANCE = 4e-6
"""Of two single-precision ways to compute log(-log1p(-u)); other random words differ by ~1."""
SEEDS = [0, -1, (1 << 63) - 1, -(1 << 63), 123456789123456789]
POSITIONS = [0, 163839, (1 << 31) - 7, 5, 1]


@pytest.fixture(autouse=True)
def _cuda() -> None:
    torch.cuda.manual_seed(0)


def rand(*shape: int, dtype: torch.dtype = F32) -> Tensor:
    return torch.randn(shape, device="cuda", dtype=F32).to(dtype)


def inside(x: Tensor, before: int = 64, after: int = 64) -> Tensor:
    """x as a slice of a wider tensor of NaN."""
    wide = x.new_full((*x.shape[:-1], before + x.shape[-1] + after), float("nan"))
    wide[..., before : before + x.shape[-1]] = x
    return wide[..., before : before + x.shape[-1]]


def lines_of(rows: list[Options]) -> Tensor:
    return torch.randperm(len(rows), device="cuda", dtype=torch.int32)


def check(logits: Tensor, rows: list[Options]) -> None:
    state, lines = make_state(rows, logits.shape[1], "cuda"), lines_of(rows)
    chosen = sample.sample_rows(logits, lines, state)
    assert wrong_lines(chosen, logits, lines, state) == []
    want = reference_sample.sample_rows(logits, lines, state)
    assert (chosen != want).sum() <= len(rows) // 30, "a margin is met now and then"


def field() -> tuple[Tensor, Tensor]:
    return torch.tensor(SEEDS, device="cuda"), torch.tensor(POSITIONS, device="cuda")


@pytest.mark.parametrize("dtype", [BF16, F32])
@pytest.mark.parametrize("spread", [0.3, 2.0, 6.0])
@pytest.mark.parametrize("vocab", [1000, 4097, V3_VOCAB])
def test_sample_rows_of_all_options(vocab: int, spread: float, dtype: torch.dtype) -> None:
    rows = mixed_options(vocab)
    check(inside(rand(len(rows), vocab, dtype=dtype) * spread), rows)


def test_sample_rows_of_one_line_and_of_300() -> None:
    rows = (mixed_options(4097) * 8)[:300]
    logits = rand(300, 4097) * 3
    check(logits, rows)
    for i in (0, 4, 24, 30):
        check(logits[i : i + 1], rows[i : i + 1])


def test_sample_rows_of_a_line_is_the_same_whatever_the_batch() -> None:
    rows = mixed_options(V3_VOCAB)
    state, logits = make_state(rows, V3_VOCAB, "cuda"), rand(len(rows), V3_VOCAB, dtype=BF16) * 2
    lines = lines_of(rows)
    together = sample.sample_rows(logits, lines, state)
    alone = [
        sample.sample_rows(logits[i : i + 1], lines[i : i + 1], state) for i in range(len(rows))
    ]
    assert torch.equal(torch.cat(alone), together)


@pytest.mark.parametrize("spread", [0.1, 2.0])
@pytest.mark.parametrize("vocab", [9001, V3_VOCAB])
def test_sample_rows_that_keep_more_than_a_list_takes(vocab: int, spread: float) -> None:
    check(rand(len(WIDE_OPTIONS), vocab) * spread, WIDE_OPTIONS)


def test_sample_rows_of_peaked_logits() -> None:
    """As a trained model makes them: a few tokens are far above the others."""
    rows = [Options(0.6, top_p=0.95, seed=i, num_tokens=i) for i in range(200)]
    rows += [Options(1.0, top_k=20, top_p=0.9, seed=i) for i in range(100)]
    logits = rand(300, V3_VOCAB, dtype=BF16) * 2
    best = torch.randint(0, V3_VOCAB, (300, 12), device="cuda")
    logits.scatter_(1, best, (18 + rand(300, 12) * 2).to(BF16))
    check(logits, rows)


def test_sample_rows_of_equals_keeps_the_first() -> None:
    rows = WIDE_OPTIONS
    logits = torch.zeros(len(rows), V3_VOCAB, device="cuda")
    check(logits, rows)
    logits[:, 4500:] = 1.0
    logits[:, 8999] = -1.0
    check(logits, rows)
    logits[:, :] = -0.0
    logits[:, ::2] = 0.0
    check(logits, rows)


def test_sample_rows_of_few_that_are_left() -> None:
    rows = WIDE_OPTIONS
    logits = torch.full((len(rows), V3_VOCAB), float("-inf"), device="cuda")
    logits[:, 50_000] = -2.0
    check(logits, rows)
    logits[:, 3:7] = float("nan")
    logits[:, 40_000] = -1e30
    logits[:, 80_000:80_003] = -1.0
    check(logits, rows)
    check(torch.full_like(logits, float("nan")), rows)


@pytest.mark.parametrize("shards", [2, 8])
@pytest.mark.parametrize("vocab", [1000, V3_VOCAB])
def test_sample_rows_of_gathered_shards_equals_whole_vocabulary(vocab: int, shards: int) -> None:
    rows = mixed_options(vocab)
    state, logits = make_state(rows, vocab, "cuda"), rand(len(rows), vocab, dtype=BF16) * 2
    lines, gathered = lines_of(rows), torch.stack(logits.chunk(shards, dim=1))
    want = sample.sample_rows(logits, lines, state)
    assert torch.equal(sample.sample_rows(gathered, lines, state), want)


def test_sample_rows_is_distributed_as_what_the_filters_leave() -> None:
    """Chi-square over positions: top-k 6 of 10 tokens that lie far apart, then the top-p that
    leaves 4 of them."""
    few = torch.tensor([2.0, 1.0, 0.0, -1.0, 1.5, 0.3, -3.0, 0.9, 0.0, -0.5], device="cuda")
    places = torch.arange(10, device="cuda") * 12_000 + 77
    logits = torch.full((V3_VOCAB,), -20.0, device="cuda")
    logits[places] = few
    state = make_state([Options(0.8, top_k=6, top_p=0.83, seed=5)] * 500, V3_VOCAB, "cuda")
    lines, found = torch.arange(500, device="cuda"), torch.zeros(V3_VOCAB, device="cuda")
    for i in range(40):
        state.num_tokens.copy_(lines + 500 * i)
        chosen = sample.sample_rows(logits.expand(500, V3_VOCAB), lines, state)
        found += torch.bincount(chosen, minlength=V3_VOCAB)
    kept = few.topk(4).indices
    assert found.nonzero().flatten().tolist() == places[kept].sort().values.tolist()
    want = (few[kept] / 0.8).double().softmax(0) * 20_000
    chi_square = ((found[places[kept]] - want) ** 2 / want).sum().item()
    assert chi_square < 16.3, f"{chi_square=}: p < 0.001 for 3 degrees of freedom"


def test_sample_and_append_equals_its_twin() -> None:
    rows = [*mixed_options(5003), Options(num_tokens=20), Options(num_tokens=19)]
    states = [make_state(rows, 5003, "cuda") for _ in range(2)]
    ids = [torch.full((len(rows), 23), -7, device="cuda").int()[:, 2:22] for _ in range(2)]
    lines = lines_of(rows)[:-4]
    for _ in range(3):
        logits = rand(len(lines), 5003) * 3
        got = sample.sample_and_append(logits, lines, states[0], ids[0])
        want = reference_sample.sample_rows(logits, lines, states[1], ids[1])
        assert torch.equal(got, want) and torch.equal(ids[0], ids[1])
        assert torch.equal(states[0].num_tokens, states[1].num_tokens)
        assert torch.equal(states[0].counts, states[1].counts)


def test_padding_lines_stay_in_their_row() -> None:
    """Many lines of one inert row that fills up."""
    rows = [Options(num_tokens=5), Options(temperature=0.0, num_tokens=2)]
    state, ids = make_state(rows, 5003, "cuda"), torch.full((2, 8), -7, device="cuda").int()
    lines = torch.tensor([0] + [1] * 63, device="cuda")
    for i in range(10):
        sample.sample_and_append(rand(64, 5003), lines, state, ids)
        assert state.num_tokens[0] == min(8, 6 + i) and state.num_tokens[1] <= 8
    assert (ids[0, :5] == -7).all() and (ids[0, 5:] >= 0).all()
    assert (ids[1, :2] == -7).all() and state.num_tokens.tolist() == [8, 8]


def test_shards_merged_equal_the_whole() -> None:
    rows = [Options(0.0), Options(0.7, seed=1), Options(2.0, repetition_penalty=1.2, prompt=(4,))]
    rows += [Options(allowed=(4000, 90_000)), Options(top_k=1), Options(0.0, allowed=())]
    state, logits = make_state(rows, V3_VOCAB, "cuda"), rand(len(rows), V3_VOCAB, dtype=BF16) * 2
    logits[0, [30_000, 129_000]] = 30.0
    lines = torch.arange(len(rows), device="cuda")
    want = sample.sample_rows(logits, lines, state)
    for cuts in (range(0, V3_VOCAB, 16160), (0, 3, 4096, 100_001)):
        starts = [*cuts, V3_VOCAB]
        parts = [(a, logits[:, a:b]) for a, b in pairwise(starts)]
        best = [sample.shard_best(part, start, lines, state) for start, part in parts]
        values, tokens = (torch.stack(column) for column in zip(*best, strict=True))
        assert torch.equal(sample.merge_shards(values, tokens), want) and want[0] == 30_000
        sums = [sample.shard_sumexp(part) for _, part in parts]
        largest, total = (torch.stack(column) for column in zip(*sums, strict=True))
        whole = logits.double().logsumexp(dim=1).float()
        torch.testing.assert_close(sample.merge_sumexp(largest, total), whole)
        torch.testing.assert_close(sample.logsumexp(logits), whole)


@pytest.mark.parametrize("num_top", [0, 20])
def test_top_logprobs_equal_their_twins(num_top: int) -> None:
    logits = inside(rand(4, V3_VOCAB) * 5)
    logits[1, : V3_VOCAB // 2] = float("-inf")
    chosen = torch.tensor([0, V3_VOCAB - 1, 70000, 5], device="cuda")
    got = sample.top_logprobs(logits, chosen, num_top)
    want = reference_sample.top_logprobs(logits, chosen, num_top)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_replayed_graph_with_other_rows_equals_eager() -> None:
    """Of rows whose options change under the graph, tokens appended."""
    rows = mixed_options(V3_VOCAB)
    state, ids = make_state(rows, V3_VOCAB, "cuda"), torch.zeros(len(rows), 64, device="cuda").int()
    logits, lines = rand(16, V3_VOCAB, dtype=BF16) * 2, torch.arange(16, device="cuda")
    sample.sample_and_append(logits, lines, state, ids)
    largest = sample.logsumexp(logits)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = sample.sample_and_append(logits, lines, state, ids)
        largest = sample.logsumexp(logits)
    for i in range(3):
        logits.copy_(rand(16, V3_VOCAB) * (i + 1))
        lines.copy_(torch.randperm(len(rows), device="cuda")[:16])
        lengths = state.num_tokens.clone()
        want = sample.sample_rows(logits, lines, state)
        graph.replay()
        assert torch.equal(captured, want)
        assert torch.equal(ids[lines, lengths[lines].long()], want.int())
        assert state.num_tokens.sum() == lengths.sum() + 16
        torch.testing.assert_close(largest, logits.float().logsumexp(dim=1))


@pytest.mark.parametrize(("top_k", "delta"), [(10, 0.4), (5000, 0.01)])
@pytest.mark.parametrize("spread", [0.5, 3.0])
def test_near_best_equals_its_twin(top_k: int, delta: float, spread: float) -> None:
    rows = mixed_options(V3_VOCAB)
    state, lines = make_state(rows, V3_VOCAB, "cuda"), lines_of(rows)
    logits = rand(len(rows), V3_VOCAB) * spread
    best = logits.topk(4 * top_k, dim=1).indices
    wrong = found = 0
    for rank in (0, 1, top_k // 2, top_k - 1, top_k, 3 * top_k):
        drafts = best[:, rank : rank + 2].int()[:, 0]
        got = near_best(logits, drafts, lines, state, top_k, delta)
        want = reference_sample.near_best(logits, drafts, lines, state, top_k, delta)
        wrong, found = wrong + int((got != want).sum()), found + int(got.sum())
    assert wrong <= len(rows) // 10, "a margin is met now and then"
    assert found > len(rows)


def test_settle_equals_its_twin() -> None:
    rows = mixed_options(5003)
    states = [make_state(rows, 5003, "cuda") for _ in range(2)]
    ids = torch.full((2, len(rows), 22), -7, dtype=torch.int32, device="cuda")
    thinking = (torch.arange(len(rows), device="cuda") % 3 != 0).int().expand(2, -1).clone()
    lines, logits = lines_of(rows)[:-2], rand(len(rows) - 2, 5003)
    drafts = torch.randint(0, 5003, (len(lines), 2), device="cuda", dtype=torch.int32)[:, 1]
    near = torch.rand(len(lines), device="cuda") < 0.6
    got, want = (
        reference_sample.sample_rows(logits, lines, state, own)
        for state, own in zip(states, ids, strict=True)
    )
    think_ids = (int(drafts[3]), int(want[6]))
    for given in ((near, drafts), (None, None)):
        settle(got, lines, states[0], ids[0], thinking[0], think_ids, *given)
        reference_sample.settle(want, lines, states[1], ids[1], thinking[1], think_ids, *given)
        assert torch.equal(got, want) and torch.equal(*ids) and torch.equal(*thinking)
        assert torch.equal(states[0].counts, states[1].counts)
