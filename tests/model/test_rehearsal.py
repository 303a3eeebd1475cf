"""What runs before the first request leaves nothing behind."""

import pytest
import torch

from dsd.ipc.messages import Join, Sampling, pack_int32
from dsd.model.graphs import default_sizes
from dsd.model.rehearsal import Rehearsal
from dsd.model.rows import Delta


@pytest.mark.parametrize("max_num_tokens", [16, 100, 512])
def test_rehearsal_changes_no_row_and_no_block_but_the_null_ones(
    make_checkpoint, make_case, open_runner, max_num_tokens: int
) -> None:
    runner = open_runner(make_checkpoint(make_case("v3_plain")).directory, num_blocks=6)
    rows, delta = runner.rows, Delta()
    rows.join(delta, Join(0, pack_int32([5, 6, 7]), 3, 0, (1,), Sampling(temperature=0.0)))
    delta.send(rows.words)
    before, passes = rows.words.clone(), []
    rehearsal = Rehearsal(runner, max_num_tokens, 64)
    rehearsal.all_sizes(lambda done, total: passes.append((done, total)))
    rehearsal.largest_passes()
    rehearsal.largest_decode()
    rows.reset_null()
    null = rows.tokens.token_ids[rows.null]
    start = null.storage_offset()
    before[start : start + len(null)] = null
    assert torch.equal(rows.words, before)
    assert [done for done, _ in passes] == list(range(passes[0][1]))
    for layer in runner.cache.layers:
        assert torch.isnan(layer[1:]).all(), "the fixture's NaN: nothing was written"


@pytest.mark.parametrize("most", [1, 2, 7, 16, 100, 256, 1000])
def test_default_graph_sizes_pad_by_a_tenth_at_most(most: int) -> None:
    sizes = default_sizes(most)
    assert sizes == sorted(set(sizes)) and sizes[-1] == most
    for lines in range(1, most + 1):
        padded = next(size for size in sizes if size >= lines)
        assert padded - lines <= padded / 10, (lines, padded)
