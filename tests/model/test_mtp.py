"""Drafts change how many tokens a step gives, and nothing else."""

import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from dsd.ipc.messages import Sampling
from dsd.model.runner import Runner
from dsd.tests.model.mtp_kit import (
    SAMPLINGS,
    add_mtp_layer,
    draft_kv,
    force_drafts,
    poison_unknown,
)
from dsd.tools.hand_driver import HandDriver

MAX_TOKENS = 24
CHUNKS = (512, 7, 16, 3, 512, 5)


@pytest.fixture(scope="session")
def mtp_dir(make_checkpoint, make_case, tmp_path_factory) -> Callable[..., Path]:
    """`mtp_dir("name", field=value)`: a checkpoint of that case with an MTP layer."""
    made: dict[str, Path] = {}

    def make(name: str, **changes: object) -> Path:
        if name not in made:
            source = make_checkpoint(make_case(name, **changes)).directory
            made[name] = add_mtp_layer(source, tmp_path_factory.mktemp(f"{name}_mtp"))
        return made[name]

    return make


@pytest.fixture
def open_driver(mtp_dir, open_runner) -> Callable[..., HandDriver]:
    def open_(num_nextn: int, name: str = "mtp", **changes: object) -> HandDriver:
        directory = mtp_dir(name, **changes)
        return HandDriver(open_runner(directory, num_nextn=num_nextn, max_batch_size=8))

    return open_


def add_rows(driver: HandDriver, prompt_of, samplings=SAMPLINGS) -> HandDriver:
    """Prompts of several lengths, the longer ones in chunks, so that decodes run beside them."""
    for i, sampling in enumerate(samplings):
        driver.add(prompt_of(5 + 13 * i, i), MAX_TOKENS - i, sampling, CHUNKS[i])
    return driver


@pytest.fixture
def expected(open_driver, prompt_of) -> HandDriver:
    """What comes out without drafts."""
    driver = add_rows(open_driver(0), prompt_of)
    driver.run()
    return driver


def outputs(driver: HandDriver) -> list[list[int]]:
    return [row.token_ids for row in driver.rows]


def check_logprobs(driver: HandDriver, expected: HandDriver) -> None:
    for row, want in zip(driver.rows, expected.rows, strict=True):
        assert [entry.token_id for entry in row.logprobs] == [e.token_id for e in want.logprobs]
        assert len(want.logprobs) in (0, len(want.token_ids))
        for entry, other in zip(row.logprobs, want.logprobs, strict=True):
            assert entry.logprob == pytest.approx(other.logprob, abs=1e-4)
            assert [token for token, _ in entry.top] == [token for token, _ in other.top]


@pytest.mark.slow
def test_sampling_options_of_these_tests_matter(expected, open_driver, prompt_of) -> None:
    plain = add_rows(open_driver(0), prompt_of, [Sampling(temperature=0.0)] * len(SAMPLINGS))
    plain.run()
    same = [a == b for a, b in zip(outputs(plain), outputs(expected), strict=True)]
    assert same == [True] + [False] * (len(SAMPLINGS) - 1)


@pytest.mark.parametrize(
    "num_nextn", [2, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 3, 4, 5))]
)
def test_rows_of_every_acceptance_get_the_tokens_that_they_get_without_drafts(
    expected, open_driver, prompt_of, num_nextn: int
) -> None:
    driver, rng = add_rows(open_driver(num_nextn), prompt_of), random.Random(num_nextn)
    want = outputs(expected)

    def before_step() -> None:
        force_drafts(driver, want, lambda row, step: rng.randint(0, num_nextn))

    driver.run(num_nextn, before_step=before_step)
    assert outputs(driver) == want
    check_logprobs(driver, expected)
    seen = {count for row in driver.rows for count in row.accepted}
    assert seen == set(range(1, num_nextn + 2)), seen


@pytest.mark.slow
@pytest.mark.parametrize("num_nextn", [1, 2, 3, 4, 5])
@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("mtp_moonlight", {"q_lora_rank": None, "n_group": 1, "topk_group": 1}),
        ("mtp_tied", {"tie_word_embeddings": True, "num_hidden_layers": 2}),
        ("mtp_all_dense", {"first_k_dense_replace": 3}),
    ],
)
def test_drafts_of_the_layer_itself_change_no_token(
    open_driver, prompt_of, name: str, changes: dict[str, object], num_nextn: int
) -> None:
    plain, driver = (add_rows(open_driver(n, name, **changes), prompt_of) for n in (0, num_nextn))
    assert driver.run(num_nextn) == plain.run()


@pytest.mark.parametrize(
    ("num_right", "tokens"), [(3, 4), (0, 1), pytest.param(1, 2, marks=pytest.mark.slow)]
)
def test_drafts_that_are_right_are_accepted_and_the_first_wrong_one_ends_it(
    expected, open_driver, prompt_of, num_right: int, tokens: int
) -> None:
    driver, want = add_rows(open_driver(3), prompt_of), outputs(expected)
    driver.run(3, before_step=lambda: force_drafts(driver, want, lambda row, step: num_right))
    assert outputs(driver) == want
    for row in driver.rows:
        assert set(row.accepted[:-1]) == {tokens}
        assert len(row.accepted) == -(-(row.max_tokens - 1) // tokens)


@pytest.mark.slow
def test_lines_of_padding_change_nothing(expected, open_driver, prompt_of, monkeypatch) -> None:
    driver, want = add_rows(open_driver(2), prompt_of), outputs(expected)

    def padded(num_lines: int, padded_size: int, *drafts: int):
        return driver.runner.decode(num_lines + 2, *drafts).first(num_lines, drafts[0] + 1)

    monkeypatch.setattr(driver.runner.graphs, "run", padded)
    driver.run(
        2, before_step=lambda: force_drafts(driver, want, lambda row, step: (row + step) % 3)
    )
    assert outputs(driver) == want
    check_logprobs(driver, expected)


def test_kv_of_rejected_tokens_is_never_read(expected, open_driver, prompt_of) -> None:
    driver, want = add_rows(open_driver(3), prompt_of), outputs(expected)

    def before_step() -> None:
        force_drafts(driver, want, lambda row, step: (row + step) % 4)
        poison_unknown(driver)

    driver.run(3, before_step=before_step)
    assert outputs(driver) == want


def test_drafting_that_comes_and_goes_leaves_no_hole_in_the_layers_kv(
    expected, open_driver, prompt_of
) -> None:
    want = outputs(expected)
    steady, changing = (add_rows(open_driver(3), prompt_of) for _ in range(2))
    steady.run(3, before_step=lambda: force_drafts(steady, want, lambda row, step: 3))
    rng = random.Random(1)
    while not all(row.ended for row in changing.rows):
        force_drafts(changing, want, lambda row, step: rng.randint(0, 3))
        poison_unknown(changing)
        changing.step(rng.choice([0, 0, 1, 3]), rng.choice([0, 0, 2, 3]))
    assert outputs(changing) == want
    whole = open_driver(3)
    for row in changing.rows:  # the same tokens as prompts, in one chunk
        whole.add([*row.prompt, *row.token_ids], 1, SAMPLINGS[0])
    whole.run()
    for i, row in enumerate(changing.rows):
        count = len(row.prompt) + len(row.token_ids) - 1
        kv = draft_kv(changing, i)
        assert len(kv) >= count, "the last step may have accepted tokens behind the end"
        for other in (steady, whole):
            torch.testing.assert_close(kv[:count], draft_kv(other, i)[:count], atol=1e-4, rtol=1e-4)


@pytest.mark.slow
def test_drafts_behind_the_blocks_of_a_row_reach_no_other_row(
    expected, open_driver, prompt_of
) -> None:
    """Rows get the blocks that their tokens need, and none for drafts, after longer rows have used
    their block tables."""
    before, want = open_driver(5), outputs(expected)
    for i in range(len(want)):
        before.add(prompt_of(90, i), 1, SAMPLINGS[0])
    before.run(5)
    driver = add_rows(HandDriver(before.runner, spare=0), prompt_of)
    driver.run(5, before_step=lambda: force_drafts(driver, want, lambda row, step: 1))
    assert outputs(driver) == want


@pytest.mark.slow
def test_second_token_is_drawn_from_the_models_distribution(open_driver) -> None:
    """Chi-square over seeds, on a vocabulary so small that drafts are right now and then."""
    vocab, prompt, num_seeds = 12, [3, 1, 4, 1, 5], 800
    changes = {"vocab_size": vocab}
    probs = exact_second(open_driver(0, "mtp_12", **changes).runner, prompt, vocab)
    counts, accepted = torch.zeros(vocab), []
    runner = open_driver(2, "mtp_12", **changes).runner
    for start in range(0, num_seeds, 8):
        driver = HandDriver(runner)
        for seed in range(start, start + 8):
            driver.add(prompt, 4, Sampling(temperature=1.0, seed=seed))
        for tokens in driver.run(2):
            counts[tokens[1]] += 1
        accepted += [row.accepted[0] for row in driver.rows]
    chi_square = ((counts - num_seeds * probs) ** 2 / (num_seeds * probs)).sum()
    assert chi_square < 31.3  # 11 degrees of freedom, p = 0.001
    assert 0.1 < sum(count > 1 for count in accepted) / num_seeds < 0.95


def exact_second(runner: Runner, prompt: list[int], vocab: int) -> torch.Tensor:
    """[V]: probabilities of the second token, over all first ones."""
    driver = HandDriver(runner)
    first = driver.add(prompt, 1, Sampling(temperature=0.0, num_logprobs=vocab))
    driver.run()
    total = torch.zeros(vocab)
    for token_id, logprob in first.logprobs[0].top:
        driver = HandDriver(runner)
        row = driver.add([*prompt, token_id], 1, Sampling(temperature=0.0, num_logprobs=vocab))
        driver.run()
        for second, other in row.logprobs[0].top:
            total[second] += torch.tensor(logprob + other).exp()
    return total
