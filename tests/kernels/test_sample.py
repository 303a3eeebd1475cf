import math
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from dsd.kernels.reference_sample import filter_logits, gumbel_noise, philox4x32
from dsd.kernels.sample import top_logprobs

V3_VOCAB = 129280
MASK = 0xFFFFFFFF


def naive_philox(counter: list[int], key: list[int]) -> list[int]:
    """Philox-4x32-10 in Python's integers, from the paper."""
    (c0, c1, c2, c3), (k0, k1) = counter, key
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (p1 >> 32) ^ c1 ^ k0, p1 & MASK, (p0 >> 32) ^ c3 ^ k1, p0 & MASK
        k0, k1 = (k0 + 0x9E3779B9) & MASK, (k1 + 0xBB67AE85) & MASK
    return [c0, c1, c2, c3]


KNOWN_ANSWERS = [
    ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ([MASK] * 4, [MASK] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        [0xA4093822, 0x299F31D0],
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
]
"""Random123's kat_vectors, philox4x32 with 10 rounds."""


def test_philox_zero_vector_equals_random123() -> None:
    zero = torch.zeros(1, dtype=torch.int64)
    words = philox4x32((zero, zero), (zero, zero))
    assert words.tolist() == [KNOWN_ANSWERS[0][2]]


def test_philox_equals_a_naive_one_that_passes_all_known_answers() -> None:
    """The other two vectors use counter words that are 0 in the kernel."""
    for counter, key, want in KNOWN_ANSWERS:
        assert naive_philox(counter, key) == want
    words = torch.randint(0, 1 << 32, (200, 4), dtype=torch.int64)
    words[0], words[1], words[2] = MASK, 1 << 31, (1 << 31) - 1
    c0, c1, k0, k1 = words.unbind(1)
    got = philox4x32((c0, c1), (k0, k1)).tolist()
    for (a, b, c, d), row in zip(words.tolist(), got, strict=True):
        assert row == naive_philox([a, b, 0, 0], [c, d])


SEEDS = [0, 1, -1, 1 << 32, (1 << 63) - 1, -(1 << 63), 123456789123456789]


def test_gumbel_noise_of_a_row_is_the_same_whatever_the_batch() -> None:
    seed = torch.tensor(SEEDS)
    position = torch.tensor([0, 5, 5, 163839, 1, (1 << 31) + 7, 5])
    together = gumbel_noise(seed, position, 1003)
    assert together.shape == (7, 1003) and together.dtype == torch.float32
    for i in range(7):
        alone = gumbel_noise(seed[i : i + 1], position[i : i + 1], 1003)
        assert torch.equal(alone[0], together[i])
    flipped = gumbel_noise(seed.flip(0), position.flip(0), 1003)
    assert torch.equal(flipped.flip(0), together)


@pytest.mark.parametrize("vocab_size", [1, 3, 4, 5, 1000])
def test_gumbel_noise_of_a_token_does_not_depend_on_the_vocabulary(vocab_size: int) -> None:
    seed, position = torch.tensor([7]), torch.tensor([11])
    wide = gumbel_noise(seed, position, 1003)
    assert torch.equal(gumbel_noise(seed, position, vocab_size), wide[:, :vocab_size])


def test_gumbel_noise_uses_every_bit_of_seed_and_position() -> None:
    rows = [(0, 0)] + [(1 << bit, 0) for bit in range(63)] + [(-(1 << 63), 0)]
    rows += [(0, 1 << bit) for bit in range(31)]
    seed, position = torch.tensor(rows).unbind(1)
    noise = gumbel_noise(seed, position, 8)
    assert len({tuple(row) for row in noise.tolist()}) == len(rows)


def test_gumbel_noise_has_the_moments_and_tails_of_gumbel() -> None:
    noise = gumbel_noise(torch.arange(8), torch.arange(8) * 31, V3_VOCAB).double().flatten()
    assert torch.isfinite(noise).all()
    deviation = math.pi / math.sqrt(6)
    standard_error = deviation / math.sqrt(len(noise))
    assert abs(noise.mean().item() - 0.5772156649) < 5 * standard_error
    assert noise.var().item() == pytest.approx(deviation**2, rel=0.01)
    for x in (-1.5, 0.0, 1.0, 3.0, 6.0, 9.0):
        want = 1 - math.exp(-math.exp(-x))
        error = math.sqrt(want * (1 - want) / len(noise))
        assert abs((noise > x).double().mean().item() - want) < 5 * error


def test_gumbel_noise_of_extreme_words_is_finite_and_right(monkeypatch) -> None:
    words = [0, 1, 2, 255, 1 << 16, 1 << 31, MASK - (1 << 20), MASK - 1000]
    exact = torch.tensor(words, dtype=torch.float64)
    rigged = torch.tensor([*words, MASK - 1, MASK, 0, 0]).view(1, 3, 4)
    monkeypatch.setattr("dsd.kernels.reference_sample.philox4x32", lambda _counter, _key: rigged)
    noise = gumbel_noise(torch.tensor([0]), torch.tensor([0]), 12)[0].double()
    assert torch.isfinite(noise).all()
    want = -torch.log(-torch.log1p(-(exact + 0.5) * 2.0**-32))
    # At the other end float32 has no more digits; tokens there are never chosen.
    torch.testing.assert_close(noise[:6], want[:6], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(noise[6:8], want[6:8], rtol=0.02, atol=0.02)
    assert noise[8] <= noise[7] and noise[9] <= noise[8]


def test_gumbel_noise_neighbours_are_uncorrelated() -> None:
    noise = gumbel_noise(torch.full((600,), 3), torch.arange(600), 600).double()
    noise = (noise - noise.mean()) / noise.std()
    for a, b in ((noise[1:], noise[:-1]), (noise[:, 1:], noise[:, :-1]), (noise, noise.t())):
        off = ~torch.eye(600, dtype=torch.bool) if a is noise else torch.ones_like(a).bool()
        assert abs((a * b)[off].mean().item()) < 0.01


def test_gumbel_argmax_is_distributed_as_softmax() -> None:
    """Chi-square over many positions, as one request sees them, and over many seeds."""
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0, 1.5, 0.3, -3.0, 0.9, 0.0, -0.5])
    count = 100_000
    many, one = torch.arange(count), torch.full((count,), 42)
    for seed, position in ((one, many), (many, one)):
        chosen = (logits + gumbel_noise(seed, position, 10)).argmax(-1)
        found = torch.bincount(chosen, minlength=10).double()
        want = logits.double().softmax(0) * count
        chi_square = ((found - want) ** 2 / want).sum().item()
        assert chi_square < 27.9, f"{chi_square=}: p < 0.001 for 9 degrees of freedom"


@dataclass(frozen=True)
class Filter:
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0


FILTERS = [
    Filter(),
    Filter(top_k=1),
    Filter(top_k=5),
    Filter(top_k=10_000),
    Filter(top_p=0.0),
    Filter(top_p=0.3),
    Filter(top_p=0.9),
    Filter(top_p=0.999),
    Filter(min_p=0.05),
    Filter(min_p=1.0),
    Filter(top_k=7, top_p=0.8, min_p=0.1),
    Filter(top_k=40, top_p=0.95),
    Filter(top_p=1e-6, min_p=0.5),
]


def naive_kept(logits: Tensor, options: Filter) -> set[int]:
    """The tokens that stay, one row in Python; top-p renormalises after top-k."""
    ids = sorted(range(len(logits)), key=lambda t: -logits[t].item())
    ids = ids[: options.top_k] if options.top_k else ids
    probs = logits[ids].double().softmax(0).tolist()
    kept, before = set(), 0.0
    for token, prob in zip(ids, probs, strict=True):
        first = not kept
        if first or (before < options.top_p and prob >= options.min_p * probs[0]):
            kept.add(token)
        before += prob
    return kept


def run_filters(logits: Tensor, options: list[Filter]) -> Tensor:
    return filter_logits(
        logits,
        torch.tensor([o.top_k for o in options]),
        torch.tensor([o.top_p for o in options]),
        torch.tensor([o.min_p for o in options]),
    )


@pytest.mark.parametrize("spread", [0.5, 3.0])
def test_filter_logits_equals_naive_rows(spread: float) -> None:
    logits = torch.randn(len(FILTERS), 200) * spread
    out = run_filters(logits, FILTERS)
    for row, options in enumerate(FILTERS):
        kept = naive_kept(logits[row], options)
        assert set(torch.isfinite(out[row]).nonzero().flatten().tolist()) == kept, options
        index = sorted(kept)
        assert torch.equal(out[row][index], logits[row][index]), "kept logits are unchanged"


def test_filter_logits_that_is_off_drops_nothing_of_a_large_vocabulary() -> None:
    """Its row must not change because a neighbour filters: sums near 1 are rounded."""
    logits = torch.randn(8, V3_VOCAB) * torch.tensor([0.0, 0.5, 1, 2, 3, 5, 8, 12])[:, None]
    options = [Filter()] * 7 + [Filter(top_p=0.5)]
    assert torch.equal(run_filters(logits, options)[:7], logits[:7])


def test_filter_logits_row_does_not_depend_on_the_batch() -> None:
    logits = torch.randn(len(FILTERS), 500) * 2
    together = run_filters(logits, FILTERS)
    for row, options in enumerate(FILTERS):
        assert torch.equal(run_filters(logits[row : row + 1], [options])[0], together[row])


def test_filter_logits_masked_tokens_stay_masked_and_one_token_always_stays() -> None:
    logits = torch.full((2, 50), float("-inf"))
    logits[:, 7] = -3.0
    out = run_filters(logits, [Filter(top_k=3, top_p=0.5, min_p=0.2), Filter(top_p=0.0)])
    assert torch.isfinite(out).nonzero().tolist() == [[0, 7], [1, 7]]


@pytest.mark.parametrize("num_top", [0, 1, 5, 40])
def test_top_logprobs_equals_sorted_log_softmax(num_top: int) -> None:
    logits = torch.randn(6, 40) * 5
    chosen = torch.randint(0, 40, (6,))
    logprob, top, top_ids = top_logprobs(logits, chosen, num_top)
    assert logprob.shape == (6,) and top.shape == top_ids.shape == (6, num_top)
    for row in range(6):
        want = logits[row].double().log_softmax(0)
        assert logprob[row].item() == pytest.approx(want[chosen[row]].item(), abs=1e-5)
        order = want.argsort(descending=True)[:num_top]
        assert top_ids[row].tolist() == order.tolist()
        torch.testing.assert_close(top[row].double(), want[order], rtol=1e-5, atol=1e-5)


def test_top_logprobs_of_nothing_is_empty() -> None:
    logprob, top, _ = top_logprobs(torch.empty(0, 40), torch.empty(0, dtype=torch.int64), 3)
    assert logprob.shape == (0,) and top.shape == (0, 3)
