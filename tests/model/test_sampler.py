"""`sampler.choose` on rows made by hand; the kernels have their own tests."""

import numpy as np
import pytest
import torch
from torch import Tensor

from dsd.ipc.messages import Join, Sampling, pack_int32
from dsd.model import sampler
from dsd.model.rows import Delta, Rows

VOCAB = 50
PROMPT = [3, 4, 5]


@pytest.fixture
def rows() -> Rows:
    return Rows(6, max_seq_len=64, block_size=8, vocab_size=VOCAB, device=torch.device("cpu"))


@pytest.fixture
def logits() -> Tensor:
    torch.manual_seed(0)
    return torch.randn(6, VOCAB) * 2


def join(rows: Rows, row: int, sampling: Sampling, generated: list[int]) -> None:
    token_ids, delta = pack_int32([*PROMPT, *generated]), Delta()
    rows.join(delta, Join(row, token_ids, len(PROMPT), 0, (1, 2), sampling))
    delta.send(rows.words)
    rows.count(row)


def choose(logits: Tensor, lines: list[int], rows: Rows) -> list[int]:
    return sampler.choose(logits, torch.tensor(lines, dtype=torch.int32), rows).tolist()


def test_choose_min_tokens_counts_generated_tokens_only(rows: Rows, logits: Tensor) -> None:
    best, second = logits[0].topk(2).indices.tolist()
    sampling = Sampling(temperature=0.0, min_tokens=2, masked_token_ids=(best,))
    for generated, want in (([], second), ([8], second), ([8, 9], best), ([8, 9, 8], best)):
        join(rows, 0, sampling, generated)
        assert choose(logits[:1], [0], rows) == [want]


def test_choose_min_tokens_without_masked_ids_changes_nothing(rows: Rows, logits: Tensor) -> None:
    join(rows, 0, Sampling(temperature=0.0, min_tokens=5), [])
    assert choose(logits[:1], [0], rows) == [logits[0].argmax().item()]


def test_choose_presence_and_frequency_leave_prompt_tokens_alone(rows: Rows) -> None:
    logits = torch.zeros(1, VOCAB)
    logits[0, 3], logits[0, 9], logits[0, 20] = 2.0, 3.0, 1.0
    for sampling in (
        Sampling(temperature=0.0, presence_penalty=2.0),
        Sampling(temperature=0.0, frequency_penalty=2.0),
    ):
        join(rows, 0, sampling, [9])
        assert choose(logits, [0], rows) == [3], "9 was generated, 3 was asked"


def test_choose_repetition_counts_prompt_tokens_too(rows: Rows) -> None:
    logits = torch.zeros(1, VOCAB)
    logits[0, 3], logits[0, 9], logits[0, 20] = 2.0, 3.0, 1.9
    join(rows, 0, Sampling(temperature=0.0, repetition_penalty=2.0), [9])
    assert choose(logits, [0], rows) == [20]


def test_choose_bias_comes_after_penalties(rows: Rows) -> None:
    logits = torch.zeros(1, VOCAB)
    logits[0, 20] = 1.4
    sampling = Sampling(
        temperature=0.0, repetition_penalty=4.0, logit_bias=((9, 1.5), (9, 0.1), (20, 0.0))
    )
    join(rows, 0, sampling, [9])
    assert choose(logits, [0], rows) == [9]


def test_choose_leaves_the_logits_alone(rows: Rows, logits: Tensor) -> None:
    """Log-probabilities are those of the unmodified logits."""
    sampling = Sampling(
        temperature=0.7, top_p=0.5, presence_penalty=1.0, logit_bias=((1, 9.0),), min_tokens=3,
        masked_token_ids=(2,),
    )  # fmt: skip
    before = logits.clone()
    for row in range(6):
        join(rows, row, sampling if row % 2 else Sampling(temperature=1.0), [9])
    choose(logits, list(range(6)), rows)
    assert torch.equal(logits, before)


def test_choose_rows_in_any_order_choose_the_same(rows: Rows, logits: Tensor) -> None:
    def join_all() -> None:
        for row, sampling in enumerate(
            (
                Sampling(temperature=0.0),
                Sampling(temperature=1.5, seed=1),
                Sampling(temperature=0.8, seed=2, top_k=5),
                Sampling(temperature=0.0, presence_penalty=2.0),
                Sampling(temperature=2.0, seed=3, min_p=0.1, frequency_penalty=1.0),
                Sampling(temperature=3.0, seed=4),
            )
        ):
            join(rows, row, sampling, [9, 10][: row % 3])

    join_all()
    alone = [choose(logits[row : row + 1], [row], rows)[0] for row in range(6)]
    for order in ([0, 1, 2, 3, 4, 5], [5, 3, 1, 0, 2, 4], [4, 2], [1]):
        join_all()
        assert choose(logits[order], order, rows) == [alone[r] for r in order]


def test_choose_appends_to_the_row_where_the_next_step_reads_it(rows: Rows, logits: Tensor) -> None:
    join(rows, 2, Sampling(temperature=0.0, presence_penalty=90.0), [9])
    chosen = [choose(logits[2:3], [2], rows)[0] for _ in range(3)]
    tokens = rows.tokens.token_ids[2, : rows.tokens.num_tokens[2]].tolist()
    assert tokens == [*PROMPT, 9, *chosen]
    assert len(set(chosen)) == 3, "what was chosen is penalised from then on"


def test_choose_for_the_null_row_changes_nothing(rows: Rows, logits: Tensor) -> None:
    join(rows, 2, Sampling(temperature=1.0), [9])
    before = rows.words.clone()
    for _ in range(100):
        choose(logits[:3], [rows.null] * 3, rows)
    own = (rows.tokens.token_ids[rows.null], rows.tokens.num_tokens[rows.null :])
    for field in own:
        start = field.storage_offset()
        before[start : start + len(field)] = field
    assert torch.equal(rows.words, before), "but for its own tokens and their number"
    assert own[1] <= len(own[0])


def test_delta_overwrites_what_it_names_and_nothing_else() -> None:
    words, delta = torch.arange(40, dtype=torch.int32), Delta()
    delta.put(3, np.array([-1, -2], np.int32))
    delta.put(20, np.zeros(0, np.int32))
    first = delta.carry(np.array([7, 8, 9], np.int32))
    delta.put(39, np.array([-3], np.int32))
    carried = delta.send(words)
    assert carried[first].tolist() == [7, 8, 9]
    want = torch.arange(40, dtype=torch.int32)
    want[[3, 4, 39]] = torch.tensor([-1, -2, -3], dtype=torch.int32)
    assert torch.equal(words, want)


def test_entries_of_the_chosen_token_alone_have_no_others(logits: Tensor) -> None:
    (entry,) = sampler.Logprobs.of(logits[:1], torch.tensor([7]), 0).entries()
    assert entry.token_id == 7 and entry.top == ()
    assert entry.logprob == pytest.approx(logits[0].log_softmax(0)[7].item(), abs=1e-5)


def test_rows_no_longer_than_a_block_have_a_block_table() -> None:
    rows = Rows(2, max_seq_len=8, block_size=8, vocab_size=VOCAB, device=torch.device("cpu"))
    assert rows.tokens.block_table.shape == (3, 1)
