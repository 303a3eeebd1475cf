"""Relaxed acceptance: which drafts are near the best, and what taking one changes."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from dsd.kernels.reference_sample import IN_PROMPT, adjust_logits, filter_logits
from dsd.kernels.sample import sample_and_append
from dsd.kernels.sample_relaxed import near_best, settle
from dsd.kernels.sample_state import SamplingState
from dsd.tests.kernels.sample_cases import Options, make_state, mixed_options

VOCAB, THINK, END = 997, 900, 901
RANKS = [*range(14), 19, 20, 30, 39, 40, 63, 64, 150, 299, 300, 600, 990, 996]
"""Of the drafts, by their adjusted logits."""


def every_token_near(
    logits: Tensor, state: SamplingState, top_k: int, delta: float
) -> tuple[Tensor, Tensor]:
    """[S, V] each: what the row's own filters keep, and what is near the best. From the filters'
    twin, and without sums over what comes before."""
    rows = torch.arange(len(logits))
    adjusted = adjust_logits(logits, rows, state)
    draws = (state.temperature > 0) & (state.top_k != 1) & (state.top_p > 0)
    heat = torch.where(draws, state.temperature.clamp(min=1e-6), 1.0)[:, None]
    filters = (state.top_k, state.top_p, state.min_p)
    kept = filter_logits(adjusted, *filters, 1 / heat).isfinite() | ~draws[:, None]
    kept &= adjusted.isfinite()
    probs = (adjusted.double() / heat).softmax(dim=1)
    order = adjusted.sort(dim=1, descending=True, stable=True).indices
    among = torch.zeros_like(kept).scatter_(1, order[:, :top_k], True)
    return kept, kept & among & (probs >= probs.amax(dim=1, keepdim=True) - delta)


@pytest.mark.parametrize(("top_k", "delta"), [(1, 1.0), (10, 0.3), (10, 1.0), (VOCAB, 0.02)])
@pytest.mark.parametrize("spread", [0.5, 5.0])
def test_near_best_is_what_filters_and_distance_leave(
    top_k: int, delta: float, spread: float
) -> None:
    rows = mixed_options(VOCAB)
    state, logits = make_state(rows, VOCAB), torch.randn(len(rows), VOCAB) * spread
    kept, want = every_token_near(logits, state, top_k, delta)
    lines = torch.arange(len(rows), dtype=torch.int32)
    order = adjust_logits(logits, lines, state).sort(dim=1, descending=True, stable=True).indices
    drafts = order[:, RANKS]
    got = torch.stack(
        [near_best(logits, d, lines, state, top_k, delta) for d in drafts.int().unbind(1)], dim=1
    )
    kept, want = kept.gather(1, drafts), want.gather(1, drafts)
    both = (state.top_k > 0) & (state.top_p < 1)
    assert torch.equal(got[~both], want[~both])
    assert not (got & ~kept).any(), "nothing that the row excludes"
    assert got.any(dim=1).sum() >= len(rows) - 4, "all but the rows that exclude everything"


def taken(
    options: Options, near: bool, draft: int, thinking: int = 1
) -> tuple[int, SamplingState, Tensor, Tensor, Tensor]:
    """One row's choice of token 3, settled -> the token before, and everything after."""
    state = make_state([options, options], VOCAB)
    logits = torch.zeros(2, VOCAB)
    logits[:, 3] = 50.0
    lines, ids = torch.tensor([1]), torch.full((2, 12), -7, dtype=torch.int32)
    thoughts = torch.tensor([0, thinking], dtype=torch.int32)
    chosen = sample_and_append(logits[:1], lines, state, ids)
    before = int(chosen[0])
    drafts = torch.tensor([draft], dtype=torch.int32)
    settle(chosen, lines, state, ids, thoughts, (THINK, END), torch.tensor([near]), drafts)
    return before, state, chosen, ids, thoughts


PLAIN = Options(temperature=0.0, num_tokens=7)
PENALISED = replace(PLAIN, presence_penalty=0.1, prompt=(3,), generated=(5,))


@pytest.mark.parametrize("options", [PLAIN, PENALISED], ids=["plain", "penalised"])
def test_draft_near_the_best_takes_the_place_of_the_choice(options: Options) -> None:
    before, state, chosen, ids, thoughts = taken(options, True, 5)
    assert (before, chosen.tolist(), ids[1, 7], thoughts.tolist()) == (3, [5], 5, [0, 1])
    assert ids[1, 6] == ids[1, 8] == -7 and (ids[0] == -7).all()
    assert state.num_tokens.tolist() == [7, 8]
    if options.penalises:
        assert state.counts[1, [3, 5]].tolist() == [IN_PROMPT, 2]
        assert state.counts[0, [3, 5]].tolist() == [IN_PROMPT, 1]


@pytest.mark.parametrize(("near", "thinking"), [(False, 1), (True, 0), (False, 0)])
def test_draft_is_refused_behind_the_thought_or_far_from_the_best(near: bool, thinking) -> None:
    _, state, chosen, ids, thoughts = taken(PENALISED, near, 5, thinking)
    assert (chosen.tolist(), ids[1, 7], thoughts.tolist()) == ([3], 3, [0, thinking])
    assert state.counts[1, [3, 5]].tolist() == [IN_PROMPT + 1, 1]


@pytest.mark.parametrize(
    ("near", "draft", "thinking", "after"),
    [(True, END, 1, 0), (False, END, 1, 1), (True, THINK, 1, 1), (True, END, 0, 0)],
)
def test_thinking_follows_the_token_that_stays(near, draft, thinking, after) -> None:
    assert taken(PLAIN, near, draft, thinking)[4].tolist() == [0, after]


@pytest.mark.parametrize(("token", "thinking", "after"), [(THINK, 0, 1), (END, 1, 0), (5, 1, 1)])
def test_thinking_follows_tokens_without_drafts(token: int, thinking: int, after: int) -> None:
    state = make_state([PLAIN], VOCAB)
    chosen, thoughts = torch.tensor([token]), torch.tensor([thinking], dtype=torch.int32)
    ids = torch.zeros(1, 12, dtype=torch.int32)
    settle(chosen, torch.tensor([0]), state, ids, thoughts, (THINK, END))
    assert thoughts.tolist() == [after] and chosen.tolist() == [token] and not ids.any()
