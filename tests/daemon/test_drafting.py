"""How many tokens are drafted: by load, and by what drafts are worth."""

import itertools
import random

import pytest

from dsd.daemon.drafting import DRAFT_COST, FIRST_PAUSE, LONGEST_PAUSE, WINDOW, DraftLength, Why

NUM_ROWS = 8


def drive(drafts: DraftLength, rates: list[float], num_steps: int, seed: int = 0) -> list[int]:
    """Steps of NUM_ROWS rows; draft j is right with probability rates[j] if those before are."""
    rng = random.Random(seed)
    lengths = []
    for _ in range(num_steps):
        length = drafts.choose(NUM_ROWS)
        counts = []
        for _ in range(NUM_ROWS):
            count = 1
            while count <= length and rng.random() < rates[count - 1]:
                count += 1
            counts.append(count)
        drafts.note(length, counts)
        lengths.append(length)
    return lengths


@pytest.mark.parametrize(
    ("num_rows", "length", "why"),
    [(1, 3, Why.CONFIGURED), (8, 3, Why.CONFIGURED), (9, 2, Why.LOAD), (33, 0, Why.LOAD)],
)
def test_choose_follows_the_table(num_rows: int, length: int, why: Why) -> None:
    drafts = DraftLength(3, ((8, 5), (32, 2)))
    assert drafts.choose(num_rows) == length
    assert (drafts.stats().length, drafts.stats().why) == (length, why)


def test_choose_without_mtp_or_rows_is_none() -> None:
    assert DraftLength(0, ((8, 5),)).choose(4) == 0
    assert DraftLength(0).why is Why.OFF
    assert DraftLength(5).choose(0) == 0


def test_choose_without_a_table_is_the_configured_number() -> None:
    assert DraftLength(5).choose(10**6) == 5


def test_note_counts_by_position() -> None:
    drafts = DraftLength(3)
    drafts.note(3, [1, 2, 4, 4])
    drafts.note(1, [2, 1])
    stats = drafts.stats()
    assert stats.num_verified == (6, 4, 4)
    assert stats.num_accepted == (4, 2, 2)
    assert stats.mean_accepted_length == 1 + 8 / 6


def test_note_good_drafts_keep_their_length() -> None:
    assert set(drive(DraftLength(3), [0.9, 0.8, 0.7], 4000)) == {3}


def test_note_useless_drafts_stop_within_a_window_and_a_step() -> None:
    drafts = DraftLength(3)
    lengths = drive(drafts, [0.02] * 3, WINDOW // NUM_ROWS + 1)
    assert lengths == [3] * (WINDOW // NUM_ROWS) + [0]
    assert drafts.why is Why.ACCEPTANCE


def test_note_only_the_first_draft_is_good_leaves_one() -> None:
    assert drive(DraftLength(3), [0.9, 0.02, 0.0], 100)[-1] == 1


def test_note_break_even_is_left_alone() -> None:
    """Where a draft is accepted about as often as it costs, neither choice is 5 % better."""
    assert set(drive(DraftLength(1), [DRAFT_COST + 0.02], 500)) == {1}
    assert set(drive(DraftLength(1), [DRAFT_COST - 0.02], 100)) == {1}


def test_note_after_a_pause_tries_again_and_waits_longer_each_time() -> None:
    drafts = DraftLength(3)
    lengths = drive(drafts, [0.0] * 3, 3 * LONGEST_PAUSE)
    runs = [0]
    for before, after in itertools.pairwise(lengths):
        if before == 0:
            runs[-1] += 1
            if after:
                runs.append(0)
    assert runs[:4] == [FIRST_PAUSE, 2 * FIRST_PAUSE, 4 * FIRST_PAUSE, 8 * FIRST_PAUSE]
    assert max(runs) <= LONGEST_PAUSE
    assert sum(lengths) < 0.03 * 3 * len(lengths)


def test_note_drafts_that_become_good_come_back() -> None:
    drafts = DraftLength(3)
    drive(drafts, [0.0] * 3, 200)
    assert drafts.choose(NUM_ROWS) == 0
    assert drive(drafts, [0.9] * 3, 2 * FIRST_PAUSE)[-1] == 3


def test_note_load_and_acceptance_the_smaller_one_is_the_reason() -> None:
    drafts = DraftLength(3, ((8, 3), (16, 2)))
    drive(drafts, [0.9, 0.02, 0.0], 100)
    assert (drafts.choose(8), drafts.why) == (1, Why.ACCEPTANCE)
    assert (drafts.choose(16), drafts.why) == (1, Why.ACCEPTANCE)
    assert (drafts.choose(17), drafts.why) == (0, Why.LOAD)


def test_same_counts_same_lengths() -> None:
    rates = [0.3, 0.2, 0.1]
    assert drive(DraftLength(3), rates, 2000) == drive(DraftLength(3), rates, 2000)
